"""AnInfoNCE (Rusak et al. 2025): contrastive learning of latents whose axes vary by different amounts within a pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import pyro
import torch
from torch import Tensor

from pyro_contrastive.factors import check_recognition, emit
from pyro_contrastive.kernels import AnisotropicKernel
from pyro_contrastive.modules import Module
from pyro_contrastive.ops.tiles import contrast

__all__ = ["AnInfoNCE"]

Evidence = Literal["elbo", "k_sample"]
Candidates = Literal["anchors", "partners", "both"]


class AnInfoNCE(Module):
    r"""InfoNCE with a learned precision per axis: :math:`\log f(z, z') = -(z - z')^\top \mathrm{diag}(\Lambda) (z - z')`.

    Generative story: z is uniform on the sphere and its partner has the density
    :math:`p(z'|z) = f(z, z') / C(z)`. An axis with a large precision is shared by the views ("content"), one with a small precision varies
    ("style"); isotropic InfoNCE loses the latter where content suffices to tell items apart. At the optimum
    Lambda itself is recovered, and the latents up to rotations among axes of equal precision: with precisions that
    all differ, the axes themselves.

    ``candidates`` says what the partner of item i is contrasted with:

    ============  ============================================================================================
    ``partners``  the second views of the others, as in ordinary InfoNCE.
    ``anchors``   the first views of the others. They are uniform if the latents of the first views are, and
                  the likelihood is then exact; partners are not uniform, since C(z) depends on z.
    ``both``      2 N - 1 candidates, as in the paper's code.
    ============  ============================================================================================

    With a point posterior (``guides.Delta``, the paper) the ELBO is the evidence. Any other guide works as well:
    anisotropic *and* heteroscedastic.

    Args:
        guide: recognition module with ``posterior(x)``, used as the Pyro guide too; any family.
        precision: Lambda at the start, > 0: one number, or one per axis; the paper's convention, half of the authors'
            code.
        learn_precision: learn Lambda; ``False`` keeps it as it is stated.
        isotropic: one precision for all axes: InfoNCE with a learned temperature 1 / (2 lambda).
        evidence: ``"elbo"``: the log at the sampled latents; the log-mean-exp over ``num_samples`` draws with
            ``"k_sample"``.
        num_samples: K of ``k_sample``.
        candidates: see above.
        symmetric: average with the likelihood of the first view given the second.
        hard_negatives: M >= 1: each anchor comes with M negatives of its own, drawn with precision Lambda^-; the model
            then takes M more views, contrasts with them only, and learns Lambda - Lambda^-.
        signed: let learned precisions be negative, which a difference may be.

    Raises:
        TypeError: for a guide without ``posterior(x)``.
        ValueError: for an option out of its range; when called, for another number of views.

    References:
        Rusak, Reizinger, Juhos, Bringmann, Zimmermann and Brendel, AISTATS 2025, arXiv 2407.00143.
    """

    def __init__(
        self,
        guide: Any,
        *,
        precision: float | Sequence[float] | Tensor = 5.0,
        learn_precision: bool = True,
        isotropic: bool = False,
        evidence: Evidence = "elbo",
        num_samples: int = 16,
        candidates: Candidates = "both",
        symmetric: bool = True,
        hard_negatives: int = 0,
        signed: bool = False,
    ) -> None:
        super().__init__()
        check_recognition("guide", guide)
        self.guide = guide
        self.kernel = AnisotropicKernel(guide.dim, precision, learn=learn_precision, signed=signed)
        self.evidence = evidence
        self.num_samples = num_samples
        self.candidates = candidates
        self.symmetric = symmetric
        self.hard_negatives = hard_negatives

    @property
    def precision(self) -> Tensor:
        """Lambda, ``(d,)``."""
        return self.kernel.precision

    def forward(self, *views: Tensor) -> None:
        """The Pyro model: sites "z1", "z2", ... and the factor "positive" in the plate "pairs"."""
        posteriors = [self.guide.posterior(x) for x in views]
        with pyro.plate("pairs", len(views[0]), dim=-1):
            z = [pyro.sample(f"z{j}", posterior) for j, posterior in enumerate(posteriors, start=1)]
            if self.evidence == "k_sample":
                z = [posterior.rsample(torch.Size((self.num_samples,))) for posterior in posteriors]
            value = self.log_ratio(z)
            if self.evidence == "k_sample":
                value = value.logsumexp(0) - math.log(self.num_samples)
            emit("positive", value)

    def log_ratio(self, z: list[Tensor]) -> Tensor:
        if self.hard_negatives:
            log_f = self.kernel(z[0].unsqueeze(-2), torch.stack(z[1:], dim=-2)).squeeze(-2)
            return log_f[..., 0] - log_f.logsumexp(-1) + math.log(log_f.shape[-1])
        return pair_log_ratio(self.kernel, *z, candidates=self.candidates, symmetric=self.symmetric)


def pair_log_ratio(kernel: Any, z1: Tensor, z2: Tensor, *, candidates: Candidates, symmetric: bool) -> Tensor:
    across = contrast(kernel(z1, z2, lazy=True), symmetric=symmetric)
    positive, count = across.positive, z1.shape[-2]
    totals = []
    for z, total in ((z1, across.row), (z2, across.column)):
        if total is None:
            continue
        if candidates != "partners":
            others = contrast(kernel(z, z, lazy=True), shift=-math.inf).row
            total = torch.logaddexp(positive if candidates == "anchors" else total, others)
        totals.append(total)
    size = 2 * count - 1 if candidates == "both" else count
    return positive - sum(totals) / len(totals) + math.log(size)
