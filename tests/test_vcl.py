"""SimCLR, SupCon and their variational forms: the objective against loops, limits, and every setting Pyro has."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_contrastive import distributions as dist
from pyro_contrastive import guides, models
from pyro_contrastive.fit import fit
from pyro_contrastive.nets import mlp
from pyro_contrastive.objectives import WeightedELBO
from pyro_contrastive.positives import nt_xent_log_ratio

DIM, SIZE, KAPPA, BETA = 3, 10, 8.0, 0.3
LABELS = torch.arange(SIZE) % 4
F64 = torch.float64

BUILD = {
    "SimCLR": lambda guide: models.SimCLR(guide, concentration=KAPPA),
    "SupCon": lambda guide: models.SupCon(guide, concentration=KAPPA),
    "SupCon, inside": lambda guide: models.SupCon(guide, concentration=KAPPA, positives="supcon_in"),
    "VSimCLR": lambda guide: models.VSimCLR(guide, beta=BETA, concentration=KAPPA),
    "VSimCLR, exact": lambda guide: models.VSimCLR(guide, beta=BETA, kl="exact", concentration=KAPPA),
    "VSimCLR, gaussian": lambda guide: models.VSimCLR(guide, beta=BETA, kl="gaussian", concentration=KAPPA),
    "VSupCon": lambda guide: models.VSupCon(guide, beta=BETA, concentration=KAPPA),
}
each = pytest.mark.parametrize("name", BUILD)


def make(name, dtype=torch.float32, **options):
    encoder = mlp([6, 16, 12])
    if name.startswith("V"):
        guide = guides.ProjectedNormal(encoder, DIM, free_length="gaussian" in name, **options)
    else:
        guide = guides.Delta(encoder, DIM)
    return BUILD[name](guide.to(dtype)).to(dtype), guide


def data(name, size=SIZE, dtype=torch.float32):
    x = torch.randn(size, 6, dtype=dtype)
    views = x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)
    return (*views, torch.arange(size) % 4) if "SupCon" in name else views


def objective(model, **options):
    return model.objective(**options) if hasattr(model, "objective") else Trace_ELBO(max_plate_nesting=1, **options)


# The objective -------------------------------------------------------------------------------------------------------


@each
def test_loss_is_the_factor_minus_the_weighted_divergence(name):
    model, guide = make(name, F64)
    views = data(name, dtype=F64)
    elbo = objective(model)
    torch.manual_seed(3)
    loss = elbo.loss(model, guide, *views)
    torch.manual_seed(3)
    with poutine.trace() as capture:
        guide(*views)
    z = torch.cat([capture.trace.nodes[site]["value"] for site in ("z1", "z2")])
    labels = views[2] if len(views) == 3 else None
    want = nt_xent_log_ratio(KAPPA * z @ z.mT, labels, positives=model.positives).sum()
    for x in views[:2] if name.startswith("V") else ():
        q = guide.posterior(x)
        prior = {"scale_free": dist.ScaleFreeUniform, "gaussian": dist.AmbientUniform}.get(model.kl)
        if prior is None:
            return  # sampled inside the loss; see the test of its mean
        want = want - BETA / (2 * DIM) * kl_divergence(q, prior(DIM)).sum()
    assert loss == pytest.approx(-want.item(), rel=1e-10)


def test_exact_divergence_enters_with_its_weight():
    """One seed, so one draw of every latent: the difference of two losses is the sampled divergence. 5 s.e."""
    model, guide = make("VSimCLR, exact", F64)
    views = data("VSimCLR", size=200, dtype=F64)
    guide.eval()
    losses = []
    for weight in (0.5, 1.5):
        torch.manual_seed(0)
        losses.append(WeightedELBO(weight).loss(model, guide, *views))
    with torch.no_grad():
        laws = [guide.posterior(x).expand((50, 200)) for x in views]
        samples = sum(kl_divergence(q, dist.HypersphericalUniform(DIM)).sum(-1) for q in laws)
    assert samples.std() < 0.1 * samples.mean()
    assert abs(losses[1] - losses[0] - samples.mean()) < 5 * samples.std() * math.sqrt(1 + 1 / 50)


def test_weighted_elbo_is_poutine_scale_on_both_sides():
    model, guide = make("VSimCLR", F64)
    views = data("VSimCLR", dtype=F64)
    prior = dist.ScaleFreeUniform(DIM)

    def scaled_model(x1, x2):
        with pyro.plate("pairs", SIZE):
            with poutine.scale(scale=0.05):
                z = [pyro.sample(site, prior) for site in ("z1", "z2")]
            z = torch.cat(z, -2)
            pyro.factor("positive", nt_xent_log_ratio(KAPPA * z @ z.mT))

    scaled_guide = poutine.scale(guide, scale=0.05)
    torch.manual_seed(1)
    want = TraceMeanField_ELBO().loss(scaled_model, scaled_guide, *views)
    torch.manual_seed(1)
    assert WeightedELBO(0.05).loss(model, guide, *views) == pytest.approx(want, rel=1e-12)
    torch.manual_seed(1)
    one = WeightedELBO(1.0).loss(model, guide, *views)
    torch.manual_seed(1)
    assert one == pytest.approx(TraceMeanField_ELBO().loss(model, guide, *views), rel=1e-12)


def test_weighted_elbo_scales_what_has_no_registered_divergence():
    def model():
        with pyro.plate("rows", 4):
            pyro.sample("z", pyro.distributions.Cauchy(torch.zeros(4), 1.0))

    def guide():
        with pyro.plate("rows", 4):
            pyro.sample("z", pyro.distributions.Normal(torch.ones(4), 1.0))

    losses = []
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        losses.append(WeightedELBO(weight).loss(model, guide))
    assert losses[0] == 0 and losses[1] == pytest.approx(0.5 * losses[2]) and losses[2] != 0


def test_trace_elbo_has_the_exact_divergence_at_weight_one():
    """Whatever `kl` and beta say. 5 s.e. of 20 losses each."""
    views = data("VSimCLR", size=50, dtype=F64)
    model, guide = make("VSimCLR", F64)
    exact = models.VSimCLR(guide, beta=0.0, kl="exact", concentration=KAPPA).double()
    guide.eval()
    with torch.no_grad():
        sampled = torch.tensor([Trace_ELBO().loss(model, guide, *views) for _ in range(20)])
        closed = torch.tensor([TraceMeanField_ELBO().loss(exact, guide, *views) for _ in range(20)])
    error = ((sampled.var() + closed.var()) / 20).sqrt()
    assert abs(sampled.mean() - closed.mean()) < 5 * error


# Reductions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", ["VSimCLR", "VSupCon"])
def test_narrow_posteriors_give_the_point_method(narrow):
    """At sigma = 1e-5 the factor is that of the mean directions, up to kappa sigma."""
    model, guide = make(narrow, F64, initial_scale=1e-5)
    views = data(narrow, dtype=F64)
    torch.manual_seed(1)
    trace = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace(*views))).get_trace(*views)
    points = torch.cat([guide.posterior(x).mean_direction for x in views[:2]])
    labels = views[2] if len(views) == 3 else None
    want = nt_xent_log_ratio(KAPPA * points @ points.mT, labels)
    torch.testing.assert_close(trace.nodes["positive"]["fn"].log_factor, want, rtol=0, atol=20 * KAPPA * 1e-5)


@pytest.mark.parametrize(("labelled", "plain"), [("SupCon", "SimCLR"), ("VSupCon", "VSimCLR")])
def test_unique_labels_give_the_method_without_labels(labelled, plain):
    model, guide = make(labelled, F64)
    other = BUILD[plain](guide).double()
    views = data(plain, dtype=F64)
    losses = []
    for program, arguments in ((model, (*views, torch.randperm(SIZE))), (other, views)):
        torch.manual_seed(4)
        losses.append(objective(program).loss(program, guide, *arguments))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_beta_zero_has_no_divergence():
    _, guide = make("VSimCLR")
    model = models.VSimCLR(guide, beta=0.0, concentration=KAPPA)
    views = data("VSimCLR")
    torch.manual_seed(2)
    loss = model.objective().loss(model, guide, *views)
    torch.manual_seed(2)
    free = models.SimCLR(guide, concentration=KAPPA)
    assert loss == pytest.approx(TraceMeanField_ELBO().loss(free, guide, *views), rel=1e-5)


def test_other_families_have_their_exact_divergence():
    guide = guides.VonMisesFisher(mlp([6, 16]), DIM)
    model = models.VSimCLR(guide)
    views = data("VSimCLR")
    torch.manual_seed(2)
    loss = WeightedELBO(2.0).loss(model, guide, *views)
    torch.manual_seed(2)
    want = WeightedELBO(0.0).loss(model, guide, *views)
    with torch.no_grad():
        divergence = sum(kl_divergence(guide.posterior(x), dist.HypersphericalUniform(DIM)).sum() for x in views)
    assert loss - want == pytest.approx(2 * divergence.item(), rel=1e-4)


# Every setting Pyro has ----------------------------------------------------------------------------------------------


@each
def test_svi_trains_every_parameter_and_the_loss_falls(name):
    model, guide = make(name)
    views = data(name, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), objective(model))
    losses = [svi.step(*views) for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1 * 16 * 5
    learned = {k for k, _ in model.named_parameters()}
    assert not [k for k in learned if torch.equal(model.state_dict()[k], before[k])]


@each
@pytest.mark.parametrize("vectorize", [False, True])
def test_elbo_module_with_particles(name, vectorize):
    model, guide = make(name)
    views = data(name)
    with pyro.settings.context(module_local_params=True):
        elbo = objective(model, num_particles=3, vectorize_particles=vectorize)(model, guide)
        loss = elbo(*views)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in elbo.parameters())
    assert {id(p) for p in guide.parameters()} <= {id(p) for p in elbo.parameters()}


@pytest.mark.parametrize("name", ["VSimCLR", "VSupCon"])
def test_vectorised_and_sequential_particles_have_one_mean(name):
    """5 standard errors."""
    model, guide = make(name)
    views = data(name)
    guide.eval()
    means, errors = [], []
    for vectorize in (False, True):
        values = torch.tensor(
            [
                objective(model, num_particles=3, vectorize_particles=vectorize).loss(model, guide, *views)
                for _ in range(10)
            ]
        )
        means.append(values.mean())
        errors.append(values.var() / 10)
    assert abs(means[0] - means[1]) < 5 * sum(errors).sqrt()


@each
def test_predictive_and_replay(name):
    model, guide = make(name)
    views = data(name)
    draws = Predictive(model, guide=guide, num_samples=4, return_sites=("z1", "z2"))(*views)
    assert draws["z1"].shape == draws["z2"].shape == (4, SIZE, DIM)
    prior = Predictive(model, num_samples=4, return_sites=("z1",), parallel=True)(*views)["z1"]
    assert prior.shape == (4, SIZE, DIM)
    trace = poutine.trace(guide).get_trace(*views)
    found = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*views)
    assert found.nodes["z1"]["value"] is trace.nodes["z1"]["value"]
    assert found.nodes["positive"]["fn"].log_factor.shape == (SIZE,)


@each
def test_one_encoder_pass_per_view_and_step(name):
    model, guide = make(name)
    calls = []
    guide.encoder.register_forward_hook(lambda *_: calls.append(1))
    views = data(name)
    objective(model).loss_and_grads(model, guide, *views)
    assert len(calls) == 2


@each
def test_fit_and_state(name):
    model, guide = make(name)
    views = data(name, 16)
    batches = [tuple(v for v in views)]
    result = fit(
        model, guide, batches, epochs=3, num_views=len(views), elbo=objective(model), device="cpu", progress=False
    )
    assert result.status == "done" and set(result.history) == {"step", "loss", "lr", "positive", "latents"}
    other, _ = make(name)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.partner_logits(*views).shape, (16, 16))
    assert guide.posterior(views[0]).event_shape == (DIM,)


def test_fit_takes_the_objective_of_the_model():
    views = data("VSimCLR", 16)
    losses = []
    for elbo in (None, models.VSimCLR.objective):
        torch.manual_seed(0)
        model, guide = make("VSimCLR")
        elbo = elbo and elbo(model)
        losses.append(fit(model, guide, [views], epochs=2, elbo=elbo, device="cpu", progress=False).history["loss"])
    assert losses[0] == losses[1]


@each
def test_partner_logits_find_the_partner(name):
    model, guide = make(name)
    guide.eval()
    x = 3 * torch.randn(8, 6)
    logits = model.partner_logits(x, x + 0.01 * torch.randn_like(x), num_samples=300)
    assert logits.shape == (8, 8)
    if not name.startswith("V"):
        assert (logits.argmax(-1) == torch.arange(8)).all()


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda g: models.VSimCLR(g, beta=-0.1), "`beta` must be >= 0"),
        (lambda g: models.VSimCLR(g, beta=math.nan), "`beta` must be >= 0"),
        (lambda g: models.VSupCon(g, kl="bound"), "`kl` must be one of exact, scale_free, gaussian, got 'bound'"),
        (lambda g: models.VSimCLR(g, kl="gaussian"), "free_length=True"),
        (lambda g: models.VSupCon(g, positives="in"), "`positives` must be one of"),
        (lambda g: models.SupCon(g, positives="in"), "`positives` must be one of"),
        (lambda g: models.SimCLR(g, concentration=0.0), "must be positive and finite"),
        (lambda g: WeightedELBO(-1.0), "`kl_weight` must be >= 0"),
        (lambda g: WeightedELBO(math.inf), "`kl_weight` must be >= 0"),
    ],
)
def test_arguments_are_checked(build, message):
    guide = guides.ProjectedNormal(mlp([6, 16]), DIM)
    with pytest.raises(ValueError, match=message):
        build(guide)


@pytest.mark.parametrize("method", [models.SimCLR, models.SupCon, models.VSimCLR, models.VSupCon])
def test_a_class_is_no_guide(method):
    with pytest.raises(TypeError, match="the class ProjectedNormal"):
        method(guides.ProjectedNormal)


def test_point_embeddings_are_refused_by_the_variational_methods():
    guide = guides.Delta(mlp([6, 16]), DIM)
    model = models.VSimCLR(guide)
    with pytest.raises(ValueError, match="VSimCLR needs posteriors with a density, got Delta; .*SimCLR"):
        model.objective().loss(model, guide, *data("VSimCLR"))


@each
@pytest.mark.parametrize("size", [0, 1])
def test_batch_without_negatives_is_refused(name, size):
    model, guide = make(name)
    guide.eval()
    with pytest.raises(ValueError, match="N >= 2|at least one item"):
        objective(model).loss(model, guide, *data(name, size))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(SIZE - 1), rf"`labels` must be a tensor of {SIZE} integers"),
        (torch.arange(SIZE).float(), "labels must be integers"),
        (torch.zeros(SIZE, dtype=torch.int64), "at least two classes"),
    ],
)
def test_labels_are_checked(labels, message):
    model, guide = make("VSupCon")
    with pytest.raises(ValueError, match=message):
        model.objective().loss(model, guide, *data("VSimCLR"), labels)


def test_guides_pass_over_labels_and_nothing_else():
    guide = guides.Delta(mlp([6, 16]), DIM)
    views = data("VSimCLR")
    trace = poutine.trace(guide).get_trace(*views, LABELS)
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "pairs"] == ["z1", "z2"]
    numbers = guides.Delta(torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 8)), DIM)
    vectors = torch.randn(SIZE), torch.randn(SIZE)  # one number per item is a view
    trace = poutine.trace(numbers).get_trace(*vectors)
    assert {"z1", "z2"} <= set(trace.nodes)
