"""The projected normal: its radial integral against mpmath, and what only an anisotropic law can get wrong."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pyro.distributions
import pytest
import torch
from scipy import stats
from torch.distributions import kl_divergence

from pyro_contrastive.distributions.kl_projected import projected_normal_kl_bound
from pyro_contrastive.distributions.projected_normal import ProjectedNormal
from pyro_contrastive.distributions.uniform import HypersphericalUniform
from pyro_contrastive.ops.projected import log_radial_integral, projected_mean
from tests.references import (
    AngleLaw,
    log_area,
    projected_normal_angle,
    projected_normal_log_density,
    radial_derivatives,
)
from tests.references import log_radial_integral as reference_log_radial_integral

F64 = torch.float64
A_GRID = (-1000.0, -100.0, -10.0, -2.0, -0.5, 0.0, 0.7, 3.0, 10.0, 100.0, 1000.0)


@pytest.mark.parametrize("dim", [2, 3, 4, 10, 128, 1024])
class TestRadialIntegral:
    def test_value(self, dim):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            a = torch.tensor(A_GRID, dtype=dtype)
            value = log_radial_integral(dim, a)
            assert value.dtype == dtype
            for x, v in zip(a.double().tolist(), value.double().tolist(), strict=True):
                reference = float(reference_log_radial_integral(dim, x))
                assert abs(v - reference) <= tolerance * max(1e-1, abs(reference)), (dtype, x)

    def test_derivatives(self, dim):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            a = torch.tensor([-1000.0, -10.0, -0.5, 0.0, 3.0, 1000.0], dtype=dtype, requires_grad=True)
            (first,) = torch.autograd.grad(log_radial_integral(dim, a).sum(), a)
            (again,) = torch.autograd.grad(log_radial_integral(dim, a).sum(), a, create_graph=True)
            (second,) = torch.autograd.grad(again.sum(), a)
            assert torch.equal(first, again)  # with and without a graph of the backward pass
            for x, d1, d2 in zip(*(t.detach().double().tolist() for t in (a, first, second)), strict=True):
                reference = [float(r) for r in radial_derivatives(dim, x)]
                np.testing.assert_allclose([d1, d2], reference, rtol=tolerance)

    def test_gradgradcheck(self, dim):
        a = torch.tensor([-30.0, -1.0, 0.3, 5.0, 40.0], dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: log_radial_integral(dim, x), a)
        assert torch.autograd.gradgradcheck(lambda x: log_radial_integral(dim, x), a)


def test_radial_integral_under_torch_func():
    a = torch.linspace(-3, 3, 7, dtype=F64)
    second = torch.func.vmap(torch.func.grad(torch.func.grad(lambda x: log_radial_integral(5, x))))(a)
    for x, value in zip(a.tolist(), second.tolist(), strict=True):
        assert value == pytest.approx(float(radial_derivatives(5, x)[1]), rel=1e-9)


def test_radial_integral_rejects_one_dimension():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        log_radial_integral(1, torch.zeros(2))


def anisotropic(dim: int, length: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(dim, generator=generator, dtype=F64)
    scale = torch.exp(0.5 * torch.randn(dim, generator=generator, dtype=F64))
    return length * loc / loc.norm(), scale


def circle(num: int) -> torch.Tensor:
    angle = 2 * math.pi * torch.arange(num, dtype=F64) / num
    return torch.stack([angle.cos(), angle.sin()], -1)


def sphere(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Product rule on the 2-sphere: points (num, 2 num, 3), weights (num, 1) that sum to the area with the points."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    cos = torch.tensor(nodes)[:, None]
    points = torch.cat([(1 - cos[..., None] ** 2).sqrt() * circle(2 * num), cos[..., None].expand(num, 2 * num, 1)], -1)
    return points, torch.tensor(weights)[:, None] * math.pi / num


@pytest.mark.parametrize("length", [0.0, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("dim", [2, 5, 32])
def test_density_is_the_gaussian_integrated_along_the_ray(dim, length):
    loc, scale = anisotropic(dim, length)
    value = torch.randn(6, dim, dtype=F64, generator=torch.Generator().manual_seed(1))
    value = torch.cat([value, loc[None] + 1e-3, -loc[None] - 1e-3])
    value = value / value.norm(dim=-1, keepdim=True)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        args = [t.to(dtype) for t in (loc, scale, value)]
        got = ProjectedNormal(*args[:2]).log_prob(args[2])
        assert got.dtype == dtype
        for y, v in zip(args[2].double(), got.double().tolist(), strict=True):
            reference = projected_normal_log_density(args[0].tolist(), args[1].tolist(), y.tolist())
            assert v == pytest.approx(float(reference), rel=tolerance, abs=tolerance * (1 + length)), (dtype, v)


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_agrees_with_pyro_where_pyro_has_a_density(dim):
    generator = torch.Generator().manual_seed(dim)
    loc = 3 * torch.randn(200, dim, dtype=F64, generator=generator)
    value = torch.randn(200, dim, dtype=F64, generator=generator)
    value = value / value.norm(dim=-1, keepdim=True)
    keep = (loc * value).sum(-1) > -3  # beyond, pyro clamps the radial part: its density is a constant floor there
    theirs = pyro.distributions.ProjectedNormal(loc).log_prob(value)
    ours = ProjectedNormal(loc, torch.ones(dim, dtype=F64)).log_prob(value)
    assert keep.sum() > 100
    assert (ours - theirs)[keep].abs().max() < 1e-9


@pytest.mark.parametrize("length", [0.0, 2.0, 20.0])
def test_integral_is_one(length):
    density = ProjectedNormal(*anisotropic(2, length)).log_prob(circle(20_000)).exp()
    assert (density.mean() * 2 * math.pi).item() == pytest.approx(1, abs=1e-10)
    points, weights = sphere(200)
    density = ProjectedNormal(*anisotropic(3, length)).log_prob(points).exp()
    assert (density * weights).sum().item() == pytest.approx(1, abs=1e-8)


def test_samples_of_an_anisotropic_law_follow_the_density():
    """Kolmogorov-Smirnov on the circle; false-alarm rate 1e-4."""
    law = ProjectedNormal(*anisotropic(2, 1.0))
    torch.manual_seed(0)
    draws = law.sample((50_000,))
    angle = torch.atan2(draws[:, 1], draws[:, 0]).numpy() % (2 * math.pi)
    density = law.log_prob(circle(100_000)).exp().numpy()
    edges = 2 * math.pi * np.arange(100_001) / 100_000
    cdf = np.concatenate([[0], np.cumsum(0.5 * (density + np.roll(density, -1)))])
    assert stats.kstest(angle, lambda x: np.interp(x, edges, cdf / cdf[-1])).pvalue > 1e-4


def test_mean_in_three_dimensions():
    """E[z] by quadrature against draws, 5 standard errors: false-alarm rate 2e-6."""
    law = ProjectedNormal(*anisotropic(3, 2.0))
    points, weights = sphere(200)
    expected = ((law.log_prob(points).exp() * weights)[..., None] * points).sum((0, 1))
    torch.manual_seed(0)
    draws = law.sample((100_000,))
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    torch.testing.assert_close(law.mean, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dim", [2, 3, 16, 128, 1024])
def test_mean_of_an_isotropic_law_against_its_closed_form(dim):
    """E[cos] = Gamma((d+1)/2) / Gamma(d/2+1) (m / sqrt 2) 1F1(1/2; d/2+1; -m^2/2) with m = |mu| / sigma."""
    ratios = (1e-8, 0.01, 1.0, 7.0, 100.0, 1e4)
    loc = 3.0 * torch.nn.functional.normalize(torch.randn(len(ratios), dim, dtype=F64), dim=-1)
    scale = 3.0 / torch.tensor(ratios, dtype=F64)
    for law in (ProjectedNormal(loc, scale[:, None]), ProjectedNormal(loc.float(), scale[:, None].float())):
        for found, m in zip(law.mean_resultant_length, ratios, strict=True):
            half = mpmath.mpf(dim) / 2
            factor = mpmath.gammaprod([half + 0.5], [half + 1]) * m / mpmath.sqrt(2)
            expected = float(factor * mpmath.hyp1f1(0.5, half + 1, -(mpmath.mpf(m) ** 2) / 2))
            assert float(found) == pytest.approx(expected, rel=1e-11 if law.loc.dtype == F64 else 1e-5)


def test_mean_of_a_law_that_is_nearly_an_axis_and_of_draws_in_many_dimensions():
    thin = ProjectedNormal(torch.tensor([0.5, 0.0], dtype=F64), torch.tensor([1.0, 1e-4], dtype=F64))
    sign = 2 * stats.norm.cdf(0.5) - 1  # it points one way or the other
    assert float(thin.mean[0]) == pytest.approx(sign, abs=1e-6) and float(thin.mean[1]) == 0.0
    law = ProjectedNormal(*anisotropic(40, 2.0))
    torch.manual_seed(0)
    draws = law.sample((20_000,))  # 5 standard errors for each of 40 axes: false-alarm rate 2e-5
    assert ((draws.mean(0) - law.mean).abs() < 5 * draws.std(0) / len(draws) ** 0.5).all()
    assert torch.autograd.gradcheck(projected_mean, [v.requires_grad_() for v in anisotropic(4, 1.0)])


def test_pathwise_gradient_of_the_sampler():
    """Gradient of E[f(z)] by draws against that of the quadrature, 5 standard errors: false-alarm rate 4e-6."""
    loc, scale = (t.requires_grad_() for t in anisotropic(3, 2.0))
    points, weights = sphere(200)
    target = torch.tensor([0.3, -1.0, 0.5], dtype=F64)

    def function(z):
        return (z @ target + (z @ target) ** 2).unsqueeze(-1)

    exact = (ProjectedNormal(loc, scale).log_prob(points).exp() * weights * function(points).squeeze(-1)).sum()
    exact = torch.cat(torch.autograd.grad(exact, (loc, scale)))
    torch.manual_seed(0)
    rows = [t.detach().expand(50_000, 3).clone().requires_grad_() for t in (loc, scale)]
    draws = torch.cat(torch.autograd.grad(function(ProjectedNormal(*rows).rsample()).sum(), rows), -1)
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / len(draws) ** 0.5).all()


@pytest.mark.parametrize("factor", [1e-25, 0.1, 10.0, 1e15])
def test_a_common_factor_of_loc_and_scale_changes_nothing(factor):
    loc, scale = (t.float() for t in anisotropic(8, 2.0))
    law, same = ProjectedNormal(loc, scale), ProjectedNormal(factor * loc, factor * scale)
    torch.manual_seed(0)
    value = law.rsample((50,))
    torch.manual_seed(0)
    torch.testing.assert_close(same.rsample((50,)), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same.log_prob(value), law.log_prob(value), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(same.mean_direction, law.mean_direction)
    torch.testing.assert_close(projected_normal_kl_bound(same), projected_normal_kl_bound(law), rtol=1e-5, atol=1e-6)
    torch.manual_seed(1)
    entropy = law.entropy()
    torch.manual_seed(1)
    torch.testing.assert_close(same.entropy(), entropy, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("length", [8.0, 1e2, 1e4])
def test_the_antipode_has_a_gradient(length):
    """float32: towards the mean, finite, and of the size that float64 gives."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        loc = torch.tensor([length, 0.0, 0.0], dtype=dtype)
        value = torch.tensor([-math.cos(0.1), math.sin(0.1), 0.0], dtype=dtype, requires_grad=True)
        law = ProjectedNormal(loc, torch.ones(3, dtype=dtype), validate_args=False)
        gradients.append(torch.autograd.grad(law.log_prob(value), value)[0])
    assert gradients[0][0] > 0
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dim", [2, 5, 64])
def test_cross_log_prob_is_the_grid_of_log_prob(dim):
    generator = torch.Generator().manual_seed(dim)
    loc = 3 * torch.randn(2, 4, dim, dtype=F64, generator=generator)
    law = ProjectedNormal(loc, torch.rand(4, dim, dtype=F64, generator=generator) + 0.1)
    value = torch.nn.functional.normalize(torch.randn(2, 6, dim, dtype=F64, generator=generator), dim=-1)
    expected = law.expand((6, 2, 4)).log_prob(value.transpose(0, 1)[:, :, None])
    torch.testing.assert_close(law.cross_log_prob(value), expected.transpose(0, 1), rtol=1e-10, atol=1e-10)


def test_gradients_of_the_density():
    loc, scale = (t.requires_grad_() for t in anisotropic(4, 2.0))
    value = torch.nn.functional.normalize(
        torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(1)), dim=-1
    )

    def density(loc, scale, value):
        return ProjectedNormal(loc, scale, validate_args=False).log_prob(value)

    inputs = (loc, scale, value.requires_grad_())
    assert torch.autograd.gradcheck(density, inputs)
    assert torch.autograd.gradgradcheck(density, inputs)


# Entropy and KL ------------------------------------------------------------------------------------------------------


def estimates(loc: torch.Tensor, scale: torch.Tensor, num: int) -> torch.Tensor:
    """``num`` independent estimates of the KL to the uniform law."""
    law = ProjectedNormal(loc, scale).expand((num,))
    return kl_divergence(law, HypersphericalUniform(len(loc)))


def check_estimates(values: torch.Tensor, exact: float, slack: float = 0.0) -> None:
    """Within 5 standard errors: false-alarm rate 6e-7."""
    error = (values.std() / len(values) ** 0.5).item()
    assert abs(values.mean().item() - exact) < 5 * error + slack, (values.mean().item(), exact, error)


@pytest.mark.parametrize("length", [0.0, 1.0, 8.0])
def test_kl_on_circle_and_sphere(length):
    """Anisotropic laws by quadrature of p log p."""
    torch.manual_seed(0)
    loc, scale = anisotropic(2, length)
    log_density = ProjectedNormal(loc, scale).log_prob(circle(20_000))
    exact = (log_density.exp() * (log_density + math.log(2 * math.pi))).mean().item() * 2 * math.pi
    check_estimates(estimates(loc, scale, 1000), exact)
    assert projected_normal_kl_bound(ProjectedNormal(loc, scale)).item() >= exact

    loc, scale = anisotropic(3, length)
    points, weights = sphere(200)
    log_density = ProjectedNormal(loc, scale).log_prob(points)
    exact = (log_density.exp() * (log_density + math.log(4 * math.pi)) * weights).sum().item()
    check_estimates(estimates(loc, scale, 1000), exact)
    assert projected_normal_kl_bound(ProjectedNormal(loc, scale)).item() >= exact


@pytest.mark.parametrize(
    ("dim", "length", "scale"), [(8, 2.83, 1.0), (8, 10.0, 0.1), (32, 5.66, 1.0), (128, 33.9, 1.0)]
)
def test_kl_of_an_isotropic_law(dim, length, scale):
    """By the one-dimensional law of the angle, with the normalised density from an independent grid."""
    torch.manual_seed(0)
    kappa = (length / scale) ** 2
    shape = projected_normal_angle(dim, kappa)
    law = AngleLaw(dim, shape)
    entropy_of_shape = law.expect(shape)
    # log density = shape - (d/2) log 2 pi: the shape is exact but for the Gaussian constant
    exact = entropy_of_shape - 0.5 * dim * math.log(2 * math.pi) + float(log_area(dim))
    loc = torch.zeros(dim, dtype=F64)
    loc[1] = length
    scales = torch.full((dim,), scale, dtype=F64)
    check_estimates(estimates(loc, scales, 500), exact, slack=1e-5)
    bound = projected_normal_kl_bound(ProjectedNormal(loc, scales)).item()
    assert exact <= bound <= 1.13 * exact


@pytest.mark.parametrize("dim", [2, 8, 128])
def test_kl_of_the_uniform_law_is_zero_without_noise(dim):
    scales = torch.full((dim,), 3.0, dtype=F64)
    assert estimates(torch.zeros(dim, dtype=F64), scales, 5).abs().max() < 1e-10
    law = ProjectedNormal(torch.zeros(dim, dtype=F64), scales)
    assert projected_normal_kl_bound(law).abs().item() < 1e-10


def test_gradient_of_the_kl():
    """Against automatic differentiation through the quadrature on the circle, 5 standard errors."""
    torch.manual_seed(0)
    loc, scale = (t.requires_grad_() for t in anisotropic(2, 2.0))
    log_density = ProjectedNormal(loc, scale).log_prob(circle(20_000))
    exact = torch.autograd.grad((log_density.exp() * log_density).mean() * 2 * math.pi, (loc, scale))
    rows = [t.detach().expand(4000, 2).clone().requires_grad_() for t in (loc, scale)]
    kl = kl_divergence(ProjectedNormal(*rows), HypersphericalUniform(2))
    gradients = torch.autograd.grad(kl.sum(), rows)
    for column, reference in zip(torch.cat(gradients, -1).T, torch.cat(exact), strict=True):
        check_estimates(column, reference.item())


@pytest.mark.parametrize("dim", [8, 32, 128])
@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("length", [1.0, 5.0, 10.0])
def test_order_of_the_bounds(dim, length, scale):
    """KL <= scale-free bound <= Gaussian KL to N(0, I); only the last sees the common scale."""
    torch.manual_seed(0)
    loc, _ = anisotropic(dim, length)
    scales = scale * torch.exp(0.15 * torch.randn(dim, dtype=F64))
    kl = estimates(loc, scales, 20)
    bound = projected_normal_kl_bound(ProjectedNormal(loc, scales)).item()
    gaussian = 0.5 * (loc.square() + scales.square() - 1 - 2 * scales.log()).sum().item()
    assert kl.mean().item() - 5 * kl.std().item() / 20**0.5 <= bound <= gaussian
    assert bound <= 1.15 * kl.mean().item()


# Shapes and errors ---------------------------------------------------------------------------------------------------


def test_parameters_broadcast():
    law = ProjectedNormal(torch.zeros(4, 1, 3), torch.ones(5, 3))
    assert (law.batch_shape, law.event_shape) == ((4, 5), (3,))
    assert law.log_prob(torch.tensor([1.0, 0.0, 0.0])).shape == (4, 5)
    assert law.rsample((2,)).shape == (2, 4, 5, 3)
    assert law.entropy().shape == (4, 5)
    assert ProjectedNormal(torch.ones(4, 3), torch.tensor(2.0)).scale_diag.shape == (4, 3)
    assert ProjectedNormal(torch.ones(4, 3), torch.ones(4, 1)).scale_diag.shape == (4, 3)
    assert ProjectedNormal.infer_shapes(torch.Size((4, 1, 3)), torch.Size((5, 3))) == ((4, 5), (3,))


@pytest.mark.parametrize(
    ("loc", "scale", "message"),
    [
        (torch.tensor([1.0, math.nan]), torch.ones(2), "`loc` must be finite"),
        (torch.ones(2), torch.tensor([1.0, 0.0]), "`scale_diag` must be positive"),
        (torch.ones(2), torch.tensor([1.0, math.nan]), "`scale_diag` must be positive"),
        (torch.ones(1), torch.ones(1), r"d >= 2.*got \(1,\)"),
        (torch.tensor(1.0), torch.tensor(1.0), "d >= 2"),
        (torch.ones(5, 3), torch.ones(4, 3), r"broadcast with `loc` of shape \(5, 3\), got \(4, 3\)"),
        (torch.ones(3), torch.ones(2), "broadcast"),
        (torch.ones(2, 3), torch.ones(2), "broadcast"),
    ],
)
def test_errors(loc, scale, message):
    with pytest.raises(ValueError, match=message):
        ProjectedNormal(loc, scale, validate_args=True)


def test_kl_between_different_spheres():
    with pytest.raises(ValueError, match="same sphere"):
        kl_divergence(ProjectedNormal(torch.ones(3), torch.ones(3)), HypersphericalUniform(4))
