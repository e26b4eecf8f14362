"""Speed as ratios measured in one run: ``python -m benchmarks``. The other modules are experiments of their own."""
