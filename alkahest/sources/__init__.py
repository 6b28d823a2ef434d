"""What can be read: checkpoints, LoRAs, and made-up weights."""
