"""Can the posterior be trusted? ArviZ bridge, calibration, alignment with a truth, representation checks, reports."""

from __future__ import annotations

from pyro_contrastive.diagnostics._intervals import Estimate
from pyro_contrastive.diagnostics._opinion import opinion_text
from pyro_contrastive.diagnostics.aggregate_bias import AggregateBias, aggregate_bias
from pyro_contrastive.diagnostics.alignment import AlignmentScore, align_and_score, cosine_correlation, procrustes
from pyro_contrastive.diagnostics.arviz_bridge import to_arviz
from pyro_contrastive.diagnostics.arviz_mcmc import from_pyro
from pyro_contrastive.diagnostics.arviz_stream import stream_arviz
from pyro_contrastive.diagnostics.bands import PITBand, pit_band
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
from pyro_contrastive.diagnostics.checks import Check, verdict
from pyro_contrastive.diagnostics.checks_fit import judge_batch, judge_training
from pyro_contrastive.diagnostics.checks_latent import (
    judge_concentration,
    judge_dimensions,
    judge_level,
    judge_uniformity,
)
from pyro_contrastive.diagnostics.checks_pairs import (
    judge_accuracy,
    judge_corruption,
    judge_khat,
    judge_partner,
    judge_partner_reliability,
)
from pyro_contrastive.diagnostics.checks_truth import (
    judge_coverage,
    judge_directions,
    judge_pit,
    judge_recovery,
    judge_sbc,
    judge_tarp,
    judge_variational_sbc,
)
from pyro_contrastive.diagnostics.collapse import Spectrum, embedding_spectrum
from pyro_contrastive.diagnostics.comparison import Comparison, compare
from pyro_contrastive.diagnostics.evaluate import CorruptionScores, RepresentationScores, evaluate_representation
from pyro_contrastive.diagnostics.evidence_gap import EvidenceGap, evidence_gap
from pyro_contrastive.diagnostics.identifiability import Identifiability, identifiability, plot_identifiability
from pyro_contrastive.diagnostics.khat import KHat, guide_khat, psis_khat
from pyro_contrastive.diagnostics.partner import partner_pit, partner_probability, partner_radius
from pyro_contrastive.diagnostics.partner_sets import partner_sets
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
from pyro_contrastive.diagnostics.plots_arviz import (
    pit_values,
    plot_ecdf_pit,
    plot_forest,
    plot_khat,
    plot_ppc_pit,
    plot_rank,
)
from pyro_contrastive.diagnostics.plots_calibration import (
    plot_calibration_grid,
    plot_comparison,
    plot_rank_histogram,
    plot_reliability,
    plot_tarp,
)
from pyro_contrastive.diagnostics.plots_retrieval import plot_credible_caps, plot_credible_sets, plot_risk_coverage
from pyro_contrastive.diagnostics.plots_sphere import plot_sphere_caps
from pyro_contrastive.diagnostics.precision import (
    PrecisionRecovery,
    judge_precision,
    plot_precision,
    precision_recovery,
)
from pyro_contrastive.diagnostics.prediction import (
    ResultantLengthCheck,
    StationarityCheck,
    resultant_length_check,
    stationarity_check,
)
from pyro_contrastive.diagnostics.predictive import PartnerCheck, Reliability, partner_check
from pyro_contrastive.diagnostics.probe import (
    LinearProbe,
    alignment_loss,
    linear_probe,
    uncertainty,
    uniformity_loss,
)
from pyro_contrastive.diagnostics.quantities import (
    angle_to_mean,
    angle_to_reference,
    coordinates,
    cosine_to,
    default_quantities,
    log_density,
)
from pyro_contrastive.diagnostics.recovery import (
    AxisRecovery,
    ConcentrationRecovery,
    LinearRecovery,
    concentration_recovery,
    linear_r2,
    mcc,
)
from pyro_contrastive.diagnostics.report import Picture, Section, image_report, sphere_report, write_html, write_summary
from pyro_contrastive.diagnostics.report_pairs import pair_report
from pyro_contrastive.diagnostics.representation import (
    Uniformity,
    accuracy_by_quartile,
    aggregate_uniformity,
    corruption_correlation,
    knn_accuracy,
    knn_correct,
    neighbour_distance,
)
from pyro_contrastive.diagnostics.retrieval import CredibleSets, cap_area, credible_sets
from pyro_contrastive.diagnostics.retrieval_scores import (
    ClassScores,
    CredibleCurve,
    RankingScores,
    RiskCoverage,
    class_scores,
    credible_curve,
    label_entropy,
    ranking_scores,
    risk_coverage,
    size_correlation,
)
from pyro_contrastive.diagnostics.sbc import SBC, adjusted_pvalues, sbc, simulator
from pyro_contrastive.diagnostics.scores import Score, Sharpness, energy_score, log_score, sharpness
from pyro_contrastive.diagnostics.selective import (
    SelectiveRisk,
    entropy_agreement,
    ood_auroc,
    rank_agreement,
    selective_risk,
)
from pyro_contrastive.diagnostics.sphere_html import sphere_html
from pyro_contrastive.diagnostics.tarp import TARP, expected_coverage, tarp
from pyro_contrastive.diagnostics.variational_sbc import VSBC, asymmetry_pvalue, variational_sbc
from pyro_contrastive.diagnostics.width import WidthCalibration, calibrate_width

__all__ = [
    "AggregateBias",
    "AlignmentScore",
    "AxisRecovery",
    "Check",
    "ClassScores",
    "Comparison",
    "ConcentrationRecovery",
    "CorruptionScores",
    "Coverage",
    "CredibleCurve",
    "CredibleSets",
    "Estimate",
    "EvidenceGap",
    "Identifiability",
    "KHat",
    "LinearProbe",
    "LinearRecovery",
    "PITBand",
    "PartnerCheck",
    "Picture",
    "PrecisionRecovery",
    "RankingScores",
    "Reliability",
    "RepresentationScores",
    "ResultantLengthCheck",
    "RiskCoverage",
    "SBC",
    "Score",
    "Section",
    "SelectiveRisk",
    "Sharpness",
    "Spectrum",
    "StationarityCheck",
    "TARP",
    "Uniformity",
    "VSBC",
    "WidthCalibration",
    "accuracy_by_quartile",
    "adjusted_pvalues",
    "aggregate_bias",
    "aggregate_uniformity",
    "align_and_score",
    "alignment_loss",
    "angle_to_mean",
    "angle_to_reference",
    "asymmetry_pvalue",
    "calibrate_width",
    "cap_area",
    "cap_pit",
    "cap_probability",
    "cap_radius",
    "class_scores",
    "compare",
    "concentration_recovery",
    "coordinates",
    "corruption_correlation",
    "cosine_correlation",
    "cosine_to",
    "coverage",
    "credible_curve",
    "credible_sets",
    "default_quantities",
    "direction_and_concentration",
    "embedding_spectrum",
    "energy_score",
    "entropy_agreement",
    "evaluate_representation",
    "evidence_gap",
    "expected_coverage",
    "from_pyro",
    "guide_khat",
    "identifiability",
    "image_report",
    "judge_accuracy",
    "judge_batch",
    "judge_concentration",
    "judge_corruption",
    "judge_coverage",
    "judge_dimensions",
    "judge_directions",
    "judge_khat",
    "judge_level",
    "judge_partner",
    "judge_partner_reliability",
    "judge_pit",
    "judge_precision",
    "judge_recovery",
    "judge_sbc",
    "judge_tarp",
    "judge_training",
    "judge_uniformity",
    "judge_variational_sbc",
    "knn_accuracy",
    "knn_correct",
    "label_entropy",
    "linear_probe",
    "linear_r2",
    "log_density",
    "log_score",
    "mcc",
    "neighbour_distance",
    "ood_auroc",
    "opinion_text",
    "pair_report",
    "partner_check",
    "partner_pit",
    "partner_probability",
    "partner_radius",
    "partner_sets",
    "pit_band",
    "pit_values",
    "plot_accuracy_by_quartile",
    "plot_aggregate",
    "plot_calibration_grid",
    "plot_comparison",
    "plot_concentration_recovery",
    "plot_concentration_vs_corruption",
    "plot_coverage",
    "plot_credible_caps",
    "plot_credible_sets",
    "plot_ecdf_pit",
    "plot_forest",
    "plot_history",
    "plot_identifiability",
    "plot_khat",
    "plot_neighbours",
    "plot_pit",
    "plot_ppc_pit",
    "plot_precision",
    "plot_rank",
    "plot_rank_histogram",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_sphere_caps",
    "plot_tarp",
    "precision_recovery",
    "procrustes",
    "psis_khat",
    "rank_agreement",
    "rank_pit",
    "ranking_scores",
    "resultant_length_check",
    "risk_coverage",
    "sbc",
    "sbc_ranks",
    "selective_risk",
    "sharpness",
    "simulator",
    "size_correlation",
    "sphere_html",
    "sphere_report",
    "stationarity_check",
    "stream_arviz",
    "tarp",
    "to_arviz",
    "uncertainty",
    "uniformity_loss",
    "uniformity_pvalue",
    "variational_sbc",
    "verdict",
    "write_html",
    "write_summary",
]
