"""Pure tensor numerics: Bessel functions, radial quantile maps, sphere geometry. No Pyro here."""

from .bessel import bessel_ratio, bessel_ratios, inverse_bessel_ratio, log_iv, log_partition, log_partition_scaled

__all__ = [
    "bessel_ratio",
    "bessel_ratios",
    "inverse_bessel_ratio",
    "log_iv",
    "log_partition",
    "log_partition_scaled",
]
