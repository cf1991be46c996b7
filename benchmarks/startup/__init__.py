"""What comes before the first batch: ``python -m benchmarks.startup`` lists the measurements."""
