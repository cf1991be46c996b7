"""Rowpack kernels on random and damaged input: what the reference makes, or the status it says, and no more.

``python -m tests.kernels.test_rowpack_properties N`` fuzzes N damaged batches and prints the counts; under
``python -m tests.emulation.sanitized`` every access is checked as well.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbx_gpu._codecs import rowpack
from hbx_gpu._engine.device.records import PIECE, RUN
from tests.codecs.rowpack_cases import DTYPES, SHAPES, varied
from tests.emulation import EmulatedLauncher
from tests.kernels import rowpack_reference as reference
from tests.kernels.rowpack_reference import Batch, Stage

SENTINEL = 0x55
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**32 - 1)


def random_batch(rng: np.random.Generator) -> tuple[Batch, int, list[str]]:
    """Pieces of a few chunks of any content; (batch, elements per output, dtypes of layers)."""
    stage, pieces = Stage(), []
    dtypes = [str(rng.choice(["uint8", "uint16", "uint32", "uint64"])) for _ in range(2)]
    size = int(rng.choice([1, 40, 300, 1_200]))
    m = int(rng.integers(1, 400))
    out = 0
    for _ in range(int(rng.integers(1, 4))):
        role = int(rng.integers(0, 3))
        if role:
            values = varied(rng, size, np.dtype(dtypes[role - 1]).str[1:], str(rng.choice(SHAPES)))
        else:
            values = varied(rng, size, str(rng.choice(DTYPES)), "rows") % np.uint8(min(m, 255))
        chunk = rowpack.encode_rowpack(values, str(rng.choice(["none", "gaps"])))
        whole = stage.add(chunk)
        for _ in range(int(rng.integers(1, 4))):
            skip = int(rng.integers(0, size))
            count = int(rng.integers(1, size - skip + 1))
            run = whole if rng.random() < 0.5 else stage.add(chunk, skip // 128, -(-(skip + count) // 128))
            pieces.append(reference.piece(run, skip, count, out=out, role=role))
            out += count
    remap = rng.permutation(m).astype(np.int32)
    remap[rng.random(m) < 0.2] = -1
    tables = reference.remap_tables([np.arange(m, dtype=np.int32) if rng.random() < 0.3 else remap])
    runs, records = reference.records(RUN, stage.runs), reference.records(PIECE, pieces)
    return Batch(stage.arena(), runs, records, *tables), out, dtypes


def random_rows(rng: np.random.Generator) -> tuple[Batch, int]:
    """Rows of one CSR matrix, for dense output; (batch, features)."""
    n = int(rng.integers(1, 600))
    index, count = str(rng.choice(["u2", "u4"])), str(rng.choice(["u1", "u2", "u4"]))
    rows = []
    for _ in range(int(rng.integers(1, 5))):
        row = rng.choice(n, rng.integers(0, n + 1), replace=bool(rng.random() < 0.2))
        rows.append(np.sort(row).astype(index))
    counts = [varied(rng, len(r), count, str(rng.choice(SHAPES))) for r in rows]
    n_features = int(rng.integers(1, 600))
    remap = rng.integers(-1, n_features, n).astype(np.int32)
    if n <= n_features and rng.random() < 0.3:
        remap = np.arange(n, dtype=np.int32)
    how: dict[str, Any] = {"chunk": int(rng.choice([128, 256, 1_024])), "partial": bool(rng.random() < 0.5)}
    return reference.csr_batch(rows, counts, remaps=[remap], **how), n_features


def damage(rng: np.random.Generator, batch: Batch) -> Batch:
    """A batch with a few bytes of the arena or fields of records altered; outputs stay as they are."""
    batch = batch.copy()
    if not len(batch.runs):
        return batch
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.choice(
            ["arena", "arena", "directory", "directory", "runs", "pieces", "sources", "segments"]
        )
        if kind in ("arena", "directory"):
            begin, end = 0, batch.arena.size
            if kind == "directory":
                run = batch.runs[int(rng.integers(0, len(batch.runs)))]
                begin = min(int(run["records"]), end - 1)  # another change may have moved it
                end = min(begin + 48, end)
            at = int(rng.integers(begin, end))
            old = int(batch.arena[at])
            batch.arena[at] = rng.choice([int(rng.integers(0, 256)), old ^ 1, (old + 1) % 256])
            continue
        table = getattr(batch, kind if len(getattr(batch, kind)) else "runs")
        name = str(rng.choice(table.dtype.names))
        place = int(rng.integers(0, len(table)))
        old, top = int(table[name][place]), int(np.iinfo(table.dtype[name]).max)
        new = int(rng.choice([0, 1, old + 1, old - 1, old ^ 8, old + 16, 2 * old, top, top - 15, top // 2]))
        table[name][place] = new % (top + 1)
    return batch


def check_csr(launcher: Any, batch: Batch, n: int, dtypes: list[str]) -> bool:
    """Outputs and status are the reference's; whether all is well."""
    found, expected = ([np.full(n, 7, d) for d in ["int32", *dtypes]] for _ in range(2))
    # Canaries at both ends: the outputs are parts of larger arrays.
    framed = [np.full(a.nbytes + 128, SENTINEL, np.uint8) for a in found]
    table = reference.output_records(launcher, found)
    for frame, array, record in zip(framed, found, table, strict=True):
        frame[64 : 64 + array.nbytes] = array.view(np.uint8)
        record["address"] = launcher.address(frame) + 64
    status, flag = reference.run_csr(launcher, batch, found, table=table)
    np.testing.assert_array_equal(status, reference.rowpack_csr(batch, expected))
    assert flag == np.bitwise_or.reduce(status, initial=0)
    for role, (frame, array) in enumerate(zip(framed, expected, strict=True)):
        assert (frame[:64] == SENTINEL).all()
        assert (frame[64 + array.nbytes :] == SENTINEL).all()
        once = claims(batch, role, n) < 2
        np.testing.assert_array_equal(frame[64 : 64 + array.nbytes].view(array.dtype)[once], array[once])
    return flag == 0


def claims(batch: Batch, role: int, n: int) -> np.ndarray:
    """How many pieces want to write each element: where several do, any may win."""
    claimed = np.zeros(n, np.int64)
    for record in batch.pieces[batch.pieces["role"] == role]:
        claimed[min(int(record["out"]), n) :][: int(record["count"])] += 1
    return claimed


def check_dense(launcher: Any, rng: np.random.Generator, batch: Batch, n_features: int) -> bool:
    """Rows without a bad piece, and status, are the reference's; whether all is well."""
    tile = int(rng.choice([n_features, max(1, n_features // 3), n_features + 5]))
    how: dict[str, Any] = {
        "tile": tile,
        "block": int(rng.choice([32, 64, 128])),
        "shift": int(rng.integers(0, 4)),
    }
    sums, totals, expected = reference.rowpack_sums(batch, n_features)
    rows, status, flag = reference.run_dense(launcher, batch, n_features, **how)
    np.testing.assert_array_equal(status, expected)
    # A segment without a piece has no status of its own.
    assert flag & np.bitwise_or.reduce(status, initial=0) == np.bitwise_or.reduce(status, initial=0)
    good = np.ones(len(rows), bool)
    for row in range(len(rows)):
        for segment in batch.segments[batch.row_ptr[row] : batch.row_ptr[row + 1]]:
            for number in (int(segment["index_piece"]), int(segment["value_piece"])):
                good[row] &= number < len(status) and status[number] == 0
    np.testing.assert_array_equal(rows[good], sums[good].astype(np.float32))
    kind, target = str(rng.choice(["f32", "f16", "bf16"])), float(rng.choice([0.0, 1e4]))
    log1p = bool(rng.random() < 0.5)
    rows, again, _ = reference.run_dense(
        launcher, batch, n_features, kind=kind, target_sum=target, log1p=log1p, **how
    )
    np.testing.assert_array_equal(again, expected)
    x = reference.transformed(sums, totals, target, log1p)
    if kind == "f32":
        np.testing.assert_allclose(rows[good], x[good], rtol=2e-6)
    else:
        y = rows.view(np.float16) if kind == "f16" else (rows.astype(np.uint32) << 16).view(np.float32)
        limit = 65_519.9 if kind == "f16" else 3e38
        np.testing.assert_allclose(
            np.minimum(y.astype(np.float64), limit)[good], np.minimum(x, limit)[good], rtol=5e-3, atol=1e-7
        )
    return flag == 0


@settings(SETTINGS, max_examples=60)
@given(seed=SEEDS)
def test_csr_equals_the_reference(launcher: Any, seed: int) -> None:
    assert check_csr(launcher, *random_batch(np.random.default_rng(seed)))


@settings(SETTINGS, max_examples=40)
@given(seed=SEEDS)
def test_dense_equals_the_reference(launcher: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, n_features = random_rows(rng)
    assert check_dense(launcher, rng, batch, n_features)


@settings(SETTINGS, max_examples=100)
@given(seed=SEEDS)
def test_damaged_csr_is_refused_or_decodes_as_the_reference(launcher: Any, seed: int) -> None:
    fuzz_csr(launcher, np.random.default_rng(seed))


@settings(SETTINGS, max_examples=60)
@given(seed=SEEDS)
def test_damaged_rows_are_refused_or_add_up_as_the_reference(launcher: Any, seed: int) -> None:
    fuzz_dense(launcher, np.random.default_rng(seed))


def fuzz_csr(launcher: Any, rng: np.random.Generator) -> bool:
    batch, n, dtypes = random_batch(rng)
    return check_csr(launcher, damage(rng, batch), n, dtypes)


def fuzz_dense(launcher: Any, rng: np.random.Generator) -> bool:
    batch, n_features = random_rows(rng)
    return check_dense(launcher, rng, damage(rng, batch), n_features)


def main(n: int) -> None:
    """Damage n batches for each kernel; print how many were refused."""
    launcher = EmulatedLauncher("random:1")
    for name, fuzz in (("csr", fuzz_csr), ("dense", fuzz_dense)):
        refused = 0
        for seed in range(n):
            try:
                refused += not fuzz(launcher, np.random.default_rng(seed))
            except AssertionError:
                print(f"{name}, seed {seed}:")
                raise
        print(f"rowpack_{name}: {n} damaged batches, {refused} refused, the rest as the reference has them")


if __name__ == "__main__":
    main(int(sys.argv[1]))
