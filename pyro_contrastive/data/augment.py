"""Augmentations of small images, a whole batch at once on its device, every image with its own draw.

torchvision's transforms give one draw to all images of a batch; these take the generator of a
:class:`~pyro_contrastive.data.ViewLoader` and one draw per image. Bytes come in, floats in ``[0, 1]`` go out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_contrastive.data.digits import shift_and_dropout

__all__ = ["JITTER_DRAWS", "crop_and_rotate", "crop_flip_jitter", "crop_ladder", "shift_and_flip"]

JITTER_DRAWS = {
    "size": 0, "aspect": 1, "flip": 2, "x": 3, "y": 4, "brightness": 5, "contrast": 6, "saturation": 7, "grey": 8,
    "jitter": 9, "hue": 10, "order": 11,
}  # fmt: skip
"""Row of every parameter of :func:`crop_flip_jitter` among its uniform numbers; the order of the changes takes four."""
_NUM_JITTER_DRAWS = 15

_LUMINANCE = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision weighs red, green and blue


def crop_flip_jitter(
    images: Tensor,
    generator: torch.Generator | None = None,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    jitter: float = 0.4,
    hue: float = 0.0,
    probability: float = 1.0,
    random_order: bool = False,
    grey: float = 0.2,
    draw: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Random resized crop, horizontal flip and colour jitter: the views of self-supervised learning.

    The crop covers a share ``scale`` of the image, its aspect ratio is log-uniform in ``ratio`` (a side longer than
    the image is cut), it lies anywhere inside and is resized bilinearly to the size of the image. Then brightness,
    contrast and saturation change by factors uniform in ``1 - jitter .. 1 + jitter``, and the hue turns.

    SimCLR's recipe for images of 32 pixels (Chen et al. 2020, arXiv 2002.05709, appendix B.9, no blur) is
    ``hue=0.1, probability=0.8, random_order=True``. The defaults leave the hue, jitter every image and keep the order.

    Args:
        images: ``(N, 3, H, W)``, uint8 or floats in ``[0, 1]``.
        generator: Source of randomness, on the device of ``images``. Default: PyTorch's global one.
        scale: Smallest and largest share of the area, in ``(0, 1]``.
        ratio: Smallest and largest width / height, ``> 0``.
        jitter: Largest relative change of the three factors, in ``[0, 1]``.
        hue: Largest turn of the hue either way, in ``[0, 0.5]`` of the circle of colours.
        probability: Of an image to be jittered at all, in ``[0, 1]``.
        random_order: Draw the order of the four changes for every image; else it is that above.
        grey: Probability to lose all colour at the end, in ``[0, 1]``.
        draw: The uniform numbers of every image, ``(15, N)`` in ``[0, 1)``, in the place of fresh ones: rows
            :data:`JITTER_DRAWS`. With them the parameters of a view are known, and views can share some or all of them.

    Returns:
        ``(view, fraction)``: floats in ``[0, 1]`` of the same shape, and the side of the crop relative to that of the
        image (geometric mean of both sides), ``(N,)``.

    Raises:
        ValueError: If the images are not ``(N, 3, H, W)``, a number is out of its range, or ``draw`` has another shape.

    Example:
        >>> view, fraction = crop_flip_jitter(torch.rand(5, 3, 32, 32), torch.Generator().manual_seed(0))
        >>> view.shape, bool((fraction > 0.4).all())
        (torch.Size([5, 3, 32, 32]), True)
    """
    for name, value, most in (("jitter", jitter, 1.0), ("hue", hue, 0.5), ("probability", probability, 1.0),
                              ("grey", grey, 1.0)):  # fmt: skip
        if not 0.0 <= value <= most:
            raise ValueError(f"`{name}` must be in [0, {most:g}], got {value!r}")
    images = _colour(images)
    shape = (_NUM_JITTER_DRAWS, len(images))
    if draw is None:
        draw = torch.rand(shape, generator=generator, device=images.device, dtype=images.dtype)
    elif draw.shape != shape:
        raise ValueError(f"`draw` must be {shape}, uniform numbers of every image, got {tuple(draw.shape)}")
    theta, fraction = _crop(draw[:5], scale, ratio)
    theta[:, :, 0] = torch.where(draw[2, :, None] < 0.5, -theta[:, :, 0], theta[:, :, 0])
    view = _resample(images, theta, "border")

    jittered = draw[9] < probability
    factors = torch.ones_like(draw[:4])  # of the four changes; the hue has none
    factors[:3] = torch.where(jittered, 1.0 + jitter * (2.0 * draw[5:8] - 1.0), 1.0)
    turn = torch.where(jittered, hue * (2.0 * draw[10] - 1.0), 0.0)
    order = torch.arange(3 + (hue > 0), device=images.device)[:, None].expand(-1, len(images))
    for change in draw[11:].argsort(dim=0) if random_order else order:  # of every image: 0 brightness, .., 3 hue
        factor, change = factors.gather(0, change[None]).reshape(-1, 1, 1, 1), change.reshape(-1, 1, 1, 1)
        luminance = _luminance(view)
        towards = torch.where(change == 1, luminance.mean(dim=(-2, -1), keepdim=True), luminance)
        changed = torch.lerp(torch.where(change == 0, 0.0, towards), view, factor).clamp(0.0, 1.0)
        view = torch.where(change == 3, _turn_hue(view, turn), changed) if hue else changed
    return torch.where((draw[8] < grey).reshape(-1, 1, 1, 1), _luminance(view), view), fraction


def crop_and_rotate(
    images: Tensor,
    generator: torch.Generator | None = None,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    degrees: float = 15.0,
    shift: float = 0.1,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Random resized crop, small rotation and shift: views of grey images on black, such as digits and clothes.

    As the crop of :func:`crop_flip_jitter`, turned about its centre; what lies outside the image is black.

    Args:
        images: ``(N, C, H, W)``, uint8 or floats in ``[0, 1]``.
        generator: Source of randomness, on the device of ``images``. Default: PyTorch's global one.
        scale: Smallest and largest share of the area, in ``(0, 1]``.
        ratio: Smallest and largest width / height, ``> 0``.
        degrees: Largest rotation either way, in ``[0, 180]``.
        shift: Largest shift of the crop beyond its place in the image, as a share of a side, in ``[0, 1]``.
        flip: Mirror every second image; not for digits.

    Returns:
        ``(view, fraction)``, as :func:`crop_flip_jitter`.

    Raises:
        ValueError: If the images are not ``(N, C, H, W)`` or a number is out of its range.

    Example:
        >>> view, fraction = crop_and_rotate(torch.rand(5, 1, 28, 28), torch.Generator().manual_seed(0))
        >>> view.shape, fraction.shape
        (torch.Size([5, 1, 28, 28]), torch.Size([5]))
    """
    for name, value, most in (("degrees", degrees, 180.0), ("shift", shift, 1.0)):
        if not 0.0 <= value <= most:
            raise ValueError(f"`{name}` must be in [0, {most:g}], got {value!r}")
    if images.ndim != 4:
        raise ValueError(f"`images` must be (N, C, H, W), got {tuple(images.shape)}; add axes with `unsqueeze`")
    images = _floats(images)
    height, width = images.shape[-2:]
    draw = torch.rand((8, len(images)), generator=generator, device=images.device, dtype=images.dtype)
    theta, fraction = _crop(draw[:5], scale, ratio)
    angle = math.radians(degrees) * (2.0 * draw[5] - 1.0)
    sides, (sine, cosine) = theta.diagonal(dim1=1, dim2=2).clone(), (angle.sin(), angle.cos())
    if flip:
        sides[:, 0] = torch.where(draw[2] < 0.5, -sides[:, 0], sides[:, 0])
    # the axes of the grid run from -1 to 1 along both sides, whatever their lengths
    theta[:, 0, :2] = torch.stack([cosine, -sine * height / width], -1) * sides
    theta[:, 1, :2] = torch.stack([sine * width / height, cosine], -1) * sides
    theta[:, :, 2] += 2.0 * shift * (2.0 * draw[6:].mT - 1.0)
    return _resample(images, theta, "zeros"), fraction


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


def _crop(draw: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Affine maps (N, 2, 3) from the view's coordinates in [-1, 1] to those of the image, and the sides' mean."""
    for name, (low, high), most in (("scale", scale, 1.0), ("ratio", ratio, math.inf)):
        if not 0.0 < low <= high <= most:
            raise ValueError(f"`{name}` must be (low, high) with 0 < low <= high <= {most}, got {(low, high)!r}")
    area = scale[0] + (scale[1] - scale[0]) * draw[0]
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draw[1])
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    theta = draw.new_zeros(draw.shape[1], 2, 3)
    for axis, (side, place) in enumerate(((width, draw[3]), (height, draw[4]))):
        theta[:, axis, axis] = side
        theta[:, axis, 2] = (1.0 - side) * (2.0 * place - 1.0)
    return theta, (width * height).sqrt()


def _resample(images: Tensor, theta: Tensor, outside: str) -> Tensor:
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode=outside, align_corners=False).clamp(0.0, 1.0)


def _luminance(images: Tensor) -> Tensor:
    return (images * images.new_tensor(_LUMINANCE).reshape(3, 1, 1)).sum(dim=-3, keepdim=True)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of every image by its share of the circle of colours; value and saturation (HSV) stay."""
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.where(value == red, (green - blue) / safe, (blue - red) / safe + 2.0)
    sixth = torch.where((value == blue) & (value != red) & (value != green), (red - green) / safe + 4.0, sixth)
    start = images.new_tensor([5.0, 3.0, 1.0]).reshape(3, 1, 1)  # of red, green and blue on the circle of six
    place = (start + (sixth + 6.0 * turn.reshape(-1, 1, 1)).unsqueeze(1)) % 6.0
    weight = torch.minimum(place, 4.0 - place).clamp(0.0, 1.0)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * weight


def _colour(images: Tensor) -> Tensor:
    """Check the shape; give floats."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` must be colour images (N, 3, H, W), got {tuple(images.shape)}")
    return _floats(images)


def _floats(images: Tensor) -> Tensor:
    return images.float() / 255.0 if images.dtype == torch.uint8 else images
