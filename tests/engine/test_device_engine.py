"""The device engine on emulated kernels: the suite of all engines, dense rows, mixtures, bounds, reuse."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec

from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._codecs.rowpack_format import read_header
from hbx_gpu._engine.device import DeviceEngine
from hbx_gpu._engine.device.backend import Slot
from hbx_gpu._engine.host import HostEngine
from hbx_gpu._engine.host.dense import densify
from hbx_gpu._plan.rows import BatchPlan, plan_rows, source_table
from hbx_gpu._source import RowIndex, Source
from hbx_gpu._storage.choice import open_reader
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu._storage.readers import Slab
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import CorruptChunkError
from hbx_gpu.testing import CODECS, StoredGroup, stored_groups, write_sources
from hbx_gpu.transforms import Transform
from tests.emulation.backend import EmulatedBackend
from tests.engine.suite import EngineSuite


class EmulatedEngine(DeviceEngine):
    """With the host engine's signature and results."""

    def __init__(self, table: Any, directory: Any, dtypes: Any, **options: Any) -> None:
        super().__init__(table, directory, dtypes, EmulatedBackend(**options))

    def csr(self, plan: BatchPlan, slab: Slab) -> Any:
        indices, values, offsets = super().csr(plan, slab)
        return indices.numpy(), [v.numpy() for v in values], offsets.numpy()


class TestEmulatedEngine(EngineSuite):
    engine = EmulatedEngine

    @given(
        case=stored_groups(),
        seed=st.integers(0, 2**32 - 1),
        n=st.integers(0, 50),
        reader=st.sampled_from(["mmap", "preadv"]),
    )
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    def test_rows_equal_the_matrices(self, **drawn: Any) -> None:
        EngineSuite.test_rows_equal_the_matrices.hypothesis.inner_test(self, **drawn)  # type: ignore[attr-defined]


class Opened:
    """Sources opened with the device engine and, beside it, the host engine."""

    def __init__(self, sources: list[Source], rows: RowIndex, n_features: int, **options: Any) -> None:
        layers = list(sources[0].layers)
        layouts = [
            layout for s in sources for layout in (s.index, *(s.layers[name] for name in layers)) if layout
        ]
        self.table = source_table(sources, layers, n_features)
        self.directory = ChunkDirectory(layouts)
        dtypes = [np.result_type(*(s.layers[name].dtype for s in sources)) for name in layers]
        self.engine = EmulatedEngine(self.table, self.directory, dtypes, **options)
        self.host = HostEngine(self.table, self.directory, dtypes)
        self.reader = open_reader("mmap", self.directory)
        self.rows, self.n_features = rows, n_features

    @property
    def launches(self) -> list[str]:
        backend: Any = self.engine.backend
        result: list[str] = backend.launches
        return result

    def read(self, selection: Any) -> tuple[BatchPlan, Slab]:
        plan = plan_rows(self.table, self.rows, np.asarray(selection, np.int64))
        return plan, self.reader.read(self.directory.extents(plan.chunks))

    def check_csr(self, selection: Any) -> None:
        """CSR of the selection, bit for bit that of the host engine."""
        work = self.read(selection)
        got, expected = self.engine.csr(*work), self.host.csr(*work)
        for a, b in zip((got[0], *got[1], got[2]), (expected[0], *expected[1], expected[2]), strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)

    def check_dense(
        self, selection: Any, dtype: str = "float32", transform: Transform | None = None, layer: int = 0
    ) -> None:
        """Dense rows of the selection against those of the host."""
        work = self.read(selection)
        got: Any = self.engine.dense(*work, dtype, transform, layer)
        assert got.dtype == getattr(torch, dtype)
        indices, values, offsets = self.host.csr(*work)
        batch = SparseBatch(indices, values[layer], offsets, self.n_features)
        expected = densify(batch, dtype=dtype, transform=transform)
        if dtype == "bfloat16":
            expected = torch.from_numpy(expected.view(np.int16)).view(torch.bfloat16).float().numpy()
        if transform is None:
            assert np.array_equal(got.double().numpy(), expected.astype(np.float64))
        else:
            # Half a unit in the last place of 11 and 8 bits; beside it, float32 steps in another order.
            tolerance = {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 5e-6)
            np.testing.assert_allclose(got.double().numpy(), expected.astype(np.float64), rtol=tolerance)


def rows_of_blocks(
    codec: str = "hbx_gpu.rowpack", n_rows: int = 30, chunk: int = 512, **kwargs: Any
) -> StoredGroup:
    """Rows of no to three blocks."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 400, size=n_rows)
    lengths[[2, 9]] = 0
    matrix = sp.csr_matrix((n_rows, 900), dtype=np.uint32)
    matrix.indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    matrix.indices = np.concatenate([np.sort(rng.choice(900, n, replace=False)) for n in lengths]).astype(
        np.int32
    )
    matrix.data = rng.geometric(0.3, size=lengths.sum()).astype(np.uint32)
    options = {"remap": rng.permutation(900).astype(np.int32), "codec": codec, "chunk": chunk, **kwargs}
    return StoredGroup(matrix=matrix, **options)


def opened(folder: Path, groups: list[StoredGroup], n_features: int = 900, **options: Any) -> Opened:
    return Opened(*write_sources(folder, groups), n_features, **options)


STEPS = [None, Transform(), Transform(1e4), Transform(log1p=True), Transform(50.0, True)]


@given(
    case=stored_groups(),
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 12),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "float64"]),
    transform=st.sampled_from(STEPS),
    order=st.sampled_from(["forward", "reverse", "random:3"]),
    max_shared=st.sampled_from([256, 200 << 10]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_dense_rows_equal_the_hosts(
    case: tuple[list[StoredGroup], int],
    seed: int,
    n: int,
    dtype: str,
    transform: Transform | None,
    order: str,
    max_shared: int,
) -> None:
    groups, n_features = case
    with tempfile.TemporaryDirectory() as folder:
        both = opened(Path(folder), groups, n_features, order=order, max_shared=max_shared)
        selection = np.random.default_rng(seed).integers(0, len(both.rows), size=n)
        both.check_dense(selection, dtype, transform)
        both.check_csr(selection)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("codec", CODECS)
def test_panels_in_any_width(codec: str, dtype: str, tmp_path: Path) -> None:
    """A few columns kept, in another order; all rows, then some of them, one twice and one empty."""
    remap = np.full(900, -1, np.int32)
    remap[[800, 3, 77, 410, 12]] = np.arange(5)
    both = opened(tmp_path, [rows_of_blocks(codec, remap=remap)], 5)
    for selection in (np.arange(30), [4, 2, 4, 29, 9]):
        for transform in STEPS:
            both.check_dense(selection, dtype, transform)
    both.check_csr([4, 2, 4, 29, 9])


def test_rowpack_goes_dense_in_one_kernel(tmp_path: Path) -> None:
    both = opened(tmp_path, [rows_of_blocks()])
    both.check_dense(np.arange(30))
    assert both.launches == ["rowpack_dense_f32"]
    both.check_dense([5], "float64")  # which has no such kernel
    assert both.launches[1:] == ["rowpack_csr", "densify_f64"]


def test_rows_wider_than_shared_memory(tmp_path: Path) -> None:
    both = opened(tmp_path, [rows_of_blocks()], max_shared=4 * 130)
    for dtype in ("float32", "float16"):
        both.check_dense(np.arange(10), dtype, Transform(1e4, True))
    both = opened(tmp_path / "zstd", [rows_of_blocks("zstd")], max_shared=8 * 130)
    for dtype in ("float32", "float64"):
        both.check_dense(np.arange(10), dtype, Transform(1e4, True))


@pytest.mark.parametrize(("chunks", "fused"), [((512, 512), True), ((512, 256), True), ((512, 384), True),
                                               ((512, 200), False)])  # fmt: skip
def test_indices_and_values_in_chunks_of_their_own(
    chunks: tuple[int, int], fused: bool, tmp_path: Path
) -> None:
    group = rows_of_blocks()
    sources, rows = write_sources(tmp_path / "a", [dataclasses.replace(group, chunk=chunks[0])])
    others, _ = write_sources(tmp_path / "b", [dataclasses.replace(group, chunk=chunks[1])])
    mixed = dataclasses.replace(sources[0], layers=others[0].layers)
    both = Opened([mixed], rows, 900)
    both.check_dense([7, 0, 29, 3, 7])
    both.check_csr([7, 0, 29, 3, 7])
    assert (both.launches[0] == "rowpack_dense_f32") == fused


def test_layers_side_by_side(tmp_path: Path) -> None:
    group = rows_of_blocks()
    doubled = dataclasses.replace(group, matrix=group.matrix * 2, codec="zstd")
    sources, rows = write_sources(tmp_path / "a", [group])
    others, _ = write_sources(tmp_path / "b", [doubled], layer="doubled")
    both = Opened([dataclasses.replace(sources[0], layers=sources[0].layers | others[0].layers)], rows, 900)
    both.check_csr([3, 8, 20])
    both.check_dense([3, 8, 20], layer=0)
    assert both.launches[-1] == "rowpack_dense_f32"
    both.check_dense([3, 8, 20], layer=1)
    assert both.launches[-1] == "densify_f32"


def test_sources_of_every_codec_in_one_plan(tmp_path: Path) -> None:
    both = opened(tmp_path, [rows_of_blocks(codec, n_rows=10) for codec in CODECS])
    selection = np.random.default_rng(0).integers(0, 60, size=40)
    both.check_csr(selection)
    assert set(both.launches) == {"rowpack_csr", "bitpacking_decode_u32", "gather_pieces", "csr_ascending"}
    both.check_dense(selection)


@pytest.mark.parametrize("chunk", [512, 70_000])
def test_words_of_eight_bytes_and_chunks_too_long_for_the_device(chunk: int, tmp_path: Path) -> None:
    from hbx_gpu._codecs.zarr_codec import BitpackingCodec

    group = rows_of_blocks("homeobox.bitpacking", chunk=chunk)
    sources, rows = write_sources(tmp_path, [group])
    values = group.matrix.data.astype(np.int64) * -(2**40)
    array = zarr.create_array(
        store=str(tmp_path / "wide"), shape=values.shape, dtype=values.dtype, chunks=(chunk,), filters=None,
        compressors=[BitpackingCodec(transform="delta_zigzag", element_size=8)], serializer=BytesCodec(),
    )  # fmt: skip
    array[:] = values
    layer = {"wide": read_layout(tmp_path / "wide", "wide")}
    both = Opened([dataclasses.replace(sources[0], layers=layer)], rows, 900)
    both.check_csr([29, 0, 5])
    assert ("bitpacking_decode_u64" in both.launches) == (chunk == 512)
    assert ("bitpacking_decode_u32" in both.launches) == (chunk == 512)


@pytest.mark.parametrize("codec", CODECS)
def test_plans_with_little_in_them(codec: str, tmp_path: Path) -> None:
    """No rows, empty rows, rows without the modality."""
    both = opened(tmp_path, [rows_of_blocks(codec)])
    both.rows = RowIndex(both.rows.source.copy(), both.rows.start, both.rows.length)
    both.rows.source[[4, 11]] = -1
    for selection in ([], [2], [4], [2, 4, 9, 11], [11, 5, 2]):
        both.check_csr(selection)
        both.check_dense(selection)
        both.check_dense(selection, "float64")


def test_order_of_columns_is_reported(tmp_path: Path) -> None:
    for name, remap, ascending in (
        ("same", np.arange(900), True),
        ("kept", np.where(np.arange(900) % 3, np.arange(900), -1), True),
        ("turned", np.arange(900)[::-1], False),
    ):
        group = rows_of_blocks(remap=np.ascontiguousarray(remap, dtype=np.int32))
        both = opened(tmp_path / name, [group])
        slot = Slot(both.engine.backend)
        staging = both.engine.measure(*both.read([3, 5]))
        both.engine.pack(staging, slot)
        pending = both.engine.submit_csr(staging, slot, value_dtypes=["float32"])
        pending.check()
        assert pending.ascending == ascending
        indices, (values,), _ = pending.result()
        assert pending.nnz == len(indices)
        assert values.dtype == torch.float32
        assert np.array_equal(values.numpy(), both.host.csr(*both.read([3, 5]))[1][0])


@given(case=stored_groups(), seed=st.integers(0, 2**32 - 1), n=st.integers(0, 40))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_for_sparse_tensors_equal_the_hosts(
    case: tuple[list[StoredGroup], int], seed: int, n: int
) -> None:
    """Sorted where remaps or stored rows do not ascend; of the latter from the second batch on."""
    groups, n_features = case
    for group in groups:
        group.matrix.sum_duplicates()
    with tempfile.TemporaryDirectory() as folder:
        both = Opened(*write_sources(Path(folder), groups), n_features)
        selection = np.random.default_rng(seed).integers(0, len(both.rows), size=n)
        expected = both.host.canonical(*both.read(selection))
        slot = Slot(both.engine.backend)
        for _ in range(2):
            staging = both.engine.measure(*both.read(selection))
            both.engine.pack(staging, slot)
            pending = both.engine.submit_csr(staging, slot, value_dtypes=["float32"], canonical=True)
            indices, (values,), offsets = pending.result()
        assert pending.ascending
        assert indices.dtype == torch.int64
        for one, other in ((indices, expected[0]), (values, expected[1][0]), (offsets, expected[2])):
            np.testing.assert_array_equal(one.numpy(), other)


def test_stored_rows_in_no_order_are_sorted_from_the_second_batch_on(tmp_path: Path) -> None:
    group = rows_of_blocks(remap=np.arange(900, dtype=np.int32))
    group.matrix.indices[:] = group.matrix.indices[::-1]
    group.matrix.indptr[:] = group.matrix.indptr[-1] - group.matrix.indptr[::-1]
    both = opened(tmp_path, [group])
    slot, seen = Slot(both.engine.backend), []
    for _ in range(2):
        staging = both.engine.measure(*both.read([3, 5]))
        both.engine.pack(staging, slot)
        pending = both.engine.submit_csr(staging, slot, value_dtypes=["float32"], canonical=True)
        pending.check()
        seen.append((pending.ascending, both.launches[-1]))
    assert seen == [(False, "csr_ascending"), (True, "sort_rows")]


@pytest.mark.parametrize("verb", ["csr", "dense"])
def test_corrupt_blocks_are_named(verb: str, tmp_path: Path) -> None:
    """What only a kernel can see: positions of exceptions that do not ascend, with a right checksum."""
    both = opened(tmp_path, [rows_of_blocks()])
    path = tmp_path / "g0/csr/indices/c/3"
    data = bytearray(path.read_bytes())
    header = read_header(bytes(data))
    data[header.patch_start] = 200
    data[-4:] = struct.pack("<I", crc32c(bytes(data[:-4])))
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptChunkError, match=r"g0/csr/indices.*ascend") as error:
        getattr(both.engine, verb)(*both.read(np.arange(30)))
    assert (error.value.chunk, error.value.file) == (3, str(path))


@pytest.mark.parametrize("verb", ["csr", "dense"])
def test_mutated_rowpack_raises_or_stays_in_bounds(verb: str, tmp_path: Path) -> None:
    """Any bytes of a chunk changed, its checksum right: an error, or numbers in range; never a crash."""
    opened(tmp_path, [rows_of_blocks()])
    path = tmp_path / "g0/csr/indices/c/0"
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    raised = 0
    sources, rows = write_sources(tmp_path / "twin", [rows_of_blocks()])
    assert sources[0].index is not None
    index = dataclasses.replace(sources[0].index, path=str(path.parents[1]))
    for _ in range(40):
        bad = bytearray(good)
        for at in rng.integers(0, 200, size=rng.integers(1, 4)):
            bad[at] ^= 1 << rng.integers(8)
        bad[-4:] = struct.pack("<I", crc32c(bytes(bad[:-4])))
        path.write_bytes(bytes(bad))
        both = Opened([dataclasses.replace(sources[0], index=index)], rows, 900)
        try:
            found = getattr(both.engine, verb)(*both.read([0, 1]))
        except CorruptChunkError:
            raised += 1
        else:
            assert verb == "dense" or (found[0].min() >= 0 and found[0].max() < 900)
    assert raised > 10


def test_a_wrong_plan_is_a_bug_and_not_a_corrupt_chunk(tmp_path: Path) -> None:
    both = opened(tmp_path, [rows_of_blocks()])
    slot = Slot(both.engine.backend)
    staging = both.engine.measure(*both.read([3]))
    staging.tables["pieces"]["out"] += np.uint64(1 << 40)
    both.engine.pack(staging, slot)
    with pytest.raises(RuntimeError, match="bug of hbx_gpu"):
        both.engine.submit_csr(staging, slot).result()


def test_what_cannot_be_submitted(tmp_path: Path) -> None:
    both = opened(tmp_path, [rows_of_blocks()])
    slot = Slot(both.engine.backend)
    staging = both.engine.measure(*both.read([3]), layout="csr")
    both.engine.pack(staging, slot)
    with pytest.raises(ValueError, match="measured for CSR"):
        both.engine.submit_dense(staging, slot)
    with pytest.raises(ValueError, match="float16"):
        both.engine.dense(*both.read([3]), dtype="int8")


def test_slots_are_used_again(tmp_path: Path) -> None:
    """After the first batches nothing is allocated but outputs, and leftovers of a batch do not show."""
    both = opened(tmp_path, [rows_of_blocks(codec) for codec in ("hbx_gpu.rowpack", "homeobox.bitpacking")])
    rng = np.random.default_rng(5)
    both.check_csr(np.arange(60))
    backend: Any = both.engine.backend
    backend.host_buffer = backend.device_buffer = None  # whoever asks now fails
    for _ in range(4):
        both.check_csr(rng.integers(0, 60, size=20))
        both.check_dense(rng.integers(0, 60, size=20))


def test_threads_share_an_engine(tmp_path: Path) -> None:
    both = opened(tmp_path, [rows_of_blocks(codec) for codec in ("hbx_gpu.rowpack", "zstd")])
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            for _ in range(4):
                both.check_csr(rng.integers(0, 60, size=10))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_engine_needs_neither_cupy_nor_torch_to_be_imported() -> None:
    code = (
        "import sys, hbx_gpu._engine.device; "
        "print(sorted({'cupy', 'torch', 'zarr', 'lancedb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
