"""A trained pair evaluated, as sections of a report: in a world with a known posterior, and on labelled images.

`sphere_report` and `image_report` compute, write PNGs and `posterior.nc` into a folder and return a `Section` with an
opinion on what they found; `write_html` and `write_summary` turn sections into one page and one file of figures. For
pairs of which nothing else is known see `report_pairs.pair_report`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_contrastive.diagnostics import plots
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._document import write_html, write_summary
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
    pair_concentration,
    partner_figures,
    partner_scores,
    store,
)
from pyro_contrastive.diagnostics.alignment import align_and_score
from pyro_contrastive.diagnostics.calibration import (
    Coverage,
    cap_pit,
    coverage,
    direction_and_concentration,
    uniformity_pvalue,
)
from pyro_contrastive.diagnostics.checks import FAMILY_LEVEL, Check
from pyro_contrastive.diagnostics.checks_pairs import judge_accuracy, judge_corruption
from pyro_contrastive.diagnostics.checks_truth import (
    judge_coverage,
    judge_directions,
    judge_pit,
    judge_recovery,
    judge_tarp,
)
from pyro_contrastive.diagnostics.representation import (
    accuracy_by_quartile,
    aggregate_uniformity,
    corruption_correlation,
    knn_accuracy,
    knn_correct,
)
from pyro_contrastive.diagnostics.section import Picture, Section
from pyro_contrastive.diagnostics.tarp import tarp
from pyro_contrastive.ops import inverse_bessel_ratio

__all__ = ["Picture", "Section", "World", "image_report", "sphere_report", "write_html", "write_summary"]

_LEVELS = (0.5, 0.8, 0.95)
_TARP_DRAWS = 199
_CURVE = np.linspace(0.02, 0.98, 49)


class World(Protocol):
    """A generative world whose exact posterior is known, such as `pyro_contrastive.data.SphereWorld`."""

    def sample(self, n: int, /, *, seed: int) -> Any:
        """Returns n pairs with fields x1, x2, z1, z2, mean_direction1, concentration1 (and the same for view 2)."""
        ...

    def posterior(self, batch: Any, view: int = 1) -> Any:
        """Returns the exact posterior of the latent of one view, batch (n,), event (d,)."""
        ...


def sphere_report(
    model: Callable[..., Any],
    guide: Any,
    world: World,
    out: str | Path,
    *,
    num_items: int = 2500,
    seed: int = 0,
    history: Mapping[str, Sequence[float]] | None = None,
    batch_size: int | None = None,
    checks: Sequence[Check] = (),
    level: float = FAMILY_LEVEL,
    title: str | None = None,
    progress: bool = False,
) -> Section:
    """Scores a trained pair on fresh items of a world whose posterior is known.

    The latent space is identified up to one rotation, which is fitted on half of the items; the figures are those of
    the other half. Coverage is of the true latent points by the credible caps of `guide.posterior(x1)`.

    Args:
        model: The trained model.
        guide: The trained guide, with `posterior(x)`.
        world: The world, see `World`.
        out: Folder for the PNGs and `posterior.nc`, created where missing.
        num_items: Number of fresh pairs.
        seed: Seed of the items and of all draws.
        history: Loss curves to show and to judge, by name, as `fit` returns them.
        batch_size: Pairs per training batch, to judge it.
        checks: Further checks of yours, such as `judge_sbc(...)`; they come first.
        level: Chance of any false alarm of the tests of this section; divide it by the sections of a page.
        title: Heading of the section.
        progress: Whether to show progress bars.

    Returns:
        The section with the figures `spearman_concentration`, `concentration_error`, `cosine_correlation`,
        `mean_angle`, `coverage_50/80/95`, `exact_coverage_50/80/95`, `pit_pvalue`, `concentration_q05/q95`,
        `mean_resultant_length`, `eigenvalue_ratio`, `uniformity_pvalue`, and where the model allows
        `pair_concentration`, `pair_concentration_sampled`, `partner_accuracy`, `partner_information` (nats per pair),
        `partner_overconfidence` (nats).
    """
    album = Album(out)
    batch = world.sample(num_items, seed=seed)
    with evaluation(model, guide, seed=seed) as device:
        x1, x2 = batch.x1.to(device), batch.x2.to(device)
        posterior = guide.posterior(x1)
        mean, kappa = direction_and_concentration(posterior, seed=seed)
        draws, partner_draws = (as_array(q.sample()).astype(np.float64) for q in (posterior, guide.posterior(x2)))
        score = align_and_score(
            mean,
            kappa,
            batch.z1,
            true_mean_direction=batch.mean_direction1,
            true_concentration=batch.concentration1,
            seed=seed,
        )
        chosen = torch.from_numpy(score.evaluated)
        aligned_truth = as_array(batch.z1).astype(np.float64)[score.evaluated] @ score.rotation.T
        judged = guide.posterior(x1[chosen.to(device)])
        pit = cap_pit(judged, aligned_truth, seed=seed)  # exact in every family
        balls = tarp(judged, aligned_truth, num_draws=_TARP_DRAWS, num_bootstrap=1, seed=seed)
        figures = {
            "spearman_concentration": score.spearman_concentration,
            "concentration_error": score.concentration_error,
            "cosine_correlation": score.cosine_correlation,
            "mean_angle": score.mean_angle,
        }
        exact_pit = cap_pit(world.posterior(batch, view=1), batch.z1)
        reached, exact = coverage(pit, _LEVELS), coverage(exact_pit, _LEVELS)
        for prefix, one in (("coverage", reached), ("exact_coverage", exact)):
            figures |= {
                f"{prefix}_{level * 100:.0f}": float(v) for level, v in zip(_LEVELS, one.empirical, strict=True)
            }
        figures["pit_pvalue"] = uniformity_pvalue(pit)
        figures |= (
            concentration_figures(kappa) | aggregate_figures(draws) | _pair_concentration(model, draws, partner_draws)
        )
        scores = partner_scores(model, guide, (x1, x2), seed=seed)
        figures |= partner_figures(model, (x1, x2), scores)
        profile = level_profile(model, guide, (x1, x2))
    curves = {"learned posterior": coverage(pit, _CURVE), "exact posterior": coverage(exact_pit, _CURVE)}
    album.add(
        "coverage",
        plots.plot_coverage(curves),
        "Each credible cap should hold its nominal share of the true latent points. On the diagonal the posterior is "
        "calibrated, below it over-confident, above it under-confident; the band is the sampling noise.",
    )
    album.add(
        "pit",
        plots.plot_pit(pit),
        "The same for all levels at once. A curve inside the grey band cannot be told from a calibrated posterior.",
    )
    album.add(
        "concentration_recovery",
        plots.plot_concentration_recovery(batch.concentration1, kappa),
        "Each point is an item. On the line the learned concentration equals that of the exact posterior.",
    )
    album.finish(draws, profile, history)
    views = (x1[:STORED_ITEMS], x2[:STORED_ITEMS])
    store(album.out, model, guide, views, seed=seed, progress=progress, sbc={"angle1": pit})
    each = level / (3 + LATENT_TESTS)
    found = [
        *checks,
        judge_coverage(pit, levels=_LEVELS, level=each),
        judge_pit(pit, level=each),
        judge_tarp(balls, level=each),
        judge_recovery(kappa, batch.concentration1),
        judge_directions(score.cosine_correlation, score.mean_angle),
        *latent_checks(model, mean, kappa, draws, scores, profile, each),
        *fit_checks(history, batch_size, mean.shape[-1], scores),
    ]
    return Section(
        title=title or f"A world with a known posterior, seed {seed}",
        kind="sphere",
        seed=seed,
        figures=figures,
        pictures=album.pictures,
        reading=[_coverage_reading(reached), _aggregate_reading(draws)],
        checks=found,
    )


def image_report(
    model: Callable[..., Any],
    guide: Any,
    images: Tensor,
    labels: Tensor,
    train_images: Tensor,
    train_labels: Tensor,
    corrupt: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    out: str | Path,
    *,
    seed: int = 0,
    max_level: float = 0.8,
    history: Mapping[str, Sequence[float]] | None = None,
    batch_size: int | None = None,
    checks: Sequence[Check] = (),
    level: float = FAMILY_LEVEL,
    title: str | None = None,
    supervised: bool = False,
    progress: bool = False,
) -> Section:
    """Checks a trained pair on held-out labelled images, where no true posterior is known.

    Every held-out image is damaged by a known amount; a posterior to be trusted widens with the damage and is right
    more often where it is narrow. Accuracy is that of 5 nearest neighbours among the clean training images.

    Args:
        model: The trained model.
        guide: The trained guide, with `posterior(x)`.
        images: Held-out images (N, C, H, W) with values in [0, 1].
        labels: Their labels (N,).
        train_images: Training images (M, C, H, W).
        train_labels: Their labels (M,).
        corrupt: `corrupt(images, level, generator)` damages each image by its level, shape (N,).
        out: Folder for the PNGs and `posterior.nc`, created where missing.
        seed: Seed of the levels, the damage and all draws.
        max_level: Levels are uniform on [0, max_level].
        history: Loss curves to show and to judge, by name, as `fit` returns them.
        batch_size: Pairs per training batch, to judge it.
        checks: Further checks of yours, such as `judge_sbc(...)`; they come first.
        level: Chance of any false alarm of the tests of this section; divide it by the sections of a page.
        title: Heading of the section.
        supervised: Whether model and guide take the labels after the views, as SupCon does.
        progress: Whether to show progress bars.

    Returns:
        The section with the figures `spearman_corruption`, `knn_clean`, `knn_corrupted`, `accuracy_q1` (surest) to
        `accuracy_q4`, `accuracy_drop`, `concentration_q05/q95`, `mean_resultant_length`, `eigenvalue_ratio`,
        `uniformity_pvalue` and, where the model allows, `partner_accuracy`, `partner_information` (nats per pair) and
        `partner_overconfidence` (nats). Those that need varied concentrations are NaN for a point guide.
    """
    album = Album(out)
    generator = torch.Generator().manual_seed(seed)
    level_of_damage = max_level * torch.rand(len(images), generator=generator)
    damaged, twin = (corrupt(images.cpu(), level_of_damage, generator) for _ in range(2))
    with evaluation(model, guide, seed=seed) as device:
        reference, _, _ = embed(guide, train_images, device, seed)
        clean, _, _ = embed(guide, images, device, seed)
        mean, kappa, draws = embed(guide, damaged, device, seed)
        views = (damaged[:STORED_ITEMS].to(device), twin[:STORED_ITEMS].to(device))
        scores = partner_scores(model, guide, (damaged.to(device), twin.to(device)), seed=seed)
        partner = partner_figures(model, views, scores)
        profile = level_profile(model, guide, (damaged.to(device), twin.to(device)))
    correct = knn_correct(reference, train_labels, mean, labels)
    varied = bool(np.any(kappa != kappa[0]))
    quartiles = accuracy_by_quartile(kappa, correct) if varied else np.full(4, np.nan)
    figures = {
        "spearman_corruption": corruption_correlation(kappa, level_of_damage),
        "knn_clean": knn_accuracy(reference, train_labels, clean, labels),
        "knn_corrupted": float(correct.mean()),
        **{f"accuracy_q{index}": float(value) for index, value in enumerate(quartiles, start=1)},
        "accuracy_drop": float(quartiles[0] - quartiles[-1]),
        **concentration_figures(kappa),
        **aggregate_figures(draws),
        **partner,
    }
    reading = [_aggregate_reading(draws)]
    if varied:
        reading.insert(0, _corruption_reading(figures))
        album.add(
            "concentration_vs_corruption",
            plots.plot_concentration_vs_corruption(level_of_damage, kappa),
            "Every point is a held-out image, damaged by a known amount that the encoder is not told. Falling from "
            "left to right: the posterior widens as it should.",
        )
        album.add(
            "accuracy_by_quartile",
            plots.plot_accuracy_by_quartile(quartiles),
            "Damaged images in four groups by concentration. Falling bars: where the posterior is sure, it is right.",
        )
        _neighbour_pictures(album, damaged, labels, train_images, train_labels, mean, reference, kappa)
    album.finish(draws, profile, history)
    given = (*views, labels[:STORED_ITEMS].to(device)) if supervised else views
    store(album.out, model, guide, given, seed=seed, progress=progress)
    each = level / (2 + LATENT_TESTS)
    found = [
        *checks,
        judge_corruption(kappa, level_of_damage, level=each),
        judge_accuracy(kappa, correct, level=each),
        *latent_checks(model, mean, kappa, draws, scores, profile, each),
        *fit_checks(history, batch_size, mean.shape[-1], scores),
    ]
    return Section(
        title=title or f"Held-out images, seed {seed}",
        kind="image",
        seed=seed,
        figures=figures,
        pictures=album.pictures,
        reading=reading,
        checks=found,
    )


def _neighbour_pictures(
    album: Album,
    queries: Tensor,
    labels: Tensor,
    train_images: Tensor,
    train_labels: Tensor,
    mean: FloatArray,
    reference: FloatArray,
    kappa: FloatArray,
    *,
    num_queries: int = 6,
    k: int = 6,
) -> None:
    order = np.argsort(-kappa, kind="stable")
    for name, title, chosen in (
        ("neighbours_surest", "The surest images and their neighbours", order[:num_queries]),
        ("neighbours_least_sure", "The least sure images and their neighbours", order[::-1][:num_queries]),
    ):
        near = np.argsort(-mean[chosen] @ reference.T, axis=-1)[:, :k]
        axes = plots.plot_neighbours(
            as_array(queries)[chosen],
            as_array(train_images)[near],
            kappa[chosen],
            labels=as_array(labels)[chosen].tolist(),
            neighbour_labels=as_array(train_labels)[near].tolist(),
            title=title,
        )
        caption = "Left the damaged image, right its nearest clean training images; an orange frame is another label."
        album.add(name, axes, caption)


def _pair_concentration(model: Any, draws: FloatArray, partners: FloatArray) -> dict[str, float]:
    """Concentration of the pair prior, and the one that sampled pairs have: A_d(kappa) is their mean cosine."""
    concentration = pair_concentration(model)
    if concentration is None:
        return {}
    cosine = float(np.clip((draws * partners).sum(-1).mean(), 0.0, 1.0 - 1e-9))
    sampled = inverse_bessel_ratio(draws.shape[-1], torch.tensor(cosine, dtype=torch.float64))
    return {"pair_concentration": concentration, "pair_concentration_sampled": float(sampled)}


def _coverage_reading(reached: Coverage) -> str:
    shares = ", ".join(
        f"{level:.0%} caps hold {share:.1%}" for level, share in zip(reached.levels, reached.empirical, strict=True)
    )
    error = float(np.mean(reached.empirical - reached.levels))
    if np.all((reached.lower <= reached.levels) & (reached.levels <= reached.upper)):
        verdict = "the posterior cannot be told from a calibrated one"
    else:
        verdict = f"the posterior is {'under' if error > 0 else 'over'}-confident by {abs(error):.1%} on average"
    return f"Of the true latent points, {shares}: with {reached.num_items} items {verdict}."


def _corruption_reading(figures: Mapping[str, float]) -> str:
    return (
        f"The concentration follows the damage with a rank correlation of {figures['spearman_corruption']:.2f}. "
        f"Nearest neighbours are right for {figures['accuracy_q1']:.0%} of the surest quarter of the damaged images "
        f"and for {figures['accuracy_q4']:.0%} of the least sure quarter; for clean images {figures['knn_clean']:.0%}."
    )


def _aggregate_reading(draws: FloatArray) -> str:
    result = aggregate_uniformity(draws)
    length, ratio = result.mean_resultant_length, result.eigenvalue_ratio
    # what uniform points of this number show by chance (for the eigenvalue: Marchenko & Pastur 1967), and a margin
    by_chance = (1 + np.sqrt(result.dim / result.num_points)) ** 2
    uniform = length < 0.1 + 2 / np.sqrt(result.num_points) and ratio < 1.25 * by_chance
    verdict = "close to uniform, as it should be" if uniform else "not uniform: take the level of the widths with care"
    return f"The aggregate posterior is {verdict} (mean length {length:.2f}, largest eigenvalue ratio {ratio:.1f})."
