"""Speed of the distributions on the sphere, as ratios to a floor: ``python -m benchmarks``."""
