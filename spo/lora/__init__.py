"""LoRA: adapters on a network, module names, files."""
