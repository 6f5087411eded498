"""The report of one or several runs: reading them, findings in words, charts, and the page around them."""
