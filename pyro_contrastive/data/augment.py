"""Augmentations of small colour images, a whole batch at once on its device, every image with its own draw.

torchvision's transforms give one draw to all images of a batch; these take the generator of a
:class:`~pyro_contrastive.data.ViewLoader` and one draw per image. Bytes come in, floats in ``[0, 1]`` go out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_contrastive.data.digits import shift_and_dropout

__all__ = ["crop_flip_jitter", "crop_ladder", "shift_and_flip"]

_LUMINANCE = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision weighs red, green and blue


def crop_flip_jitter(
    images: Tensor,
    generator: torch.Generator | None = None,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    jitter: float = 0.4,
    grey: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Random resized crop, horizontal flip and colour jitter: the views of self-supervised learning.

    The crop covers a share ``scale`` of the image, its aspect ratio is log-uniform in ``ratio`` (a side longer than
    the image is cut), it lies anywhere inside and is resized bilinearly to the size of the image. Then brightness,
    contrast and saturation are changed in this order, each by a factor uniform in ``1 - jitter .. 1 + jitter``.
    Unlike SimCLR's recipe (Chen et al. 2020, arXiv 2002.05709) the order is fixed, every image is jittered, and the
    hue stays as it is.

    Args:
        images: ``(N, 3, H, W)``, uint8 or floats in ``[0, 1]``.
        generator: Source of randomness, on the device of ``images``. Default: PyTorch's global one.
        scale: Smallest and largest share of the area, in ``(0, 1]``.
        ratio: Smallest and largest width / height, ``> 0``.
        jitter: Largest relative change of the three factors, in ``[0, 1]``.
        grey: Probability to lose all colour, in ``[0, 1]``.

    Returns:
        ``(view, fraction)``: floats in ``[0, 1]`` of the same shape, and the side of the crop relative to that of the
        image (geometric mean of both sides), ``(N,)``.

    Raises:
        ValueError: If the images are not ``(N, 3, H, W)`` or a number is out of its range.

    Example:
        >>> view, fraction = crop_flip_jitter(torch.rand(5, 3, 32, 32), torch.Generator().manual_seed(0))
        >>> view.shape, bool((fraction > 0.4).all())
        (torch.Size([5, 3, 32, 32]), True)
    """
    for name, (low, high), most in (("scale", scale, 1.0), ("ratio", ratio, math.inf)):
        if not 0.0 < low <= high <= most:
            raise ValueError(f"`{name}` must be (low, high) with 0 < low <= high <= {most}, got {(low, high)!r}")
    for name, value in (("jitter", jitter), ("grey", grey)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` must be in [0, 1], got {value!r}")
    images = _colour(images)
    n = len(images)
    draw = torch.rand((9, n), generator=generator, device=images.device, dtype=images.dtype)
    area = scale[0] + (scale[1] - scale[0]) * draw[0]
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draw[1])
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    theta = images.new_zeros(n, 2, 3)  # maps the output's coordinates in [-1, 1] to those of the image
    theta[:, 0, 0] = torch.where(draw[2] < 0.5, -width, width)
    theta[:, 0, 2] = (1.0 - width) * (2.0 * draw[3] - 1.0)
    theta[:, 1, 1] = height
    theta[:, 1, 2] = (1.0 - height) * (2.0 * draw[4] - 1.0)
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    view = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)

    brightness, contrast, saturation = (1.0 + jitter * (2.0 * draw[5:8] - 1.0)).reshape(3, n, 1, 1, 1)
    view = (view * brightness).clamp(0.0, 1.0)
    mean = _luminance(view).mean(dim=(-2, -1), keepdim=True)
    view = torch.lerp(mean, view, contrast).clamp(0.0, 1.0)
    saturation = saturation.masked_fill((draw[8] < grey).reshape(n, 1, 1, 1), 0.0)
    return torch.lerp(_luminance(view), view, saturation).clamp(0.0, 1.0), (width * height).sqrt()


def shift_and_flip(images: Tensor, generator: torch.Generator | None = None, *, max_shift: int = 4) -> Tensor:
    """Move by whole pixels in both directions (zeros move in), and mirror every second image: mild, keeps the class.

    Args:
        images: ``(N, 3, H, W)``, uint8 or floats in ``[0, 1]``.
        generator: Source of randomness, on the device of ``images``. Default: PyTorch's global one.
        max_shift: Largest shift in pixels, ``>= 0``; the same law as a random crop of the image padded by as much.

    Returns:
        Floats in ``[0, 1]``, of the same shape.

    Raises:
        ValueError: If the images are not ``(N, 3, H, W)`` or ``max_shift`` is negative.

    Example:
        >>> shift_and_flip(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).dtype
        torch.float32
    """
    view, _ = shift_and_dropout(_colour(images), generator, max_shift=max_shift, max_level=0.0)
    flip = torch.rand(len(view), generator=generator, device=view.device) < 0.5
    return torch.where(flip.reshape(-1, 1, 1, 1), view.flip(-1), view)


def crop_ladder(images: Tensor, *, smallest: float = 0.25, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make images ambiguous by a known amount: centre crops of random size, resized to the size of the image.

    The ambiguity of Kirchhof et al. 2023 (arXiv 2302.02865): the side fraction c is uniform on ``[smallest, 1]``, one
    draw per image, and the central ``round(c H)`` pixels are resized bilinearly. For evaluation: fixed by ``seed``.

    Args:
        images: ``(N, 3, H, H)``, uint8 or floats in ``[0, 1]``. Pass the whole set and pick from the result, so that
            an image has the same crop in whichever subset it stands.
        smallest: Smallest side fraction, in ``(0, 1]``.
        seed: Seed of the fractions, ``>= 0``.

    Returns:
        ``(views, fraction)``: floats in ``[0, 1]`` of the same shape, and float32 ``(N,)``, on the device of the
        images.

    Raises:
        ValueError: If the images are not square colour images or ``smallest`` is out of its range.

    Example:
        >>> views, fraction = crop_ladder(torch.rand(4, 3, 32, 32))
        >>> views.shape, bool((fraction >= 0.25).all())
        (torch.Size([4, 3, 32, 32]), True)
    """
    if not 0.0 < smallest <= 1.0:
        raise ValueError(f"`smallest` must be in (0, 1], got {smallest!r}")
    images = _colour(images)
    side = images.shape[-1]
    if images.shape[-2] != side:
        raise ValueError(f"`images` must be square, got {tuple(images.shape)}")
    fraction = smallest + (1.0 - smallest) * torch.rand(len(images), generator=torch.Generator().manual_seed(seed))
    sizes = (side * fraction).round().clamp(min=1).int()
    views = torch.empty_like(images)
    for size in sizes.unique().tolist():
        chosen = (sizes == size).to(images.device)
        start = round((side - size) / 2)
        crop = images[chosen, :, start : start + size, start : start + size]
        views[chosen] = torch.nn.functional.interpolate(crop, side, mode="bilinear", align_corners=False)
    return views, fraction.to(images.device)


def _luminance(images: Tensor) -> Tensor:
    return (images * images.new_tensor(_LUMINANCE).reshape(3, 1, 1)).sum(dim=-3, keepdim=True)


def _colour(images: Tensor) -> Tensor:
    """Check the shape; give floats."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` must be colour images (N, 3, H, W), got {tuple(images.shape)}")
    return images.float() / 255.0 if images.dtype == torch.uint8 else images
