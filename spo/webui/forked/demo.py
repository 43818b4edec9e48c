"""The demo checkpoint, which Forges do not take.

They build a network by tables in their code, of what they know, not by a yaml beside the file: text encoder and VAE are
of the real sizes there, and the UNet's widths must be in the table. Three tables of each fork would have to be changed
while the demo is loaded, and whatever loads then would be built by them.
"""

from __future__ import annotations

from spo.errors import SpoError


def refuse_demo() -> None:
    """Always: raises SpoError, which says what to do instead."""
    raise SpoError(
        "The demo checkpoint is a network of its own size, and this WebUI takes SD1.5's and SDXL's alone, so the demo "
        "runs in AUTOMATIC1111's WebUI only. Load a checkpoint of yours, choose a preference model or vote, give "
        "prompts (Take the bundled list), and press Start."
    )
