"""The application layer of beta-dpo: the command, its sub-commands and the method itself."""
