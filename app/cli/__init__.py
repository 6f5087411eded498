"""The command line: parsing, refusals, resume, and the record of a run."""
