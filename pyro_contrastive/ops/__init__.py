"""Pure tensor numerics: Bessel functions, log-gamma differences, the radial quantile map. No Pyro here."""

from .bessel import (
    bessel_ratio,
    bessel_ratio_complement,
    bessel_ratios,
    inverse_bessel_ratio,
    log_iv,
    log_partition,
    log_partition_scaled,
    matched_log_density,
)
from .gamma import digamma_increment, log_gamma_increment

__all__ = [
    "bessel_ratio",
    "bessel_ratio_complement",
    "bessel_ratios",
    "digamma_increment",
    "inverse_bessel_ratio",
    "log_gamma_increment",
    "log_iv",
    "log_partition",
    "log_partition_scaled",
    "matched_log_density",
]
