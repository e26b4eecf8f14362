"""Heads of the recognition networks, and encoders: a small one, and two for small images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ConcentrationHead", "DirectionHead", "feature_size", "mlp", "projector", "small_convnet", "small_resnet18"]

_LOG_RANGE = 12.0  # concentrations stay within exp(+-12) of their initial value


def mlp(sizes: Sequence[int], *, batch_norm: bool = False, flatten: bool = True) -> nn.Sequential:
    """Multilayer perceptron with LeakyReLU after every layer, the last one included: an encoder of features.

    Args:
        sizes: widths, from input to features, at least two.
        batch_norm: normalise before each nonlinearity.
        flatten: accept ``(N, ...)`` inputs (images).

    Returns:
        A module ``(N, sizes[0]) -> (N, sizes[-1])``.

    Raises:
        ValueError: for fewer than two sizes.

    Example:
        >>> mlp([64, 128, 32])(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 32])
    """
    if len(sizes) < 2:
        raise ValueError(f"`sizes` must hold at least the input and the output width, got {list(sizes)!r}")
    layers: list[nn.Module] = [nn.Flatten()] if flatten else []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers.append(nn.Linear(fan_in, fan_out))
        if batch_norm:
            layers.append(nn.BatchNorm1d(fan_out))
        layers.append(nn.LeakyReLU())
    return nn.Sequential(*layers)


def projector(features: int, hidden: int | None = None) -> nn.Sequential:
    """Hidden layer of a projection head (Chen et al. 2020, arXiv 2002.05709); the heads of a guide are its last layer.

    Evaluate the encoder's features, and put this between them and the guide:
    ``guides.Delta(nn.Sequential(encoder, projector(512)), dim)``.

    Args:
        features: width of the encoder's output.
        hidden: width of the hidden layer; ``features`` if omitted.

    Returns:
        A module ``(N, features) -> (N, hidden)``: linear, batch norm, rectifier.

    Example:
        >>> projector(32, 64)(torch.zeros(5, 32)).shape
        torch.Size([5, 64])
    """
    hidden = features if hidden is None else hidden
    return nn.Sequential(nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU())


def _check_channels(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"`{name}` must be an integer >= 1, a number of channels, got {number!r}")


def small_convnet(
    channels: int, *, widths: Sequence[int] = (32, 64, 128), strides: Sequence[int] = (1, 2, 2)
) -> nn.Sequential:
    """A few convolutions of 3 x 3 with batch norm and rectifier, then the mean over the image: for digits.

    Args:
        channels: of the images.
        widths: channels after each convolution, at least one.
        strides: of each convolution.

    Returns:
        A module ``(N, channels, H, W) -> (N, widths[-1])``.

    Raises:
        ValueError: for no widths, another number of strides, or a number of channels < 1.

    Example:
        >>> small_convnet(1)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 128])
    """
    if not widths or len(widths) != len(strides):
        raise ValueError(f"`widths` and `strides` must be as many, one or more, got {widths!r} and {strides!r}")
    _check_channels(channels=channels, widths=min(widths))
    layers: list[nn.Module] = []
    for fan_in, fan_out, stride in zip((channels, *widths), widths, strides, strict=False):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def small_resnet18(channels: int = 3, *, width: int = 64, pool: bool = False) -> nn.Sequential:
    """ResNet-18 for images of 32 pixels: a stem of 3 x 3 with stride 1 and no max-pool (SimCLR, appendix B.9).

    The blocks are torchvision's (He et al. 2016, arXiv 1512.03385).

    Args:
        channels: of the images.
        width: channels of the first stage; 64 is ResNet-18.
        pool: put the max-pool back, for a quarter of the arithmetic.

    Returns:
        A module ``(N, channels, H, W) -> (N, 8 width)``.

    Raises:
        ValueError: for a number of channels < 1.

    Example:
        >>> small_resnet18(width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 32])
    """
    from torchvision.models.resnet import BasicBlock

    _check_channels(channels=channels, width=width)

    def stage(fan_in: int, fan_out: int, stride: int) -> list[nn.Module]:
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))
        return [BasicBlock(fan_in, fan_out, stride, shortcut), BasicBlock(fan_out, fan_out)]

    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1) if pool else nn.Identity(),
        *stage(width, width, 1),
        *stage(width, 2 * width, 2),
        *stage(2 * width, 4 * width, 2),
        *stage(4 * width, 8 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def feature_size(encoder: nn.Module) -> int:
    """Width of the features that an encoder returns, read off its last layer with parameters.

    Args:
        encoder: a module ``x -> (N, features)``.

    Returns:
        ``out_features``, ``num_features``, ``out_channels`` or ``embedding_dim`` of the last linear, normalisation,
        convolution or embedding layer.

    Raises:
        ValueError: if there is no such layer; pass ``features=`` to the guide then.
    """
    for module in reversed(list(encoder.modules())):
        for name in ("out_features", "num_features", "out_channels", "embedding_dim"):
            size = getattr(module, name, None)
            if isinstance(size, int) and size > 0:
                return size
    raise ValueError(
        f"the width of the features of {type(encoder).__name__} cannot be read off its layers; "
        "pass it to the guide as features=..."
    )


class DirectionHead(nn.Linear):
    """Linear map to R^d followed by normalisation: ``(N, features) -> (N, d)`` unit vectors."""

    def forward(self, features: Tensor) -> Tensor:
        """Return unit vectors; a zero vector (dead features) gives an arbitrary finite one, not NaN."""
        return nn.functional.normalize(super().forward(features), dim=-1)


class ConcentrationHead(nn.Module):
    r"""Positive width parameters: ``(N, features) -> (N, outputs)``, starting near ``initial`` for every input.

    The log of the output is ``log(initial) + 12 tanh(h / 12)`` with h a two-layer network, so values span
    initial * exp(+-12) (a factor of 160,000 either way) with a gradient that never vanishes abruptly: a model that
    wants an infinite concentration gets a very large finite one.

    Args:
        features: width of the input.
        initial: value at the start, > 0; the spread over inputs is about 10 % at initialisation.
        outputs: number of values per input.
        hidden: width of the hidden layer.
    """

    log_initial: Tensor

    def __init__(self, features: int, initial: float, *, outputs: int = 1, hidden: int = 64) -> None:
        super().__init__()
        if not (initial > 0 and math.isfinite(initial)):
            raise ValueError(f"`initial` must be positive and finite, got {initial!r}")
        self.hidden = nn.Linear(features, hidden)
        self.output = nn.Linear(hidden, outputs)
        with torch.no_grad():  # start close to `initial`, but not at a point without gradient
            self.output.weight.mul_(0.3)
            self.output.bias.zero_()
        self.register_buffer("log_initial", torch.tensor(math.log(initial)))

    def forward(self, features: Tensor) -> Tensor:
        """Return positive values, ``(N, outputs)``."""
        h = self.output(nn.functional.leaky_relu(self.hidden(features)))
        return torch.exp(self.log_initial + _LOG_RANGE * torch.tanh(h / _LOG_RANGE))
