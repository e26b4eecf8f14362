"""Encoders in chunks: the loss of the batch with the memory of one chunk; reduced precision of the encoder only."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_contrastive import guides, models, nets
from pyro_contrastive.data import ViewLoader
from pyro_contrastive.encoding import encode
from pyro_contrastive.fit import fit
from pyro_contrastive.objectives import KSampleELBO


def pair(*layers, kind="exact", **options):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 16), *layers, nn.Tanh(), nn.Linear(16, 12))
    guide = guides.VonMisesFisher(encoder, dim=3, **options)
    return models.MCInfoNCE(guide, concentration=5.0, evidence=kind), guide


def step(model, guide, x1, x2, elbo=None):
    """Loss and gradients of one training step."""
    torch.manual_seed(1)
    loss = (elbo or Trace_ELBO(max_plate_nesting=1))(model, guide)(x1, x2)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
@pytest.mark.parametrize(
    ("kind", "elbo"),
    [
        ("exact", Trace_ELBO(max_plate_nesting=1)),
        ("elbo", Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1)),
        ("elbo", Trace_ELBO(3, max_plate_nesting=1)),
        ("elbo", KSampleELBO(3)),
        ("k_sample", Trace_ELBO(max_plate_nesting=1)),
    ],
)
def test_gradients_are_those_of_one_pass(chunk_size, kind, elbo):
    model, guide = pair(kind=kind)
    model.double()  # in float32 the order of the sums is worth 1e-5
    views = torch.randn(10, 6).double(), torch.randn(10, 6).double()
    whole = step(model, guide, *views, elbo)
    guide.chunk_size = chunk_size
    torch.testing.assert_close(step(model, guide, *views, elbo), whole, rtol=1e-8, atol=1e-8)


def test_plain_svi_trains_in_chunks():
    losses = []
    for chunk_size in (None, 4):
        pyro.clear_param_store()
        model, guide = pair()
        guide.chunk_size = chunk_size
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        torch.manual_seed(2)
        x1, x2 = torch.randn(10, 6), torch.randn(10, 6)
        losses.append([svi.step(x1, x2) for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]


def by_hand(encoder, x, chunk_size):
    return torch.cat([encoder(chunk) for chunk in x.split(chunk_size)])


def test_batch_norm_statistics_and_dropout_masks_are_those_of_one_pass_over_the_chunks():
    x = torch.randn(11, 6)
    results = []
    for run in (by_hand, lambda encoder, x, size: encode(encoder, x, chunk_size=size)):
        torch.manual_seed(0)
        encoder = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.5),
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)),  # its power iteration is a buffer that matters
            nn.BatchNorm1d(4, momentum=None),
        )
        features = run(encoder, x, 3)
        after_forward = {name: value.clone() for name, value in encoder.named_buffers()}
        features.square().sum().backward()
        assert all(torch.equal(value, after_forward[name]) for name, value in encoder.named_buffers())
        results.append((features.detach(), dict(after_forward), [p.grad for p in encoder.parameters()], torch.randn(2)))
    assert int(results[0][1]["1.num_batches_tracked"]) == 4  # the reference counts chunks of 3, 3, 3 and 2
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)  # the random state behind it as well


class LiveBytes(TorchDispatchMode):
    """Largest number of bytes of all tensors made inside that are alive at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


def test_memory_is_that_of_one_chunk():
    encoder = nn.Sequential(nn.Linear(6, 32), *[nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(6)])
    encoder.append(nn.Linear(32, 4))
    x1, x2 = torch.randn(1024, 6), torch.randn(1024, 6)

    def peak(chunk_size):
        with LiveBytes() as live:
            views = [encode(encoder, x, chunk_size=chunk_size) for x in (x1, x2)]
            (views[0] * views[1]).sum().backward()
        encoder.zero_grad()
        return live.peak

    whole, chunked = peak(None), peak(64)
    assert whole > 2 * 6 * 1024 * 32 * 4  # one activation per view, layer and item
    assert chunked < whole / 5, (whole, chunked)


def test_fit_in_chunks_is_the_fit_without_them():
    images = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    results = []
    for options in ({}, {"chunk_size": 5}):
        model, guide = pair(batch_norm=False)
        loader = ViewLoader(images, lambda x, g: x + 0.3 * torch.randn(x.shape, generator=g), batch_size=8)
        fit(model, guide, loader, steps=12, lr=1e-2, device="cpu", progress=False, **options)
        assert guide.chunk_size is None  # set for the run only
        results.append(dict(model.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_lazy_layers_are_shaped_by_one_item_and_frozen_encoders_need_no_gradient():
    encoder = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    x = torch.randn(10, 6)
    assert encode(encoder, x, chunk_size=4).shape == (10, 4)
    assert int(encoder[1].num_batches_tracked) == 3 and encoder.training
    encoder.requires_grad_(False)
    assert not encode(encoder, x, chunk_size=4).requires_grad


def test_an_encoder_of_the_wrong_shape_is_named_in_chunks_too():
    guide = guides.VonMisesFisher(nn.Sequential(nn.Linear(6, 12), nn.Unflatten(1, (3, 4))), dim=3, features=12)
    guide.chunk_size = 2
    with pytest.raises(ValueError, match=r"must return a tensor of shape \(N, 12\)"):
        guide.posterior(torch.randn(5, 6))


class Dtypes(nn.Module):
    """Takes down the dtype of what its layers compute."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(6, 12), set()

    def forward(self, x):
        out = self.layer(x)
        self.seen.add(out.dtype)
        return out


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_bfloat16_is_for_the_encoder_only(chunk_size):
    torch.manual_seed(0)
    encoder = Dtypes()
    guide = guides.VonMisesFisher(encoder, dim=3, features=12)
    model = models.MCInfoNCE(guide, concentration=5.0)
    data = [(torch.randn(8, 6), torch.randn(8, 6))]
    result = fit(model, guide, data, steps=3, precision="bfloat16", chunk_size=chunk_size, device="cpu", progress=False)
    assert encoder.seen == {torch.bfloat16} and result.status == "done"
    assert all(p.dtype == torch.float32 for p in guide.parameters())
    assert guide.precision == "float32"
    guide.posterior(data[0][0])
    assert torch.float32 in encoder.seen
    guide.precision = "bfloat16"
    assert guide.posterior(data[0][0]).mean_direction.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "`chunk_size` must be an integer >= 1"),
        ({"chunk_size": 2.0}, "`chunk_size` must be an integer >= 1"),
        ({"precision": "bf16"}, "`precision` must be one of float32, bfloat16, float16, got 'bf16'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encode(nn.Linear(2, 2), torch.zeros(4, 2), **options)
    model, guide = pair()
    with pytest.raises(ValueError, match=message):
        fit(model, guide, [torch.zeros(4, 6)], steps=1, device="cpu", progress=False, **options)


def test_fit_says_what_cannot_be():
    model, guide = pair()
    with pytest.raises(ValueError, match="'float16' needs a CUDA device"):
        fit(model, guide, [torch.zeros(4, 6)], steps=1, device="cpu", precision="float16")

    def plain(x):
        pyro.param("w", torch.zeros(()))

    with pytest.raises(ValueError, match="the pair has none; use a guide of this package"):
        fit(plain, plain, [torch.zeros(4, 6)], steps=1, device="cpu", num_views=1, chunk_size=2)


def test_networks_for_images_run_in_chunks():
    net = nets.small_convnet(1)
    x = torch.randn(5, 1, 8, 8)
    encode(net, x, chunk_size=2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
