"""Experiments: a claim as TOML, measured into tables, with a verdict that its checks decide."""
