"""The factor with several positives against loops over items, and against the losses of the peers."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine

from pyro_contrastive.kernels import AnisotropicKernel, VonMisesFisherKernel
from pyro_contrastive.ops import tiles
from pyro_contrastive.positives import nt_xent_factor, nt_xent_log_ratio

KAPPA = 6.0
CONVENTIONS = ("supcon_out", "supcon_in")
LABELS = {
    "none": None,
    "unique": [3, 1, 4, 15, 9, 2, 6],
    "classes": [0, 1, 0, 2, 2, 0, 7],
    "two": [1, 0, 0, 0, 0, 0, 0],
}


def latents(*batch, size=7, dtype=torch.float64):
    torch.manual_seed(5)
    z = torch.randn(2, *batch, size, 4, dtype=dtype)
    return torch.nn.functional.normalize(z, dim=-1).requires_grad_()


def labels_of(name, size=7):
    return None if LABELS[name] is None else torch.tensor(LABELS[name][:size])


def loop(z1, z2, labels, convention, kappa=KAPPA):
    """Equations 2 and 3 of Khosla et al., item by item in plain Python; minus the loss, plus log(2N - 1)."""
    z = [*z1.detach().tolist(), *z2.detach().tolist()]
    n = len(z) // 2
    things = list(range(n)) if labels is None else labels.tolist()

    def f(a, k):
        return math.exp(kappa * sum(u * v for u, v in zip(z[a], z[k], strict=True)))

    losses = []
    for a in range(2 * n):
        others = [k for k in range(2 * n) if k != a]
        near = [k for k in others if things[k % n] == things[a % n]]
        total = sum(f(a, k) for k in others)
        if convention == "supcon_out":
            losses.append(-sum(math.log(f(a, p) / total) for p in near) / len(near))
        else:
            losses.append(-math.log(sum(f(a, p) / total for p in near) / len(near)))
    return torch.tensor(
        [math.log(2 * n - 1) - 0.5 * (losses[i] + losses[i + n]) for i in range(n)], dtype=torch.float64
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", LABELS)
def test_equals_the_loop(name, convention):
    z1, z2 = latents()
    labels = labels_of(name)
    with poutine.trace() as capture, pyro.plate("pairs", 7):
        value = nt_xent_factor("positive", z1, z2, VonMisesFisherKernel(KAPPA), labels, positives=convention)
    want = loop(z1, z2, labels, convention)
    torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)
    capture.trace.compute_log_prob()
    torch.testing.assert_close(capture.trace.nodes["positive"]["log_prob"], value)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("kernel", [VonMisesFisherKernel(KAPPA), AnisotropicKernel(4, [1.0, 2.0, 3.0, 9.0])])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocks_equal_the_grid_in_value_and_gradient(block, kernel, name, convention):
    views = latents(3)
    labels = labels_of(name)
    z = torch.cat([views[0], views[1]], -2)
    whole = nt_xent_log_ratio(kernel(z, z), labels, positives=convention)
    blocks = nt_xent_log_ratio(kernel(z, z, lazy=True), labels, positives=convention, block=block)
    assert whole.shape == (3, 7)
    torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(whole)
    leaves = [views, *kernel.parameters()]
    for one, other in zip(
        *(torch.autograd.grad(v, leaves, weight, retain_graph=True) for v in (blocks, whole)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradient_is_that_of_finite_differences():
    z = latents(size=4)
    labels = torch.tensor([0, 1, 0, 1])

    def loss(views, convention):
        joined = torch.cat([views[0], views[1]])
        return nt_xent_log_ratio(KAPPA * joined @ joined.mT, labels, positives=convention)

    for convention in CONVENTIONS:
        assert torch.autograd.gradcheck(lambda v, c=convention: loss(v, c), z)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_large_batch_keeps_no_grid(monkeypatch, labelled):
    monkeypatch.setattr("pyro_contrastive.positives.PLAIN_ELEMENTS", 100)
    monkeypatch.setattr(tiles, "PLAIN_ELEMENTS", 100)
    monkeypatch.setitem(tiles.TILE, "cpu", 10)
    sizes = []
    kernel = VonMisesFisherKernel(KAPPA)
    plain = kernel.pairs

    def spied(z1, z2):
        pairs = plain(z1, z2)

        def function(rows, columns, shared):
            tile = pairs.function(rows, columns, shared)
            sizes.append(tile.numel())
            return tile

        return tiles.Pairs(function, pairs.rows, pairs.columns, pairs.shared)

    monkeypatch.setattr(kernel, "pairs", spied)
    z = latents(size=30)
    with pyro.plate("pairs", 30):
        labels = torch.arange(30) // 2 if labelled else None
        nt_xent_factor("positive", z[0], z[1], kernel, labels).sum().backward()
    # labelled: a row of 60 at a time, else 36 tiles, forward and backward; and once the positives' cells
    assert max(sizes) <= 100 and len(sizes) == (2 * 60 if labelled else 2 * 36 + 1)


@pytest.mark.parametrize("tile", [3, 7, 100])
@pytest.mark.parametrize("kernel", [VonMisesFisherKernel(KAPPA), AnisotropicKernel(6, [3.0, 1.0] * 3)])
def test_without_labels_tiles_leave_the_item_itself_out(monkeypatch, tile, kernel):
    """Also where the item itself is by far its own nearest, so that subtracting it from a sum would lose the rest."""
    monkeypatch.setattr(tiles, "PLAIN_ELEMENTS", 0)
    monkeypatch.setitem(tiles.TILE, "cpu", tile)
    kernel = kernel.double()
    generator = torch.Generator().manual_seed(3)
    z = torch.nn.functional.normalize(torch.randn(2, 16, 6, generator=generator).double(), dim=-1)
    weight, found = torch.rand(8, generator=generator).double(), []
    for scale, lazy in ((1.0, True), (1.0, False), (30.0, True), (30.0, False)):
        views = (scale * z[0]).requires_grad_()
        value = nt_xent_log_ratio(kernel(views, views, lazy=lazy))
        found.append((value.detach(), *torch.autograd.grad((weight * value).sum(), views)))
    for ours, expected in zip(found[::2], found[1::2], strict=True):
        for one, other in zip(ours, expected, strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LABELS)
def test_mean_outside_is_at_most_the_mean_inside(name):
    z = torch.cat([*latents()])
    outside, inside = (nt_xent_log_ratio(KAPPA * z @ z.mT, labels_of(name), positives=c) for c in CONVENTIONS)
    assert (outside <= inside + 1e-12).all()
    assert torch.allclose(outside, inside) == (name in ("none", "unique"))


def test_unique_labels_are_no_labels_and_names_do_not_matter():
    z = torch.cat([*latents()])
    log_f = KAPPA * z @ z.mT
    torch.testing.assert_close(nt_xent_log_ratio(log_f, labels_of("unique")), nt_xent_log_ratio(log_f))
    labels = labels_of("classes")
    torch.testing.assert_close(nt_xent_log_ratio(log_f, 10 - labels), nt_xent_log_ratio(log_f, labels))
    torch.testing.assert_close(nt_xent_log_ratio(log_f, labels == 2), nt_xent_log_ratio(log_f, (labels == 2).int()))


def test_range():
    same = torch.tensor([0, 0, 1])
    assert nt_xent_log_ratio(torch.zeros(6, 6), same).abs().max() < 1e-6
    apart = 1e4 * torch.eye(3).repeat(2, 2)
    torch.testing.assert_close(nt_xent_log_ratio(apart), torch.full((3,), math.log(5)))
    far = latents(dtype=torch.float32)
    value = nt_xent_log_ratio(1e4 * far[0].repeat(2, 1) @ far[1].repeat(2, 1).mT, labels_of("classes"))
    gradient = torch.autograd.grad(value.sum(), far)[0]
    assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_diagonal_is_not_used(convention):
    z = torch.cat([*latents()])
    log_f = KAPPA * z @ z.mT
    other = log_f.clone().fill_diagonal_(math.inf)
    for labels in (None, labels_of("classes")):
        value = nt_xent_log_ratio(other, labels, positives=convention)
        torch.testing.assert_close(value, nt_xent_log_ratio(log_f, labels, positives=convention))


def test_lightly_has_the_same_loss():
    loss = pytest.importorskip("lightly.loss").NTXentLoss(temperature=1 / KAPPA)
    z1, z2 = latents()
    log_f = KAPPA * torch.cat([z1, z2]) @ torch.cat([z1, z2]).mT
    torch.testing.assert_close(math.log(13) - nt_xent_log_ratio(log_f).mean(), loss(z1, z2))


def test_pytorch_metric_learning_has_the_same_loss():
    loss = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(temperature=1 / KAPPA)
    z, labels = torch.cat([*latents()]), labels_of("classes")
    theirs = loss(z, labels.repeat(2))
    torch.testing.assert_close(math.log(13) - nt_xent_log_ratio(KAPPA * z @ z.mT, labels).mean(), theirs)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(6, 6), torch.tensor([0, 1])), {}, r"`labels` must be a tensor of 3 integers.*int64 \(2,\)"),
        ((torch.zeros(6, 6), torch.tensor([[0, 1, 2]])), {}, r"`labels` must be a tensor of 3 integers.*\(1, 3\)"),
        ((torch.zeros(6, 6), torch.tensor([0.0, 1.0, 2.0])), {}, "`labels` must be.*float32"),
        ((torch.zeros(6, 6), [0, 1, 2]), {}, "`labels` must be.*list"),
        ((torch.zeros(6, 6), torch.tensor([4, 4, 4])), {}, "at least two classes, got 3 times 4"),
        ((torch.zeros(6, 6),), {"positives": "out"}, "`positives` must be one of supcon_out, supcon_in, got 'out'"),
        ((torch.zeros(2, 2),), {}, "both views of N >= 2 things"),
        ((torch.zeros(5, 5),), {}, r"\(\.\.\., 2N, 2N\)"),
        ((torch.zeros(6, 4),), {}, r"\(\.\.\., 2N, 2N\)"),
        ((torch.zeros(6),), {}, r"\(\.\.\., 2N, 2N\)"),
        ((torch.zeros(6, 6),), {"block": 2}, "`block` is for grids that are not evaluated yet"),
        ((torch.zeros(6, 6),), {"block": 0}, "`block` must be an integer >= 1"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        nt_xent_log_ratio(*arguments, **options)


def test_one_class_is_let_through_without_validation():
    with pyro.validation_enabled(False):  # the check waits for the device; training steps must not
        assert nt_xent_log_ratio(torch.zeros(6, 6), torch.zeros(3, dtype=torch.int64)).abs().max() < 1e-6


def test_shapes_are_checked_against_one_another_and_the_plate():
    z1, z2 = latents()
    kernel = VonMisesFisherKernel(KAPPA)
    with pyro.plate("pairs", 7), pytest.raises(ValueError, match="latents of one shape"):
        nt_xent_factor("positive", z1, z2[:6], kernel)
    with pyro.plate("pairs", 8), pytest.raises(ValueError, match="one value per item of plate 'pairs'"):
        nt_xent_factor("positive", z1, z2, kernel)
    with pytest.raises(ValueError, match="inside the plate"):
        nt_xent_factor("positive", z1, z2, kernel)
