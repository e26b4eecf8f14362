r"""Pair kernels f(z, z'), the unnormalised density of one view's latent given the other's, and their expectations.

A kernel is a callable ``kernel(z1, z2)`` on ``(..., N, d)`` and ``(..., M, d)`` that returns ``log f`` on the grid
``(..., N, M)``. Only ratios of f matter to the InfoNCE likelihood, so kernels need no normaliser. A :class:`PairKernel`
can also hand out the grid unevaluated, which lets the factors go through a large one by tiles.

The functions below integrate the von Mises-Fisher kernel over two von Mises-Fisher posteriors. Their values are log
density ratios: log of p(x, x') / p(x) p(x') under the model, in nats, zero for views that say nothing. Each comes as a
grid (``*_log_ratio``) and unevaluated (``*_pairs``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.nn import PyroParam
from torch import Tensor

from .distributions import VonMisesFisher
from .modules import Module
from .ops.anisotropic import log_normalizer, matched_precision
from .ops.bessel import bessel_ratio, matched_log_density
from .ops.constraints import scale_parameter, signed_scale_parameter
from .ops.precision import HALF, at_least_single, matmul
from .ops.products import products
from .ops.series import expected_kernel_log_ratio, shared_latent_kernel_log_ratio
from .ops.tables import on_grid
from .ops.tiles import Pairs, Tensors

__all__ = [
    "AnisotropicKernel",
    "PairKernel",
    "VonMisesFisherKernel",
    "expected_log_ratio",
    "expected_pairs",
    "moment_matched_anisotropic_pairs",
    "moment_matched_log_ratio",
    "moment_matched_pairs",
    "shared_latent_log_ratio",
    "shared_latent_pairs",
]


class PairKernel(Module):
    """A kernel whose grid can be left unevaluated. Subclasses define :meth:`pairs`.

    Ask for the pairs by calling the module, ``kernel(z1, z2, lazy=True)``: Pyro sees its parameters only in a call.

    Shape:
        ``(..., N, d), (..., M, d) -> (..., N, M)``.

    Example:
        >>> class Laplace(PairKernel):
        ...     def pairs(self, z1, z2):
        ...         return Pairs(minus_distance, (z1,), (z2,))
        >>> def minus_distance(rows, columns, shared):
        ...     return -torch.cdist(rows[0], columns[0])
        >>> Laplace()(torch.zeros(2, 3), torch.eye(3))
        tensor([[-1., -1., -1.],
                [-1., -1., -1.]])
    """

    def forward(self, z1: Tensor, z2: Tensor, *, lazy: bool = False) -> Tensor | Pairs:
        """Return log f on the grid of all pairs, or unevaluated.

        Args:
            z1: ``(..., N, d)``.
            z2: ``(..., M, d)``.
            lazy: return :class:`~pyro_contrastive.ops.tiles.Pairs` instead of a tensor.
        """
        pairs = self.pairs(z1, z2)
        return pairs if lazy else pairs.grid()

    def pairs(self, z1: Tensor, z2: Tensor) -> Pairs:
        """The grid, unevaluated: what each item brings along is computed here, once, and what each pair needs there."""
        raise NotImplementedError(f"{type(self).__name__} must define pairs(z1, z2)")


class VonMisesFisherKernel(PairKernel):
    r"""The von Mises-Fisher kernel, :math:`\log f(z, z') = \kappa\, z \cdot z'`.

    Its concentration is the inverse of the "temperature" of contrastive losses.

    Args:
        concentration: kappa > 0, finite.
        learn: make it a positive parameter (``concentration``) instead of a buffer, optimised as log(kappa) / 4 so
            that it keeps pace with the network.

    Raises:
        ValueError: if the concentration is not positive and finite.

    Shape:
        ``(..., N, d), (..., M, d) -> (..., N, M)``.
    """

    concentration: Tensor

    def __init__(self, concentration: float = 10.0, *, learn: bool = False) -> None:
        super().__init__()
        value = torch.as_tensor(float(concentration))
        if not (value > 0 and torch.isfinite(value)):
            raise ValueError(f"`concentration` of a kernel must be positive and finite, got {concentration!r}")
        if learn:
            setattr(self, "concentration", PyroParam(value, constraint=scale_parameter))  # noqa: B010 (typing)
        else:
            self.register_buffer("concentration", value)

    def pairs(self, z1: Tensor, z2: Tensor) -> Pairs:
        """See :meth:`PairKernel.pairs`."""
        if z1.dtype in HALF:  # kappa z1 would be rounded once more, and kappa times that lost
            return Pairs(products, (z1,), (z2,), (self.concentration,))
        return Pairs(products, (self.concentration * z1,), (z2,))


def _matched_anisotropic(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    (mu1, k1), (mu2, k2), (precision,) = rows, columns, shared
    # (..., N, M, d): the precision of a pair depends on the widths of both of its items
    matched = matched_precision(precision, k1, k2.mT)
    distance = (mu1.unsqueeze(-2) - mu2.unsqueeze(-3)).square()
    return -(matched * distance).sum(-1) - log_normalizer(mu1.unsqueeze(-2), matched)


class AnisotropicKernel(PairKernel):
    r"""The anisotropic Gaussian kernel, :math:`\log f(z, z') = -(z - z')^\top \mathrm{diag}(\Lambda)\, (z - z')`.

    A dimension with a large precision varies little between two views of a thing ("content"), one with a small
    precision varies much ("style"). It is computed by one matrix product, and is not a dot product with weights: the
    terms quadratic in z' do not cancel in the likelihood unless all precisions are equal.

    Convention: Lambda as in the paper, without a factor 1/2. The authors' code has the factor, so its precisions are
    twice as large; on the unit sphere, Lambda = lambda I is the von Mises-Fisher kernel with kappa = 2 lambda.

    Args:
        dim: d, dimension of the latents.
        precision: Lambda > 0, finite; one number for all dimensions or d of them.
        learn: make them positive parameters (``precision``) instead of a buffer, optimised as log(Lambda) / 4 so that
            they keep pace with the network.
        normalized: subtract the log of the mean of f(z, .) over the sphere, by a saddle point
            (:func:`~pyro_contrastive.ops.anisotropic.log_normalizer`): log f is then the log density of z' given z
            relative to the uniform law. It cancels where partners of one z are compared, and not where candidates
            for z are.
        signed: let them be negative. The kernel is then a ratio of two anisotropic laws, for negatives that are not
            uniform: their precisions are differences (optimised as asinh(Lambda) / 4).

    Raises:
        ValueError: if a precision is not finite, or not positive in a kernel that is not `signed`, or if there is
            neither one number nor d numbers; when called, if latents have another dimension.

    Shape:
        ``(..., N, d), (..., M, d) -> (..., N, M)``.

    References:
        Rusak, Reizinger, Juhos, Bringmann, Zimmermann and Brendel, AISTATS 2025, arXiv 2407.00143.

    Example:
        >>> kernel = AnisotropicKernel(2, [4.0, 1.0], learn=False)
        >>> kernel(torch.eye(2), torch.eye(2))
        tensor([[ 0., -5.],
                [-5.,  0.]])
    """

    precision: Tensor

    def __init__(
        self,
        dim: int,
        precision: float | Sequence[float] | Tensor = 5.0,
        *,
        learn: bool = True,
        normalized: bool = False,
        signed: bool = False,
    ) -> None:
        super().__init__()
        value = torch.as_tensor(precision, dtype=torch.get_default_dtype()).detach()
        if value.shape not in ((), (1,), (dim,)):
            raise ValueError(
                f"`precision` must be one number or one per dimension, {dim} of them, got shape {tuple(value.shape)}"
            )
        if normalized and signed:
            raise ValueError("`normalized` is for precisions that are positive; pass only one of it and `signed`")
        value = value.expand(dim).clone()
        if not ((value.gt(0) | signed) & value.isfinite()).all():
            rule, way_out = ("", "") if signed else ("positive and ", "; signed=True allows negative ones")
            raise ValueError(f"`precision` must be {rule}finite, got {precision!r}{way_out}")
        self.normalized = normalized
        if learn:
            constraint = signed_scale_parameter if signed else scale_parameter
            setattr(self, "precision", PyroParam(value, constraint=constraint))  # noqa: B010 (typing)
        else:
            self.register_buffer("precision", value)

    def pairs(self, z1: Tensor, z2: Tensor) -> Pairs:
        """See :meth:`PairKernel.pairs`."""
        precision = self.precision
        for z in (z1, z2):
            if z.shape[-1] != len(precision):
                raise ValueError(
                    f"the kernel has {len(precision)} precisions and latents of shape {tuple(z.shape)} have "
                    f"{z.shape[-1]} dimensions; build AnisotropicKernel({z.shape[-1]})"
                )
        z1, z2 = at_least_single(z1), at_least_single(z2)
        rows, columns = (-(z.square() * precision).sum(-1, keepdim=True) for z in (z1, z2))
        if self.normalized:
            rows = rows - log_normalizer(z1, precision).unsqueeze(-1)
        return Pairs(products, (2 * precision * z1, rows), (z2, columns))


def _check_families(posterior1: VonMisesFisher, posterior2: VonMisesFisher) -> None:
    for q in (posterior1, posterior2):
        if not isinstance(q, VonMisesFisher):
            raise TypeError(
                "closed-form evidences need VonMisesFisher posteriors, got "
                f"{type(q).__name__}; use guides.VonMisesFisher, or evidence='k_sample' with any guide"
            )


def _directions_and_concentrations(posterior1: VonMisesFisher, posterior2: VonMisesFisher) -> tuple[Tensors, Tensors]:
    _check_families(posterior1, posterior2)
    rows, columns = ((q.mean_direction, q.concentration.unsqueeze(-1)) for q in (posterior1, posterior2))
    return rows, columns


def _shared_latent(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    (mu1, k1), (mu2, k2) = rows, columns
    return on_grid(shared_latent_kernel_log_ratio, mu1.shape[-1], k1, k2.mT, (), matmul(mu1, mu2.mT))


def shared_latent_pairs(posterior1: VonMisesFisher, posterior2: VonMisesFisher) -> Pairs:
    """:func:`shared_latent_log_ratio`, unevaluated."""
    return Pairs(_shared_latent, *_directions_and_concentrations(posterior1, posterior2))


def shared_latent_log_ratio(posterior1: VonMisesFisher, posterior2: VonMisesFisher) -> Tensor:
    r"""Exact evidence of a pair of views that share one uniform latent (pair concentration infinite), on all pairs.

    With recognition laws vMF(mu1, k1) and vMF(mu2, k2), writing :math:`\Phi` for the log-partition
    (:func:`~pyro_contrastive.ops.log_partition`),

    .. math::  \log \frac{p(x, x')}{p(x)\,p(x')} = \Phi(|k_1 \mu_1 + k_2 \mu_2|) - \Phi(k_1) - \Phi(k_2).

    It has no temperature: the concentrations take its place, item by item. (The expected-likelihood kernel of the
    literature is the same quantity.)

    Args:
        posterior1: batch ``(..., N)``.
        posterior2: batch ``(..., M)``.

    Returns:
        ``(..., N, M)`` log ratios in nats.

    Raises:
        TypeError: for posteriors of another family.
    """
    return shared_latent_pairs(posterior1, posterior2).grid()


def _matched_log_ratio(dim: int, length1: Tensor, length2: Tensor, length: Tensor, cosine: Tensor) -> Tensor:
    rho, cosine = torch.broadcast_tensors(length1 * length2 * length, cosine)
    return matched_log_density(dim, rho, cosine)


def _moment_matched(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    (mu1, length1), (mu2, length2) = rows, columns
    return on_grid(_matched_log_ratio, mu1.shape[-1], length1, length2.mT, shared, matmul(mu1, mu2.mT))


def moment_matched_pairs(posterior1: VonMisesFisher, posterior2: VonMisesFisher, concentration: Tensor) -> Pairs:
    """:func:`moment_matched_log_ratio`, unevaluated."""
    _check_families(posterior1, posterior2)
    rows, columns = ((q.mean_direction, q.mean_resultant_length.unsqueeze(-1)) for q in (posterior1, posterior2))
    return Pairs(_moment_matched, rows, columns, (bessel_ratio(posterior1.dim, concentration),))


def moment_matched_anisotropic_pairs(
    posterior1: VonMisesFisher, posterior2: VonMisesFisher, precision: Tensor
) -> Pairs:
    r"""Evidence of a pair of views whose latents lie apart by an anisotropic law, in closed form but not exact.

    The law of the second view given the first is taken to be anisotropic around the first mean direction, with the
    precisions of :func:`~pyro_contrastive.ops.anisotropic.matched_precision` for the three steps (first posterior,
    pair, second posterior), and normalised. For equal precisions this is :func:`moment_matched_log_ratio`. Against
    simulation at d = 4 and 10, concentrations of 4 to 64 and ratios of precisions up to 5 it is off by about .05 nats
    for likely pairs (.2 at most), and by more on the far side, where pairs weigh little; at a ratio of 20 by up to .6.

    Args:
        posterior1: batch ``(..., N)``, of the anchors.
        posterior2: batch ``(..., M)``.
        precision: Lambda > 0 of the pair, ``(d,)``, the paper's convention.

    Returns:
        ``(..., N, M)`` log ratios in nats, unevaluated. A grid takes memory for ``d`` numbers per pair.

    Raises:
        TypeError: for posteriors of another family.
    """
    rows, columns = _directions_and_concentrations(posterior1, posterior2)
    return Pairs(_matched_anisotropic, rows, columns, (precision,))


def moment_matched_log_ratio(posterior1: VonMisesFisher, posterior2: VonMisesFisher, concentration: Tensor) -> Tensor:
    r"""Evidence of a pair of views whose latents are vMF(z, kappa) apart, by matching one moment, on all pairs.

    The law of z2 given the two posteriors' means is replaced by the von Mises-Fisher law with the same mean resultant
    length: :math:`A(k_{12}) = A(k_1) A(k_2) A(\kappa)`, and the log ratio is
    :math:`k_{12} \cos - \Phi(k_{12})`. Cheap and smooth; off by up to half a nat for concentrated pairs in high
    dimension, and by more on the far side, where pairs weigh little.

    Args:
        posterior1: batch ``(..., N)``.
        posterior2: batch ``(..., M)``.
        concentration: kappa > 0 of the pair, a scalar tensor.

    Returns:
        ``(..., N, M)`` log ratios in nats.

    Raises:
        TypeError: for posteriors of another family.
    """
    return moment_matched_pairs(posterior1, posterior2, concentration).grid()


def _expected(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    (mu1, k1), (mu2, k2) = rows, columns
    return on_grid(expected_kernel_log_ratio, mu1.shape[-1], k1, k2.mT, shared, matmul(mu1, mu2.mT))


def expected_pairs(posterior1: VonMisesFisher, posterior2: VonMisesFisher, concentration: float | Tensor) -> Pairs:
    """:func:`expected_log_ratio`, unevaluated."""
    _check_families(posterior1, posterior2)
    if isinstance(concentration, Tensor):
        kappa = concentration.to(posterior1.concentration)
    elif not concentration > 0:
        raise ValueError(f"`concentration` of a pair must be positive, or infinite, got {concentration!r}")
    elif math.isinf(concentration):
        return shared_latent_pairs(posterior1, posterior2)
    else:
        kappa = posterior1.concentration.new_tensor(concentration)
    return Pairs(_expected, *_directions_and_concentrations(posterior1, posterior2), (kappa,))


def expected_log_ratio(posterior1: VonMisesFisher, posterior2: VonMisesFisher, concentration: float | Tensor) -> Tensor:
    r"""Exact evidence of a pair of views whose latents are vMF(z, kappa) apart, the latents integrated out.

    .. math::  \log \frac{p(x, x')}{p(x)\,p(x')} = \log E[f(z, z')] - \Phi(\kappa), \quad
               z \sim R(\cdot|x),\ z' \sim R(\cdot|x'),\ f = e^{\kappa z \cdot z'}

    No samples and no approximation to speak of: see :func:`~pyro_contrastive.ops.expected_kernel_log_ratio` for the
    series and its accuracy.

    Args:
        posterior1: batch ``(..., N)``.
        posterior2: batch ``(..., M)``.
        concentration: kappa > 0 of the pair, a number or a scalar tensor; infinite for views that share one latent.

    Returns:
        ``(..., N, M)`` log ratios in nats.

    Raises:
        TypeError: for posteriors of another family.
        ValueError: if the concentration is not positive.
    """
    return expected_pairs(posterior1, posterior2, concentration).grid()
