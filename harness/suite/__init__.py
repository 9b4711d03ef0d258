"""Suites: what one TOML file may say (`schema`), how it is read (`reader`) and loaded (`load`)."""
