"""The library as a stranger uses it: other grids, encoders of all kinds, wrong arguments; public names only."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_contrastive import diagnostics, guides, models
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import HypersphericalUniform, PowerSpherical, ProjectedNormal, VonMisesFisher
from pyro_contrastive.factors import infonce_factor, recognition_factor
from pyro_contrastive.kernels import VonMisesFisherKernel

DIM = 5
FAMILIES = [guides.VonMisesFisher, guides.PowerSpherical, guides.ProjectedNormal]


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def linear_guide(family: Callable[..., nn.Module] = guides.VonMisesFisher) -> nn.Module:
    return family(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), DIM)


# --- von Mises-Fisher law off the documented grid ---------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 7, 50, 300, 2048])
@pytest.mark.parametrize("kappa", [0.0, 1e-20, 1e-7, 0.5, 37.0, 5e4, 1e8, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_von_mises_fisher_is_finite_and_on_the_sphere_far_off_the_grid(dim, kappa, dtype):
    mean, concentration = unit(dim, dtype=dtype).requires_grad_(), torch.tensor(kappa, dtype=dtype, requires_grad=True)
    law = VonMisesFisher(mean, concentration)
    z = law.rsample((64,))
    assert torch.allclose(z.norm(dim=-1), torch.ones(64, dtype=dtype), atol=1e-5)
    assert torch.isfinite(law.entropy())
    assert torch.isfinite(law.log_prob(z)).all()
    for gradient in torch.autograd.grad((z @ mean).sum() + law.log_prob(z.detach()).sum(), [mean, concentration]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("dim", "kappa"), [(2, 0.5), (2, 37.0), (3, 5e4), (7, 37.0), (50, 0.5), (50, 37.0)])
def test_von_mises_fisher_density_is_scipys(dim, kappa):
    mean = unit(dim, dtype=torch.float64)
    law = VonMisesFisher(mean, torch.tensor(kappa, dtype=torch.float64))
    z = law.sample((20,))
    expected = scipy.stats.vonmises_fisher(mean.numpy(), kappa).logpdf(z.numpy())
    np.testing.assert_allclose(law.log_prob(z).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("law", [VonMisesFisher, PowerSpherical])
def test_batches_of_every_shape_even_empty(law, batch):
    q = law(unit(*batch, 7), torch.rand(batch) * 10)
    assert q.rsample().shape == (*batch, 7)
    assert q.rsample((0,)).shape == (0, *batch, 7)
    assert q.expand((4, *batch)).rsample((3,)).shape == (3, 4, *batch, 7)
    assert q.log_prob(q.sample()).shape == q.entropy().shape == batch


def test_first_draw_in_inference_mode_leaves_later_gradients_alone():
    dim = 23  # used by no other test, so that its table is built here
    with torch.inference_mode():
        VonMisesFisher(unit(4, dim), torch.ones(4)).rsample()
    kappa = torch.ones(4, requires_grad=True)
    VonMisesFisher(unit(4, dim), kappa).rsample()[..., 0].sum().backward()
    assert torch.isfinite(kappa.grad).all()


# --- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_encoder_runs_under_autocast(family):
    guide, x = linear_guide(family), torch.randn(12, 8)
    model = models.RPM(guide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = guide.posterior(x)
        loss = Trace_ELBO().differentiable_loss(model, guide, x, x)
    assert posterior.mean_direction.dtype == torch.float32
    assert torch.allclose(posterior.mean_direction.norm(dim=-1), torch.ones(12), atol=1e-5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters())


@pytest.mark.parametrize(
    "law",
    [
        VonMisesFisher(unit(6, DIM), torch.full((6,), 200.0)),
        PowerSpherical(unit(6, DIM), torch.full((6,), 200.0)),
        ProjectedNormal(unit(6, DIM), torch.full((6, DIM), 0.1)),
    ],
)
def test_densities_keep_their_precision_under_autocast(law):
    z = unit(6, DIM)
    expected = law.cross_log_prob(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(law.cross_log_prob(z), expected)


def test_kernels_and_closed_forms_keep_their_precision_under_autocast():
    z, x1, x2 = unit(6, DIM), torch.randn(6, 8), torch.randn(6, 8)
    guide, kernel = linear_guide(), VonMisesFisherKernel(200.0)
    model = models.MCInfoNCE(guide)
    posteriors = guide.posterior(x1), guide.posterior(x2)
    expected = kernel(z, z), model.partner_logits(x1, x2, posteriors=posteriors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel(z, z), expected[0])
        assert torch.equal(model.partner_logits(x1, x2, posteriors=posteriors), expected[1])


# --- encoders ---------------------------------------------------------------------------------------------------------


class Custom(nn.Module):
    """An encoder whose width no layer tells."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class Pair(nn.Linear):
    """An encoder that returns more than the features."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


CONVOLUTION = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
ENCODERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int | None]] = {
    "relu": (lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU()), lambda: torch.randn(9, 8), None),
    "layer norm": (lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)), lambda: torch.randn(9, 8), None),
    "dropout": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5)), lambda: torch.randn(9, 8), None),
    "convolution": (lambda: nn.Sequential(*CONVOLUTION), lambda: torch.randn(9, 1, 8, 8), None),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(6), nn.ReLU()), lambda: torch.randn(9, 8), None),
    "tokens": (lambda: nn.EmbeddingBag(50, 12), lambda: torch.randint(0, 50, (9, 4)), None),
    "custom": (Custom, lambda: torch.randn(9, 8), 6),
    "identity": (nn.Identity, lambda: torch.randn(9, 8), 8),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_all_kinds_train(name):
    encoder, views, features = ENCODERS[name]
    guide = guides.VonMisesFisher(encoder(), DIM, features=features)
    model = models.MCInfoNCE(guide, concentration=20.0)
    x = views()
    guide.posterior(x)  # shapes the lazy one
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert all(math.isfinite(svi.step(x, x)) for _ in range(2))
    assert guide.posterior(x).rsample().shape == (9, DIM)


def test_lazy_encoder_that_has_seen_nothing_is_told_the_way_out():
    with pytest.raises(ValueError, match=r"lazy parameters.*call guide.posterior\(x\) once"):
        guides.VonMisesFisher(nn.LazyLinear(6), DIM)(torch.randn(9, 8), torch.randn(9, 8))


def test_double_precision_trains():
    guide = linear_guide().double()
    model, x = models.MCInfoNCE(guide, concentration=20.0).double(), torch.randn(9, 8, dtype=torch.float64)
    assert guide.posterior(x).rsample().dtype == torch.float64
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x, x))


@pytest.mark.parametrize(
    ("encoder", "features", "x", "message"),
    [
        (
            nn.Sequential(nn.Linear(8, 12), nn.GLU()),
            None,
            torch.randn(9, 8),
            r"\(N, 12\), got \(9, 6\); pass features=6",
        ),
        (nn.Conv2d(1, 4, 3), None, torch.randn(9, 1, 8, 8), r"got \(9, 4, 6, 6\); pool or flatten"),
        (Pair(8, 6), None, torch.randn(9, 8), "got tuple; wrap it in a module"),
        (nn.Linear(8, 6), 7, torch.randn(9, 8), "pass features=6 to the guide"),
    ],
)
def test_encoder_of_another_shape_is_told_the_way_out(encoder, features, x, message):
    with pytest.raises(ValueError, match=message):
        guides.VonMisesFisher(encoder, DIM, features=features).posterior(x)


@pytest.mark.parametrize("features", [0, -1, "6", 6.0])
def test_width_of_features_is_checked(features):
    with pytest.raises(ValueError, match=r"`features` must be an integer >= 1.*got"):
        guides.VonMisesFisher(nn.Linear(8, 6), DIM, features=features)


def test_empty_views_are_refused():
    with pytest.raises(ValueError, match="at least one item, got none"):
        linear_guide()(torch.randn(0, 8), torch.randn(0, 8))


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used_local", [False, True])
@pytest.mark.parametrize("built_local", [False, True])
@pytest.mark.parametrize("name", ["mcinfonce", "learned kernel", "rpm", "own function"])
def test_pairs_run_in_both_parameter_modes_wherever_they_were_built(name, built_local, used_local):
    """Pyro's own modules fail with an AttributeError when built outside of the context and used in it."""
    local = lambda on: pyro.settings.context(module_local_params=True) if on else nullcontext()  # noqa: E731
    with local(built_local):
        guide = linear_guide()
        pair: dict[str, Callable[[], Callable[..., None]]] = {
            "mcinfonce": lambda: models.MCInfoNCE(guide, concentration=20.0),
            "learned kernel": lambda: models.MCInfoNCE(
                guide, concentration=20.0, evidence="elbo", learn_concentration=True
            ),
            "rpm": lambda: models.RPM(guide),
            "own function": lambda: own_model(guide),
        }
        model = pair[name]()
    with local(used_local):
        elbo = Trace_ELBO()(model, guide)
        x = torch.randn(9, 8)
        elbo(x, x).backward()
        assert all(p.grad is not None for p in guide.encoder.parameters())
    if used_local and name != "own function":
        assert len(pyro.get_param_store()) == 0


def own_model(guide: nn.Module, plate: str = "pairs") -> Callable[[Tensor, Tensor], None]:
    """A user's own model, without parameters of its own."""

    def model(x1: Tensor, x2: Tensor) -> None:
        with pyro.plate(plate, len(x1)):
            z1 = pyro.sample("z1", HypersphericalUniform(DIM))
            z2 = pyro.sample("z2", VonMisesFisher(z1, torch.tensor(10.0)))
            recognition_factor("x1", z1, guide.posterior(x1))
            recognition_factor("x2", z2, guide.posterior(x2))

    return model


@pytest.mark.parametrize("wrong", [None, 20.0, guides.VonMisesFisher, nn.Linear(8, 6)], ids=repr)
@pytest.mark.parametrize("model", [models.MCInfoNCE, models.RPM])
def test_model_refuses_what_is_no_recognition_module(model, wrong):
    with pytest.raises(TypeError, match=r"`guide` must be a recognition module with a method posterior\(x\), got"):
        model(wrong)


@pytest.mark.parametrize("num_samples", [0, 2.5])
def test_number_of_samples_is_checked(num_samples):
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1, got"):
        models.MCInfoNCE(linear_guide(), concentration=20.0, evidence="k_sample", num_samples=num_samples)


@pytest.mark.parametrize("wrong", [linear_guide(), torch.randn(9, DIM)], ids=["guide", "tensor"])
def test_recognition_factor_refuses_what_is_no_law(wrong):
    with pyro.plate("pairs", 9), pytest.raises(TypeError, match=r"needs a recognition law, got .*posterior\(x\)"):
        recognition_factor("x", unit(9, DIM), wrong)


def test_factors_count_draws_in_an_outer_plate_as_draws():
    guide, x = linear_guide(), torch.randn(9, 8)
    with pyro.poutine.trace() as trace, pyro.plate("items", 9, dim=-1), pyro.plate("draws", 3, dim=-2):
        z = pyro.sample("z", guide.posterior(x))
        recognition_factor("x", z, guide.posterior(x))
        infonce_factor("pair", z, z, VonMisesFisherKernel(5.0))
    for name in ("x", "pair"):
        together = trace.trace.nodes[name]["fn"].log_factor
        assert together.shape == (3, 9)
    alone = torch.stack([guide.posterior(x).log_prob(row.unsqueeze(-2)).log_softmax(-1).diagonal() for row in z])
    torch.testing.assert_close(trace.trace.nodes["x"]["fn"].log_factor, alone + math.log(9))


@pytest.mark.parametrize("position", ["model", "guide"])
def test_to_arviz_refuses_what_cannot_be_called(position):
    pair = {"model": linear_guide(), "guide": linear_guide(), position: None}
    with pytest.raises(TypeError, match=rf"`{position}` must be callable.*got NoneType"):
        diagnostics.to_arviz(**pair, views=(torch.randn(4, 8), torch.randn(4, 8)), num_samples=2)


def test_worlds_of_more_than_31_dimensions_need_no_further_argument():
    assert SphereWorld(dim=40).sample(3, seed=0).x1.shape == (3, 80)
