"""Pure tensor numerics: Bessel functions, log-gamma, the radial quantile map, exact pair evidence. No Pyro here."""

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
from .series import expected_kernel_log_ratio, shared_latent_kernel_log_ratio

__all__ = [
    "bessel_ratio",
    "bessel_ratio_complement",
    "bessel_ratios",
    "digamma_increment",
    "expected_kernel_log_ratio",
    "inverse_bessel_ratio",
    "log_gamma_increment",
    "log_iv",
    "log_partition",
    "log_partition_scaled",
    "matched_log_density",
    "shared_latent_kernel_log_ratio",
]
