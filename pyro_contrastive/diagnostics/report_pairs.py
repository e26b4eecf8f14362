"""Any trained pair evaluated on held-out views of which nothing else is known, labels at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_contrastive.diagnostics import plots, plots_retrieval
from pyro_contrastive.diagnostics._arrays import as_array
from pyro_contrastive.diagnostics._run import evaluation
from pyro_contrastive.diagnostics._sections import (
    LATENT_TESTS,
    STORED_ITEMS,
    Album,
    aggregate_figures,
    concentration_figures,
    embed,
    fit_checks,
    latent_checks,
    level_profile,
    partner_figures,
    partner_scores,
    store,
)
from pyro_contrastive.diagnostics.checks import FAMILY_LEVEL, Check
from pyro_contrastive.diagnostics.checks_pairs import judge_accuracy
from pyro_contrastive.diagnostics.representation import accuracy_by_quartile, knn_correct
from pyro_contrastive.diagnostics.retrieval_scores import risk_coverage
from pyro_contrastive.diagnostics.section import Section

__all__ = ["pair_report"]


def pair_report(
    model: Callable[..., Any],
    guide: Any,
    views: Sequence[Tensor],
    out: str | Path,
    *,
    labels: ArrayLike | Tensor | None = None,
    seed: int = 0,
    history: Mapping[str, Sequence[float]] | None = None,
    batch_size: int | None = None,
    checks: Sequence[Check] = (),
    level: float = FAMILY_LEVEL,
    title: str | None = None,
    progress: bool = False,
) -> Section:
    """Checks a trained pair on held-out views: your own model, your own data.

    Where the posterior is known use `sphere_report`, for labelled images and a known damage `image_report`; both check
    more. With labels, a random half of the items is the reference for the 5 nearest neighbours of the other half.

    Args:
        model: The trained model; its method `partner_logits(x1, x2)`, where it has one, is scored.
        guide: The trained guide, with `posterior(x)`.
        views: Held-out first and second views, each (N, ...), row i of one thing; N >= 40. First views are embedded.
        out: Folder for the PNGs and `posterior.nc`, created where missing.
        labels: Labels of the things, shape (N,), where known.
        seed: Seed of all draws.
        history: Loss curves to show and to judge, by name, as `fit` returns them.
        batch_size: Pairs per training batch, to judge it.
        checks: Further checks of yours, such as `judge_khat(...)`; they come first.
        level: Chance of any false alarm of the tests of this section; divide it by the sections of a page.
        title: Heading of the section.
        progress: Whether to show progress bars.

    Returns:
        The section with the figures `concentration_q05/q95`, `mean_resultant_length`, `eigenvalue_ratio`,
        `uniformity_pvalue`; where the model allows `partner_accuracy`, `partner_information`, `partner_overconfidence`
        (nats); with labels `knn_accuracy`, `accuracy_q1` (surest) to `accuracy_q4` and `accuracy_drop`.

    Raises:
        TypeError: If the guide has no `posterior(x)`.
        ValueError: If views or labels do not fit each other, or there are fewer than 40 items.

    Example:
        >>> import tempfile, torch
        >>> from pyro_contrastive import guides, models
        >>> from pyro_contrastive.diagnostics import write_html
        >>> guide = guides.VonMisesFisher(torch.nn.Linear(8, 16), dim=4)
        >>> x1 = torch.randn(64, 8)
        >>> views = (x1, x1 + 0.1 * torch.randn(64, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     section = pair_report(models.MCInfoNCE(guide), guide, views, folder)
        ...     page = write_html(folder, "My pair", [section])
        >>> section.kind, page.name
        ('pair', 'report.html')
    """
    if not callable(getattr(guide, "posterior", None)):
        raise TypeError(f"`guide` must have a method posterior(x), got {type(guide).__name__}; see docs/grammar.md")
    if len(views) < 2 or len({len(view) for view in views}) != 1 or len(views[0]) < 40:
        sizes = [len(view) for view in views]
        raise ValueError(f"`views` must be two or more of one length >= 40, got lengths {sizes}; hold out more pairs")
    targets = None if labels is None else as_array(labels)
    if targets is not None and targets.shape != (len(views[0]),):
        raise ValueError(f"`labels` must have shape ({len(views[0])},), one per item, got {targets.shape}")
    album = Album(out)
    with evaluation(model, guide, seed=seed) as device:
        placed = tuple(view.to(device) for view in views)
        mean, kappa, draws = embed(guide, placed[0], device, seed)
        scores = partner_scores(model, guide, placed, seed=seed)
        profile = level_profile(model, guide, placed)
        figures = concentration_figures(kappa) | aggregate_figures(draws) | partner_figures(model, placed, scores)
    each = level / (LATENT_TESTS + (targets is not None))
    found = list(checks)
    if targets is not None:
        order = np.random.default_rng(seed).permutation(len(mean))
        known, asked = order[: len(order) // 2], order[len(order) // 2 :]
        correct = knn_correct(mean[known], targets[known], mean[asked], targets[asked])
        quartiles = accuracy_by_quartile(kappa[asked], correct)
        figures["knn_accuracy"] = float(correct.mean())
        figures |= {f"accuracy_q{index}": float(value) for index, value in enumerate(quartiles, start=1)}
        figures["accuracy_drop"] = float(quartiles[0] - quartiles[-1])
        found.append(judge_accuracy(kappa[asked], correct, level=each))
        album.add(
            "risk_coverage",
            plots_retrieval.plot_risk_coverage(risk_coverage(kappa[asked], correct)),
            "The error rate among the surest share of the items. Rising from left to right: the width knows where the "
            "mistakes are. Flat: it does not.",
        )
        album.add(
            "accuracy_by_quartile",
            plots.plot_accuracy_by_quartile(quartiles),
            "Items in four groups by concentration. Falling bars: where the posterior is sure, it is right.",
        )
    found += latent_checks(model, mean, kappa, draws, scores, profile, each)
    found += fit_checks(history, batch_size, mean.shape[-1], scores)
    album.finish(draws, profile, history)
    store(album.out, model, guide, tuple(view[:STORED_ITEMS] for view in placed), seed=seed, progress=progress)
    return Section(
        title=title or f"Held-out pairs, seed {seed}",
        kind="pair",
        seed=seed,
        figures=figures,
        pictures=album.pictures,
        checks=found,
    )
