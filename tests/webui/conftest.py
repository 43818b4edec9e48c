"""For tests in a real WebUI: found before any test imports the seam, which chooses its side once."""

from __future__ import annotations

from tests.webui import started

started.find()
