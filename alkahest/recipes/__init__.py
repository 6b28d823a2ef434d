"""An expression as text: read, written, found again and verified."""
