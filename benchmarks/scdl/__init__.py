"""SCDL archives, here and in bionemo-scdl: ``python -m benchmarks.scdl`` lists the measurements."""
