"""The extension's entry: the WebUI runs this at its start and again at Reload UI."""

from spo.webui.register import register

register()
