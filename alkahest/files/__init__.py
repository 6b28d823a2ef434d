"""Bytes on disk: reading them, hashing them, and writing them whole or not at all."""
