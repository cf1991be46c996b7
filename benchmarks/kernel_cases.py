"""Batches for the kernel benchmark: count data, staged chunks, launches, and what NumPy says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hbx_gpu._codecs.bitpacking import encode_bitpacking
from hbx_gpu._codecs.rowpack import encode_rowpack
from hbx_gpu._codecs.rowpack_format import RECORD_BLOCKS, read_header
from hbx_gpu._engine.device.launches import TILE_SLACK
from hbx_gpu._engine.device.records import ELEMENT_TYPES, OUTPUT, PACKED, PIECE, PLAIN, RUN, SEGMENT, SOURCE
from hbx_gpu.synthetic import Block, GammaPoisson, Uniform, expression_profiles

CHUNK = 40_960
TARGET_SUM = 1e4
FLOATS = {"f32": 4, "f16": 2, "bf16": 2}
"""Ending of a dense kernel's name -> bytes per element."""
DATA = ("uniform", "realistic")
_CELL_TYPES = 8
_DRAWN_AT_ONCE = 512
_CHECKED_AT_ONCE = 512


class Device(Protocol):
    """Where kernels run: CUDA, or the tests' emulation."""

    max_shared: int

    def array(self, host: np.ndarray) -> Any:
        """A copy of an array in device memory."""

    def empty(self, nbytes: int) -> Any:
        """Device memory, filled with bytes that no result has."""

    def address(self, memory: Any) -> int: ...

    def host(self, memory: Any) -> np.ndarray:
        """uint8 copy of device memory, after all work."""

    def poison(self, memory: Any) -> None:
        """Overwrite, so that what a kernel leaves out shows."""

    def launch(self, kernel: str, grid: int, block: int, args: Sequence[Any], shared: int = 0) -> None:
        """`args` are NumPy scalars; addresses are uint64."""


def draw(name: str, cells: int, genes: int, density: float, seed: int = 0) -> Block:
    """Count data: `uniform` as in the other benchmarks, `realistic` overdispersed counts of typed cells."""
    rng = np.random.default_rng([seed, DATA.index(name)])
    if name == "uniform":
        return Uniform(genes, density).draw(rng, np.zeros(cells, np.int64), np.zeros(cells))
    model = GammaPoisson(expression_profiles(_CELL_TYPES, genes, seed=seed))
    blocks = []
    for first in range(0, cells, _DRAWN_AT_ONCE):
        n = min(_DRAWN_AT_ONCE, cells - first)
        # About 7 % of 20,000 genes are met at this depth.
        depth = rng.lognormal(np.log(0.1 * genes), 0.4, size=n)
        blocks.append(model.draw(rng, rng.integers(0, _CELL_TYPES, size=n), depth))
    lengths = np.concatenate([np.diff(block.indptr) for block in blocks])
    return Block(
        np.concatenate([block.counts for block in blocks]),
        np.concatenate([block.indices for block in blocks]),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


# --- staged chunks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Staged:
    """Whole chunks of both arrays in one arena, and their records: indices first, then counts."""

    arena: np.ndarray
    records: np.ndarray  # RUN, or PACKED
    n_chunks: int  # of each array
    packed_bytes: int
    words: int  # decoded, of both arrays together


def _chunks(data: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    """Stretches of `chunk` values, the last padded with zeros as zarr pads it."""
    for first in range(0, len(data), chunk):
        part = data[first : first + chunk].astype(np.uint32)
        yield np.concatenate([part, np.zeros(chunk - len(part), np.uint32)])


def stage_rowpack(counts: Block, chunk: int) -> Staged:
    """All chunks as hbx_gpu.rowpack."""
    encoded = [encode_rowpack(part, "gaps") for part in _chunks(counts.indices, chunk)]
    encoded += [encode_rowpack(part) for part in _chunks(counts.counts, chunk)]
    runs, parts, at = np.zeros(len(encoded), RUN), [], 0
    for run, data in zip(runs, encoded, strict=True):
        head = read_header(data, check=False)
        for name in ("minimum", "n", "element_size", "transform", "base_bytes"):
            run[name] = getattr(head, name)
        run["records"], run["payload"], run["patches"] = (
            at + 32,
            at + head.payload_start,
            at + head.patch_start,
        )
        run["n_records"] = -(-head.n_blocks // RECORD_BLOCKS)
        run["payload_units"] = (head.patch_start - head.payload_start) // 16
        run["patch_bytes"] = head.patch_end - head.patch_start
        parts.append(data + bytes(-len(data) % 16))
        at += len(parts[-1])
    arena = np.frombuffer(b"".join(parts), np.uint8).copy()
    return Staged(arena, runs, len(encoded) // 2, sum(map(len, encoded)), len(encoded) * chunk)


def stage_bitpacking(counts: Block, chunk: int) -> Staged:
    """All chunks as homeobox.bitpacking; after them room for the words: indices, then counts."""
    encoded = [encode_bitpacking(part, "delta_zigzag") for part in _chunks(counts.indices, chunk)]
    encoded += [encode_bitpacking(part) for part in _chunks(counts.counts, chunk)]
    jobs, parts, at = np.zeros(len(encoded), PACKED), [], 0
    for job, data in zip(jobs, encoded, strict=True):
        job["data"], job["nbytes"] = at, len(data)
        parts.append(data + bytes(-len(data) % 16))
        at += len(parts[-1])
    jobs["n_words"] = jobs["last_word"] = chunk
    jobs["out"] = at + 4 * chunk * np.arange(len(encoded))
    parts.append(bytes([0xA7]) * (4 * chunk * len(encoded)))
    arena = np.frombuffer(b"".join(parts), np.uint8).copy()
    return Staged(arena, jobs, len(encoded) // 2, sum(map(len, encoded)), len(encoded) * chunk)


# --- batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Some rows of the data, and their stretches cut at the borders of chunks."""

    rows: np.ndarray
    starts: np.ndarray  # of rows in the flat data
    offsets: np.ndarray  # of rows in the batch
    row_ptr: np.ndarray  # uint32: stretches of each row
    begin: np.ndarray  # of stretches in the flat data
    count: np.ndarray
    out: np.ndarray  # of stretches in the batch

    @property
    def nnz(self) -> int:
        """Elements."""
        return int(self.offsets[-1])


def cut(counts: Block, rows: np.ndarray, chunk: int) -> Batch:
    """Stretches of `rows`, in the order given."""
    starts, ends = counts.indptr[rows], counts.indptr[rows + 1]
    offsets = np.concatenate([[0], np.cumsum(ends - starts)])
    pieces = np.where(ends > starts, (ends - 1) // chunk - starts // chunk + 1, 0)
    row_ptr = np.concatenate([[0], np.cumsum(pieces)])
    row = np.repeat(np.arange(len(rows)), pieces)
    number = starts[row] // chunk + np.arange(len(row)) - row_ptr[row]
    begin = np.maximum(starts[row], number * chunk)
    count = np.minimum(ends[row], (number + 1) * chunk) - begin
    return Batch(
        rows, starts, offsets, row_ptr.astype(np.uint32), begin, count, offsets[row] + begin - starts[row]
    )


def rowpack_records(batch: Batch, staged: Staged, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(pieces: those of the indices, then those of the counts; segments that pair them)."""
    n = len(batch.begin)
    pieces, segments = np.zeros(2 * n, PIECE), np.zeros(n, SEGMENT)
    for role in (0, 1):
        part = pieces[role * n : (role + 1) * n]
        part["run"] = batch.begin // chunk + role * staged.n_chunks
        part["skip"], part["count"], part["out"], part["role"] = (
            batch.begin % chunk,
            batch.count,
            batch.out,
            role,
        )
    segments["index_piece"], segments["value_piece"] = np.arange(n), np.arange(n) + n
    segments["index_skip"] = segments["value_skip"] = batch.begin % chunk
    segments["count"] = batch.count
    return pieces, segments


def plain_records(batch: Batch, staged: Staged, chunk: int) -> np.ndarray:
    """Pieces of the decoded words after bitpacked chunks."""
    n = len(batch.begin)
    pieces = np.zeros(2 * n, PLAIN)
    for role in (0, 1):
        part = pieces[role * n : (role + 1) * n]
        part["data"] = staged.records["out"][0] + 4 * (batch.begin + role * staged.n_chunks * chunk)
        part["count"], part["out"], part["role"], part["type"] = (
            batch.count,
            batch.out,
            role,
            ELEMENT_TYPES["uint32"],
        )
    return pieces


# --- expected results ---------------------------------------------------------------------------------------


def flat(counts: Block, batch: Batch, remap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(columns, counts) of the batch's rows, in stored order; `remap`: stored column -> column."""
    at = np.repeat(batch.starts - batch.offsets[:-1], np.diff(batch.offsets)) + np.arange(batch.nnz)
    return remap[counts.indices[at]], counts.counts[at]


def check_dense(
    counts: Block, batch: Batch, remap: np.ndarray, kind: str, transform: bool, out: np.ndarray
) -> None:
    """Raise AssertionError unless `out` (bytes) holds the batch's dense rows.

    Raw counts must be equal; after normalize and log1p a float32 may be off by 2e-6 of its size, a 16-bit
    float by one step.
    """
    columns, values = flat(counts, batch, remap)
    genes = len(remap)
    found = out.view({"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[kind]).reshape(-1, genes)
    for first in range(0, len(batch.rows), _CHECKED_AT_ONCE):
        last = min(first + _CHECKED_AT_ONCE, len(batch.rows))
        part = slice(batch.offsets[first], batch.offsets[last])
        lengths = np.diff(batch.offsets[first : last + 1])
        row = np.repeat(np.arange(last - first), lengths)
        x = values[part].astype(np.float64)
        if transform:
            totals = np.bincount(row, x, minlength=last - first)
            x = np.log1p(
                (x * (TARGET_SUM / np.maximum(totals, 1))[row]).astype(np.float32).astype(np.float64)
            )
        expected = np.zeros((last - first, genes), np.float32)
        expected[row, columns[part]] = x
        _compare(found[first:last], expected, kind, exact=not transform)


def _compare(found: np.ndarray, expected: np.ndarray, kind: str, *, exact: bool) -> None:
    if kind == "f32":
        other = found != expected  # few: full comparisons take longer than the kernels by far
        np.testing.assert_allclose(found[other], expected[other], rtol=0 if exact else 2e-6)
        return
    if kind == "f16":
        bits = expected.astype(np.float16).view(np.uint16)
    else:
        wide = expected.view(np.uint32)
        bits = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)
    steps = np.abs(found.view(np.uint16).astype(np.int32) - bits)
    assert steps.max(initial=0) <= (0 if exact else 1), f"{kind}: off by {steps.max()} steps"


# --- cases --------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Launches to be timed. `run(k)` writes to output k: repeated runs meet no warm cache."""

    name: str
    kernel: str
    cells: int
    read: int  # bytes that must be read once
    written: int
    places: int
    run: Callable[[int], None]
    check: Callable[[], None]  # raises AssertionError
    block: int = 256
    shared: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Knobs:
    """What may be tuned."""

    block: int = 256
    tile_bytes: int = 0  # of shared memory for a row; 0 = as much as there is
    stage_bytes: int = 100_000  # of shared memory for a bitpacked chunk
    grid: int = 0  # blocks of dense kernels; 0 = one per row
    cold_bytes: int = 1 << 28  # outputs rotate over at least so much memory


class Bench:
    """One data set on one device; makes cases.

    Attributes
    ----------
    remap
        Column of each gene of the data set, int32 (genes,): a permutation, because an atlas has the genes of
        most data sets in another order than the data set itself; or ascending, with `mixed` false.
    """

    def __init__(
        self, device: Device, counts: Block, genes: int, *, chunk: int = CHUNK, mixed: bool = True
    ) -> None:
        self.device, self.counts, self.genes, self.chunk = device, counts, genes, chunk
        order = np.random.default_rng(7).permutation(genes) if mixed else np.arange(genes)
        self.remap = order.astype(np.int32)
        self.rowpack, self.packed = stage_rowpack(counts, chunk), stage_bitpacking(counts, chunk)
        source = np.zeros(1, SOURCE)
        source["remap_length"] = genes
        self._kept: list[Any] = []
        self._rowpack_at = self._place(self.rowpack.arena)
        self._runs_at = self._place(self.rowpack.records)
        self._packed_at = self._place(self.packed.arena)
        self._jobs_at = self._place(self.packed.records)
        self._lookup = (self._place(source), np.uint32(1), self._place(self.remap), np.uint64(genes))

    def _place(self, host: np.ndarray) -> np.uint64:
        self._kept.append(self.device.array(host))
        return np.uint64(self.device.address(self._kept[-1]))

    def _outputs(self, nbytes: int, knobs: Knobs) -> tuple[list[Any], list[np.uint64]]:
        memory = [self.device.empty(nbytes) for _ in range(max(1, -(-knobs.cold_bytes // max(1, nbytes))))]
        return memory, [np.uint64(self.device.address(part)) for part in memory]

    def _status(self, n: int) -> tuple[Callable[[], None], np.uint64, np.uint64]:
        """Status words and `any`, and a check that they are 0."""
        words = self.device.array(np.zeros(n + 1, np.uint32))
        self._kept.append(words)

        def check() -> None:
            bits = self.device.host(words).view(np.uint32)
            assert not bits.any(), f"status bits {np.bitwise_or.reduce(bits)}"

        at = self.device.address(words)
        return check, np.uint64(at), np.uint64(at + 4 * n)

    def _tile(self, knobs: Knobs) -> int:
        """Features per tile, a multiple of 8 where the row takes several."""
        room = (min(knobs.tile_bytes or self.device.max_shared, self.device.max_shared) - TILE_SLACK) // 4
        return self.genes if self.genes <= room else room // 8 * 8

    def rowpack_dense(self, batch: Batch, kind: str, transform: bool, knobs: Knobs) -> Case:
        """The fused kernel."""
        pieces, segments = rowpack_records(batch, self.rowpack, self.chunk)
        n_rows, tile, kernel = len(batch.rows), self._tile(knobs), f"rowpack_dense_{kind}"
        check_status, status, flag = self._status(len(pieces))
        written = n_rows * self.genes * FLOATS[kind]
        memory, outputs = self._outputs(written, knobs)
        head = (
            self._rowpack_at, np.uint64(self.rowpack.arena.nbytes),
            self._runs_at, np.uint32(len(self.rowpack.records)),
            self._place(pieces), np.uint32(len(pieces)),
            self._place(segments), np.uint32(len(segments)),
            self._place(batch.row_ptr), np.uint32(n_rows), *self._lookup,
        )  # fmt: skip
        tail = (
            np.uint32(self.genes), np.uint32(tile), np.float64(TARGET_SUM if transform else 0),
            np.uint32(transform), status, flag,
        )  # fmt: skip

        def run(k: int) -> None:
            arguments = (*head, outputs[k % len(outputs)], *tail)
            self.device.launch(kernel, knobs.grid or n_rows, knobs.block, arguments, 4 * tile + TILE_SLACK)

        def check() -> None:
            self.device.poison(memory[0])
            run(0)
            check_status()
            check_dense(self.counts, batch, self.remap, kind, transform, self.device.host(memory[0]))

        read = round(self.rowpack.packed_bytes * batch.nnz / max(1, len(self.counts.indices)))
        name = kernel + (" normalize log1p" if transform else "")
        return Case(
            name, kernel, n_rows, read, written, len(outputs), run, check, knobs.block, 4 * tile + TILE_SLACK
        )

    def _csr_outputs(self, batch: Batch, knobs: Knobs) -> tuple[list[Any], list[np.uint64]]:
        """Flat columns and counts (int32, uint32), and the HbxOutput records of each place."""
        memory, addresses = self._outputs(8 * max(1, batch.nnz), knobs)
        places = []
        for address in addresses:
            records = np.zeros(2, OUTPUT)
            records["address"] = [address, address + np.uint64(4 * max(1, batch.nnz))]
            records["elements"] = batch.nnz
            records["type"] = [ELEMENT_TYPES["int32"], ELEMENT_TYPES["uint32"]]
            places.append(self._place(records))
        return memory, places

    def _check_csr(self, batch: Batch, memory: Any) -> None:
        columns, values = np.split(self.device.host(memory).view(np.uint32), 2)
        expected = flat(self.counts, batch, self.remap)
        np.testing.assert_array_equal(columns[: batch.nnz], expected[0])
        np.testing.assert_array_equal(values[: batch.nnz], expected[1])

    def _csr_case(
        self, kernel: str, head: tuple[Any, ...], n_pieces: int, batch: Batch, read: int, knobs: Knobs
    ) -> Case:
        check_status, status, flag = self._status(n_pieces)
        memory, places = self._csr_outputs(batch, knobs)
        grid = max(1, -(-n_pieces * 32 // knobs.block))

        def run(k: int) -> None:
            arguments = (*head, *self._lookup, places[k % len(places)], np.uint32(2), status, flag)
            self.device.launch(kernel, grid, knobs.block, arguments)

        def check() -> None:
            self.device.poison(memory[0])
            run(0)
            check_status()
            self._check_csr(batch, memory[0])

        return Case(
            kernel, kernel, len(batch.rows), read, 8 * batch.nnz, len(places), run, check, knobs.block
        )

    def rowpack_csr(self, batch: Batch, knobs: Knobs) -> Case:
        """Rowpack chunks to flat CSR."""
        pieces, _ = rowpack_records(batch, self.rowpack, self.chunk)
        head = (
            self._rowpack_at, np.uint64(self.rowpack.arena.nbytes),
            self._runs_at, np.uint32(len(self.rowpack.records)), self._place(pieces), np.uint32(len(pieces)),
        )  # fmt: skip
        read = round(self.rowpack.packed_bytes * batch.nnz / max(1, len(self.counts.indices)))
        return self._csr_case("rowpack_csr", head, len(pieces), batch, read, knobs)

    def gather(self, batch: Batch, knobs: Knobs) -> Case:
        """Decoded words to flat CSR; the bitpacking case must have run."""
        pieces = plain_records(batch, self.packed, self.chunk)
        head = (
            self._packed_at, np.uint64(self.packed.arena.nbytes), self._place(pieces), np.uint32(len(pieces)),
        )  # fmt: skip
        return self._csr_case("gather_pieces", head, len(pieces), batch, 8 * batch.nnz, knobs)

    def bitpacking(self, knobs: Knobs) -> Case:
        """All chunks of both arrays, decoded in place of one output."""
        jobs, blocks = self.packed.records, -(-self.chunk // 128)
        check_status, status, flag = self._status(len(jobs))
        stage = min(
            knobs.stage_bytes, int(jobs["nbytes"].max(initial=0)) + 16, self.device.max_shared - 8 * blocks
        )
        arguments = (
            self._packed_at, np.uint64(self.packed.arena.nbytes), self._jobs_at, np.uint32(len(jobs)),
            np.uint32(blocks), np.uint32(stage), status, flag,
        )  # fmt: skip
        shared = stage + 8 * blocks

        def run(_: int) -> None:
            self.device.launch("bitpacking_decode_u32", max(1, len(jobs)), knobs.block, arguments, shared)

        def check() -> None:
            run(0)
            check_status()
            arena = self.device.host(self._kept[2])
            words = arena[int(jobs["out"][0]) :].view(np.uint32).reshape(2, -1)
            for found, expected in zip(words, (self.counts.indices, self.counts.counts), strict=True):
                np.testing.assert_array_equal(found[: len(expected)], expected)

        name, cells = "bitpacking_decode_u32", len(self.counts.indptr) - 1
        return Case(
            name,
            name,
            cells,
            self.packed.packed_bytes,
            4 * self.packed.words,
            1,
            run,
            check,
            knobs.block,
            shared,
        )

    def sort(self, batch: Batch, knobs: Knobs) -> Case:
        """Flat CSR to rows whose columns ascend, as int64: what sparse tensors are made of."""
        columns, values = flat(self.counts, batch, self.remap)
        n_rows, nnz, kernel = len(batch.rows), batch.nnz, "sort_rows"
        words = max(1, min(-(-self.genes // 32), self.device.max_shared // 8))
        check_status, _, flag = self._status(0)
        memory, outputs = self._outputs(12 * max(1, nnz), knobs)
        offsets = self._place(batch.offsets.astype(np.int64))
        head = (
            self._place(columns.astype(np.int32)), offsets, np.uint32(n_rows), np.uint64(nnz), offsets,
        )  # fmt: skip
        counts = self._place(values.astype(np.uint32))

        def run(k: int) -> None:
            at = outputs[k % len(outputs)]
            arguments = (
                *head, at, counts, at + np.uint64(8 * max(1, nnz)), np.uint32(4), np.uint64(nnz),
                np.uint32(self.genes), np.uint32(words), flag,
            )  # fmt: skip
            self.device.launch(kernel, max(1, n_rows), knobs.block, arguments, 8 * words)

        def check() -> None:
            self.device.poison(memory[0])
            run(0)
            check_status()
            found = self.device.host(memory[0])
            order = np.lexsort((columns, np.repeat(np.arange(n_rows), np.diff(batch.offsets))))
            np.testing.assert_array_equal(found[: 8 * nnz].view(np.int64), columns[order])
            np.testing.assert_array_equal(found[8 * max(1, nnz) :].view(np.uint32)[:nnz], values[order])

        return Case(
            kernel, kernel, n_rows, 8 * nnz, 12 * nnz, len(outputs), run, check, knobs.block, 8 * words
        )

    def densify(self, batch: Batch, kind: str, transform: bool, knobs: Knobs) -> Case:
        """Flat CSR to dense rows."""
        columns, values = flat(self.counts, batch, self.remap)
        n_rows, tile, kernel = len(batch.rows), self._tile(knobs), f"densify_{kind}"
        check_status, status, flag = self._status(n_rows)
        written = n_rows * self.genes * FLOATS[kind]
        memory, outputs = self._outputs(written, knobs)
        head = (
            self._place(columns.astype(np.int32)), self._place(values.astype(np.uint32)),
            np.uint32(ELEMENT_TYPES["uint32"]), np.uint64(batch.nnz),
            self._place(batch.offsets.astype(np.int64)), np.uint32(n_rows),
        )  # fmt: skip
        tail = (
            np.uint32(self.genes), np.uint32(tile), np.float64(TARGET_SUM if transform else 0),
            np.uint32(transform), status, flag,
        )  # fmt: skip

        def run(k: int) -> None:
            arguments = (*head, outputs[k % len(outputs)], *tail)
            self.device.launch(kernel, knobs.grid or n_rows, knobs.block, arguments, 4 * tile + TILE_SLACK)

        def check() -> None:
            self.device.poison(memory[0])
            run(0)
            check_status()
            check_dense(self.counts, batch, self.remap, kind, transform, self.device.host(memory[0]))

        name = kernel + (" normalize log1p" if transform else "")
        return Case(
            name,
            kernel,
            n_rows,
            8 * batch.nnz,
            written,
            len(outputs),
            run,
            check,
            knobs.block,
            4 * tile + TILE_SLACK,
        )
