"""The demo's rules of taste. Of two pictures the one with the higher value is preferred.

colourfulness  "vivid over dull", what the shipped preference model was fitted to
sharpness      "sharp over blurred", which strength of colour cannot cheat: the second taste of docs/evidence.md
"""

from spo.evaluation.measures import colourfulness, sharpness

RULES = {"colourfulness": colourfulness, "sharpness": sharpness}

__all__ = ["RULES", "colourfulness", "sharpness"]
