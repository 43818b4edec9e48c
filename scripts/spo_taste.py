"""The script "SPO taste" of txt2img and img2img: the WebUI takes the class of a script from its file."""

from spo.webui import taste

TasteScript = taste.script()
