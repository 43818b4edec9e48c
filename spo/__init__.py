"""Step-by-step preference optimization (SPO, CVPR 2025) for Stable Diffusion checkpoints.

Importing this package imports nothing heavy: every module loads torch and its other libraries where it needs them.
"""

__version__ = "0.1.0"
