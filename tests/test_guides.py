"""Recognition families: shapes, starting widths, persistence, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Delta as DeltaDistribution
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_contrastive import distributions, guides, models
from pyro_contrastive.nets import mlp

FAMILIES = {
    guides.VonMisesFisher: distributions.VonMisesFisher,
    guides.PowerSpherical: distributions.PowerSpherical,
    guides.ProjectedNormal: distributions.ProjectedNormal,
    guides.Delta: DeltaDistribution,
}
STOCHASTIC = [family for family in FAMILIES if family is not guides.Delta]
all_families = pytest.mark.parametrize("family", FAMILIES)


def make(family, dim=5, **kwargs):
    return family(mlp([8, 16, 12]), dim, **kwargs)


def draws(guide, x):
    """What a guide says about x, for any family, at fixed noise."""
    torch.manual_seed(11)
    return guide.posterior(x).rsample()


@all_families
@pytest.mark.parametrize("dim", [2, 3, 17])
def test_posterior_has_one_unit_vector_per_input(family, dim):
    q = make(family, dim).posterior(torch.randn(6, 8))
    assert type(q) is FAMILIES[family]
    assert q.batch_shape == (6,) and q.event_shape == (dim,)
    z = q.rsample((4,))
    assert z.shape == (4, 6, dim) and z.requires_grad
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(4, 6))


@all_families
def test_images_pass_through_a_convolutional_encoder(family):
    encoder = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert family(encoder, dim=4).posterior(torch.randn(3, 1, 8, 8)).batch_shape == (3,)


@pytest.mark.parametrize("dim", [2, 3, 10, 128])
@pytest.mark.parametrize("family", STOCHASTIC)
def test_posteriors_start_at_a_mean_resultant_length_of_six_tenths(family, dim):
    lengths = []
    for _ in range(20):
        q = family(mlp([8, 32, 32]), dim).posterior(torch.randn(200, 8))
        centre = q.mean_direction
        lengths.append((q.sample((20,)) * centre).sum(-1).mean())
    # one network is off by a few hundredths (its widths spread by 10 %); the mean over 20 by a fraction of that
    lengths = torch.stack(lengths)
    assert (lengths - 0.6).abs().max() < 0.12
    assert (lengths.mean() - 0.6).abs() < 0.04


@pytest.mark.parametrize(
    ("family", "option", "attribute"),
    [
        (guides.VonMisesFisher, "initial_concentration", "concentration"),
        (guides.PowerSpherical, "initial_concentration", "concentration"),
        (guides.ProjectedNormal, "initial_scale", "scale_diag"),
    ],
)
def test_initial_width_can_be_chosen(family, option, attribute):
    value = getattr(make(family, **{option: 0.03}).posterior(torch.randn(200, 8)), attribute)
    assert 0.02 < value.mean() < 0.045


def test_projected_normal_widths_differ_between_axes():
    q = make(guides.ProjectedNormal).posterior(torch.randn(6, 8))
    assert q.scale_diag.shape == (6, 5) and (q.scale_diag.std(-1) > 0).all()


@all_families
@pytest.mark.parametrize("views", [1, 2, 3])
def test_guide_has_one_site_per_view_in_one_plate(family, views):
    trace = poutine.trace(make(family)).get_trace(*torch.randn(views, 6, 8))
    sites = {k: v for k, v in trace.nodes.items() if v["type"] == "sample" and k != "pairs"}
    assert list(sites) == [f"z{j}" for j in range(1, views + 1)]
    for site in sites.values():
        assert [(f.name, f.size, f.dim) for f in site["cond_indep_stack"]] == [("pairs", 6, -1)]
        assert site["value"].shape == (6, 5) and not site["is_observed"]
    trace.compute_log_prob()
    assert all(site["log_prob"].shape == (6,) for site in sites.values())


@all_families
def test_guide_samples_from_its_posterior(family):
    guide, x = make(family), torch.randn(6, 8)
    sites = poutine.trace(guide).get_trace(x, 2 * x).nodes
    for name, view in (("z1", x), ("z2", 2 * x)):
        value = sites[name]["value"].detach()
        expected = guide.posterior(view).log_prob(value)
        torch.testing.assert_close(sites[name]["fn"].log_prob(value), expected)


@all_families
def test_state_dict_is_everything(family):
    source, target, x = make(family), make(family), torch.randn(6, 8)
    assert not torch.equal(draws(source, x), draws(target, x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(draws(source, x), draws(target, x))


def through_pickle(guide):
    return pickle.loads(pickle.dumps(guide))


def through_torch_save(guide):
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@all_families
@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("when", ["fresh", "after a pass", "after a backward pass"])
def test_copies_are_equal_and_independent(family, clone, when):
    guide, x = make(family), torch.randn(6, 8)
    if when != "fresh":  # the pass holds non-leaf tensors, which cannot be copied
        model = models.MCInfoNCE(guide, concentration=5.0, evidence="elbo")
        loss = Trace_ELBO()(model, guide)(x, x.flip(0))
        if when == "after a backward pass":
            loss.backward()
    twin = clone(guide)
    before = draws(guide, x)
    assert torch.equal(draws(twin, x), before)
    with poutine.trace():  # nor does the copy answer from the original's pass
        twin.posterior(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert torch.equal(draws(guide, x), before) and not torch.equal(draws(twin, x), before)
    poutine.trace(twin).get_trace(x, x)


@all_families
def test_double(family):
    guide = make(family).double()
    assert guide.posterior(torch.randn(6, 8).double()).rsample().dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_float32_posteriors(dtype):
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x).to(dtype)

    q = guides.VonMisesFisher(Half(8, 12), dim=5).posterior(torch.randn(6, 8))
    assert q.concentration.dtype == q.mean_direction.dtype == torch.float32


@all_families
@pytest.mark.parametrize("dim", [1, 0, -2, 3.0, "5", None])
def test_dimension_is_checked(family, dim):
    with pytest.raises(ValueError, match="`dim` must be an integer >= 2"):
        family(nn.Linear(8, 12), dim)


@all_families
def test_encoder_is_checked(family):
    with pytest.raises(TypeError, match="`encoder` must be a torch.nn.Module, got function"):
        family(lambda x: x, 5)
    with pytest.raises(ValueError, match="features="):
        family(nn.Identity(), 5)
    assert family(nn.Identity(), 5, features=8).posterior(torch.randn(6, 8)).batch_shape == (6,)


@all_families
def test_output_of_the_encoder_is_checked(family):
    x = torch.randn(6, 1, 8, 8)
    with pytest.raises(ValueError, match=r"shape \(N, 4\), got \(6, 4, 6, 6\); pool or flatten"):
        family(nn.Conv2d(1, 4, 3), 5).posterior(x)
    with pytest.raises(ValueError, match=r"shape \(N, 7\), got \(6, 8\); pass features=8"):
        family(nn.Identity(), 5, features=7).posterior(torch.randn(6, 8))

    class Pair(nn.Linear):
        def forward(self, x):
            return (x, x)

    with pytest.raises(ValueError, match="got tuple; wrap it"):
        family(Pair(8, 8), 5).posterior(torch.randn(6, 8))


@pytest.mark.parametrize("family", STOCHASTIC)
def test_nan_is_refused_not_sampled(family):
    x = torch.randn(6, 8)
    x[2, 3] = float("nan")
    with pytest.raises(ValueError, match="(?i)nan|must"):
        make(family).posterior(x)


@all_families
def test_views_are_checked(family):
    guide = make(family)
    with pytest.raises(ValueError, match=r"one leading dimension N, got \[\(6, 8\), \(5, 8\)\]"):
        guide(torch.randn(6, 8), torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"one leading dimension N, got \[\]"):
        guide()


@all_families
def test_module_parameters_stay_out_of_the_store_in_local_mode(family):
    with pyro.settings.context(module_local_params=True):
        guide = make(family)
        guide(torch.randn(6, 8), torch.randn(6, 8))
    assert list(pyro.get_param_store().keys()) == []


def test_directions_start_apart_with_batch_norm_and_crowded_without():
    def mean_length(**options):
        torch.manual_seed(0)
        guide = guides.VonMisesFisher(mlp([32, 128, 128]), 64, **options)
        return guide.posterior(torch.randn(512, 32)).mean_direction.mean(0).norm().item()

    assert mean_length() < 0.2
    assert mean_length(batch_norm=False) > 0.6


def test_single_items_are_recognised_in_eval_mode_only():
    guide = guides.VonMisesFisher(mlp([6, 16]), 3)
    x = torch.randn(64, 6)
    guide.posterior(x)
    with pytest.raises(ValueError, match=r"needs at least 2, got 1; .* guide.eval\(\)"):
        guide.posterior(x[:1])
    guide.eval()
    alone, together = guide.posterior(x[:1]), guide.posterior(x)
    torch.testing.assert_close(alone.concentration, together.concentration[:1])
    plain = guides.VonMisesFisher(mlp([6, 16]), 3, batch_norm=False)
    assert plain.posterior(x[:1]).batch_shape == (1,)


def test_views_with_nan_are_called_by_their_name():
    guide = guides.VonMisesFisher(mlp([6, 16]), 3).eval()
    x = torch.randn(4, 6)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"norm nan \(1 of 4 rows\); look for NaN in the inputs"):
        guide.posterior(x)
