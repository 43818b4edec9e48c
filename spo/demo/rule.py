"""The demo's rule of taste, "vivid over dull": of two pictures, the more colourful one is preferred."""

import torch


def colourfulness(pixels: torch.Tensor) -> torch.Tensor:
    """Colourfulness of pictures on the 0 to 255 scale: 0 is grey, about 45 is quite, 80 and more very colourful.

    With rg = R - G and yb = (R + G) / 2 - B over all pixels of a picture:

        M = sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)

    Source: D. Hasler and S. Suesstrunk, Measuring colourfulness in natural images, Proc. SPIE 5007 (2003), the
    metric M^(3). Variances are the population's.

    pixels: [N, 3, H, W] in [-1, 1], RGB. Returns float32 [N].
    """
    red, green, blue = ((pixels.float() + 1) * 127.5).flatten(2).unbind(1)
    rg = red - green
    yb = 0.5 * (red + green) - blue
    spread = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    return spread + 0.3 * (rg.mean(1).square() + yb.mean(1).square()).sqrt()
