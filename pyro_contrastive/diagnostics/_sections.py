"""What the reports share: an album of pictures, the stored posterior, and checks that every pair gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_contrastive.diagnostics import plots
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics.arviz_bridge import to_arviz
from pyro_contrastive.diagnostics.calibration import direction_and_concentration
from pyro_contrastive.diagnostics.checks import Check
from pyro_contrastive.diagnostics.checks_fit import judge_batch, judge_training
from pyro_contrastive.diagnostics.checks_latent import (
    judge_concentration,
    judge_dimensions,
    judge_level,
    judge_uniformity,
)
from pyro_contrastive.diagnostics.checks_pairs import judge_partner, judge_partner_reliability
from pyro_contrastive.diagnostics.identifiability import Identifiability, identifiability, plot_identifiability
from pyro_contrastive.diagnostics.predictive import PartnerCheck, partner_check
from pyro_contrastive.diagnostics.representation import aggregate_uniformity
from pyro_contrastive.diagnostics.section import Picture
from pyro_contrastive.distributions import VonMisesFisher

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LATENT_TESTS",
    "STORED_ITEMS",
    "Album",
    "aggregate_figures",
    "concentration_figures",
    "embed",
    "fit_checks",
    "latent_checks",
    "level_profile",
    "pair_concentration",
    "partner_figures",
    "partner_scores",
    "store",
]

STORED_ITEMS = 256  # items in posterior.nc and in the search for partners
LATENT_TESTS = 3  # of `latent_checks`: uniformity, partner, stated probabilities
_STORED_DRAWS = 100
_PROFILED = 512  # pairs behind the profile of the pair concentration
_CHUNK = 2048  # views that one pass of the encoder sees
_BLOCKS = 16  # of candidates, at least, for a standard error


class Album:
    """Writes axes as PNG files and keeps their captions.

    Args:
        out: Folder, created where missing.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.pictures: list[Picture] = []

    def add(self, name: str, axes: Axes, caption: str) -> None:
        """Write one picture; what it shows is read off its title and axes."""
        path = self.out / f"{name}.png"
        figure: Any = axes.figure
        figure.savefig(path)
        shown = " ".join(axes.get_title().split("\n")) or name.replace("_", " ")
        if axes.axison and axes.get_ylabel():
            shown += f": {axes.get_ylabel()} against {axes.get_xlabel()}"
        self.pictures.append(Picture(path, caption, shown))

    def finish(
        self, draws: FloatArray, profile: Identifiability | None, history: Mapping[str, Sequence[float]] | None
    ) -> None:
        """Add the pictures that every report ends with."""
        self.add(
            "aggregate",
            plots.plot_aggregate(draws),
            "One posterior draw per item. All axes on the dashed curve: the latent space is used uniformly, as the "
            "identification of the posterior assumes. A gap says along which kind of axis it is not.",
        )
        if profile is not None:
            self.add(
                "identifiability",
                plot_identifiability(profile),
                "Held-out evidence for other pair concentrations. Where the curve with moved widths is flat, the data "
                "do not tell those values apart, and the level of the concentrations is an assumption.",
            )
        if history and "loss" in history:
            curve = {name: column for name, column in history.items() if name in ("step", "loss")}
            finite = {name: [np.nan if value is None else value for value in column] for name, column in curve.items()}
            self.add(
                "history", plots.plot_history(finite), "The loss during training. A long one: with its running median."
            )


def embed(guide: Any, views: Tensor, device: torch.device, seed: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean directions (N, d), concentrations (N,) and one draw per view (N, d), a chunk at a time."""
    parts = []
    for chunk in views.split(_CHUNK):
        posterior = guide.posterior(chunk.to(device))
        parts.append((*direction_and_concentration(posterior, seed=seed), as_array(posterior.sample())))
    mean, kappa, draws = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return mean, kappa, draws.astype(np.float64)


def store(
    out: Path,
    model: Callable[..., Any],
    guide: Any,
    views: tuple[Tensor, ...],
    *,
    seed: int,
    progress: bool,
    sbc: Mapping[str, FloatArray] | None = None,
) -> None:
    """Write `posterior.nc`."""
    data = to_arviz(model, guide, views, num_samples=_STORED_DRAWS, seed=seed, progress=progress, sbc=sbc)
    data.to_netcdf(out / "posterior.nc")


def concentration_figures(kappa: FloatArray) -> dict[str, float]:
    """Range of the concentrations."""
    low, high = np.quantile(kappa, [0.05, 0.95], method="nearest")  # no interpolation: infinity is a legal value
    return {"concentration_q05": float(low), "concentration_q95": float(high)}


def aggregate_figures(draws: FloatArray) -> dict[str, float]:
    """Uniformity of the aggregate."""
    result = aggregate_uniformity(draws)
    return {
        "mean_resultant_length": result.mean_resultant_length,
        "eigenvalue_ratio": result.eigenvalue_ratio,
        "uniformity_pvalue": result.pvalue,
    }


def pair_concentration(model: Any) -> float | None:
    """The concentration of the pair that a model states or has learned; None where it has no single one."""
    concentration = getattr(model, "concentration", None)
    if concentration is None or as_array(concentration).size != 1:
        return None
    return float(as_array(concentration).reshape(()))


def partner_scores(
    model: Any, guide: Any, views: tuple[Tensor, ...], *, seed: int, num_candidates: int = 100
) -> PartnerCheck | None:
    """Scores of the partner among at most `num_candidates`, in at least 16 blocks; None where a model has no logits.

    Fewer than 32 views make no blocks, and give None as well.
    """
    candidates = min(num_candidates, len(views[0]) // _BLOCKS)
    if not hasattr(model, "partner_logits") or candidates < 2:
        return None
    return partner_check(model, guide, views, num_candidates=candidates, seed=seed)


def partner_figures(model: Any, views: tuple[Tensor, ...], scores: PartnerCheck | None) -> dict[str, float]:
    """How often the partner is found among the first 256 pairs, and the scores among fewer."""
    if not hasattr(model, "partner_logits"):
        return {}
    logits = model.partner_logits(*(view[:STORED_ITEMS] for view in views))
    best = as_array(logits.argmax(dim=-1))
    figures = {"partner_accuracy": float(np.mean(best == np.arange(len(best))))}
    if scores is not None:
        figures["partner_information"] = scores.log_score + math.log(scores.num_candidates)
        figures["partner_overconfidence"] = scores.overconfidence
    return figures


def level_profile(model: Any, guide: Any, views: tuple[Tensor, ...]) -> Identifiability | None:
    """Held-out evidence over the pair concentration; None where the model has not the evidence that it profiles."""
    stated = pair_concentration(model)
    if stated is None or getattr(model, "evidence", None) not in ("exact", "moment_matched") or len(views) != 2:
        return None
    laws = [guide.posterior(view[:_PROFILED]) for view in views]
    size = min(256, len(views[0]) // 2)
    usable = all(isinstance(law, VonMisesFisher) and bool(torch.isfinite(law.concentration).all()) for law in laws)
    if not usable or size < 16:
        return None
    marginal: Any = getattr(model, "marginal", "uniform")
    return identifiability(laws[0], laws[1], stated, batch_size=size, marginal=marginal)


def latent_checks(
    model: Any,
    mean: FloatArray,
    kappa: FloatArray,
    draws: FloatArray,
    scores: PartnerCheck | None,
    profile: Identifiability | None,
    level: float,
) -> list[Check]:
    """Checks that any pair gets, whatever is known about its views.

    Args:
        model: The model; what it assumes is read off it.
        mean: Mean directions, shape (N, d).
        kappa: Concentrations, shape (N,).
        draws: One draw per item, shape (N, d).
        scores: Of the partner, where the model has logits.
        profile: Of the pair concentration, where the model has one.
        level: Significance level of each of the `LATENT_TESTS` tests.
    """
    own = [name for name, _ in getattr(model, "named_parameters", list)() if not name.startswith("guide.")]
    learned = any("concentration" in name for name in own)
    assumed = getattr(model, "marginal", "uniform") != "empirical"
    partner = (
        [judge_partner(scores, level=level), judge_partner_reliability(scores, level=level)]
        if scores is not None
        else [Check("Partner among candidates", "skip", "not scored", "It needs `partner_logits` and 32 pairs.")]
    )
    return [
        *partner,
        judge_concentration(kappa, mean.shape[-1]),
        judge_uniformity(draws, assumed=assumed, level=level),
        judge_dimensions(mean),
        judge_level(pair_concentration(model), learned=learned, profile=profile),
    ]


def fit_checks(
    history: Mapping[str, Sequence[float]] | None, batch_size: int | None, dim: int, scores: PartnerCheck | None
) -> list[Check]:
    """Checks of the training, as far as it is known."""
    checks = [] if history is None else [judge_training(history)]
    if batch_size is not None:
        nats = None if scores is None else scores.log_score + math.log(scores.num_candidates)
        checks.append(judge_batch(batch_size, dim, nats))
    return checks
