from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as pyro_dist
from torch import nn

from pyro_contrastive import distributions as dist
from pyro_contrastive.diagnostics import guide_khat, psis_khat
from pyro_contrastive.factors import infonce_factor, recognition_factor
from pyro_contrastive.guides import VonMisesFisher
from pyro_contrastive.kernels import VonMisesFisherKernel

DIM = 4


@pytest.mark.parametrize("rate", [1.0, 2.0, 4.0])
def test_sign_and_scale_on_the_installed_arviz(rate):
    # log-weights with an exponential tail of rate r: the weights have a Pareto tail of k = 1/r
    weights = np.random.default_rng(0).exponential(1 / rate, size=(20_000, 8))
    # the estimate shrinks to .5 by ten draws of a prior; standard error (1 + k) / sqrt(424) per column
    np.testing.assert_allclose(psis_khat(weights).mean(), 1 / rate, atol=4 * (1 + 1 / rate) / np.sqrt(8 * 424) + 0.02)
    assert psis_khat(-weights).max() < 0  # bounded weights


def test_shapes_and_invariance():
    weights = np.random.default_rng(1).normal(size=(200, 3))
    whole = psis_khat(weights)
    assert whole.shape == (3,)
    for column in range(3):
        one = psis_khat(weights[:, column])
        assert one.shape == () and one == whole[column]
    np.testing.assert_allclose(psis_khat(weights + 1e3), whole)
    np.testing.assert_allclose(psis_khat(torch.from_numpy(weights[::-1].copy())), whole)


def test_weights_without_a_tail():
    assert np.isneginf(psis_khat(np.zeros(100)))
    few = np.full(100, -np.inf)
    few[:50] = 0.0
    assert np.isneginf(psis_khat(few))
    zeros = np.random.default_rng(0).normal(size=200)
    zeros[:30] = -np.inf
    assert np.isfinite(psis_khat(zeros))
    assert np.isfinite(psis_khat(np.random.default_rng(0).normal(size=30)))


# --- guides -----------------------------------------------------------------------------------------------------------


def pair(scale: float, kappa: float = 8.0):
    """z is uniform and x ~ vMF(z, kappa), so that the posterior is vMF(x, kappa); the guide has scale * kappa."""

    def model(x):
        with pyro.plate("items", len(x)):
            z = pyro.sample("z", dist.HypersphericalUniform(DIM))
            pyro.sample("x", dist.VonMisesFisher(z, torch.full((len(x),), kappa)), obs=x)

    def guide(x):
        with pyro.plate("items", len(x)):
            pyro.sample("z", dist.VonMisesFisher(x, torch.full((len(x),), scale * kappa)))

    return model, guide


VIEWS = (nn.functional.normalize(torch.randn(6, DIM, generator=torch.Generator().manual_seed(0)), dim=-1),)


def test_guides_known_to_be_right_too_wide_and_too_narrow():
    right, wide, narrow = (guide_khat(*pair(scale), VIEWS, num_draws=120) for scale in (1.0, 0.5, 8.0))
    assert right.counts == wide.counts == {"good": 6, "ok": 0, "bad": 0, "very bad": 0}
    # nearly normal laws in a tangent plane: weights with a tail of k = 1 - 1 / 8
    assert np.median(narrow.khat) == pytest.approx(0.875, abs=0.25)
    assert narrow.counts["bad"] + narrow.counts["very bad"] >= 5
    assert narrow.threshold == pytest.approx(min(1 - 1 / np.log10(120), 0.7))
    assert narrow.num_draws == 120 and not narrow.conditional
    np.testing.assert_array_equal(narrow.items, np.arange(6))


def test_weights_are_those_of_the_densities():
    model, _ = pair(3.0)

    class Kept(dist.VonMisesFisher):
        def rsample(self, sample_shape=()):
            z = super().rsample(sample_shape)
            kept.append(z)
            return z

        sample = rsample

    kept: list[torch.Tensor] = []

    def keeping(x):
        with pyro.plate("items", len(x)):
            pyro.sample("z", Kept(x, torch.full((len(x),), 24.0)))

    result = guide_khat(model, keeping, VIEWS, num_draws=50)
    z = torch.stack(kept[-50:])
    cosine = (z.double() * VIEWS[0].double()).sum(-1)
    np.testing.assert_allclose(result.khat, psis_khat((8.0 - 24.0) * cosine), atol=1e-3)


def test_some_items_only_and_nothing_touched():
    model, guide = pair(2.0)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    whole, some = guide_khat(model, guide, VIEWS, num_draws=60), guide_khat(
        model, guide, VIEWS, num_draws=60, items=[4, 1]
    )  # fmt: skip
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(some.items, [4, 1])
    np.testing.assert_array_equal(some.khat, whole.khat[[4, 1]])


def contrastive(kind: str):
    guide = VonMisesFisher(nn.Linear(3, 8), DIM)
    kernel = VonMisesFisherKernel(5.0)

    def model(x1, x2):
        with pyro.plate("pairs", len(x1)):
            z1 = pyro.sample("z1", dist.HypersphericalUniform(DIM))
            z2 = pyro.sample("z2", dist.VonMisesFisher(z1, torch.tensor(5.0)))
            if kind == "recognition":
                recognition_factor("x1", z1, guide.posterior(x1))
                recognition_factor("x2", z2, guide.posterior(x2))
            else:
                infonce_factor("pair", z1, z2, kernel)

    return model, guide


def test_recognition_factors_leave_items_apart_and_infonce_factors_do_not():
    views = torch.randn(5, 3), torch.randn(5, 3)
    apart = guide_khat(*contrastive("recognition"), views, num_draws=40)
    assert not apart.conditional and np.all(np.isfinite(apart.khat))
    with pytest.raises(ValueError, match=r'items of this model are coupled.*rest="condition"'):
        guide_khat(*contrastive("infonce"), views, num_draws=40)
    given = guide_khat(*contrastive("infonce"), views, num_draws=40, rest="condition", items=[0, 3])
    assert given.conditional and given.khat.shape == (2,) and np.all(np.isfinite(given.khat))


def test_conditioning_is_exact_where_the_rest_matters():
    # z_i given all others: a chain of neighbours on the line, judged by its exact conditional
    n = 4

    def model(x):
        with pyro.plate("items", n):
            z = pyro.sample("z", pyro_dist.Normal(0.0, 1.0))
            pyro.factor("smooth", -0.5 * (z - z.roll(1)) ** 2)

    def guide(x):
        with pyro.plate("items", n):
            pyro.sample("z", pyro_dist.Normal(0.0, 2.0))

    result = guide_khat(model, guide, (torch.zeros(n),), num_draws=200, rest="condition")
    # the conditional has variance 1/3 and is narrower than the guide: the weights are bounded
    assert result.conditional and result.khat.max() < 0.5
    with pytest.raises(ValueError, match="coupled"):
        guide_khat(model, guide, (torch.zeros(n),), num_draws=200)


def test_global_latents_are_refused_by_name():
    def model(x):
        scale = pyro.sample("scale", pyro_dist.LogNormal(0.0, 1.0))
        with pyro.plate("items", len(x)):
            pyro.sample("z", pyro_dist.Normal(0.0, scale))

    def guide(x):
        pyro.sample("scale", pyro_dist.LogNormal(0.0, 1.0))
        with pyro.plate("items", len(x)):
            pyro.sample("z", pyro_dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'scale' of the guide must have one value per item"):
        guide_khat(model, guide, VIEWS)
    fixed = [pyro.poutine.condition(f, {"scale": torch.tensor(1.0)}) for f in (model, guide)]
    assert guide_khat(*fixed, VIEWS, num_draws=30).khat.shape == (6,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psis_khat(np.zeros(29)), r"S >= 30 draws.*got \(29,\)"),
        (lambda: psis_khat(np.zeros((30, 2, 2))), "must be"),
        (lambda: psis_khat(np.full(40, np.nan)), "NaN or plus infinity"),
        (lambda: psis_khat(np.r_[np.zeros(30), np.inf]), "NaN or plus infinity"),
        (lambda: psis_khat(np.full(30, -np.inf)), "a weight above zero"),
        (lambda: guide_khat(*pair(1.0), VIEWS, num_draws=29), "`num_draws` must be >= 30"),
        (lambda: guide_khat(*pair(1.0), VIEWS, rest="drop"), '"refuse" or "condition"'),
        (lambda: guide_khat(*pair(1.0), VIEWS, items=[6]), r"`items` must be indices in 0..5"),
        (lambda: guide_khat(pair(1.0)[0], lambda x: None, VIEWS), "at least one latent sample site"),
        (
            lambda: guide_khat(*contrastive("recognition"), (torch.randn(5, 3),) * 2, items=[]),
            "at least one",
        ),
        (
            lambda: guide_khat(
                lambda x: (pair(1.0)[0](x), pyro.sample("w", pyro_dist.Normal(0.0, 1.0))), pair(1.0)[1], VIEWS
            ),
            r"every latent site of the model, got none for \['w'\]",
        ),  # fmt: skip
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
