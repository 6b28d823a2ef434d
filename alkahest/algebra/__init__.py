"""Expressions of weights and deltas, of which nothing is computed until one is streamed."""
