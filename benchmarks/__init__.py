"""Measurements for the published figures; ``python -m benchmarks`` lists them with their questions."""
