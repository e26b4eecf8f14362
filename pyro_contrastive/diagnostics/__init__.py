"""Can the posterior be trusted? The ArviZ bridge, calibration, alignment with a truth, representation checks, reports."""

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
    "knn_accuracy",
    "knn_correct",
    "procrustes",
    "rank_pit",
    "sbc_ranks",
    "to_arviz",
    "uniformity_pvalue",
]
