"""The same numbers on a GPU, nothing that waits for it, and memory that stays linear.

Without a GPU the CPU stands for it, so that these tests stay sound, and what only a GPU can show is skipped.
"""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_contrastive import distributions as dist
from pyro_contrastive import guides, models, nets
from pyro_contrastive.choices import DATA, METHODS
from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.fit import fit
from pyro_contrastive.kernels import AnisotropicKernel, VonMisesFisherKernel, expected_pairs
from pyro_contrastive.ops import fused
from pyro_contrastive.positives import nt_xent_log_ratio
from pyro_contrastive.registry import Run, RunConfig

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="only a GPU can tell")
KERNELS = {"von Mises-Fisher": VonMisesFisherKernel(20.0), "anisotropic": AnisotropicKernel(16, [20.0, 3.0] * 8)}
FAMILIES = {
    "von Mises-Fisher": lambda mean, kappa: dist.VonMisesFisher(mean, kappa),
    "power spherical": lambda mean, kappa: dist.PowerSpherical(mean, kappa),
    "projected normal": lambda mean, kappa: dist.ProjectedNormal(mean, kappa.rsqrt().unsqueeze(-1)),
}


def latents(*shape: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, dim, generator=generator), dim=-1)


def likelihoods(kernel, z, **options):
    """InfoNCE and NT-Xent, with their gradients."""
    z = z.detach().requires_grad_()
    infonce = infonce_log_ratio(kernel(*z, lazy=True), symmetric=True, **options)
    nt_xent = nt_xent_log_ratio(kernel(z.flatten(0, 1), z.flatten(0, 1), lazy=True))
    gradients = [torch.autograd.grad(value.mean(), z)[0] for value in (infonce, nt_xent)]
    return infonce.detach(), nt_xent.detach(), *gradients


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [64, 2500])  # the whole grid; tiles
def test_likelihoods_are_those_of_double_precision_on_the_cpu(name, size):
    z = latents(2, size)
    found = likelihoods(KERNELS[name].to(DEVICE), z.to(DEVICE))
    exact = likelihoods(KERNELS[name].to("cpu").double(), z.double())
    KERNELS[name].float()
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.cpu().double() - theirs).abs().max() < 2e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_the_fused_kernel(dtype):
    """Values to float32 rounding of a grid of 20; gradients to three roundings of halves."""
    kernel, z = VonMisesFisherKernel(20.0).to(DEVICE), latents(2, 2500, dim=128).to(dtype)
    if ON_GPU:
        assert fused.applies(z[0].to(DEVICE), z[1].to(DEVICE))
    found = likelihoods(kernel, z.to(DEVICE))
    exact = likelihoods(VonMisesFisherKernel(20.0).double(), z.double())
    for k, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
        error = (ours.cpu().double() - theirs).abs().max()
        assert error < (2e-5 if k < 2 else 4 * torch.finfo(dtype).eps * float(theirs.abs().max()))


@needs_gpu
def test_the_fused_kernel_with_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        z = latents(2, 2500, dim=128)
        assert fused.applies(z[0].to(DEVICE), z[1].to(DEVICE))
        found = likelihoods(VonMisesFisherKernel(20.0).to(DEVICE), z.to(DEVICE))
    finally:
        torch.set_float32_matmul_precision(before)
    exact = likelihoods(VonMisesFisherKernel(20.0).double(), z.double())
    for ours, theirs in zip(found, exact, strict=True):  # products have 10 bits
        assert (ours.cpu().double() - theirs).abs().max() < 20 * 2**-9 * max(1e-3, float(theirs.abs().max()))


@pytest.mark.parametrize("concentration", [20.0, float("inf")])
@pytest.mark.parametrize("size", [64, 2500])  # pair by pair; tables
def test_exact_evidence_is_that_of_the_cpu(concentration, size):
    mean, kappa = (
        latents(2, size),
        torch.empty(2, size).uniform_(16.0, 64.0, generator=torch.Generator().manual_seed(1)),
    )

    def value(device, dtype):
        laws = [dist.VonMisesFisher(m.to(device, dtype), k.to(device, dtype)) for m, k in zip(mean, kappa, strict=True)]
        return infonce_log_ratio(expected_pairs(*laws, concentration), symmetric=True).cpu().double()

    assert (value(DEVICE, torch.float32) - value("cpu", torch.float64)).abs().max() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_and_densities(family):
    mean, kappa = latents(5), torch.tensor([2.0, 8.0, 32.0, 128.0, 512.0])
    q = FAMILIES[family](mean.to(DEVICE), kappa.to(DEVICE))
    z = q.rsample((4_000,))
    assert z.device.type == DEVICE.type
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(4_000, 5, device=DEVICE))
    # means of 4,000 draws: six standard errors of a component, at most 1 / sqrt(4,000) each
    assert (z.mean(0) - q.mean).abs().max() < 6 / 4_000**0.5
    there = FAMILIES[family](mean, kappa).log_prob(z.cpu())
    torch.testing.assert_close(q.log_prob(z).cpu(), there, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits(method, tmp_path):
    data = next(name for name, about in DATA.items() if about.labels or not METHODS[method].labels)
    run = Run(RunConfig(method=method, data=data, steps=12, batch_size=64))
    options = {"steps": 12, "device": DEVICE, "num_views": run.num_views, "progress": False, "out": tmp_path}
    result = fit(run.model, run.guide, run.batches(DEVICE), **options)
    assert result.status == "done"
    assert {p.device.type for p in run.guide.parameters()} == {DEVICE.type}


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=needs_gpu)])
def test_mixed_precision_with_chunks_and_a_resume(precision, tmp_path):
    found = []
    for seconds in (0.0, None):
        run = Run(RunConfig(method="mcinfonce", data="sphere", steps=12, batch_size=64))
        options = {"device": DEVICE, "progress": False, "out": tmp_path, "precision": precision, "chunk_size": 16}
        found.append(fit(run.model, run.guide, run.batches(DEVICE), steps=12, max_seconds=seconds, **options).status)
    assert found == ["interrupted", "done"]


@needs_gpu
@pytest.mark.parametrize("size", [128, 2500])
def test_nothing_waits_for_the_gpu(size):
    """Loss and gradient of a step, after a first one that builds what is built once."""
    torch.manual_seed(0)
    guide = guides.VonMisesFisher(nets.mlp([32, 64, 64]), dim=16).to(DEVICE)
    x = torch.randn(2, size, 32, device=DEVICE)
    with pyro.validation_enabled(False):
        for model in (models.MCInfoNCE(guide, concentration=20.0).to(DEVICE), models.RPM(guide).to(DEVICE)):
            elbo = Trace_ELBO(max_plate_nesting=1)
            elbo.differentiable_loss(model, guide, *x).backward()
            torch.cuda.set_sync_debug_mode("error")
            try:
                elbo.differentiable_loss(model, guide, *x).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("what", ["dot product, bfloat16", "dot product, float32", "exact evidence"])
def test_65_536_pairs_in_4_gib(what):
    z = latents(2, 65_536, dim=128).to(DEVICE).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    if what == "exact evidence":
        kappa = torch.linspace(16.0, 64.0, 65_536, device=DEVICE)
        pairs = expected_pairs(*(dist.VonMisesFisher(one, kappa, validate_args=False) for one in z), 20.0)
    else:
        kernel = VonMisesFisherKernel(20.0).to(DEVICE)
        pairs = kernel(*(z.bfloat16() if what.endswith("bfloat16") else z), lazy=True)
    infonce_log_ratio(pairs, symmetric=True).mean().backward()
    assert z.grad.isfinite().all()
    assert torch.cuda.max_memory_allocated() < 4 * 2**30
