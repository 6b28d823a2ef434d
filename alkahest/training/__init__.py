"""Fine-tune with the refiners frozen: stages, objective, optimisers, the loop, checkpoints that resume to the bit."""
