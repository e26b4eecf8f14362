"""AnInfoNCE (Rusak et al. 2025): contrastive learning of latents whose axes vary by different amounts within a pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_contrastive.factors import check_recognition, emit
from pyro_contrastive.kernels import AnisotropicKernel
from pyro_contrastive.modules import Module
from pyro_contrastive.ops.tiles import contrast

__all__ = ["AnInfoNCE", "Candidates", "check_options", "pair_log_ratio"]

Evidence = Literal["elbo", "k_sample"]
Candidates = Literal["anchors", "partners", "both"]


class AnInfoNCE(Module):
    r"""InfoNCE with a learned precision per axis.

    .. math::  \log f(z, z') = -(z - z')^\top \mathrm{diag}(\Lambda)\, (z - z')

    Generative story: z is uniform on the sphere and its partner has the density :math:`p(z'|z) = f(z, z') / C(z)`. An
    axis with a large precision is shared by the views of a pair ("content"), one with a small precision varies within
    it ("style"). Where the story holds, the optimum has the true Lambda on an absolute scale, and the latents up to
    rotations among axes of equal precision: where all precisions differ, up to the order and the signs of the axes.

    ``candidates`` says what the partner of an item is contrasted with:

    ============  =================================================================================================
    ``anchors``   the first views of the others. They are uniform where the story holds, and only then is the
                  likelihood exact: partners are not quite uniform, since C(z) depends on z.
    ``partners``  the second views of the others, as in :class:`MCInfoNCE`. The cheapest.
    ``both``      2 N - 1 candidates, as in the paper's code. Its Lambda is about 1 % larger.
    ============  =================================================================================================

    With point embeddings (``guides.Delta``, the paper) the ELBO is the evidence. Stochastic guides make the posterior
    anisotropic in its pairs *and* heteroscedastic in its inputs; ``evidence`` is then as in :class:`MCInfoNCE`, where
    a small K favours posteriors that are too concentrated.

    Args:
        guide: recognition module with ``posterior(x)`` and ``dim``, used as the Pyro guide too; any family.
        precision: Lambda, > 0, in the paper's convention (the authors' code counts twice as much); one number for all
            axes or one for each. Where training starts, or the truth if it is not learned.
        learn_precision: learn Lambda. It is optimised as log(Lambda) / 4, so that one learning rate suffices.
        evidence: ``"elbo"`` (the mean of the log at the sampled latents) or ``"k_sample"`` (the log of the mean over
            ``num_samples`` draws).
        num_samples: K of ``k_sample``.
        candidates: see above.
        symmetric: average with the likelihood of the first view given the second. Helps the encoder, and is exact
            where pairs are exchangeable.
        hard_negatives: M; each anchor comes with M negatives of its own as further views, drawn around it with some
            precision Lambda^-. They replace the other items of the batch, and what is learned is Lambda - Lambda^-.
        signed: let learned precisions be negative, as such a difference may be. Without it a negative one stays near
            zero, and its axis is lost.

    Raises:
        TypeError: for a guide without ``posterior(x)`` or without ``dim``.
        ValueError: for an option out of its range; when called, for another number of views or views of different
            lengths.

    References:
        Rusak, Reizinger, Juhos, Bringmann, Zimmermann and Brendel, "InfoNCE: Identifying the Gap Between Theory and
        Practice", AISTATS 2025, arXiv 2407.00143.

    Example:
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> from pyro.infer import Trace_ELBO
        >>> guide = guides.Delta(nn.Linear(8, 32), dim=5)
        >>> elbo = Trace_ELBO()(AnInfoNCE(guide), guide)
        >>> elbo(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        guide: Any,
        *,
        precision: float | Sequence[float] | Tensor = 5.0,
        learn_precision: bool = True,
        evidence: Evidence = "elbo",
        num_samples: int = 16,
        candidates: Candidates = "anchors",
        symmetric: bool = True,
        hard_negatives: int = 0,
        signed: bool = False,
    ) -> None:
        super().__init__()
        check_options(guide, candidates)
        if evidence not in get_args(Evidence):
            raise ValueError(
                f"`evidence` must be one of {', '.join(get_args(Evidence))}, got {evidence!r}; the closed forms of "
                "MCInfoNCE hold for isotropic kernels only"
            )
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"`num_samples` must be an integer >= 1, got {num_samples!r}")
        if not isinstance(hard_negatives, int) or hard_negatives < 0:
            raise ValueError(f"`hard_negatives` must be an integer >= 0, got {hard_negatives!r}")
        self.guide = guide
        self.kernel = AnisotropicKernel(guide.dim, precision, learn=learn_precision, signed=signed)
        self.evidence = evidence
        self.num_samples = num_samples
        self.candidates: Candidates = candidates
        self.symmetric = symmetric
        self.hard_negatives = hard_negatives

    @property
    def precision(self) -> Tensor:
        """Lambda, or Lambda - Lambda^- with hard negatives, ``(d,)``."""
        return self.kernel.precision

    def forward(self, *views: Tensor) -> None:
        """The Pyro model: sites "z1", "z2", ... and the factor "positive" in the plate "pairs".

        Args:
            views: ``(N, ...)`` each: anchors, partners, and as many hard negatives as were announced; row i of each
                belongs to row i of the first.
        """
        if len(views) != 2 + self.hard_negatives or len({len(x) for x in views}) != 1 or len(views[0]) < 2:
            raise ValueError(
                f"AnInfoNCE(hard_negatives={self.hard_negatives}) needs {2 + self.hard_negatives} views of one length "
                f"N >= 2, got {[tuple(x.shape) for x in views]}"
            )
        posteriors = [self.guide.posterior(x) for x in views]
        with pyro.plate("pairs", len(views[0]), dim=-1):
            # P(z) = R(z), P(z'|z) ~ R(z') f: the recognition laws cancel and the factor is what is left
            z = [pyro.sample(f"z{j}", posterior) for j, posterior in enumerate(posteriors, start=1)]
            if self.evidence == "elbo":
                value = self._log_ratio(z)
            else:
                draws = [posterior.rsample(torch.Size((self.num_samples,))) for posterior in posteriors]
                value = self._log_ratio(draws).logsumexp(0) - math.log(self.num_samples)
            emit("positive", value)

    def _log_ratio(self, z: list[Tensor]) -> Tensor:
        if not self.hard_negatives:
            return pair_log_ratio(self.kernel, z[0], z[1], candidates=self.candidates, symmetric=self.symmetric)
        log_f = self.kernel(z[0].unsqueeze(-2), torch.stack(z[1:], dim=-2)).squeeze(-2)  # (..., N, 1 + M)
        return log_f[..., 0] - log_f.logsumexp(-1) + math.log(log_f.shape[-1])

    def partner_logits(self, x1: Tensor, x2: Tensor, *, posteriors: tuple[Any, Any] | None = None) -> Tensor:
        """Log evidence that x1[i] and x2[j] show the same thing, for all pairs: the logits of the partner's index.

        Args:
            x1: ``(N, ...)`` views.
            x2: ``(M, ...)`` views.
            posteriors: of both, when they are already known.

        Returns:
            ``(N, M)`` log averages of the kernel in nats, over ``num_samples`` draws unless embeddings are points. They
            hold up to a constant of each row, and Monte-Carlo error. With hard negatives they are relative to those.
        """
        posterior1, posterior2 = posteriors or (self.guide.posterior(x1), self.guide.posterior(x2))
        points = isinstance(posterior1, Delta) and isinstance(posterior2, Delta)
        size = torch.Size((1 if points else self.num_samples,))
        log_f = self.kernel(posterior1.rsample(size), posterior2.rsample(size))
        return log_f.logsumexp(0) - math.log(size[0])


def check_options(guide: Any, candidates: str) -> None:
    """Check what the models with an anisotropic kernel have in common.

    Args:
        guide: recognition module with ``dim``.
        candidates: one of `Candidates`.

    Raises:
        TypeError: for a guide without ``posterior(x)`` or without ``dim``.
        ValueError: for other candidates.
    """
    check_recognition("guide", guide)
    if not isinstance(getattr(guide, "dim", None), int):
        raise TypeError(
            f"`guide` must have an attribute `dim`, the number of axes, got {type(guide).__name__} without one; "
            "use a guide of pyro_contrastive.guides, or set it"
        )
    if candidates not in get_args(Candidates):
        raise ValueError(f"`candidates` must be one of {', '.join(get_args(Candidates))}, got {candidates!r}")


def pair_log_ratio(
    kernel: Any, z1: Tensor, z2: Tensor, *, candidates: Candidates = "anchors", symmetric: bool = True
) -> Tensor:
    r"""Log InfoNCE likelihood of pairs against candidates from either view: :math:`f_{ii} / \frac1n \sum_c f_{ic}`.

    Args:
        kernel: a :class:`~pyro_contrastive.kernels.PairKernel`.
        z1: ``(..., N, d)`` anchors.
        z2: ``(..., N, d)`` their partners, by rows.
        candidates: what stands in the sum beside the partner, see :class:`AnInfoNCE`; n is their number, the partner
            included: N, or 2 N - 1 for ``"both"``.
        symmetric: average with the same after z1 and z2 changed places.

    Returns:
        ``(..., N)`` in nats, at most log n.
    """
    across = contrast(kernel(z1, z2, lazy=True), symmetric=symmetric)
    totals = []
    for z, total in ((z1, across.row), (z2, across.column)):
        if total is None:
            continue
        if candidates != "partners":
            others = contrast(kernel(z, z, lazy=True), shift=-math.inf).row  # without the item itself
            total = torch.logaddexp(across.positive if candidates == "anchors" else total, others)
        totals.append(total)
    size = 2 * z1.shape[-2] - 1 if candidates == "both" else z1.shape[-2]
    return across.positive - torch.stack(totals).mean(0) + math.log(size)
