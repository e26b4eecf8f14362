"""AnInfoNCE (Rusak et al. 2025): contrastive learning of latents whose axes vary by different amounts within a pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_contrastive.factors import check_recognition, emit
from pyro_contrastive.kernels import AnisotropicKernel, moment_matched_anisotropic_pairs
from pyro_contrastive.modules import Module
from pyro_contrastive.ops.joint import joint_size
from pyro_contrastive.ops.tiles import Pairs, contrast

__all__ = ["AnInfoNCE", "Candidates", "check_options", "pair_log_ratio"]

Evidence = Literal["elbo", "k_sample", "moment_matched"]
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
    ``anchors``   the first views of the others, in both directions. They are uniform where the story holds, and the
                  likelihood is then exact.
    ``partners``  the views of the others' partners, the other way round those of the others' anchors, as in
                  :class:`MCInfoNCE`. Partners are not quite uniform, since C(z) depends on z.
    ``both``      all 2 N - 1 of them, as in the paper's code.
    ============  =================================================================================================

    ``evidence`` says how the latents are integrated:

    ==================  ===========================================================================================
    ``elbo``            the mean of the log at the sampled latents. With point embeddings (``guides.Delta``, the
                        paper) it is the evidence. ``KSampleELBO(K)`` makes it ``k_sample``.
    ``k_sample``        the log of the mean over ``num_samples`` draws; a small K favours posteriors that are too
                        concentrated.
    ``moment_matched``  no samples: :func:`~pyro_contrastive.kernels.moment_matched_anisotropic_pairs`, for
                        ``guides.VonMisesFisher``: pairs that are anisotropic and views that are heteroscedastic.
    ==================  ===========================================================================================

    As for every stochastic guide, the level of the concentrations is identified only relative to the pairs: state
    Lambda (``learn_precision=False``) to have widths that mean something.

    Args:
        guide: recognition module with ``posterior(x)`` and ``dim``, used as the Pyro guide too; any family.
        precision: Lambda, > 0, in the paper's convention (the authors' code counts twice as much); one number for all
            axes or one for each. Where training starts, or the truth if it is not learned.
        learn_precision: learn Lambda. It is optimised as log(Lambda) / 4, so that one learning rate suffices.
        evidence: see above.
        num_samples: K of ``k_sample``.
        candidates: see above.
        symmetric: average with the likelihood of the anchor given its partner.
        normalized: divide f by C(z). That cancels in the likelihood of the partner and makes the one of the anchor
            exact. False is the paper's form, whose small precisions come out some percent too large.
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
        normalized: bool = True,
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
        if hard_negatives and evidence == "moment_matched":
            raise ValueError("`hard_negatives` have no closed form; use evidence='elbo' or 'k_sample' with them")
        if signed and not hard_negatives:
            raise ValueError("`signed` is for differences of precisions; it needs `hard_negatives` >= 1, got 0")
        self.guide = guide
        self.kernel = AnisotropicKernel(
            guide.dim, precision, learn=learn_precision, normalized=normalized and not hard_negatives, signed=signed
        )
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
            elif self.evidence == "moment_matched":
                value = pair_log_ratio(
                    self._expected_pairs, *posteriors, candidates=self.candidates, symmetric=self.symmetric
                )
            else:
                draws = [posterior.rsample(torch.Size((self.num_samples,))) for posterior in posteriors]
                value = self._log_ratio(draws).logsumexp(0) - math.log(self.num_samples)
            emit("positive", value)

    def _log_ratio(self, z: list[Tensor]) -> Tensor:
        if not self.hard_negatives:
            log_f = partial(self.kernel, lazy=True)
            return pair_log_ratio(log_f, *z, candidates=self.candidates, symmetric=self.symmetric)
        log_f = self.kernel(z[0].unsqueeze(-2), torch.stack(z[1:], dim=-2)).squeeze(-2)  # (..., N, 1 + M)
        return log_f[..., 0] - log_f.logsumexp(-1) + math.log(log_f.shape[-1])

    def _expected_pairs(self, posterior1: Any, posterior2: Any) -> Pairs:
        return moment_matched_anisotropic_pairs(posterior1, posterior2, self.kernel.precision)

    def partner_logits(self, x1: Tensor, x2: Tensor, *, posteriors: tuple[Any, Any] | None = None) -> Tensor:
        """Log evidence that x1[i] and x2[j] show the same thing, for all pairs: the logits of the partner's index.

        Args:
            x1: ``(N, ...)`` views.
            x2: ``(M, ...)`` views.
            posteriors: of both, when they are already known.

        Returns:
            ``(N, M)`` log density ratios in nats. Sampled evidences average the kernel over ``num_samples`` draws,
            unless embeddings are points. Without ``normalized``, and with hard negatives, they hold up to a constant
            of each row.
        """
        posterior1, posterior2 = posteriors or (self.guide.posterior(x1), self.guide.posterior(x2))
        if self.evidence == "moment_matched":
            return self._expected_pairs(posterior1, posterior2).grid()
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
    log_f: Callable[[Any, Any], Pairs],
    first: Any,
    second: Any,
    *,
    candidates: Candidates = "anchors",
    symmetric: bool = True,
) -> Tensor:
    r"""Log InfoNCE likelihood of pairs against candidates from either view: :math:`f_{ii} / \frac1n \sum_c f_{ic}`.

    Args:
        log_f: ``log_f(first, second)``: all pairs, unevaluated.
        first: what it takes for the anchors, of batch shape ``(..., N)`` or shape ``(..., N, d)``.
        second: for their partners, by rows.
        candidates: what stands in the sum beside the partner, see :class:`AnInfoNCE`; n is their number, the partner
            included: N, or 2 N - 1 for ``"both"``.
        symmetric: average with the likelihood of the anchor given its partner.

    Returns:
        ``(..., N)`` in nats, at most log n.
    """
    across = contrast(log_f(first, second), symmetric=symmetric)
    total, size = across.row, joint_size(across.row.shape[-1])
    if candidates != "partners":
        others = contrast(log_f(first, first), shift=-math.inf).row  # without the item itself
        total = torch.logaddexp(across.positive if candidates == "anchors" else total, others)
    if across.column is not None:  # candidates for z, given z': log_f need not be symmetric
        back = across.column
        if candidates == "both":
            within = contrast(log_f(second, second), shift=-math.inf, symmetric=True).column
            assert within is not None
            back = torch.logaddexp(back, within)
        total = 0.5 * (total + back)
    return across.positive - total + math.log(2 * size - 1 if candidates == "both" else size)
