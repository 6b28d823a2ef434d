"""The layout of diffusers' ``ZImageTransformer2DModel``, whose names are the canonical ones."""

from __future__ import annotations

from alkahest.model.layouts.layout import Layout

LAYOUT = Layout("diffusers", canonical=lambda stored: (stored,), stored=lambda key: key)
