"""Size and speed of the codecs: ``python -m benchmarks.codecs [a.h5ad ...]``.

Column indices and counts of a CSR matrix, cut into chunks as an atlas cuts them, through hbx_gpu.rowpack,
homeobox.bitpacking and zstd, beside the entropy bound: bits per nonzero, encoding and decoding on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np

from benchmarks.common import conditions
from benchmarks.datasets import Model, SpecA, SpecB, blocks, copied
from benchmarks.peers.protocol import Csr
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import table, write_json
from hbx_gpu._codecs import encode_bitpacking, encode_rowpack
from hbx_gpu._codecs.bitpacking_numba import decode_into
from hbx_gpu._codecs.rowpack_numba import decode_rowpack_into

_CHUNK = 40_960
# Nonzeros of a typical row: what reading one row alone is measured with.
_ROW = 1_400
_SYNTHETIC: dict[str, Model] = {
    "A": SpecA(),
    "NB": SpecB(n_genes=20_000, mean_sd=1.8, median_depth=3_000),
    "B": SpecB(),
}


@dataclass(frozen=True)
class Codec:
    """One way to store a chunk.

    Attributes
    ----------
    name
        As in tables.
    encode
        (values, whether they are column indices) -> bytes.
    decode
        (chunk as uint8, first, last, out, n): at least values [first, last) of n to their places in `out`.
    """

    name: str
    encode: Callable[[np.ndarray, bool], bytes]
    decode: Callable[[np.ndarray, int, int, np.ndarray, int], Any]


def _rowpack(src: np.ndarray, first: int, last: int, out: np.ndarray, n: int) -> None:
    assert decode_rowpack_into(src, 4, n, first, last, out) == 0


def _bitpacking(src: np.ndarray, first: int, last: int, out: np.ndarray, n: int) -> None:
    assert decode_into(src, 4, n, first, last, out) == 0


_ZSTD = numcodecs.Zstd(level=0)


def _zstd(src: np.ndarray, first: int, last: int, out: np.ndarray, n: int) -> None:  # noqa: ARG001
    _ZSTD.decode(src, out[:n])


def _packed(transform: str) -> Callable[[np.ndarray, bool], bytes]:
    return lambda values, index: encode_bitpacking(values, transform if index else "none")


CODECS = (
    Codec("hbx_gpu.rowpack", lambda v, index: encode_rowpack(v, "gaps" if index else "none"), _rowpack),
    # As its writer stores indices, and with the transform that suits short rows better.
    Codec("homeobox.bitpacking", _packed("delta"), _bitpacking),
    Codec("  with delta_zigzag", _packed("delta_zigzag"), _bitpacking),
    Codec("zstd", lambda values, index: bytes(_ZSTD.encode(values)), _zstd),  # noqa: ARG005
)


def entropy_bound(rows: Csr) -> tuple[float, float]:
    """Bits per symbol of an ideal coder without memory: gaps, beginning anew in every row, and counts."""
    gaps = np.diff(rows.indices, prepend=0)
    starts = rows.indptr[:-1][np.diff(rows.indptr) > 0] - rows.indptr[0]
    gaps[starts] = rows.indices[starts]
    return _entropy(gaps), _entropy(rows.values)


def _entropy(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _fastest(call: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest call: on a shared machine the others measure the neighbors."""
    call()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 3:
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


def measure(codec: Codec, values: np.ndarray, *, index: bool, seconds: float) -> dict[str, float]:
    """Size over all of `values`; rates on the middle chunk."""
    chunks = [values[k : k + _CHUNK] for k in range(0, len(values), _CHUNK)]
    encoded = [codec.encode(chunk, index) for chunk in chunks]
    k = (len(chunks) - 1) // 2
    chunk, n = chunks[k], len(chunks[k])
    src = np.frombuffer(encoded[k], np.uint8)
    out = np.zeros(-(-n // 128) * 128, np.uint32)
    codec.decode(src, 0, n, out, n)
    np.testing.assert_array_equal(out[:n], chunk)
    middle, row = n // 2, min(_ROW, n // 2)
    encode = _fastest(lambda: codec.encode(chunk, index), seconds)
    decode = _fastest(lambda: codec.decode(src, 0, n, out, n), seconds)
    nothing = _fastest(lambda: codec.decode(src, 0, 0, out, n), seconds) if codec.name != "zstd" else 0.0
    one_row = _fastest(lambda: codec.decode(src, middle, middle + row, out, n), seconds)
    return {
        "bits": 8 * sum(map(len, encoded)) / len(values),
        "encode_mb_per_s": chunk.nbytes / encode / 1e6,
        "decode_values_per_s": n / decode,
        # Less what a call from Python costs, which kernels do not pay.
        "row_us": (one_row - nothing) * 1e6,
        "memcpy_values_per_s": n / _fastest(lambda: np.copyto(out[:n], chunk), seconds),
        "crc32c_gb_per_s": len(src) / _fastest(lambda: google_crc32c.value(encoded[k]), seconds) / 1e9,
    }


def _join(parts: Sequence[Csr]) -> Csr:
    ends = np.cumsum([0] + [int(p.indptr[-1] - p.indptr[0]) for p in parts])
    indptr = [p.indptr[:-1] - p.indptr[0] + e for p, e in zip(parts, ends[:-1], strict=True)]
    return Csr(
        np.concatenate([*indptr, ends[-1:]]),
        np.concatenate([p.indices for p in parts]),
        np.concatenate([p.values for p in parts]),
    )


def _data(options: argparse.Namespace) -> list[tuple[str, str, Csr]]:
    found = []
    for path in options.h5ad:
        genes, parts = copied(path, options.cells)
        found.append((path.stem, f"{path.name}: {len(genes):,} genes", _join(list(parts))))
    for name in options.synthetic:
        model = _SYNTHETIC[name]
        label = model.describe().replace("B: ", f"{name}: ")
        found.append((name, label, _join(list(blocks(model, options.synthetic_cells, 0)))))
    return found


def measure_data(name: str, label: str, rows: Csr, *, seconds: float) -> dict[str, Any]:
    """All codecs on one matrix."""
    codecs = {}
    for codec in CODECS:
        parts = (("index", rows.indices, True), ("value", rows.values, False))
        codecs[codec.name] = {
            part: measure(codec, values.astype(np.uint32), index=index, seconds=seconds)
            for part, values, index in parts
        }
    index, value = entropy_bound(rows)
    return {
        "name": name,
        "data": label,
        "cells": len(rows),
        "nonzeros": len(rows.indices),
        "codecs": codecs,
        "entropy": {"index": index, "value": value},
    }


def report(results: Sequence[dict[str, Any]]) -> str:
    """One table for all data."""
    lines = []
    for r in results:
        for name, codec in r["codecs"].items():
            i, v = codec["index"], codec["value"]
            lines.append(
                (
                    r["name"],
                    name,
                    *(f"{bits:.2f}" for bits in (i["bits"], v["bits"], i["bits"] + v["bits"])),
                    *(f"{part['encode_mb_per_s']:,.0f}" for part in (i, v)),
                    *(f"{part['decode_values_per_s'] / 1e9:.2f}" for part in (i, v)),
                    *(f"{part['row_us']:.2f}" for part in (i, v)),
                )
            )
        index, value = r["entropy"]["index"], r["entropy"]["value"]
        bound = (f"{bits:.2f}" for bits in (index, value, index + value))
        lines.append((r["name"], "entropy bound", *bound, *[""] * 6))
    head = ("data", "codec", "index", "value", "total", "enc i", "enc v", "dec i", "dec v", "row i", "row v")
    return table(head, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description=__doc__)
    parser.add_argument("h5ad", type=Path, nargs="*", help="count matrices to measure besides generated ones")
    parser.add_argument("--cells", type=int, help="cells of each .h5ad; all unless given")
    parser.add_argument("--synthetic", nargs="*", choices=sorted(_SYNTHETIC), default=list(_SYNTHETIC))
    parser.add_argument("--synthetic-cells", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=0.2, help="per rate")
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    options = parser.parse_args(argv)
    found = conditions()
    results = [measure_data(*data, seconds=options.seconds) for data in _data(options)]
    for r in results:
        print(f"{r['name']}: {r['data']}; {r['cells']:,} cells, {r['nonzeros']:,} nonzeros")
    print(
        f"chunks of {_CHUNK:,} values; bits per nonzero; encoding in MB/s of uint32; decoding in 1e9\n"
        f"values/s, and in us per row of {_ROW:,} values; one core, fastest of many, in cache; checksums\n"
        "not verified"
    )
    print(report(results))
    one = results[-1]["codecs"]["hbx_gpu.rowpack"]["index"]
    print(
        f"same process: memcpy {one['memcpy_values_per_s'] / 1e9:.1f}e9 values/s, "
        f"CRC32C {one['crc32c_gb_per_s']:.1f} GB/s"
    )
    print(describe(found))
    write_json(options.out / "codecs.json", {"conditions": found, "results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
