"""Numbers about weights: tables, multipliers, spectra, lineages."""
