"""What a checkpoint file or folder is, and its tensors."""
