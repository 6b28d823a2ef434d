"""LoRA: read every flavour as a delta, extract one from any delta, write it so that it loads everywhere."""
