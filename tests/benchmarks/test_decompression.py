"""The benchmark of decompression runs, on the CPU's doubles, and says so where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import decompression
from tests.emulation.backend import EmulatedBackend


@pytest.mark.parametrize("codec", decompression.CODECS)
def test_both_ways_are_measured(codec: str, tmp_path: Path) -> None:
    dataset = decompression.written(tmp_path, codec, 40, 200, 128)
    again = decompression.written(tmp_path, codec, 40, 200, 128)
    assert (dataset[[3]].values == again[[3]].values).all()
    assert dataset[np.arange(40)].values.min() >= 2
    backend = EmulatedBackend()
    found = decompression.measure(dataset, backend, 16, 1, lambda: None)
    assert "check_streams" in backend.launches
    for place in ("host", "device", "cpu"):
        assert found["cells_per_s"][place]["min"] > 0
    assert found["window_s"]["device"]["host"]["median"] > 0
    assert len(decompression.rows_of(codec, found)) == 3


def test_wrong_rows_are_not_timed(tmp_path: Path) -> None:
    dataset = decompression.written(tmp_path, "zstd", 40, 200, 128)
    backend = EmulatedBackend()
    launch = backend.launch

    def forgetful(kernel: str, *args: object, **kwargs: object) -> None:
        if kernel != "gather_pieces":
            launch(kernel, *args, **kwargs)  # type: ignore[arg-type]

    backend.launch = forgetful  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="other rows"):
        decompression.window(dataset, backend, "device", dataset.row_numbers([1, 2, 3]), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert decompression.main([]) == 2
    assert "device='cuda' was asked for" in capsys.readouterr().out
