"""The embedded models' own lm-eval tasks; `items` makes their documents, lm-eval reads the YAML beside it."""
