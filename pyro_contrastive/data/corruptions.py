"""A ladder of corruptions of known severity, to see whether a posterior widens when an image gets worse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_contrastive.ops.random import derived_seed

__all__ = ["CORRUPTIONS", "NUM_SEVERITIES", "degrade"]

NUM_SEVERITIES = 5
CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "noise": (0.05, 0.1, 0.2, 0.3, 0.4),
    "blur": (0.02, 0.03, 0.045, 0.07, 0.1),
    "occlusion": (0.06, 0.14, 0.25, 0.39, 0.56),
    "contrast": (0.7, 0.5, 0.35, 0.2, 0.1),
}
"""What the severities 1 to 5 are, by kind; see :func:`degrade`."""


def degrade(images: Tensor, kind: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupt images by a stated amount, as benchmarks of robustness do (Hendrycks & Dietterich, arXiv 1903.12261).

    The strengths are ours and relative to the size of the image, so that they suit images of 8 and of 32 pixels
    (:data:`CORRUPTIONS`):

    =============  =============================================================================
    ``noise``      Gaussian, of this standard deviation, the same severity for all pixels.
    ``blur``       Gaussian, of this width as a share of the image's shorter side.
    ``occlusion``  one black square per image, of this share of the area, anywhere.
    ``contrast``   pulled towards the image's own mean; this share of the contrast is left.
    =============  =============================================================================

    Args:
        images: ``(N, C, H, W)``, uint8 or floats in ``[0, 1]``. Pass the whole set at once: draws go by position.
        kind: A key of :data:`CORRUPTIONS`.
        severity: 1..5, or 0 for the images as they are.
        seed: Seed of noise and places, ``>= 0``.

    Returns:
        Floats in ``[0, 1]`` of the same shape, on the device of the images.

    Raises:
        ValueError: If the images are not ``(N, C, H, W)``, or an argument is none of the above.

    Example:
        >>> degrade(torch.ones(2, 1, 10, 10), "occlusion", 3).mean(dim=(1, 2, 3))  # 5 x 5 black pixels
        tensor([0.7500, 0.7500])
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"`kind` must be one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if severity not in range(NUM_SEVERITIES + 1):
        raise ValueError(f"`severity` must be an integer in 0..{NUM_SEVERITIES}, got {severity!r}")
    if images.ndim != 4:
        raise ValueError(f"`images` must be (N, C, H, W), got {tuple(images.shape)}; add axes with `unsqueeze`")
    images = images.float() / 255.0 if images.dtype == torch.uint8 else images
    if severity == 0:
        return images
    strength, (height, width) = CORRUPTIONS[kind][severity - 1], images.shape[-2:]
    generator = torch.Generator().manual_seed(derived_seed(seed, list(CORRUPTIONS).index(kind), severity))
    if kind == "noise":
        noise = torch.randn(images.shape, generator=generator).to(images)
        return (images + strength * noise).clamp(0.0, 1.0)
    if kind == "blur":
        from torchvision.transforms.v2.functional import gaussian_blur

        short = min(height, width)
        reach = min(math.ceil(3 * strength * short), (short - 1) // 2)
        return gaussian_blur(images, [2 * reach + 1] * 2, [strength * short] * 2)
    if kind == "occlusion":
        side = round(math.sqrt(strength * height * width))
        sides = min(side, height), min(side, width)
        draw = torch.rand((2, len(images), 1), generator=generator)
        hidden = []
        for place, whole, part in zip(draw, (height, width), sides, strict=True):
            start = (place * (whole - part + 1)).floor()
            pixel = torch.arange(whole)
            hidden.append(((pixel >= start) & (pixel < start + part)).to(images.device))
        square = hidden[0][:, None, :, None] & hidden[1][:, None, None, :]
        return images.masked_fill(square, 0.0)
    return torch.lerp(images.mean(dim=(-3, -2, -1), keepdim=True), images, strength)
