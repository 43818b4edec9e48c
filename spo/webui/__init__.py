"""The room for AUTOMATIC1111's WebUI: the only one that may import modules.*, gradio and fastapi."""
