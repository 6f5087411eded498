"""The report on one or several runs: it reads them, states findings, draws charts and writes the HTML page."""
