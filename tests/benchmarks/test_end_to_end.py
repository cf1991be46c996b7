"""The benchmark beside peers: it runs, checks, and says who is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.peers.protocol import Csr, Mover


@pytest.mark.slow
def test_a_small_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--cells", "300", "--groups", "2", "--batch", "64", "--seconds", "0.05",
                 "--repeat", "1", "--train", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
                 "--peers", "homeobox", "annbatch", "--python", f"annbatch={tmp_path / 'none'}"]  # fmt: skip
    assert end_to_end.main(arguments) == 0
    out = capsys.readouterr().out
    assert "all equal" in out
    assert "annbatch skipped: " in out
    found = json.loads((tmp_path / "out/end_to_end.json").read_text())
    assert len(found["ours"]["results"]) >= 6
    # Homeobox is here or it is not; either is said.
    assert ("homeobox" in found["skipped"]) != any(
        one["peer"].startswith("homeobox") for one in found["peers"]
    )


def test_batches_of_peers_move_as_they_are() -> None:
    import numpy as np

    mover = Mover("cpu")
    mover.move(np.ones((2, 3), np.float32))
    mover.move(Csr(np.array([0, 1]), np.array([2]), np.array([1.0])))
    mover.finish()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_to_end.main([]) == 2
    assert "cuda" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing moves to cuda here"):
        Mover("cuda")
