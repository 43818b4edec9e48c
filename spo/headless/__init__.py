"""Training and sampling without a WebUI, over diffusers."""
