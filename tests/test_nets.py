"""Heads and encoders: starting values, ranges, dtypes, and widths that are read off."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyro_contrastive.nets import (
    ConcentrationHead,
    DirectionHead,
    feature_size,
    mlp,
    projector,
    small_convnet,
    small_resnet18,
)


def test_mlp_has_the_stated_layers():
    net = mlp([6, 5, 4, 3])
    linear = [m for m in net if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(6, 5), (5, 4), (4, 3)]
    assert isinstance(net[0], nn.Flatten) and isinstance(net[-1], nn.LeakyReLU)
    assert net(torch.randn(7, 1, 2, 3)).shape == (7, 3)


def test_mlp_computes_what_its_weights_say():
    net = mlp([4, 3, 2], flatten=False)
    x = torch.randn(5, 4)
    want = x
    for layer in net[::2]:
        want = want @ layer.weight.mT + layer.bias
        want = torch.where(want > 0, want, 0.01 * want)
    torch.testing.assert_close(net(x), want)


def test_mlp_with_batch_norm_normalises_before_every_nonlinearity():
    net = mlp([4, 8, 3], batch_norm=True, flatten=False)
    kinds = [type(m).__name__ for m in net]
    assert kinds == ["Linear", "BatchNorm1d", "LeakyReLU"] * 2
    normalised = net[:2](torch.randn(256, 4))
    torch.testing.assert_close(normalised.mean(0), torch.zeros(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [[], [3]])
def test_mlp_needs_two_sizes(sizes):
    with pytest.raises(ValueError, match="at least the input and the output width"):
        mlp(sizes)


class ResNetLike(nn.Module):
    """Backbone with a head ``fc``, whose forward does not follow the order of registration, like torchvision's."""

    def __init__(self, fc):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.bn = nn.BatchNorm2d(12)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = fc

    def forward(self, x):
        return self.fc(self.pool(self.bn(self.conv(x)).relu()).flatten(1))


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [
        (nn.Linear(4, 9), (4,)),
        (mlp([4, 7, 5]), (4,)),
        (mlp([4, 7, 5], batch_norm=True), (4,)),
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Dropout()), (4,)),
        (nn.Sequential(nn.Conv2d(3, 11, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 8, 8)),
        (ResNetLike(nn.Linear(12, 10)), (3, 8, 8)),
        (ResNetLike(nn.Identity()), (3, 8, 8)),
        (nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6)), (4,)),
    ],
)
def test_width_read_off_is_the_width_returned(encoder, shape):
    assert feature_size(encoder) == encoder(torch.randn(5, *shape)).shape[-1]


@pytest.mark.parametrize("encoder", [nn.Identity(), nn.Flatten(), nn.Sequential(nn.ReLU(), nn.Dropout())])
def test_unreadable_width_says_the_way_out(encoder):
    with pytest.raises(ValueError, match=rf"{type(encoder).__name__} cannot be read off.*features="):
        feature_size(encoder)


def test_directions_are_unit_and_dead_features_are_finite():
    head = DirectionHead(6, 4)
    z = head(torch.cat([torch.randn(50, 6), 1e6 * torch.randn(50, 6), 1e-6 * torch.randn(50, 6)]))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(150))
    head.bias.data.zero_()
    dead = head(torch.zeros(3, 6, requires_grad=True))
    dead.sum().backward()
    assert torch.isfinite(dead).all() and torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("initial", [1e-3, 0.5, 9.3, 120.0, 1e4])
@pytest.mark.parametrize("outputs", [1, 5])
def test_concentrations_start_near_the_initial_value(initial, outputs):
    head = ConcentrationHead(32, initial, outputs=outputs)
    value = head(torch.randn(2_000, 32)).detach()
    assert value.shape == (2_000, outputs)
    ratio = (value / initial).log()
    # "the spread over inputs is about 10 %": a random network, so per output at most twice that
    assert (ratio.std(0) < 0.2).all() and (ratio.std(0) > 0.01).all()
    assert ratio.mean(0).abs().max() < 0.35


def test_concentrations_stay_in_range_with_a_finite_gradient():
    head = ConcentrationHead(8, 20.0)
    features = torch.randn(100, 8)
    for scale in (-1e6, -1e3, 1e3, 1e6):
        head.zero_grad()
        value = head(scale * features)
        value.log().sum().backward()
        assert (value >= 20.0 * math.exp(-12.001)).all() and (value <= 20.0 * math.exp(12.001)).all()
        assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    # both ends are reached, so the range is as wide as stated
    ends = head(1e6 * features)
    assert ends.min() < 20.0 * math.exp(-11.9) and ends.max() > 20.0 * math.exp(11.9)


def test_nan_features_stay_visible():
    """A NaN of the encoder must reach the checks of the distribution, not become a plausible number."""
    features = torch.randn(3, 8)
    features[1, 2] = math.nan
    value = ConcentrationHead(8, 20.0)(features)
    assert value.isnan().squeeze(-1).tolist() == [False, True, False]
    assert DirectionHead(8, 4)(features).isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("initial", [0.0, -1.0, math.inf, math.nan])
def test_initial_value_is_checked(initial):
    with pytest.raises(ValueError, match="`initial` must be positive and finite"):
        ConcentrationHead(8, initial)


def test_double():
    x = torch.randn(5, 4).double()
    net = nn.Sequential(mlp([4, 8], batch_norm=True), ConcentrationHead(8, 3.0)).double()
    assert net(x).dtype == torch.float64
    assert mlp([4, 8]).double()(x).dtype == DirectionHead(4, 3).double()(x).dtype == torch.float64


def test_state_dict_carries_the_initial_value():
    """A head loaded into one built with another starting value must compute the same."""
    source, target = ConcentrationHead(8, 20.0), ConcentrationHead(8, 3.0)
    target.load_state_dict(source.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(source(x), target(x))


def test_small_resnet18_is_torchvisions_with_another_stem():
    from torchvision.models import resnet18

    theirs = resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    ours = small_resnet18()
    assert [v.shape for v in ours.state_dict().values()] == [v.shape for v in theirs.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert feature_size(ours) == 512


def test_encoders_of_images_have_the_stated_widths_and_strides():
    pooled = small_resnet18(1, width=4, pool=True)
    assert pooled(torch.rand(2, 1, 32, 32)).shape == (2, 32) and pooled[:4](torch.rand(2, 1, 32, 32)).shape[-1] == 16
    net = small_convnet(3, widths=(4, 8), strides=(1, 2))
    assert net[:-2](torch.rand(2, 3, 8, 8)).shape == (2, 8, 4, 4) and feature_size(net) == 8
    with pytest.raises(ValueError, match=r"must be as many, one or more, got \(4, 8\) and \(1,\)"):
        small_convnet(1, widths=(4, 8), strides=(1,))
    for build in (lambda: small_resnet18(0), lambda: small_convnet(0), lambda: small_resnet18(3, width=0)):
        with pytest.raises(ValueError, match="must be an integer >= 1, a number of channels, got 0"):
            build()
    assert feature_size(nn.Sequential(net, projector(8, 16))) == 16
