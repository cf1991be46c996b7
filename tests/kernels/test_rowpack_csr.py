"""rowpack_csr: every width, patch and type equals the reference; records that lie are refused. NumPy only."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._codecs import rowpack, rowpack_format
from hbx_gpu._engine.device.records import ELEMENT_TYPES, OUTPUT, PIECE, RUN
from hbx_gpu.errors import CorruptChunkError
from tests.kernels import rowpack_reference as reference
from tests.kernels.rowpack_reference import BAD_COLUMN, BAD_PATCH, BAD_PLACE, BAD_RECORD, Batch, Stage, piece

VECTORS = Path(__file__).parents[1] / "codecs" / "rowpack_vectors.json"
SENTINEL = 0x55


def batch_of(stage: Stage, pieces: list[np.ndarray], *remaps: np.ndarray) -> Batch:
    sources, remap = reference.remap_tables(remaps)
    runs, table = reference.records(RUN, stage.runs), reference.records(PIECE, pieces)
    return Batch(stage.arena(), runs, table, sources, remap)


def outputs_for(n: int, *dtypes: str) -> list[np.ndarray]:
    """int32 columns and layers of `dtypes`, full of a byte that must survive where nothing is written."""
    return [np.full(n * np.dtype(d).itemsize, SENTINEL, np.uint8).view(d) for d in ("int32", *dtypes)]


def check(launcher: Any, batch: Batch, n: int, *dtypes: str, grid: int = 2, block: int = 64) -> np.ndarray:
    """Kernel and reference leave the same outputs and status; returns the status per piece."""
    found, expected = outputs_for(n, *dtypes), outputs_for(n, *dtypes)
    status, flag = reference.run_csr(launcher, batch, found, grid=grid, block=block)
    np.testing.assert_array_equal(status, reference.rowpack_csr(batch, expected))
    assert flag == np.bitwise_or.reduce(status, initial=0)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    return status


def stored_chunk(values: np.ndarray, transform: str = "none") -> bytes:
    return rowpack.encode_rowpack(values, transform)


def round_trip(launcher: Any, arrays: list[np.ndarray], transform: str) -> None:
    """Each array through the kernel as a layer of its dtype, whole; equals the array and decode_rowpack."""
    stage, pieces = Stage(), []
    dtypes = [a.dtype.name for a in arrays]
    for number, values in enumerate(arrays):
        run = stage.add(stored_chunk(values, transform))
        pieces.append(piece(run, 0, len(values), role=1 + number))
    found = outputs_for(max(len(a) for a in arrays), *dtypes)
    status, flag = reference.run_csr(launcher, batch_of(stage, pieces), found)
    assert not status.any()
    assert flag == 0
    for values, out in zip(arrays, found[1:], strict=True):
        np.testing.assert_array_equal(out[: len(values)], values)
        assert (out[len(values) :].view(np.uint8) == SENTINEL).all()


@pytest.mark.parametrize("transform", ["none", "gaps"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
def test_every_width(launcher: Any, dtype: str, transform: str) -> None:
    rng = np.random.default_rng(0)
    bits, arrays = 8 * np.dtype(dtype).itemsize, []
    for width in range(bits + 1):
        steps = (
            rng.integers(0, 2**64, 150, dtype=np.uint64) >> np.uint64(64 - width) if width else np.zeros(150)
        )
        steps = steps.astype(dtype)
        arrays.append(steps if transform == "none" else np.cumsum(steps, dtype=dtype))
    seen = {rowpack.decode_rowpack(stored_chunk(a)).dtype for a in arrays}
    assert seen == {np.dtype(dtype)}
    round_trip(launcher, arrays, transform)


@pytest.mark.parametrize("transform", ["none", "gaps"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
def test_exceptions_of_every_width(launcher: Any, dtype: str, transform: str) -> None:
    """High parts of every stored width, one to 31 of them, behind payloads of several widths."""
    bits, arrays, codes = 8 * np.dtype(dtype).itemsize, [], set()
    for width in (0, 3, 7, 20, 31):
        for extra in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32):
            if width + extra > bits:
                continue
            for n in (1, 5, 31):
                stored = np.full(128, (1 << width) - 1, np.uint64)
                at = np.linspace(1, 127, n).astype(int)
                stored[at] = (1 << (width + extra)) - 1 - np.arange(n) % 2
                values = np.cumsum(stored, dtype=dtype) if transform == "gaps" else stored.astype(dtype)
                if transform == "none":
                    values[0] = 0
                arrays.append(values)
                info = stored_chunk(values, transform)[48]
                codes.add(info >> 5 if info & 31 else None)
    assert codes >= set(range({"u1": 6, "u2": 7}.get(dtype, 8)))
    round_trip(launcher, arrays, transform)


def test_resets_and_exceptions_together(launcher: Any) -> None:
    """None to 127 resets in a block: rows of one value up to rows longer than a block."""
    rng = np.random.default_rng(1)
    arrays = [np.arange(300, 0, -1).astype(dtype) for dtype in ("u2", "u4", "u8")]
    for dtype in ("u1", "u2", "u4", "u8"):
        for longest in (1, 2, 5, 40, 200):
            rows = []
            for _ in range(2 + 600 // longest):
                row = np.sort(rng.integers(0, 250, rng.integers(1, longest + 1)))
                row[-1] += rng.choice([0, 0, 2_000, 2**30]) if dtype in ("u4", "u8") else 0
                rows.append(row)
            arrays.append(np.concatenate(rows)[:700].astype(dtype))
    round_trip(launcher, arrays, "gaps")


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
def test_largest_values(launcher: Any, dtype: str) -> None:
    top = np.iinfo(dtype).max
    arrays = [[top], [0, top], [top, 0], [top] * 300, [0, top] * 150, [top, top - 1] * 100, [0] * 129]
    for transform in ("none", "gaps"):
        round_trip(launcher, [np.array(a, dtype) for a in arrays], transform)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300, 1_024, 1_025, 1_200])
def test_any_range_of_a_chunk(launcher: Any, length: int, partial: bool) -> None:
    """Ranges at every edge of blocks and records, from a whole chunk and from the blocks they need."""
    rng = np.random.default_rng(length)
    values = np.sort(rng.integers(0, 60_000, length)).astype(np.uint32)
    values[rng.random(length) < 0.02] = 2**31
    chunk = stored_chunk(values, "gaps")
    edges = sorted(
        {e for e in (0, 1, 5, 127, 128, 129, 1_023, 1_024, 1_025, length - 1, length) if 0 <= e <= length}
    )
    stage = Stage()
    whole = stage.add(chunk)
    pieces, out = [], 3
    for i, a in enumerate(edges):
        for b in edges[i + 1 :]:
            run = stage.add(chunk, a // 128, -(-b // 128)) if partial else whole
            pieces.append(piece(run, a, b - a, out=out, role=1))
            out += b - a + 1  # one element that nobody writes
    status = check(launcher, batch_of(stage, pieces), out, "uint32", grid=1, block=128)
    assert not status.any()


def test_columns_go_through_the_remap(launcher: Any) -> None:
    rng = np.random.default_rng(3)
    n = 700
    remaps = [rng.permutation(n).astype(np.int32), np.arange(n, dtype=np.int32), np.full(n, 5, np.int32)]
    remaps[0][rng.random(n) < 0.3] = -1
    rows = [np.sort(rng.choice(n, k, replace=False)).astype(np.uint16) for k in (0, 1, 128, 300, 7, 699, 50)]
    counts = [rng.geometric(0.4, len(r)).astype(np.uint8) for r in rows]
    row_source = [0, 1, 2, 0, 1, 2, 0]
    for partial in (False, True):
        batch = reference.csr_batch(
            rows,
            counts,
            remaps=remaps,
            row_source=row_source,
            partial=partial,
            order=[6, 3, 0, 1, 3, 2, 5, 4],
        )
        assert batch.sources["identity"].tolist() == [0, 1, 0]
        total = sum(len(rows[r]) for r in [6, 3, 0, 1, 3, 2, 5, 4])
        assert not check(launcher, batch, total, "uint8").any()
        found = outputs_for(total, "uint8")
        reference.run_csr(launcher, batch, found)
        wanted = [remaps[row_source[r]][rows[r]] for r in [6, 3, 0, 1, 3, 2, 5, 4]]
        np.testing.assert_array_equal(found[0], np.concatenate(wanted))
        np.testing.assert_array_equal(found[1], np.concatenate([counts[r] for r in [6, 3, 0, 1, 3, 2, 5, 4]]))


@pytest.mark.parametrize("stored", ["u1", "u2", "u4", "u8"])
def test_values_convert_as_numpy_does(launcher: Any, stored: str) -> None:
    rng = np.random.default_rng(4)
    values = rng.integers(0, 2**64, 300, dtype=np.uint64) >> rng.integers(0, 64, 300).astype(np.uint64)
    values = values.astype(stored)
    values[:6] = [0, 1, 2, 3, np.iinfo(stored).max, np.iinfo(stored).max - 1]
    types = [name for name in ELEMENT_TYPES if name != "bfloat16"]
    stage = Stage()
    run = stage.add(stored_chunk(values))
    pieces = [piece(run, 0, 300, role=1 + k) for k in range(len(types))]
    found = outputs_for(300, *types)
    status, _ = reference.run_csr(launcher, batch_of(stage, pieces), found)
    assert not status.any()
    with np.errstate(over="ignore"):
        for name, out in zip(types, found[1:], strict=True):
            np.testing.assert_array_equal(out, values.astype(name), err_msg=name)


def test_more_pieces_than_warps_and_more_warps_than_pieces(launcher: Any) -> None:
    values = np.arange(1_000, dtype=np.uint32)
    stage = Stage()
    run = stage.add(stored_chunk(values, "gaps"))
    pieces = [piece(run, 7 * k, 7, out=7 * k, role=1) for k in range(140)]
    for grid, block in ((1, 32), (3, 256), (40, 256)):
        assert not check(launcher, batch_of(stage, pieces), 1_000, "uint32", grid=grid, block=block).any()


def test_nothing_to_do(launcher: Any) -> None:
    stage = Stage()
    run = stage.add(stored_chunk(np.arange(5, dtype=np.uint8)))
    assert not check(launcher, batch_of(stage, []), 5, "uint8").any()
    assert not check(launcher, batch_of(stage, [piece(run, 0, 0, role=9)]), 5, "uint8").any()


def test_vectors(launcher: Any) -> None:
    vectors = json.loads(VECTORS.read_text())
    arrays: dict[str, list[np.ndarray]] = {"none": [], "gaps": []}
    for case in vectors["good"]:
        values = np.array(case["values"], case["dtype"])
        assert stored_chunk(values, case["transform"]).hex() == case["chunk"]
        if len(values):
            arrays[case["transform"]].append(values)
    for transform, group in arrays.items():
        round_trip(launcher, group, transform)


def blocks_refuse(chunk: bytes, head: rowpack_format.ChunkHeader) -> bool:
    """Whether the codec's reference refuses a block of a chunk, read alone."""
    data = np.frombuffer(chunk, np.uint8)
    try:
        for b in range(head.n_blocks):
            rowpack.decode_block(data, head, b, rowpack.look_up(data, head, b))
    except CorruptChunkError:
        return True
    return False


def test_malformed_vectors(launcher: Any) -> None:
    """Whatever is wrong with a block shows; headers and what only whole chunks show are the host's."""
    refused, reasons = 0, []
    for case in json.loads(VECTORS.read_text())["malformed"]:
        chunk = bytes.fromhex(case["chunk"])
        try:
            head = rowpack_format.read_header(chunk, check=False)
        except CorruptChunkError:
            continue
        stage = Stage()
        run = stage.add(chunk)
        status = check(
            launcher, batch_of(stage, [piece(run, 0, head.n, role=1)]), head.n, f"uint{8 * head.element_size}"
        )
        assert bool(status[0]) == blocks_refuse(chunk, head), case["reason"]
        refused += bool(status[0])
        reasons += [] if status[0] else [case["reason"]]
    assert refused >= 10
    assert set(reasons) <= {
        "a payload bit flipped, checksum left",
        "payload shorter than its area",
        "unused place of a record",
        "unused base",
        "bytes before the checksum",
        "padding behind the directory",
        "an exception too many",
        "a reset too many",
        "payload of the first record not at its start",
    }


@pytest.mark.parametrize("place", [0, 1, 31, 32, 63, 64, 96, 126])
@pytest.mark.parametrize("position", [0, 1, 128, 255, None])
def test_resets_ascend_over_all_of_a_block(launcher: Any, place: int, position: int | None) -> None:
    """More resets than a warp has lanes; one of them is moved, or (None) repeats the one before it."""
    good = stored_chunk(np.arange(128, 0, -1).astype(np.uint16), "gaps")
    head = rowpack_format.read_header(good)
    assert (good[48] & 31, good[56]) == (0, 127)
    chunk = bytearray(good)
    chunk[head.patch_start + place] = place if position is None else position
    stage = Stage()
    stage.add(bytes(chunk))
    status = check(launcher, batch_of(stage, [piece(0, 0, 128, role=1)]), 128, "uint16")
    assert status.tolist() == [0 if chunk == good else BAD_PATCH]


def damaged_run(fields: dict[str, int]) -> Batch:
    """Two blocks of gaps with exceptions, in a run with other `fields`."""
    values = np.arange(200, dtype=np.uint32) * 3
    values[::50] = 2**20
    stage = Stage()
    stage.add(stored_chunk(values, "gaps"))
    for name, value in fields.items():
        stage.runs[0][name] = value
    return batch_of(stage, [piece(0, 0, len(values), role=1)])


@pytest.mark.parametrize(
    "fields",
    [
        {"records": 4},
        {"records": 1 << 40},
        {"records": 2**64 - 8},
        {"payload": 8},
        {"payload": 2**64 - 16},
        {"patches": 2**64 - 1},
        {"patch_bytes": 2**32 - 1},
        {"payload_units": 2**32 - 1},
        {"n_records": 2**32 - 1},
        {"n_records": 0},
        {"first_record": 1},
        {"first_record": 2**32 - 1},
        {"n": 199},
        {"element_size": 0},
        {"element_size": 3},
        {"element_size": 9},
        {"element_size": 255},
        {"transform": 2},
        {"base_bytes": 0},
        {"base_bytes": 3},
        {"base_bytes": 8},
        {"transform": 0},
    ],
)
def test_runs_that_lie_are_refused(launcher: Any, fields: dict[str, int]) -> None:
    assert check(launcher, damaged_run(fields), 200, "uint32").tolist() == [BAD_RECORD]


@pytest.mark.parametrize(
    "fields", [{"payload_begin": 1}, {"patch_begin": 1}, {"payload_units": 1}, {"patch_bytes": 1}]
)
def test_blocks_outside_what_was_staged_are_refused(launcher: Any, fields: dict[str, int]) -> None:
    assert check(launcher, damaged_run(fields), 200, "uint32").tolist() == [reference.TRUNCATED]


def test_directory_offsets_do_not_wrap_around(launcher: Any) -> None:
    """A record whose payload lies a little before what was staged, in 32-bit arithmetic far behind it."""
    values = np.random.default_rng(0).integers(0, 2**20, 256).astype(np.uint32)
    chunk = bytearray(stored_chunk(values))
    for at, number in ((32, 2**32 - 1), (32, 2**32 - 20), (36, 2**32 - 1)):
        stage = Stage()
        struct.pack_into("<I", chunk, at, number)
        stage.add(bytes(chunk))
        for begin in (0, number):
            stage.runs[0]["payload_begin" if at == 32 else "patch_begin"] = begin
            check(launcher, batch_of(stage, [piece(0, 0, 256, role=1)]), 256, "uint32")


@pytest.mark.parametrize(
    ("change", "bits"),
    [
        ({"run": 1}, BAD_RECORD),
        ({"skip": 1}, BAD_RECORD),
        ({"skip": 2**32 - 1}, BAD_RECORD),
        ({"count": 201}, BAD_PLACE),
        ({"count": 2**32 - 1}, BAD_PLACE),
        ({"out": 1}, BAD_PLACE),
        ({"out": 2**64 - 1}, BAD_PLACE),
        ({"role": 2}, BAD_PLACE),
        ({"role": 0, "source": 1}, BAD_PLACE),
        ({"role": 0}, BAD_COLUMN),
    ],
)
def test_pieces_that_lie_are_refused(launcher: Any, change: dict[str, int], bits: int) -> None:
    """Here the Source has one feature less than the columns need."""
    stage = Stage()
    stage.add(stored_chunk(np.arange(200, dtype=np.uint32), "gaps"))
    record = piece(0, 0, 200, role=1)
    for name, value in change.items():
        record[name] = value
    batch = batch_of(stage, [record], np.arange(199, dtype=np.int32)[::-1])
    assert check(launcher, batch, 200, "uint32").tolist() == [bits]


def test_outputs_of_other_types_are_refused(launcher: Any) -> None:
    stage = Stage()
    run = stage.add(stored_chunk(np.arange(9, dtype=np.uint16)))
    batch = batch_of(stage, [piece(run, 0, 9), piece(run, 0, 9, role=1)], np.arange(9, dtype=np.int32))
    outputs = outputs_for(9, "uint32")
    table = reference.output_records(launcher, outputs)
    for types in (("int64", "bfloat16"), ("uint32", 12), ("float32", 2**32 - 1)):
        table["type"] = [ELEMENT_TYPES.get(str(t), t) for t in types]
        status, flag = reference.run_csr(launcher, batch, outputs, table=table)
        assert (status.tolist(), flag) == ([BAD_PLACE, BAD_PLACE], BAD_PLACE)
    assert all((a.view(np.uint8) == SENTINEL).all() for a in outputs)
    status, flag = reference.run_csr(launcher, batch, outputs, table=np.zeros(0, OUTPUT))
    assert status.tolist() == [BAD_PLACE, BAD_PLACE]


def test_remap_outside_its_table_is_refused(launcher: Any) -> None:
    stage = Stage()
    run = stage.add(stored_chunk(np.arange(9, dtype=np.uint16)))
    batch = batch_of(stage, [piece(run, 0, 9)], np.arange(9, dtype=np.int32)[::-1])
    for start, length in ((1, 9), (0, 10), (2**64 - 1, 9), (2**63, 9)):
        batch.sources["remap_start"], batch.sources["remap_length"] = start, length
        assert check(launcher, batch, 9).tolist() == [BAD_PLACE]
