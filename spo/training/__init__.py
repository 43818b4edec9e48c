"""The training loop and what it needs of the world around a checkpoint."""
