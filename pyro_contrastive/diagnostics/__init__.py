"""Can the posterior be trusted? ArviZ bridge, calibration, alignment with a truth, representation checks, reports."""

from __future__ import annotations

from pyro_contrastive.diagnostics.alignment import AlignmentScore, align_and_score, cosine_correlation, procrustes
from pyro_contrastive.diagnostics.arviz_bridge import to_arviz
from pyro_contrastive.diagnostics.calibration import (
    Coverage,
    cap_pit,
    cap_probability,
    cap_radius,
    coverage,
    direction_and_concentration,
    rank_pit,
    sbc_ranks,
    uniformity_pvalue,
)
from pyro_contrastive.diagnostics.identifiability import Identifiability, identifiability, plot_identifiability
from pyro_contrastive.diagnostics.plots import (
    plot_accuracy_by_quartile,
    plot_aggregate,
    plot_concentration_recovery,
    plot_concentration_vs_corruption,
    plot_coverage,
    plot_history,
    plot_neighbours,
    plot_pit,
)
from pyro_contrastive.diagnostics.report import Picture, Section, image_report, sphere_report, write_html, write_summary
from pyro_contrastive.diagnostics.representation import (
    Uniformity,
    accuracy_by_quartile,
    aggregate_uniformity,
    corruption_correlation,
    knn_accuracy,
    knn_correct,
)

__all__ = [
    "AlignmentScore",
    "Coverage",
    "Identifiability",
    "Picture",
    "Section",
    "Uniformity",
    "accuracy_by_quartile",
    "aggregate_uniformity",
    "align_and_score",
    "cap_pit",
    "cap_probability",
    "cap_radius",
    "corruption_correlation",
    "cosine_correlation",
    "coverage",
    "direction_and_concentration",
    "identifiability",
    "image_report",
    "knn_accuracy",
    "knn_correct",
    "plot_accuracy_by_quartile",
    "plot_aggregate",
    "plot_concentration_recovery",
    "plot_concentration_vs_corruption",
    "plot_coverage",
    "plot_history",
    "plot_identifiability",
    "plot_neighbours",
    "plot_pit",
    "procrustes",
    "rank_pit",
    "sbc_ranks",
    "sphere_report",
    "to_arviz",
    "uniformity_pvalue",
    "write_html",
    "write_summary",
]
