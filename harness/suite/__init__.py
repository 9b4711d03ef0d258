"""Suites: one TOML file says what is built, measured and held to account, with names and numbers only.

A key is documented, typed, defaulted and checked as a field in `schema`, `rules` or `texts`, and nowhere else; `load`
checks what one table says of another. Every run's header holds the suite with all defaults written out, and its digest.
A location is a folder if it is *written* as one (it begins with `.`, `/` or `~`), whatever lies on the disk.
"""
