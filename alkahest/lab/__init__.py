"""Plots and widgets for notebooks: ``from alkahest.lab import plots, panels``."""
