"""Suites: one TOML file says what is built, measured and held to account, with names and numbers only.

`suites/demo.toml` is one of them. A key is documented, typed, defaulted and checked as a field in `schema`, `rules` or
`texts`, and nowhere else; `load` checks what one table says of another.

A suite file never inherits from another one, and no number hides in code: `Suite.resolved` writes every default out,
and every run's header holds the resolved suite with its digest.

Meaning never depends on what lies on the disk: a location is a folder if it is *written* as one (it begins with `.`,
`/` or `~`), and a relative path starts at the suite's own folder.
"""
