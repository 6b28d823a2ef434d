"""What needs a model that draws: pipelines, samplers, sweeps, and measures of pictures."""
