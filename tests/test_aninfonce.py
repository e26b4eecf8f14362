"""AnInfoNCE: its likelihood against loops, its relation to InfoNCE, hard negatives, ensembles, what is recovered."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from pyro_contrastive import diagnostics, guides, models
from pyro_contrastive.data import AnisotropicWorld, bimodal_precision
from pyro_contrastive.fit import fit
from pyro_contrastive.kernels import AnisotropicKernel
from pyro_contrastive.models.aninfonce import pair_log_ratio
from pyro_contrastive.nets import mlp
from pyro_contrastive.objectives import KSampleELBO
from pyro_contrastive.ops.anisotropic import log_normalizer

DIM, SIZE = 3, 6
PRECISION = (6.0, 2.0, 0.5)


def unit(*shape):
    return normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def pair(family=guides.Delta, dtype=torch.float64, **options):
    guide = family(mlp([4, 8, 8]), DIM).to(dtype)
    return models.AnInfoNCE(guide, **options).to(dtype), guide


def views(num=2, size=SIZE, dtype=torch.float64):
    return tuple(torch.randn(size, 4, dtype=dtype) for _ in range(num))


def factor(model, guide, data, name="positive"):
    """Value of a factor, and of the latents it was computed from."""
    trace = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(*data))).get_trace(*data)
    z = [trace.nodes[f"z{j + 1}"]["value"].detach() for j in range(len(data))]
    return trace.nodes[name]["fn"].log_factor.detach(), z


def log_f(a, b, precision=PRECISION, constant=0.0):
    """The kernel, one pair at a time."""
    return -sum(p * float(u - v) ** 2 for p, u, v in zip(precision, a, b, strict=True)) - constant


def log_mean(values):
    return math.log(sum(math.exp(value) for value in values) / len(values))


# --- the likelihood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("candidates", ["anchors", "partners", "both"])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_factor_is_the_loop_over_candidates(candidates, symmetric, normalized):
    model, guide = pair(
        precision=PRECISION, learn_precision=False, candidates=candidates, symmetric=symmetric, normalized=normalized
    )
    got, (z1, z2) = factor(model, guide, views())
    c1, c2 = ((log_normalizer(z, torch.tensor(PRECISION).double()) * normalized).tolist() for z in (z1, z2))
    for i in range(SIZE):
        positive = log_f(z1[i], z2[i], constant=c1[i])
        others = [j for j in range(SIZE) if j != i]
        ahead = [log_f(z1[i], z1[j], constant=c1[i]) for j in others] if candidates != "partners" else []
        ahead += [log_f(z1[i], z2[j], constant=c1[i]) for j in others] if candidates != "anchors" else []
        back = [log_f(z1[j], z2[i], constant=c1[j]) for j in others]
        back += [log_f(z2[j], z2[i], constant=c2[j]) for j in others] if candidates == "both" else []
        want = positive - log_mean([positive, *ahead])
        if symmetric:
            want = 0.5 * (want + positive - log_mean([positive, *back]))
        assert float(got[i]) == pytest.approx(want, abs=1e-6)


def test_the_form_of_the_paper_is_the_softmax_over_both_views_with_the_second_block_transposed():
    """2 N anchors, 2 N - 1 candidates, written as one matrix. Anchors of the second view need the transposed block."""
    z1, z2, precision = unit(SIZE, DIM), unit(SIZE, DIM), torch.tensor(PRECISION).double()
    kernel = AnisotropicKernel(DIM, PRECISION, learn=False).double()
    got = pair_log_ratio(partial(kernel, lazy=True), z1, z2, candidates="both")
    z = torch.cat([z1, z2])
    logits = -((z.unsqueeze(1) - z.unsqueeze(0)) ** 2 @ precision.float().double())
    logits.fill_diagonal_(-torch.inf)
    target = torch.arange(2 * SIZE).roll(SIZE)
    loss = cross_entropy(logits, target, reduction="none").view(2, SIZE).mean(0)
    torch.testing.assert_close(math.log(2 * SIZE - 1) - loss, got)
    repeated = logits.clone()
    repeated[SIZE:, :SIZE] = logits[:SIZE, SIZE:]  # what the authors' code has there
    assert (cross_entropy(repeated, target, reduction="none").view(2, SIZE).mean(0) - loss).abs().max() > 1e-2


def test_a_kernel_that_knows_nothing_has_the_loss_of_a_guess_among_all_candidates():
    z1, z2 = unit(1000, 10), unit(1000, 10)
    kernel = partial(AnisotropicKernel(10, 1e-9, learn=False).double(), lazy=True)
    for candidates, size in (("both", 1999), ("anchors", 1000)):
        value = pair_log_ratio(kernel, z1, z2, candidates=candidates)
        assert float(math.log(size) - value.mean()) == pytest.approx(math.log(size), abs=1e-6)  # ln 1999 = 7.6004


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_equal_precisions_are_infonce_with_the_temperature_of_half_their_inverse(tau):
    model, guide = pair(precision=1 / (2 * tau), learn_precision=False, candidates="partners")
    data = views()
    got, (z1, z2) = factor(model, guide, data)
    logits, target = z1 @ z2.mT / tau, torch.arange(SIZE)
    want = [math.log(SIZE) - cross_entropy(block, target, reduction="none") for block in (logits, logits.mT)]
    torch.testing.assert_close(got, sum(want) / 2, rtol=1e-5, atol=1e-5)  # 1 / (2 tau) is rounded to float32
    infonce = models.MCInfoNCE(guide, concentration=1 / tau, evidence="elbo").double()
    torch.testing.assert_close(got, factor(infonce, guide, data)[0], rtol=1e-5, atol=1e-5)


def test_large_batches_go_by_tiles(monkeypatch):
    z1, z2 = unit(40, DIM).requires_grad_(), unit(40, DIM)
    kernel = partial(AnisotropicKernel(DIM, PRECISION, learn=False, normalized=True).double(), lazy=True)
    results = []
    for limit in (2048**2, 10):
        monkeypatch.setattr("pyro_contrastive.ops.tiles.PLAIN_ELEMENTS", limit)
        monkeypatch.setattr("pyro_contrastive.ops.tiles.TILE", {"cpu": 16})
        value = pair_log_ratio(kernel, z1, z2, candidates="both")
        results.append((value.detach(), *torch.autograd.grad(value.square().sum(), z1)))
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(whole, tiled)


def test_samples_are_averaged_inside_the_log():
    model, guide = pair(guides.VonMisesFisher, evidence="k_sample", num_samples=5, candidates="both")
    drawn = []
    law = guide.posterior

    class Recorder(nn.Module):
        dim = DIM

        @staticmethod
        def posterior(x):
            posterior = law(x)
            draw = posterior.rsample

            def rsample(size=()):
                drawn.append(draw(torch.Size(size)))
                return drawn[-1]

            posterior.rsample = rsample
            return posterior

    recording = models.AnInfoNCE(Recorder(), evidence="k_sample", num_samples=5, candidates="both").double()
    got = poutine.trace(recording).get_trace(*views()).nodes["positive"]["fn"].log_factor
    z1, z2 = (z for z in drawn if z.dim() == 3)
    each = torch.stack([pair_log_ratio(partial(model.kernel, lazy=True), a, b, candidates="both")
                        for a, b in zip(z1, z2, strict=True)])  # fmt: skip
    torch.testing.assert_close(got, each.exp().mean(0).log())


@pytest.mark.parametrize(
    ("family", "evidence"),
    [(guides.VonMisesFisher, "elbo"), (guides.PowerSpherical, "k_sample"), (guides.ProjectedNormal, "elbo")],
)
def test_every_guide_trains_under_plain_svi(family, evidence):
    model, guide = pair(family, torch.float32, evidence=evidence, num_samples=2)
    before = model.precision.detach().clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    x, _ = views(size=32, dtype=torch.float32)
    losses = [svi.step(x, x + 0.1 * torch.randn_like(x)) for _ in range(15)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not torch.allclose(model.precision, before)


def test_vectorised_particles_and_one_encoder_pass():
    model, guide = pair(guides.VonMisesFisher)
    data, calls = views(), []
    guide.encoder.register_forward_hook(lambda *_: calls.append(1))
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    many = float(elbo(model, guide)(*data).detach())
    assert len(calls) == 2
    one = torch.tensor([float(Trace_ELBO()(model, guide)(*data).detach()) for _ in range(50)])
    assert many == pytest.approx(float(one.mean()), abs=5 * math.sqrt(2 / 50) * float(one.std()))  # 5 s.e.: < 1e-6


# --- stochastic guides in closed form ---------------------------------------------------------------------------------


def test_the_moment_matched_model_trains_and_ranks_partners():
    model, guide = pair(guides.VonMisesFisher, torch.float32, evidence="moment_matched", precision=PRECISION)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    x, _ = views(size=32, dtype=torch.float32)
    losses = [svi.step(x, x) for _ in range(25)]
    assert losses[-1] < losses[0] - 5
    logits = model.partner_logits(x, x).detach()
    assert logits.shape == (32, 32) and (logits.argmax(1) == torch.arange(32)).float().mean() > 0.5
    assert model.partner_logits(x, x[:5], posteriors=(guide.posterior(x), guide.posterior(x[:5]))).shape == (32, 5)


def test_partner_logits_of_points_are_log_densities_relative_to_the_uniform_law():
    model, guide = pair(precision=PRECISION, learn_precision=False)
    guide.eval()
    x, y = views()[0], views(size=20_000)[0]
    law = unit(20_000, DIM)
    posteriors = guide.posterior(x), pyro.distributions.Delta(law, event_dim=1)
    density = model.partner_logits(x, y, posteriors=posteriors).exp().mean(1)
    assert torch.allclose(density, torch.ones(SIZE, dtype=torch.float64), atol=0.08)  # 5 s.e. are .06, the rest C(z)'s


# --- what is recovered ------------------------------------------------------------------------------------------------


def oracle(world, steps, lr, **options):
    """Learn Lambda alone, from the true latents."""
    guide = guides.Delta(nn.Identity(), world.dim, features=world.dim, batch_norm=False)
    guide.requires_grad_(False)
    guide.direction.weight.copy_(torch.eye(world.dim))
    guide.direction.bias.zero_()
    model = models.AnInfoNCE(guide, **options)
    fit(model, guide, world.batches(256, 0), steps=steps, num_views=None, lr=lr, device="cpu", progress=False)
    return model.precision.detach()


def test_an_oracle_encoder_finds_the_precisions_on_their_absolute_scale():
    world = AnisotropicWorld([10.0, 10.0, 10.0, 2.0, 2.0, 2.0], generator="identity")
    found = oracle(world, 60, 0.03)
    # after so few steps the mean of a group is 2 and 3 % off, and its s.d. over seeds is 1.2 %: false alarm < 1e-6
    assert found[:3].mean() == pytest.approx(10.0, rel=0.1) and found[3:].mean() == pytest.approx(2.0, rel=0.1)


def test_hard_negatives_leave_the_difference_and_a_negative_one_is_seen():
    world = AnisotropicWorld([8.0, 6.0, 2.0], negative_precision=[2.0, 2.0, 6.0], num_negatives=2, generator="identity")
    signed = oracle(world, 80, 0.05, hard_negatives=2, signed=True, precision=1.0)  # s.d. over seeds: 3, 6, 2 %
    torch.testing.assert_close(signed, torch.tensor([6.0, 4.0, -4.0]), rtol=0.25, atol=0)
    pinned = oracle(world, 40, 0.05, hard_negatives=2, precision=0.4)
    assert 0 < pinned[2] < 0.07 and pinned[:2].min() > 1
    assert diagnostics.judge_precision(pinned).value.startswith("axis 2: ")
    assert diagnostics.judge_precision(signed).status == "warn"


def test_the_factor_of_hard_negatives_is_the_loop():
    model, guide = pair(precision=PRECISION, learn_precision=False, hard_negatives=2)
    got, z = factor(model, guide, views(4))
    for i in range(SIZE):
        values = [log_f(z[0][i], z[j][i]) for j in (1, 2, 3)]
        assert float(got[i]) == pytest.approx(values[0] - log_mean(values), abs=1e-6)


def test_a_small_encoder_finds_content_and_style():
    world = AnisotropicWorld(bimodal_precision(4))
    torch.manual_seed(0)
    guide = guides.Delta(mlp([4, 64, 64]), 4)
    model = models.AnInfoNCE(guide, candidates="partners", normalized=False)
    fit(model, guide, world.batches(128, 0), steps=150, lr=5e-3, device="cpu", progress=False)
    test = world.sample(2_000, seed=1)
    with torch.no_grad():
        found = diagnostics.linear_r2(guide.posterior(test.x1).mean, test.z1, groups={"style": [2, 3]})
    assert found.r2 > 0.9 and found.groups["style"] > 0.85  # a fit that folds a style axis has .75 and .5


# --- ensembles --------------------------------------------------------------------------------------------------------


def ensemble(**options):
    guide = guides.Delta(mlp([4, 8, 8]), DIM).double()
    return models.AnInfoNCEEnsemble(guide, 2, **options).double(), guide


@pytest.mark.parametrize("pairs", [None, [(1, 2), (3, 4)]])
def test_an_ensemble_adds_up_its_families(pairs):
    precision = [list(PRECISION), [0.5, 2.0, 6.0]]
    model, guide = ensemble(precision=precision, learn_precision=False, weights=[1.0, 0.25], pairs=pairs)
    assert model.num_views == (3 if pairs is None else 4)
    data = views(model.num_views)
    guide_trace = poutine.trace(guide).get_trace(*data)
    trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*data)
    z = [trace.nodes[f"z{j + 1}"]["value"].detach() for j in range(len(data))]
    for name, (i, j), row, weight in zip(
        ("family1", "family2"), pairs or [(1, 2), (1, 3)], precision, (1.0, 0.25), strict=True
    ):
        single = models.AnInfoNCE(guide, precision=row, learn_precision=False).double()
        want = weight * pair_log_ratio(partial(single.kernel, lazy=True), z[i - 1], z[j - 1])
        torch.testing.assert_close(trace.nodes[name]["fn"].log_factor.detach(), want)
    assert {"pairs", "z1", "family1", "family2"} <= set(trace.nodes)


def test_an_ensemble_trains_saves_and_takes_k_samples():
    world = AnisotropicWorld([[8.0, 8.0, 1.0], [8.0, 1.0, 8.0]])
    guide = guides.VonMisesFisher(mlp([3, 16, 16]), 3)
    model = models.AnInfoNCEEnsemble(guide, 2)
    result = fit(model, guide, world.batches(64, 0), steps=20, lr=5e-3, num_views=None, device="cpu", progress=False,
                 elbo=KSampleELBO(4), log_every=1)  # fmt: skip
    assert result.history["loss"][-1] < result.history["loss"][0] and {"family1", "family2"} <= set(result.history)
    other = models.AnInfoNCEEnsemble(guides.VonMisesFisher(mlp([3, 16, 16]), 3), 2)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.precision, model.precision)
    assert model.precision.shape == (2, 3) and not torch.equal(model.precision[0], model.precision[1])


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": -1.0}, "`precision` must be positive and finite"),
        ({"precision": [1.0, 2.0]}, "`precision` must be one number or one per dimension, 3 of them"),
        ({"evidence": "exact"}, "one of elbo, k_sample, moment_matched, got 'exact'"),
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1, got 0"),
        ({"candidates": "all"}, "`candidates` must be one of anchors, partners, both, got 'all'"),
        ({"hard_negatives": -1}, "`hard_negatives` must be an integer >= 0, got -1"),
        ({"hard_negatives": 1, "evidence": "moment_matched"}, "`hard_negatives` have no closed form"),
        ({"signed": True}, "`signed` .* needs `hard_negatives`"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pair(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": [[1.0] * 3] * 3}, r"one row per family, 2 of them, got \(3, 3\)"),
        ({"weights": [1.0]}, "`weights` must be 2 positive numbers"),
        ({"weights": [1.0, 0.0]}, "`weights` must be 2 positive numbers"),
        ({"pairs": [(1, 2)]}, "`pairs` must be 2 pairs"),
        ({"pairs": [(1, 2), (0, 1)]}, "`pairs` must be 2 pairs"),
        ({"candidates": "all"}, "`candidates` must be one of"),
    ],
)
def test_wrong_options_of_ensembles_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ensemble(**options)


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match=r"needs 2 views of one length N >= 2, got \[\(6, 4\)\]"):
        pair()[0](*views(1))
    with pytest.raises(ValueError, match=r"AnInfoNCE\(hard_negatives=1\) needs 3 views"):
        pair(hard_negatives=1)[0](*views(2))
    with pytest.raises(ValueError, match="need 3 views of one length"):
        ensemble()[0](*views(2))
    with pytest.raises(ValueError, match="`families` must be an integer >= 1"):
        models.AnInfoNCEEnsemble(pair()[1], 0)
    with pytest.raises(TypeError, match=r"posterior\(x\)"):
        models.AnInfoNCE(nn.Linear(2, 2))
    nameless = type("Nameless", (nn.Module,), {"posterior": lambda self, x: x})()
    with pytest.raises(TypeError, match="must have an attribute `dim`"):
        models.AnInfoNCE(nameless)
    with pytest.raises(TypeError, match="VonMisesFisher posteriors, got Delta"):
        pair(evidence="moment_matched")[0](*views())
    with pytest.raises(ValueError, match="only one of it and `signed`"):
        AnisotropicKernel(3, normalized=True, signed=True)
