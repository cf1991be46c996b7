"""hbx_gpu.rowpack on real counts: values come back, sizes and speeds stay in bounds, the benchmark runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import codecs as benchmark
from hbx_gpu._codecs import decode_rowpack, decode_rowpack_reference, encode_rowpack, encode_rowpack_reference
from hbx_gpu._codecs.rowpack_numba import OK, decode_rowpack_into

CHUNK = 40_960


def csr(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Column indices and counts of X, uint32 both."""
    import h5py

    with h5py.File(path) as file:
        x = file["X"]
        assert x.attrs["encoding-type"] == "csr_matrix"
        return x["indices"][:].astype(np.uint32), x["data"][:].astype(np.uint32)


def chunks(values: np.ndarray) -> list[np.ndarray]:
    return [values[k : k + CHUNK] for k in range(0, len(values), CHUNK)]


@pytest.mark.parametrize(("file", "bits"), [(0, 10.5), (1, 11.0)], ids=["mouse", "human"])
def test_real_counts_come_back_and_stay_small(real_h5ad: tuple[Path, Path], file: int, bits: float) -> None:
    total = 0
    indices, counts = csr(real_h5ad[file])
    for values, transform in ((indices, "gaps"), (counts, "none")):
        for chunk in chunks(values):
            packed = encode_rowpack(chunk, transform)
            np.testing.assert_array_equal(decode_rowpack(packed), chunk)
            total += len(packed)
    assert 8 * total / len(indices) <= bits
    # Rows fewer than in the whole, a tail included: the reference takes its time.
    for values, transform in ((indices[:5_000], "gaps"), (counts[:5_000], "none")):
        packed = encode_rowpack(values, transform)
        assert packed == encode_rowpack_reference(values, transform)
        np.testing.assert_array_equal(decode_rowpack_reference(packed), values)


def fastest(call: Callable[[], object]) -> float:
    took = []
    for _ in range(300):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


@pytest.mark.parametrize("transform", ["gaps", "none"])
@pytest.mark.timing
def test_decoding_stays_near_the_speed_of_a_copy(transform: str) -> None:
    """Ratios to a memcpy of the same output: 6 for indices, 3 for counts when written.

    A loop over single values takes 30; a decoder that goes through the chunk takes half as long for the row
    in its middle as for all.
    """
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.choice(20_000, 1_400, replace=False)) for _ in range(30)]
    values = np.concatenate(rows)[:CHUNK] if transform == "gaps" else rng.geometric(0.3, CHUNK)
    values = values.astype(np.uint32)
    src = np.frombuffer(encode_rowpack(values, transform), np.uint8)
    out = np.empty(CHUNK, np.uint32)
    copy = fastest(lambda: np.copyto(out, values))
    whole = fastest(lambda: decode_rowpack_into(src, 4, CHUNK, 0, CHUNK, out))
    row = fastest(lambda: decode_rowpack_into(src, 4, CHUNK, 20_000, 21_400, out))
    assert decode_rowpack_into(src, 4, CHUNK, 0, CHUNK, out) == OK
    np.testing.assert_array_equal(out, values)
    assert whole < 20 * copy
    assert row < whole / 4


def test_benchmark_measures_all_codecs(
    tmp_path: Path, real_h5ad: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(real_h5ad[1]), "--cells", "200", "--synthetic", "A", "--synthetic-cells", "8"]
    assert benchmark.main([*arguments, "--seconds", "0.001", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "codecs.json").read_text())["results"]
    assert [r["cells"] for r in results] == [200, 8]
    for r in results:
        ours, others = r["codecs"]["hbx_gpu.rowpack"], r["codecs"]["homeobox.bitpacking"]
        for part in ("index", "value"):
            assert r["entropy"][part] < ours[part]["bits"] < others[part]["bits"]
            assert min(ours[part]["encode_mb_per_s"], ours[part]["decode_values_per_s"]) > 0
    out = capsys.readouterr().out
    assert "zstd" in out
    assert "memcpy" in out


def test_entropy_bound_begins_anew_in_every_row() -> None:
    from benchmarks.peers.protocol import Csr

    # Gaps 1, 1, 1, 1 | (empty) | 1, 1 and counts of two kinds, equally often.
    rows = Csr(np.array([4, 8, 8, 10]), np.array([1, 2, 3, 4, 1, 2]), np.array([5, 6, 5, 6, 5, 6]))
    assert benchmark.entropy_bound(rows) == (0.0, 1.0)
