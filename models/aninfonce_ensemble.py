"""Loss ensembles of AnInfoNCE: several augmentation families, one encoder, a precision per axis for each family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_contrastive.factors import emit
from pyro_contrastive.kernels import AnisotropicKernel
from pyro_contrastive.modules import Module

from .aninfonce import Candidates, check_options, pair_log_ratio

__all__ = ["AnInfoNCEEnsemble"]


class AnInfoNCEEnsemble(Module):
    r"""Several augmentation families in one model: what one of them leaves rotated, another may pin.

    Generative story: z is uniform on the sphere, and family k makes a partner with its own precisions,
    :math:`p(z_k|z) \propto e^{-(z_k - z)^\top \mathrm{diag}(\Lambda_k) (z_k - z)}`. Given z the partners are
    independent, so their log likelihoods add up. One family identifies the latents up to rotations among its axes of
    equal precision; together they leave only the rotations that all of them allow, those among axes whose precisions
    are equal in *every* family.

    The factors are those of the sampled latents: with a stochastic guide, ``KSampleELBO(K)`` as the objective averages
    the likelihood of all families together over K draws.

    Args:
        guide: recognition module with ``posterior(x)`` and ``dim``, used as the Pyro guide too; any family.
        families: K >= 1, number of families.
        precision: Lambda_k at the start, > 0, the paper's convention: one number, or ``(d,)`` for every family, or
            ``(K, d)``.
        learn_precision: learn all Lambda_k.
        weights: of the families, > 0; 1 each makes it the likelihood.
        pairs: which views each family relates, counted from 1. Default ``((1, 2), (1, 3), ...)``: an anchor and one
            partner per family. ``((1, 2), (3, 4), ...)`` takes pairs that have nothing in common.
        candidates: see :class:`AnInfoNCE`.
        symmetric: average both directions.
        normalized: see :class:`AnInfoNCE`.

    Raises:
        TypeError: for a guide without ``posterior(x)`` or without ``dim``.
        ValueError: for an option out of its range or of another number of families; when called, for another number of
            views or views of different lengths.

    References:
        Rusak et al., AISTATS 2025, arXiv 2407.00143, propose ensembles; this form of them is ours.

    Example:
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> from pyro.infer import Trace_ELBO
        >>> guide = guides.Delta(nn.Linear(8, 32), dim=5)
        >>> elbo = Trace_ELBO()(AnInfoNCEEnsemble(guide, 2), guide)
        >>> elbo(*torch.randn(3, 16, 8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        guide: Any,
        families: int,
        *,
        precision: float | Sequence[float] | Sequence[Sequence[float]] | Tensor = 5.0,
        learn_precision: bool = True,
        weights: Sequence[float] | None = None,
        pairs: Sequence[tuple[int, int]] | None = None,
        candidates: Candidates = "anchors",
        symmetric: bool = True,
        normalized: bool = True,
    ) -> None:
        super().__init__()
        check_options(guide, candidates)
        if not isinstance(families, int) or families < 1:
            raise ValueError(f"`families` must be an integer >= 1, got {families!r}")
        start = torch.as_tensor(precision, dtype=torch.get_default_dtype())
        if start.dim() == 2 and len(start) != families:
            raise ValueError(f"`precision` must have one row per family, {families} of them, got {tuple(start.shape)}")
        weights = [1.0] * families if weights is None else list(weights)
        if len(weights) != families or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"`weights` must be {families} positive numbers, one per family, got {weights!r}")
        pairs = [(1, k + 2) for k in range(families)] if pairs is None else list(pairs)
        if len(pairs) != families or not all(len(pair) == 2 and 0 < min(pair) < max(pair) for pair in pairs):
            raise ValueError(
                f"`pairs` must be {families} pairs (i, j) of different views, counted from 1, i < j, got {pairs!r}"
            )
        self.guide = guide
        self.num_views = max(max(pair) for pair in pairs)
        self.pairs = pairs
        self.weights = weights
        self.candidates: Candidates = candidates
        self.symmetric = symmetric
        for k in range(families):  # one attribute each: Pyro does not see into a ModuleList
            row = start[k] if start.dim() == 2 else start
            setattr(
                self, f"kernel{k + 1}", AnisotropicKernel(guide.dim, row, learn=learn_precision, normalized=normalized)
            )

    @property
    def precision(self) -> Tensor:
        """Lambda_k of all families, ``(K, d)``."""
        return torch.stack([self._kernel(k).precision for k in range(len(self.pairs))])

    def _kernel(self, family: int) -> AnisotropicKernel:
        return getattr(self, f"kernel{family + 1}")

    def forward(self, *views: Tensor) -> None:
        """The Pyro model: sites "z1", "z2", ... and the factors "family1", ..., "familyK" in the plate "pairs".

        Args:
            views: ``(N, ...)`` each, paired by rows: those that ``pairs`` speaks of.
        """
        if len(views) != self.num_views or len({len(x) for x in views}) != 1 or len(views[0]) < 2:
            raise ValueError(
                f"the pairs {self.pairs} need {self.num_views} views of one length N >= 2, got "
                f"{[tuple(x.shape) for x in views]}"
            )
        posteriors = [self.guide.posterior(x) for x in views]
        with pyro.plate("pairs", len(views[0]), dim=-1):
            z = [pyro.sample(f"z{j}", posterior) for j, posterior in enumerate(posteriors, start=1)]
            for k, ((i, j), weight) in enumerate(zip(self.pairs, self.weights, strict=True)):
                log_f = partial(self._kernel(k), lazy=True)
                value = pair_log_ratio(log_f, z[i - 1], z[j - 1], candidates=self.candidates, symmetric=self.symmetric)
                emit(f"family{k + 1}", weight * value)
