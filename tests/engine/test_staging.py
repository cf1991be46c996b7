"""What is staged of a plan's chunks: read back record by record, in NumPy, as a kernel would."""

from __future__ import annotations

import dataclasses
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from hbx_gpu._codecs import rowpack, rowpack_format
from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._engine.device import records, status
from hbx_gpu._engine.device.staged_plan import StagedPlan
from hbx_gpu._engine.device.stager import Stager
from hbx_gpu._engine.device.staging_kernels import MAX_GAP
from hbx_gpu._plan.rows import plan_rows, source_table
from hbx_gpu._source import RowIndex
from hbx_gpu.errors import CorruptChunkError, UnsupportedError
from hbx_gpu.testing import CODECS, StoredGroup, write_sources
from tests.engine.suite import Rows, one_group

HEADER = (Path(__file__).resolve().parents[2] / "kernels" / "hbx.cuh").read_text()
C_TYPES = {"u64": "<u8", "u32": "<u4", "u8": "|u1"}


def test_records_are_those_of_the_kernels() -> None:
    structs = re.findall(r"struct (\w+) \{\n(.*?)\};  // (\d+) bytes", HEADER, re.DOTALL)
    assert {name for name, _, _ in structs} == set(records.RECORDS)
    for name, body, size in structs:
        fields = re.findall(r"^ +(u\d+) (\w+);", body, re.MULTILINE)
        dtype: Any = records.RECORDS[name]
        assert [(field, C_TYPES[ctype]) for ctype, field in fields] == [
            (field, dtype[field].str) for field in dtype.names
        ]
        assert dtype.itemsize == int(size)
        # What C adds between fields for alignment would show here.
        assert [dtype.fields[f][1] % dtype[f].itemsize for f in dtype.names] == [0] * len(fields)


def test_numbers_are_those_of_the_kernels() -> None:
    bits = re.findall(r"#define HBX_(BAD_\w+|TRUNCATED|NOT_COUNTS) (\d+)u", HEADER)
    assert {name: int(value) for name, value in bits} == {
        name: value for name, value in vars(status).items() if name.isupper() and not name.startswith("_")
    }
    short = {"u": "uint", "i": "int", "f": "float", "bf": "bfloat"}
    types = re.findall(r"#define HBX_(U|I|F|BF)(\d+) (\d+)\n", HEADER)
    assert {short[k.lower()] + bits: int(n) for k, bits, n in types} == records.ELEMENT_TYPES


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32, 6])
def test_every_status_has_a_reason(bits: int) -> None:
    assert "unknown status" not in status.describe_status(bits)


def opened(tmp_path: Path, groups: list[StoredGroup], n_features: int = 30) -> Rows:
    return Rows(Stager, *write_sources(tmp_path, groups), n_features)


def measured(rows: Rows, selection: Any, **options: Any) -> StagedPlan:
    plan = plan_rows(rows.table, rows.rows, np.asarray(selection))
    result: StagedPlan = rows.engine.measure(
        plan, rows.reader.read(rows.directory.extents(plan.chunks)), **options
    )
    return result


def packed(rows: Rows, selection: Any, **options: Any) -> tuple[StagedPlan, np.ndarray]:
    """Measured and packed into a buffer that is larger than needed and must stay untouched there."""
    staging = measured(rows, selection, **options)
    host = np.full(staging.host_bytes + 64, 0xEE, np.uint8)
    rows.engine.pack(staging, host[: staging.host_bytes])
    assert (host[staging.host_bytes :] == 0xEE).all()
    return staging, host[: staging.host_bytes]


def table(staging: StagedPlan, host: np.ndarray, name: str) -> np.ndarray:
    """A table as it lies in the staged bytes."""
    expected = staging.tables[name]
    at = staging.at[name]
    assert at % 16 == 0
    found = host[at : at + expected.nbytes].view(expected.dtype)
    assert np.array_equal(found, expected)
    return found


def run_block(host: np.ndarray, run: np.void, b: int) -> np.ndarray:
    """Values of block b of a run: the reference's decoder, looking at nothing but the run's bytes."""
    r = {name: int(run[name]) for name in run.dtype.names or ()}
    header = rowpack_format.ChunkHeader(
        r["element_size"], r["transform"], r["base_bytes"], r["n"], 0, r["minimum"], 0
    )
    assert r["records"] % 8 == 0
    assert r["payload"] % 16 == 0
    place = b // 8 - r["first_record"]
    assert 0 <= place < r["n_records"]
    record = host[r["records"] + place * header.record_bytes :][: header.record_bytes]
    payload_begin, patch_begin = (int(x) for x in record[:8].view("<u4"))
    entries = rowpack.directory_entries(
        record,
        header,
        r["payload"] + 16 * (payload_begin - r["payload_begin"]),
        r["patches"] + patch_begin - r["patch_begin"],
        b % 8 + 1,
    )
    block = list(entries)[-1]
    assert r["payload"] <= block.payload_at
    assert block.payload_at + 16 * block.width <= r["payload"] + 16 * r["payload_units"]
    assert r["patches"] <= block.patch_at
    assert block.patch_at + block.patch_bytes <= r["patches"] + r["patch_bytes"]
    return rowpack.decode_block(host, header, b, block)


def staged_elements(rows: Rows, staging: StagedPlan, host: np.ndarray) -> list[np.ndarray]:
    """Flat output of every role, local columns, from rowpack runs and plain pieces."""
    flat = [np.full(staging.plan.n_elements, -1, np.float64) for _ in range(rows.table.n_roles)]
    runs = table(staging, host, "runs")
    for piece in table(staging, host, "pieces"):
        skip, count = int(piece["skip"]), int(piece["count"])
        blocks = range(skip // 128, -(-(skip + count) // 128))
        values = np.concatenate([run_block(host, runs[piece["run"]], b) for b in blocks])
        size = 8 * int(runs[piece["run"]]["element_size"])
        part = values[skip - 128 * blocks[0] :][:count] & np.uint64(2**size - 1)
        flat[piece["role"]][int(piece["out"]) :][:count] = part
    names = {number: name for name, number in records.ELEMENT_TYPES.items()}
    for plain in table(staging, host, "plains"):
        dtype = np.dtype(names[int(plain["type"])])
        assert plain["data"] % dtype.itemsize == 0
        stored = host[int(plain["data"]) :][: int(plain["count"]) * dtype.itemsize].view(dtype)
        flat[plain["role"]][int(plain["out"]) :][: len(stored)] = stored
    return flat


def long_rows(n_rows: int = 40, nnz: int = 300, seed: int = 0, **kwargs: Any) -> StoredGroup:
    """Rows of several blocks each, with wide gaps and rare large counts."""
    rng = np.random.default_rng(seed)
    indices = np.concatenate([np.sort(rng.choice(20_000, nnz, replace=False)) for _ in range(n_rows)])
    matrix = sp.csr_matrix((n_rows, 20_000), dtype=np.uint32)
    matrix.indptr = np.arange(n_rows + 1, dtype=np.int32) * nnz
    matrix.indices = indices.astype(np.int32)
    data = rng.geometric(0.3, size=len(indices))
    data[rng.random(len(data)) < 0.01] = 70_000
    matrix.data = data.astype(np.uint32)
    options = {"codec": "hbx_gpu.rowpack", "chunk": 2048, **kwargs}
    return StoredGroup(matrix=matrix, remap=np.arange(20_000, dtype=np.int32), **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("selection", [range(40), [7, 31, 7, 0, 39, 12]], ids=["stored", "random"])
def test_runs_hold_the_blocks_of_the_pieces(dtype: type, selection: Any, tmp_path: Path) -> None:
    group = long_rows()
    group.matrix.data = (group.matrix.data * np.uint64(1 if dtype != np.uint64 else 2**33)).astype(dtype)
    rows = opened(tmp_path, [group], 20_000)
    staging, host = packed(rows, selection)
    indices, values = staged_elements(rows, staging, host)
    expected = group.matrix[np.asarray(selection)]
    assert np.array_equal(indices, expected.indices)
    assert np.array_equal(values, expected.data.astype(np.float64))
    begin = staging.at["status"]
    assert not host[begin : begin + staging.status_bytes].any()
    assert np.array_equal(table(staging, host, "offsets"), staging.plan.offsets)


@pytest.mark.parametrize("codec", ["zstd", "none", "blosc"])
def test_other_codecs_stage_the_elements_of_the_pieces(codec: str, tmp_path: Path) -> None:
    group = long_rows(codec=codec)
    rows = opened(tmp_path, [group], 20_000)
    selection = [3, 17, 3, 25]
    staging, host = packed(rows, selection)
    indices, values = staged_elements(rows, staging, host)
    assert np.array_equal(indices, group.matrix[selection].indices)
    assert np.array_equal(values, group.matrix[selection].data)
    assert staging.at["outputs"] < 4 * 2 * 300 * 4 * 1.1  # no chunk crosses whole


def test_stored_order_copies_a_chunk_about_once(tmp_path: Path) -> None:
    rows = opened(tmp_path, [long_rows()], 20_000)
    staging = measured(rows, np.arange(40))
    assert len(staging.tables["runs"]) == len(staging.plan.chunks)
    nbytes = int(staging.slab.nbytes.sum())
    assert 0.9 * nbytes < staging.rowpack_ranges["nbytes"].sum() < nbytes


def test_one_row_copies_its_blocks_alone(tmp_path: Path) -> None:
    rows = opened(tmp_path, [long_rows(400, chunk=1 << 17)], 20_000)
    staging = measured(rows, [200])
    assert len(staging.plan.chunks) == 2
    assert staging.rowpack_ranges["nbytes"].sum() < staging.slab.nbytes.sum() / 100


@pytest.mark.parametrize(("apart", "n_runs"), [(MAX_GAP, 1), (MAX_GAP + 1, 2)])
def test_near_pieces_share_a_run(apart: int, n_runs: int, tmp_path: Path) -> None:
    rows = opened(tmp_path, [long_rows(nnz=128, chunk=1 << 13)], 20_000)
    staging, host = packed(rows, [5, 5 + apart + 1])
    assert len(staging.tables["runs"]) == 2 * n_runs  # of indices and values
    staged_elements(rows, staging, host)


@pytest.mark.parametrize("room", [0, 3000, 1 << 20])
@pytest.mark.parametrize("again", [True, False])
def test_what_fits_is_copied_with_the_measuring(room: int, again: bool, tmp_path: Path) -> None:
    """Packing does the rest, and all of it into another buffer; nothing is written outside the room."""
    rows = opened(tmp_path, [long_rows()], 20_000)
    selection = np.random.default_rng(0).permutation(40)
    _, expected = packed(rows, selection)
    buffer = np.full((1 << 21) + 8, 0xEE, np.uint8)[-(1 << 21) :]
    buffer = buffer[-buffer.ctypes.data % 16 :]
    staging = measured(rows, selection, host=buffer[:room])
    assert (buffer[room:] == 0xEE).all()
    n = len(staging.rowpack_ranges)
    assert staging.n_copied == n if room > len(expected) else staging.n_copied < n
    assert (staging.n_copied > 0) == (room > 0)
    host = buffer if again else np.full(len(expected), 0xEE, np.uint8)
    if again and 0 < room < len(expected):  # what is there already is not copied again
        staging.slab.address[:] = 0
        staging.rowpack_ranges[: staging.n_copied]["source"] = 0
    rows.engine.pack(staging, host)
    for ranges in staging.rowpack_ranges:
        part = slice(int(ranges["target"]), int(ranges["target"] + ranges["nbytes"]))
        assert np.array_equal(host[part], expected[part])
    place = slice(staging.at["pieces"], staging.at["pieces"] + staging.tables["pieces"].nbytes)
    assert np.array_equal(host[place], expected[place])


@pytest.mark.parametrize("codec", CODECS)
def test_room_is_exact_and_ranges_do_not_overlap(codec: str, tmp_path: Path) -> None:
    rows = opened(tmp_path, [long_rows(codec=codec)], 20_000)
    staging = measured(rows, [30, 2, 2, 11])
    decoded = [ranges for _, ranges in staging.decode]
    ranges = np.concatenate([staging.rowpack_ranges, *staging.ranges, *decoded])
    ranges = ranges[ranges["nbytes"] > 0]
    ranges = np.sort(ranges, order="target")
    end = ranges["target"] + ranges["nbytes"]
    assert (end[:-1] <= ranges["target"][1:]).all()
    assert end[-1] <= staging.at["outputs"]
    spans = [(staging.at[name], t.nbytes) for name, t in staging.tables.items()]
    spans += [(staging.at["outputs"], 48), (staging.at["total"], 8)]
    spans = sorted([*spans, (staging.at["status"], staging.status_bytes)])
    for (a, n), (b, _) in pairwise(spans):
        assert a + n <= b < a + n + 16
    assert sum(spans[-1]) <= staging.host_bytes < sum(spans[-1]) + 16


def test_rows_that_overlap(tmp_path: Path) -> None:
    """A short row inside a long one does not end the run they share."""
    rows = opened(tmp_path, [long_rows()], 20_000)
    rows.rows = RowIndex(np.zeros(2, np.int32), np.array([0, 5]), np.array([900, 10], np.int32))
    staging, host = packed(rows, [0, 1])
    indices, _ = staged_elements(rows, staging, host)
    stored = long_rows().matrix.indices
    assert np.array_equal(indices, np.concatenate([stored[:900], stored[5:15]]))


def test_segments_pair_equal_stretches(tmp_path: Path) -> None:
    rows = opened(tmp_path, [long_rows()], 20_000)
    staging, host = packed(rows, [9, 3, 30])
    assert staging.fused == [True]
    segments, row_ptr = table(staging, host, "segments0"), table(staging, host, "row_ptr0")
    pieces = staging.tables["pieces"]
    assert row_ptr.tolist()[0] == 0
    for r in range(3):
        at = int(staging.plan.offsets[r])
        for s in segments[row_ptr[r] : row_ptr[r + 1]]:
            index, value = pieces[s["index_piece"]], pieces[s["value_piece"]]
            assert (index["role"], value["role"]) == (0, 1)
            assert int(index["out"]) + int(s["index_skip"]) - int(index["skip"]) == at
            assert int(value["out"]) + int(s["value_skip"]) - int(value["skip"]) == at
            at += int(s["count"])
        assert at == staging.plan.offsets[r + 1]
    assert not measured(rows, [9, 3], layout="csr").fused


def test_room_for_a_flat_csr_only_where_it_is_needed(tmp_path: Path) -> None:
    fused = measured(opened(tmp_path / "a", [long_rows()], 20_000), [1, 2])
    assert fused.arena_bytes == fused.host_bytes < fused.flat_bytes
    flat = measured(opened(tmp_path / "b", [long_rows(codec="zstd")], 20_000), [1, 2])
    assert flat.arena_bytes == flat.flat_bytes
    group = dataclasses.replace(long_rows(), remap=np.full(20_000, -1, np.int32))
    drops = opened(tmp_path / "c", [group], 20_000)
    assert measured(drops, [1, 2], layout="csr").arena_bytes > measured(drops, [1], layout="dense").host_bytes
    dense = measured(drops, [1, 2], layout="dense")
    assert dense.arena_bytes == dense.host_bytes


def rewrite(path: Path, change: Any) -> None:
    """Change the bytes of a rowpack chunk and make its checksum right."""
    data = bytearray(path.read_bytes())
    change(data)
    data[-4:] = struct.pack("<I", crc32c(bytes(data[:-4])))
    path.write_bytes(bytes(data))


def test_a_flipped_bit_of_a_block_nobody_asked_for_is_seen_at_first_touch(tmp_path: Path) -> None:
    rows = opened(tmp_path, [long_rows()], 20_000)
    measured(rows, [0])
    path = tmp_path / "g0/csr/layers/counts/c/2"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptChunkError, match=r"layers/counts.*CRC32C") as error:
        measured(rows, [2 * 2048 // 300 + 1])
    assert (error.value.chunk, error.value.file) == (2, str(path))


def test_a_run_that_leaves_its_chunk_is_refused(tmp_path: Path) -> None:
    group = long_rows()
    for at, value in ((32, 1 << 20), (36, 1 << 30), (40, 255)):  # payload, patches, width of block 0
        folder = tmp_path / str(at)
        rows = opened(folder, [group], 20_000)
        path = folder / "g0/csr/indices/c/0"

        def change(data: bytearray, at: int = at, value: int = value) -> None:
            data[at : at + (4 if at < 40 else 1)] = value.to_bytes(4 if at < 40 else 1, "little")

        rewrite(path, change)
        with pytest.raises(CorruptChunkError, match=r"g0/csr/indices.*leave their area") as error:
            measured(rows, [0])
        assert (error.value.chunk, error.value.file) == (0, str(path))


def test_no_directory_makes_copies_leave_the_chunk(tmp_path: Path) -> None:
    """Bytes changed anywhere in header and directory, checksums right: an error, or copies inside."""
    opened(tmp_path, [long_rows()], 20_000)
    path = tmp_path / "g0/csr/indices/c/0"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    raised = 0
    sources, index = write_sources(tmp_path / "other", [long_rows()])
    del sources
    for _ in range(150):

        def change(data: bytearray) -> None:
            data[:] = good
            for at in rng.integers(0, 32 + 2 * 48, size=rng.integers(1, 4)):
                data[at] = rng.integers(256)

        rewrite(path, change)
        rows = _reopened(tmp_path, index)
        try:
            staging = measured(rows, [0, 2, 5])
        except CorruptChunkError:
            raised += 1
            continue
        first = int(staging.slab.address[0])
        end = first + int(staging.slab.nbytes[0])
        ranges = staging.rowpack_ranges
        inside = (ranges["source"] >= first) & (ranges["source"] + ranges["nbytes"] <= end)
        others = [int(a) for a in staging.slab.address[1:]]
        n_bytes = [int(n) for n in staging.slab.nbytes[1:]]
        for a, n in zip(others, n_bytes, strict=True):
            inside |= (ranges["source"] >= a) & (ranges["source"] + ranges["nbytes"] <= a + n)
        assert inside.all()
        assert (ranges["target"] + ranges["nbytes"] <= staging.at["outputs"]).all()
    assert raised > 50


def _reopened(root: Path, index: RowIndex) -> Rows:
    from hbx_gpu._source import Source
    from hbx_gpu._storage.metadata import read_layout

    layer = {"counts": read_layout(root / "g0/csr/layers/counts", "g0/csr/layers/counts")}
    columns = read_layout(root / "g0/csr/indices", "g0/csr/indices")
    source = Source("g0", columns, layer, np.arange(20_000, dtype=np.int32))
    return Rows(Stager, [source], index, 20_000)


def test_lost_objects_and_wrong_lengths_are_named(tmp_path: Path) -> None:
    rows = opened(tmp_path / "a", [one_group("none")])
    path = tmp_path / "a/g0/csr/layers/counts/c/1"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptChunkError, match=r"layers/counts.*252 bytes stored, 64 elements of uint32"):
        measured(rows, np.arange(40))
    rows = opened(tmp_path / "b", [one_group()])
    (tmp_path / "b/g0/csr/indices/c/1").unlink()
    with pytest.raises(CorruptChunkError, match="missing"):
        measured(rows, np.arange(40))


def test_absent_chunks_share_one_stretch(tmp_path: Path) -> None:
    rows = opened(tmp_path, [long_rows(chunk=128)], 20_000)
    for chunk in (tmp_path / "g0/csr/layers/counts/c").iterdir():
        chunk.unlink()
    staging, host = packed(rows, np.arange(40))
    assert len(staging.fills) == 1
    assert staging.fills[0][1].nbytes == 128 * 4
    assert not staged_elements(rows, staging, host)[1].any()


def test_bytes_behind_the_blocks_of_a_bitpacked_chunk_stay(tmp_path: Path) -> None:
    rows = opened(tmp_path, [one_group()])
    path = tmp_path / "g0/csr/indices/c/0"
    path.write_bytes(path.read_bytes() + bytes(100_000))
    assert measured(rows, [0]).host_bytes < 5_000


def test_memory_is_used_again_and_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    rows = opened(tmp_path, [long_rows(1500, chunk=4096)], 20_000)
    selections = [np.random.default_rng(k).integers(0, 1500, 1200) for k in range(24)]
    alone = [packed(rows, selection)[1] for selection in selections[:6]]
    before = rows.engine._pool.n_allocated
    for selection in selections[:6]:
        packed(rows, selection)
    assert rows.engine._pool.n_allocated == before > 0
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda s: packed(rows, s)[1], selections[:6] * 4))
    for k, host in enumerate(together):
        assert np.array_equal(host, alone[k % 6])


def test_dtypes_that_no_kernel_takes(tmp_path: Path) -> None:
    sources, _ = write_sources(tmp_path, [one_group("zstd")])
    layer = dataclasses.replace(sources[0].layers["counts"], dtype=np.dtype(np.complex64))
    source = dataclasses.replace(sources[0], layers={"counts": layer})
    from hbx_gpu._storage.chunks import ChunkDirectory

    assert source.index is not None
    directory = ChunkDirectory([source.index, layer])
    with pytest.raises(UnsupportedError, match=r"g0/csr/layers/counts.*complex64"):
        Stager(source_table([source], ["counts"], 30), directory, [np.dtype(np.uint32)])


def test_a_buffer_that_is_too_small(tmp_path: Path) -> None:
    rows = opened(tmp_path, [one_group()])
    staging = measured(rows, [0])
    with pytest.raises(ValueError, match="takes"):
        rows.engine.pack(staging, np.empty(staging.host_bytes - 1, np.uint8))
