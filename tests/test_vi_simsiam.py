"""VI-SimSiam and SimSiam: the loss against loops, stop-gradient, passes of the encoder, and Pyro's settings."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch import nn

from pyro_contrastive import diagnostics, guides, models
from pyro_contrastive.aggregates import FullData, MemoryBank
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.fit import fit
from pyro_contrastive.nets import mlp

DIM, SIZE = 3, 9
DENSITIES = ["power_spherical", "von_mises_fisher", "projected_normal"]
each_density = pytest.mark.parametrize("density", DENSITIES)
each_stop = pytest.mark.parametrize("stop", [True, False])
each_uniformity = pytest.mark.parametrize("uniformity", ["none", "batch"])


def pair(uniformity="none", dtype=torch.float64, **options):
    guide = guides.Siamese(mlp([6, 10, 8]), DIM, **options).to(dtype)
    return models.VISimSiam(guide, uniformity=uniformity).to(dtype), guide


def views(size=SIZE, dtype=torch.float64):
    x = torch.randn(size, 6, dtype=dtype)
    return x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)


def log_density(law, i, z):
    """Log density of law i of a batch at one point, by formulas of others."""
    mu, z = law.mean_direction[i].detach().double().numpy(), z.detach().double().numpy()
    name = type(law).__name__
    if name == "ProjectedNormal":  # Pyro's own, which knows one width and d <= 4
        scale = law.scale_diag[i].detach()
        assert torch.equal(scale, scale[:1].expand(DIM))
        return float(pyro.distributions.ProjectedNormal(torch.tensor(mu) / scale[0]).log_prob(torch.tensor(z)))
    kappa = law.concentration[i].item()
    if name == "VonMisesFisher":
        return float(stats.vonmises_fisher(mu, kappa).logpdf(z))
    beta = (DIM - 1) / 2  # De Cao and Aziz, equations 1 and 2
    alpha = beta + kappa
    log_c = (alpha + beta) * math.log(2) + beta * math.log(math.pi) + math.lgamma(alpha) - math.lgamma(alpha + beta)
    return kappa * math.log1p(float(mu @ z)) - log_c


def loop(guide, data, uniformity):
    """ELBO of a batch, one pair after the other."""
    branches, total = [guide.branch(x) for x in data], 0.0
    for target, other in ((0, 1), (1, 0)):
        for i in range(SIZE):
            z, law = branches[target].point[i], branches[other].prediction
            total += log_density(law, i, z)
            if uniformity == "batch":
                mean = sum(math.exp(log_density(law, j, z)) for j in range(SIZE)) / SIZE
                total -= math.log(mean) + math.log(4 * math.pi)  # and the uniform prior on the sphere
    return total


@each_density
@each_uniformity
@pytest.mark.parametrize("width", ["head", "fixed"])
def test_elbo_is_the_loop_over_pairs(density, uniformity, width):
    if density == "projected_normal" and width == "head":
        width = "learned"  # one width for all axes, which is what the reference has
    model, guide = pair(uniformity, density=density, width=width)
    data = views()
    elbo = -Trace_ELBO().loss(model, guide, *data)
    assert elbo == pytest.approx(loop(guide, data, uniformity), rel=1e-6, abs=1e-6)


def test_projected_normal_head_has_a_width_per_axis():
    _, guide = pair(density="projected_normal")
    scale = guide.posterior(views()[0]).scale_diag
    assert scale.shape == (SIZE, DIM) and (scale.std(-1) > 0).all()


def negative_cosine(guide, x1, x2):
    """SimSiam's loss as in its algorithm 1: D(p, z) = - mean cosine of p with z, z without gradient."""
    p, z = [], []
    for x in (x1, x2):
        features = nn.functional.batch_norm(guide.encoder(x), None, None, training=True)
        z.append(guide.projector(features))
        p.append(guide.predictor(z[-1]))
    cosine = nn.CosineSimilarity(dim=1)
    return -0.5 * (cosine(p[0], z[1].detach()).mean() + cosine(p[1], z[0].detach()).mean())


@pytest.mark.parametrize("kappa", [0.5, 20.0])
def test_simsiam_is_the_negative_cosine_up_to_scale_and_constant(kappa):
    guide = guides.Siamese(mlp([6, 10, 8]), DIM, density="von_mises_fisher", width="fixed", concentration=kappa)
    guide = guide.double()
    loss = Trace_ELBO()(models.SimSiam(guide), guide)(*(data := views()))
    loss.backward()
    found = {name: p.grad.clone() for name, p in guide.named_parameters()}
    guide.zero_grad()
    cosine = negative_cosine(guide, *data)
    cosine.backward()
    log_integral = math.log(4 * math.pi * math.sinh(kappa) / kappa)  # of exp(kappa mu . z) over the sphere in space
    assert loss.item() == pytest.approx(2 * SIZE * (kappa * cosine.item() + log_integral), rel=1e-6)
    for name, p in guide.named_parameters():
        torch.testing.assert_close(found[name], 2 * SIZE * kappa * p.grad, rtol=1e-6, atol=1e-9)


@each_stop
@each_uniformity
def test_gradient_is_the_finite_difference(stop, uniformity):
    model, guide = pair(uniformity, stop_gradient=stop)
    data = views()
    frozen = [branch.point.detach() for branch in guide.branches(*data)]

    def loss():
        """With the points held where they are if there is a stop-gradient."""
        branches = guide.branches(*data)
        total = 0.0
        for target, other in ((0, 1), (1, 0)):
            z, law = (frozen if stop else [b.point for b in branches])[target], branches[other].prediction
            grid = law.log_prob(z.unsqueeze(1))  # (point, law)
            total -= grid.diagonal().sum()
            if uniformity == "batch":
                total += (grid.logsumexp(1) - math.log(SIZE) + math.log(4 * math.pi)).sum()
        return total.item()

    Trace_ELBO()(model, guide)(*data).backward()
    generator, step = torch.Generator().manual_seed(3), 1e-6
    for name, p in guide.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        with torch.no_grad():
            p += step * direction
            above = loss()
            p -= 2 * step * direction
            below = loss()
            p += step * direction
        got = 0.0 if p.grad is None else (p.grad * direction).sum().item()
        assert got == pytest.approx((above - below) / (2 * step), rel=2e-4, abs=2e-5), name


@each_stop
@each_uniformity
def test_stop_gradient_is_exactly_zero_on_the_side_of_the_target(stop, uniformity):
    """Only the first latent is scored: x1 is then the target and nothing else."""
    model, guide = pair(uniformity, stop_gradient=stop)
    x1, x2 = (x.requires_grad_() for x in views())
    hidden = {"hide": ["z2", "x1"]}
    Trace_ELBO()(poutine.block(model, **hidden), poutine.block(guide, **hidden))(x1, x2).backward()
    assert (x2.grad != 0).any()
    if stop:
        assert x1.grad is None or (x1.grad == 0).all()
    else:
        assert (x1.grad != 0).any()


# --- one pass ---------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """An encoder that counts its calls; dropout makes any two passes differ."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def counting_pair(uniformity):
    guide = guides.Siamese(Counting(), DIM, features=8)
    bank = MemoryBank(20) if uniformity == "bank" else uniformity
    return models.VISimSiam(guide, uniformity=bank), guide


def check_passes(guide, number):
    norms = [part for part in guide.modules() if isinstance(part, nn.BatchNorm1d)]
    assert len(norms) == 4  # of the encoder, the features, the projection and the predictor
    assert guide.encoder.calls == number
    assert [int(norm.num_batches_tracked) for norm in norms] == [number] * 4


@pytest.mark.parametrize("uniformity", ["none", "batch", "bank"])
def test_one_encoder_pass_per_view_and_step(uniformity):
    model, guide = counting_pair(uniformity)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    data = views(dtype=torch.float32)
    for step in (1, 2):
        svi.step(*data)
        check_passes(guide, 2 * step)
    pyro.clear_param_store()
    model, guide = counting_pair(uniformity)
    Trace_ELBO()(model, guide)(*data).backward()
    check_passes(guide, 2)
    model, guide = counting_pair(uniformity)
    Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)(model, guide)(*data).backward()
    check_passes(guide, 2)


def test_points_and_predictions_are_of_one_pass():
    """Dropout: two passes would give two points."""
    model, guide = counting_pair("none")
    data = views(dtype=torch.float32)
    guide_trace = poutine.trace(guide).get_trace(*data)
    with poutine.trace():
        branches = [guide.branch(x) for x in data]
    assert guide.encoder.calls == 2
    for j, branch in enumerate(branches, start=1):
        assert torch.equal(guide_trace.nodes[f"z{j}"]["value"], branch.point.detach())
        assert not guide_trace.nodes[f"z{j}"]["value"].requires_grad and branch.point.requires_grad


# --- Pyro -------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "published": {},
    "kappa learned": {"width": "learned"},
    "kappa from the projection": {"width_input": "projection"},
    "no batch norm": {"batch_norm": False},
    "no stop-gradient": {"stop_gradient": False},
    "projected normal": {"density": "projected_normal"},
}


@pytest.mark.parametrize(
    ("name", "uniformity"),
    [*((name, "none") for name in OPTIONS), ("published", "batch"), ("no stop-gradient", "batch")],
)
def test_svi_trains_every_parameter_and_the_loss_falls(name, uniformity):
    model, guide = pair(uniformity, torch.float32, **OPTIONS[name])
    data = views(64, torch.float32)
    before = {key: value.clone() for key, value in model.named_parameters()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(*data) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1 * 64
    # a bias before a standardisation changes nothing, and gets a gradient of rounding size
    idle = {"guide.projector.0.bias", "guide.predictor.0.bias"}
    assert {key for key, value in model.named_parameters() if torch.equal(value, before[key])} <= idle


@each_uniformity
def test_vectorised_sequential_and_mean_field_agree(uniformity):
    model, guide = pair(uniformity)
    guide.eval()
    data = views()
    expected = Trace_ELBO().loss(model, guide, *data)  # points and laws are fixed: no variance
    for objective in (
        Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
        Trace_ELBO(3, vectorize_particles=False),
        TraceMeanField_ELBO(),
    ):
        assert objective.loss(model, guide, *data) == pytest.approx(expected, rel=1e-10)


def test_predictive_draws_from_the_other_views_prediction():
    model, guide = pair(dtype=torch.float32)
    guide.eval()
    x1, x2 = views(dtype=torch.float32)
    with torch.no_grad():
        draws = Predictive(model, num_samples=4_000, parallel=True)(x1, x2)["z1"].reshape(4_000, SIZE, DIM)
        points = Predictive(model, guide=guide, num_samples=3)(x1, x2)["z1"].reshape(3, SIZE, DIM)
        # components in [-1, 1] have sd <= 1: 27 means over 4,000 draws, 5 sd: false alarm below 2e-5
        assert (draws.mean(0) - guide.posterior(x2).mean).abs().max() < 5 / math.sqrt(4_000)
        assert torch.equal(points, guide.branch(x1).point.expand(3, SIZE, DIM))


def test_arviz_has_points_from_the_guide_and_draws_from_its_predictions():
    model, guide = pair(dtype=torch.float32)
    data = views(dtype=torch.float32)
    points = diagnostics.to_arviz(model, guide, data, num_samples=4)
    drawn = diagnostics.to_arviz(model, guide.predictions, data, num_samples=200)
    guide.eval()
    with torch.no_grad():
        branch = guide.branch(data[0])
    np.testing.assert_allclose(points["posterior"]["z1"].values[0, 3], branch.point, rtol=1e-5, atol=1e-6)
    z = drawn["posterior"]["z1"].values[0]
    # 27 means over 200 draws, 5 sd of components in [-1, 1]: false alarm below 2e-5
    assert np.abs(z.mean(0) - branch.prediction.mean.numpy()).max() < 5 / math.sqrt(200)
    assert "z2" in points["prior"]


def test_every_later_step_takes_the_predictions(tmp_path):
    model, guide = pair("batch", torch.float32)
    data = views(60, torch.float32)
    section = diagnostics.pair_report(model, guide, data, tmp_path)
    assert {"concentration_q05", "partner_accuracy"} <= set(section.figures)
    guide.eval()
    with torch.no_grad():
        laws, points = guide.posterior(data[0]), guide.branch(data[1]).point
    found = diagnostics.credible_sets(laws, points, alpha=0.5)
    assert len(found.sizes) == 60


def test_partner_logits_are_the_loop():
    model, guide = pair()
    guide.eval()
    x1, x2 = views()
    x2 = x2[:4]
    got = model.partner_logits(x1, x2)
    one, two = guide.branch(x1), guide.branch(x2)

    def ratio(z, law, j):
        each = [math.exp(log_density(law, k, z)) for k in range(len(law.concentration))]
        return math.log(each[j] / (sum(each) / len(each)))

    for i in range(SIZE):
        for j in range(4):
            want = 0.5 * (ratio(one.point[i], two.prediction, j) + ratio(two.point[j], one.prediction, i))
            assert got[i, j].item() == pytest.approx(want, abs=1e-9)


def test_state_dict_copies_and_pickles():
    model, guide = pair(MemoryBank(12), torch.float32)
    data = views(dtype=torch.float32)
    Trace_ELBO()(model, guide)(*data)
    other, _ = pair(MemoryBank(12), torch.float32)
    other.load_state_dict(model.state_dict())
    pyro.clear_param_store()
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.eval(), model.eval()
        with torch.no_grad():
            left, right = (m.guide.branch(data[0]) for m in (model, twin))
        assert torch.equal(left.point, right.point)
        assert torch.equal(left.prediction.concentration, right.prediction.concentration)


def test_full_data_aggregate():
    data = views(40)
    _, guide = pair(batch_norm=False)
    whole, batch = (models.VISimSiam(guide, uniformity=u) for u in (FullData(*data), "batch"))
    assert Trace_ELBO().loss(whole, guide, *data) == pytest.approx(Trace_ELBO().loss(batch, guide, *data), rel=1e-9)


@each_density
def test_starts_at_a_mean_resultant_length_of_six_tenths(density):
    _, guide = pair(density=density, width="fixed", dtype=torch.float32)
    law = guide.eval().posterior(views(dtype=torch.float32)[0])
    length = (law.sample((4_000,)) * law.mean_direction).sum(-1).mean().item()
    # 36,000 cosines of sd <= 1, though 0.6 is exact for two families only; 0.05 for the third
    assert length == pytest.approx(0.6, abs=0.05 if density == "projected_normal" else 0.02)


# --- a known answer ---------------------------------------------------------------------------------------------------


def test_symmetric_form_with_uniformity_learns_the_law_of_the_other_view():
    """On the sphere in space the points become the exact mean directions, and caps hold what they claim."""
    world = SphereWorld(3)
    guide = guides.Siamese(mlp([32, 64, 64]), 3, stop_gradient=False, predictor=nn.Identity())
    model = models.VISimSiam(guide, uniformity="batch")
    fit(model, guide, world.batches(128, 0), steps=120, lr=1e-2, device="cpu", progress=False)
    test = world.sample(2_000, seed=9)
    with torch.no_grad():
        (points, law), other = guide.branch(test.x1), guide.branch(test.x2).point
    assert diagnostics.cosine_correlation(points, test.mean_direction1) > 0.98  # .994 to .997 at four seeds
    widths = (
        test.concentration1,
        torch.tensor(20.0),
        test.concentration2,
    )  # of the view, of the pair, of the other view
    lengths = [VonMisesFisher(test.z1, kappa).mean_resultant_length.mean().item() for kappa in widths]
    assert law.mean_resultant_length.mean().item() == pytest.approx(math.prod(lengths), abs=0.02)
    assert diagnostics.resultant_length_check(law, other).largest_gap < 0.03
    shares = diagnostics.coverage(diagnostics.cap_pit(law, other)).empirical
    np.testing.assert_allclose(shares, [0.5, 0.8, 0.95], atol=0.05)  # 4.5 standard errors of the first


# --- the example ------------------------------------------------------------------------------------------------------


def test_example_runs_resumes_and_writes_its_tables(example, tmp_path, capsys):
    module = example("vi_simsiam")
    command = ["--small", "--rows", "simsiam", "rpm-3", "--out", str(tmp_path / "runs")]
    module.main(module.parse(command))
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert [file.stem for file in files] == ["digits-simsiam-0", "sphere-rpm-3-0"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    module.main(module.parse(command))
    assert capsys.readouterr().out == ""  # nothing is fitted twice
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n{module.MARKER}\nold")
    module.write_page(page, tmp_path / "runs")
    text = page.read_text()
    assert text.startswith("Text.\n") and "old" not in text and "| rpm-3: d = 3, " in text
    assert len(json.loads(page.with_suffix(".json").read_text())) == 2


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.0, -1.0, math.inf, math.nan])
def test_concentration_must_be_positive(kappa):
    with pytest.raises(ValueError, match="`concentration` of the predictions must be positive and finite"):
        pair(concentration=kappa)


@pytest.mark.parametrize("option", ["density", "width", "width_input"])
def test_unknown_option(option):
    with pytest.raises(ValueError, match=f"`{option}` must be one of .*, got 'other'"):
        pair(**{option: "other"})


@pytest.mark.parametrize("part", ["projector", "predictor"])
def test_a_part_of_another_width(part):
    net = nn.Linear(8 if part == "projector" else DIM, 7)
    with pytest.raises(ValueError, match=rf"`{part}` must return \(N, 3\), .* got \(9, 7\)"):
        pair(**{part: net})[1].posterior(views()[0])


def test_wrong_guides_and_uniformities():
    _, guide = pair()
    with pytest.raises(TypeError, match="points and predictions, got VonMisesFisher; build guides.Siamese"):
        models.VISimSiam(guides.VonMisesFisher(nn.Linear(6, 8), DIM))
    with pytest.raises(TypeError, match="the class Siamese"):
        models.VISimSiam(guides.Siamese)
    with pytest.raises(ValueError, match="'none', 'batch' or an aggregate, got 'bank'"):
        models.VISimSiam(guide, uniformity="bank")
    for wrong in (None, MemoryBank):
        with pytest.raises(TypeError, match="'none', 'batch' or an aggregate"):
            models.VISimSiam(guide, uniformity=wrong)
    with pytest.raises(ValueError, match="one fixed concentration, got a guide with width='head'"):
        models.SimSiam(guide)


def test_views_that_do_not_fit():
    model, guide = pair()
    x1, x2 = views()
    with pytest.raises(ValueError, match=r"one leading dimension N, got \(9, 6\) and \(4, 6\)"):
        model(x1, x2[:4])
    with pytest.raises(ValueError, match="one leading dimension N"):
        guide(x1, x2[:4])
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        Trace_ELBO().loss(model, guide, x1[:1], x2[:1])
    model, guide = pair(batch_norm=False)
    assert math.isfinite(Trace_ELBO().loss(model, guide, x1[:1], x2[:1]))
