"""The version, apart from the package so that what writes files need not import it."""

__version__ = "0.1.0"
