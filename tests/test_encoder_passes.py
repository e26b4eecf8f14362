"""The encoder runs once per view and step, and never answers with something stale."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyro_contrastive import guides, models
from pyro_contrastive.fit import fit
from pyro_contrastive.objectives import KSampleELBO

FAMILIES = [guides.VonMisesFisher, guides.PowerSpherical, guides.ProjectedNormal, guides.Delta]
ELBO_KINDS = [Trace_ELBO, KSampleELBO]


class Encoder(nn.Module):
    """Counts its calls; batch norm counts too, and dropout makes any two passes differ."""

    def __init__(self, noisy=True):
        super().__init__()
        self.linear = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12) if noisy else nn.Identity()
        self.dropout = nn.Dropout(0.5 if noisy else 0.0)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.dropout(self.norm(self.linear(x)).relu())

    def check(self, calls):
        assert self.calls == calls
        if isinstance(self.norm, nn.BatchNorm1d):
            assert int(self.norm.num_batches_tracked) == calls


def pair(kind="elbo", family=guides.VonMisesFisher, noisy=True):
    guide = family(Encoder(noisy), dim=3, features=12)
    if kind == "rpm":
        return models.RPM(guide), guide
    if kind == "exact":
        return models.MCInfoNCE(guide), guide
    return models.MCInfoNCE(guide, concentration=5.0, evidence=kind), guide


PAIRS = [(kind, guides.VonMisesFisher) for kind in ("rpm", "exact", "moment_matched", "k_sample")]
PAIRS += [("elbo", family) for family in FAMILIES]
each_pair = pytest.mark.parametrize(("kind", "family"), PAIRS, ids=lambda v: getattr(v, "__name__", v))


def views(size=8):
    return torch.randn(size, 6), torch.randn(size, 6)


@each_pair
def test_svi_step(kind, family):
    model, guide = pair(kind, family)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    x1, x2 = views()
    for step in (1, 2, 3):
        svi.step(x1, x2)  # the same tensors again: the parameters have changed, so nothing may be kept
        guide.encoder.check(2 * step)


@each_pair
def test_elbo_module(kind, family):
    model, guide = pair(kind, family)
    elbo = Trace_ELBO()(model, guide)
    optim = torch.optim.Adam(elbo.parameters())
    for step in (1, 2, 3):
        elbo(*views()).backward()
        optim.step()
        guide.encoder.check(2 * step)


@each_pair
@pytest.mark.parametrize("elbo", ELBO_KINDS)
def test_vectorised_particles(kind, family, elbo):
    model, guide = pair(kind, family)
    elbo(4, vectorize_particles=True, max_plate_nesting=1)(model, guide)(*views()).backward()
    guide.encoder.check(2)


@pytest.mark.parametrize("elbo", ELBO_KINDS)
def test_sequential_particles_are_passes_of_their_own(elbo):
    model, guide = pair()
    elbo(3, vectorize_particles=False, max_plate_nesting=1)(model, guide)(*views()).backward()
    guide.encoder.check(6)


def test_without_gradients():
    model, guide = pair()
    svi = SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO())
    svi.evaluate_loss(*views())
    guide.encoder.check(2)
    with torch.inference_mode():
        Trace_ELBO()(model, guide)(*views())
    guide.encoder.check(4)


@each_pair
def test_fit(kind, family):
    model, guide = pair(kind, family)
    fit(model, guide, [views() for _ in range(4)], steps=1, progress=False, device="cpu")
    before = guide.encoder.calls
    dry = before - 2  # one call in eval mode creates lazy parameters
    fit(model, guide, [views() for _ in range(4)], steps=4, progress=False, device="cpu")
    assert guide.encoder.calls - before == dry + 2 * 4
    assert int(guide.encoder.norm.num_batches_tracked) == 2 * (1 + 4)


def gradients(guide, model):
    modules = nn.ModuleList([model, guide])
    found = {name: p.grad.clone() for name, p in modules.named_parameters() if p.grad is not None}
    modules.zero_grad()
    return found


@each_pair
@pytest.mark.parametrize("noisy", [False, True])
def test_activation_checkpointing_gives_the_same_loss_and_gradients(kind, family, noisy):
    """The recomputation is a pass of its own, and must save the very same tensors as the first one."""
    model, guide = pair(kind, family, noisy)
    elbo = Trace_ELBO()(model, guide)
    x1, x2 = views()
    losses, grads = [], []
    for run in (lambda: elbo(x1, x2), lambda: checkpoint(elbo, x1, x2, use_reentrant=False)):
        torch.manual_seed(5)
        loss = run()
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(guide, model))
    assert guide.encoder.calls in (2 + 2 + 1, 2 + 2 + 2)  # once more per view, unless PyTorch stops it early
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    assert grads[1].keys() == grads[0].keys() and len(grads[0]) >= 4
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
    torch.manual_seed(5)
    Trace_ELBO()(model, guide)(x1, x2).backward()  # and the next step is an ordinary one
    torch.testing.assert_close(gradients(guide, model), grads[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_guide_share_the_dropout_mask(family):
    model, guide = pair("elbo", family)
    guide_trace = poutine.trace(guide).get_trace(*(x := views()))
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*x)
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
    for site in ("z1", "z2"):
        assert torch.equal(model_trace.nodes[site]["log_prob"], guide_trace.nodes[site]["log_prob"])


def test_one_tensor_for_both_views_keeps_two_dropout_masks():
    """Dropout as the only augmentation: x1 is x2, but the two posteriors differ, and the model needs both."""
    model, guide = pair("elbo")
    x = torch.randn(8, 6)
    guide_trace = poutine.trace(guide).get_trace(x, x)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x, x)
    mean = {(t, z): t.nodes[z]["fn"].mean_direction for t in (guide_trace, model_trace) for z in ("z1", "z2")}
    assert not torch.equal(mean[guide_trace, "z1"], mean[guide_trace, "z2"])
    for z in ("z1", "z2"):
        assert torch.equal(mean[model_trace, z], mean[guide_trace, z])
    guide.encoder.check(2)


def asked_in_a_handler(guide, x):
    """Whether guide.posterior(x) under a Pyro handler ran the encoder."""
    before = guide.encoder.calls
    with poutine.trace():
        guide.posterior(x)
    return guide.encoder.calls > before


@pytest.fixture
def passed():
    """A guide that has just run on x1, x2."""
    model, guide = pair()
    x1, x2 = views()
    with poutine.trace():
        guide(x1, x2)
    assert not asked_in_a_handler(guide, x1) and not asked_in_a_handler(guide, x2)
    return guide, x1, x2


def test_other_tensor_of_equal_content_is_encoded(passed):
    guide, x1, _ = passed
    assert asked_in_a_handler(guide, x1.clone())
    assert asked_in_a_handler(guide, x1.detach())


def test_input_modified_in_place_is_encoded_again(passed):
    guide, x1, x2 = passed
    x1.mul_(2.0)
    assert asked_in_a_handler(guide, x1) and not asked_in_a_handler(guide, x2)


def test_optimiser_step_ends_the_pass(passed):
    guide, x1, _ = passed
    optim = torch.optim.SGD(guide.parameters(), lr=0.1)
    guide.posterior(x1).mean.sum().backward()  # another graph: does not spend the one of the pass
    assert not asked_in_a_handler(guide, x1)
    optim.step()
    assert asked_in_a_handler(guide, x1)


def test_loaded_weights_end_the_pass(passed):
    guide, x1, _ = passed
    guide.load_state_dict(pair()[1].state_dict())
    assert asked_in_a_handler(guide, x1)


def test_change_of_dtype_ends_the_pass(passed):
    guide, x1, _ = passed
    guide.double().float()
    assert asked_in_a_handler(guide, x1)


@pytest.mark.parametrize("part", ["guide", "dropout"])
def test_change_of_mode_ends_the_pass(passed, part):
    guide, x1, _ = passed
    (guide if part == "guide" else guide.encoder.dropout).eval()
    assert asked_in_a_handler(guide, x1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_change_of_gradient_mode_ends_the_pass(passed, context):
    guide, x1, _ = passed
    with context():
        assert asked_in_a_handler(guide, x1)


def test_pass_without_gradient_is_not_used_with_gradient():
    _, guide = pair()
    x1, x2 = views()
    with torch.no_grad(), poutine.trace():
        guide(x1, x2)
    with poutine.trace():
        assert guide.posterior(x1).mean.requires_grad


def test_edit_of_raw_data_shows_in_the_next_pass():
    """`p.data` edits are invisible to PyTorch's version counter; every call of the guide encodes anew."""
    model, guide = pair("exact", noisy=False)
    x1, x2 = views()
    elbo = Trace_ELBO()(model, guide)
    first = elbo(x1, x2).item()
    for p in guide.encoder.parameters():
        p.data.mul_(3.0)
    second = elbo(x1, x2).item()
    fresh_model, fresh = pair("exact", noisy=False)
    fresh.load_state_dict(guide.state_dict())
    assert second != first
    assert second == pytest.approx(Trace_ELBO()(fresh_model, fresh)(x1, x2).item(), rel=1e-6)


@each_pair
def test_backward_ends_the_pass(kind, family):
    model, guide = pair(kind, family)
    x1, x2 = views()
    Trace_ELBO()(model, guide)(x1, x2).backward()
    assert asked_in_a_handler(guide, x1) and asked_in_a_handler(guide, x2)


def test_direct_call_is_always_fresh(passed):
    guide, x1, _ = passed
    first, second = guide.posterior(x1).mean_direction, guide.posterior(x1).mean_direction
    assert not torch.equal(first, second)  # two dropout masks
    guide.eval()
    assert torch.equal(guide.posterior(x1).mean_direction, guide.posterior(x1).mean_direction)


def test_pass_does_not_keep_the_views_alive():
    import gc
    import weakref

    _, guide = pair()
    x1, x2 = views()
    with torch.no_grad(), poutine.trace():
        guide(x1, x2)
    alive = weakref.ref(x1)
    del x1
    gc.collect()
    assert alive() is None
