"""Published packages beside our tokens: a difference is told, a package that cannot run is named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import token_peers, tokens
from hbx_gpu import SparseBatch

STAND_IN = """
import sys
import numpy as np

with np.load(sys.argv[2]) as file:
    cells = dict(file)
n = len(cells["indptr"]) - 1
ids, counts = np.zeros((n, 2047), np.int64), np.zeros((n, 2047), np.float32)
for k in range(n):
    row = slice(cells["indptr"][k], cells["indptr"][k + 1])
    found = row.stop - row.start
    ids[k, :found] = cells["token"][cells["indices"][row]]
    counts[k, :found] = np.minimum(cells["data"][row], CLIP)
np.savez(sys.argv[3], input_ids=ids, values=counts, seconds=1.0, version="0")
"""


@pytest.mark.parametrize(("clip", "differs"), [(30, ""), (29, "values: 1 of 2 rows")])
def test_what_a_package_makes_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: int, differs: str
) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.replace("CLIP", str(clip)))
    monkeypatch.setattr(token_peers, "SCRIPT", script)
    rows = SparseBatch(
        np.array([0, 3, 1], np.int32), np.array([1, 99, 2], np.uint32), np.array([0, 2, 3]), 5, {}
    )
    found = token_peers.compare("transcriptformer", sys.executable, rows, list("abcde"))
    assert found.differs == differs
    assert found.theirs == 2
    assert ("DIFFERENT" in found.line[-1]) == bool(differs)


def test_a_package_that_is_not_there_is_named() -> None:
    rows = SparseBatch(np.array([0], np.int32), np.array([1.0]), np.array([0, 1]), 2, {})
    with pytest.raises(RuntimeError, match=r"helical in .* failed"):
        token_peers.compare("helical", sys.executable, rows, ["a", "b"])


def test_an_unknown_package_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected one of transcriptformer"):
        tokens._references(
            ["bert=python"], SparseBatch(np.zeros(0), np.zeros(0), np.zeros(0), 1, {}), [], Path()
        )


def test_every_peer_has_code_in_the_other_interpreter() -> None:
    text = token_peers.SCRIPT.read_text()
    assert all(f'"{name}":' in text for name in token_peers.PEERS)
