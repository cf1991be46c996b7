"""Where the time of a batch goes: ``python -m benchmarks.stages`` lists the measurements."""
