"""General codecs decompressed on the device: rows of the host engine, and no damage that passes unseen."""

from __future__ import annotations

import dataclasses
import logging
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._engine.device import DeviceEngine, compressed
from hbx_gpu._engine.device.backend import Slot
from hbx_gpu._engine.host import HostEngine
from hbx_gpu._engine.host.dense import densify
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu._plan.rows import plan_rows, source_table
from hbx_gpu._source import ArrayLayout, RowIndex, Source
from hbx_gpu._storage.choice import open_reader
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import CorruptChunkError, DeviceUnavailableError
from hbx_gpu.testing import StoredGroup, stored_groups, write_sources
from tests.emulation.backend import EmulatedBackend
from tests.kernels.conftest import on_gpu

PLAIN = ["zstd", "blosc", "blosc-lz4-bits", "blosc-zstd-bytes", "blosc-zlib", "lz4", "zlib", "gzip"]
CHECKSUMMED = [f"{codec}+crc32c" for codec in PLAIN]
OTHERS = ["hbx_gpu.rowpack", "homeobox.bitpacking", "none", "blosc-blosclz"]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "emulated":
        return EmulatedBackend()
    on_gpu()
    from hbx_gpu._engine.device.cuda import CudaBackend

    return CudaBackend(0)


class Opened:
    """Sources with the host engine and the device engine, which decodes on the host and on the device."""

    def __init__(
        self, sources: list[Source], rows: RowIndex, n_features: int, backend: Any, reader: str = "mmap"
    ) -> None:
        layers = list(sources[0].layers)
        layouts = [
            layout for s in sources for layout in (s.index, *(s.layers[name] for name in layers)) if layout
        ]
        self.table, self.directory = source_table(sources, layers, n_features), ChunkDirectory(layouts)
        self.dtypes = [np.result_type(*(s.layers[name].dtype for s in sources)) for name in layers]
        self.backend, self.rows, self.n_features = backend, rows, n_features
        self.host = HostEngine(self.table, self.directory, self.dtypes)
        self.reader = open_reader(reader, self.directory)

    def engine(self, decode: str) -> DeviceEngine:
        return DeviceEngine(self.table, self.directory, self.dtypes, self.backend, decode=decode)

    def read(self, selection: Any) -> Any:
        plan = plan_rows(self.table, self.rows, np.asarray(selection, np.int64))
        return plan, self.reader.read(self.directory.extents(plan.chunks))

    def check(self, selection: Any, decodes: tuple[str, ...] = ("host", "auto", "device")) -> None:
        """CSR bit for bit and dense rows, however chunks are decoded."""
        indices, values, offsets = self.host.csr(*self.read(selection))
        batch = SparseBatch(indices, values[0], offsets, self.n_features)
        for decode in decodes:
            engine: Any = self.engine(decode)
            got = engine.csr(*self.read(selection))
            for a, b in zip((got[0], *got[1], got[2]), (indices, *values, offsets), strict=True):
                found = a.cpu().numpy()
                assert found.dtype == b.dtype
                assert np.array_equal(found, b), decode
            dense = engine.dense(*self.read(selection)).cpu().numpy()
            assert np.array_equal(dense, densify(batch, dtype="float32"))


def counts(
    codec: str, dtype: Any = np.uint32, chunk: int = 512, n_rows: int = 30, **kwargs: Any
) -> StoredGroup:
    """Rows of up to 400 elements; half of the values do not compress."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 400, size=n_rows)
    lengths[[2, 9]] = 0
    matrix = sp.csr_matrix((n_rows, 900), dtype=dtype)
    matrix.indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = [np.sort(rng.choice(900, n, replace=False)) for n in lengths]
    matrix.indices = np.concatenate(columns).astype(np.int32)
    data = rng.geometric(0.3, size=lengths.sum())
    noise = rng.integers(0, 2 ** min(31, 8 * np.dtype(dtype).itemsize - 1), size=len(data))
    matrix.data = np.where(np.arange(len(data)) < len(data) // 2, data, noise).astype(dtype)
    options = {"remap": rng.permutation(900).astype(np.int32), "codec": codec, "chunk": chunk, **kwargs}
    return StoredGroup(matrix=matrix, **options)


def opened(folder: Path, groups: list[StoredGroup], backend: Any, **options: Any) -> Opened:
    return Opened(*write_sources(folder, groups), 900, backend, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("codec", [*PLAIN, "zstd+crc32c", "blosc+crc32c"])
def test_every_codec_and_dtype(backend: Any, codec: str, dtype: Any, tmp_path: Path) -> None:
    both = opened(tmp_path, [counts(codec, dtype)], backend)
    both.check([4, 2, 29, 4, 9, 17])
    both.check(np.arange(30))
    both.check([])


@pytest.mark.parametrize("reader", ["mmap", "pinned", "preadv"])
def test_shards_panels_and_readers(backend: Any, reader: str, tmp_path: Path) -> None:
    remap = np.full(900, -1, np.int32)
    remap[[800, 3, 77, 410, 12]] = np.arange(5)
    groups = [counts(codec, chunks_per_shard=3, lead=130, remap=remap) for codec in CHECKSUMMED]
    both = opened(tmp_path, groups, backend, reader=reader)
    both.check(np.random.default_rng(0).integers(0, 30 * len(groups), size=40))


def test_one_plan_with_every_codec(backend: Any, tmp_path: Path) -> None:
    groups = [counts(codec, n_rows=12) for codec in [*PLAIN, *OTHERS, *CHECKSUMMED]]
    both = opened(tmp_path, groups, backend)
    rng = np.random.default_rng(1)
    for _ in range(2):
        both.check(rng.integers(0, 12 * len(groups), size=60))


@given(
    case=stored_groups(codecs=(*PLAIN, *CHECKSUMMED, *OTHERS)),
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 12),
    order=st.sampled_from(["forward", "reverse", "random:3"]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_ragged_collections(case: tuple[list[StoredGroup], int], seed: int, n: int, order: str) -> None:
    groups, n_features = case
    with tempfile.TemporaryDirectory() as folder:
        sources, rows = write_sources(Path(folder), groups)
        both = Opened(sources, rows, n_features, EmulatedBackend(order))
        both.check(np.random.default_rng(seed).integers(0, len(rows), size=n))


class Counting(EmulatedBackend):
    """Counts the streams that are decompressed."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: dict[str, int] = {}
        self.calls = 0

    def decompressor(self) -> Any:
        inner = super().decompressor()
        backend = self

        class Counted:
            def decompress(self, algorithm: str, streams: Any) -> None:
                backend.calls += 1
                backend.streams[algorithm] = backend.streams.get(algorithm, 0) + len(streams.sizes)
                inner.decompress(algorithm, streams)

        return Counted()


def test_where_chunks_are_decoded(tmp_path: Path) -> None:
    """Unless told otherwise: without a checksum on the host, with one on the device."""
    for codec, expected in (("zstd", (0, 0, 1)), ("zstd+crc32c", (0, 1, 1)), ("blosc-blosclz", (0, 0, 0))):
        found = []
        for decode in ("host", "auto", "device"):
            backend = Counting()
            both = opened(tmp_path / codec / decode, [counts(codec)], backend)
            both.check([3, 5], (decode,))
            found.append(int("zstd" in backend.streams))
            assert ("check_streams" in backend.launches) == bool(found[-1])
        assert tuple(found) == expected, codec
    backend = Counting()
    opened(tmp_path / "all", [counts(codec) for codec in PLAIN], backend).check(np.arange(200), ("device",))
    assert set(backend.streams) == {"zstd", "lz4", "deflate"}
    assert backend.calls == 2 * 3  # for CSR and for dense rows, one call per algorithm
    assert "unshuffle_blocks" in backend.launches


def test_streams_cross_compressed(tmp_path: Path) -> None:
    """All rows: as many bytes as the chunks have, and not as their elements would."""
    both = opened(tmp_path, [counts("zstd+crc32c", n_rows=100, chunk=4096)], EmulatedBackend())
    plan, slab = both.read(np.arange(100))
    staging = both.engine("auto").measure(plan, slab)
    elements = both.engine("host").measure(plan, slab)
    assert staging.at["outputs"] < slab.nbytes.sum() * 1.05
    assert staging.at["outputs"] < elements.at["outputs"]


def test_without_a_decompressor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = EmulatedBackend()
    backend.no_decompressor = "nvCOMP is not installed, says this test"
    both = opened(tmp_path, [counts("zstd+crc32c")], backend)
    with caplog.at_level(logging.INFO, logger=compressed.__name__):
        both.check([3, 5], ("auto", "auto", "host"))
    assert [r.message for r in caplog.records].count(
        "hbx_gpu decodes chunks of general codecs on the host: nvCOMP is not installed, says this test"
    ) == 1
    with pytest.raises(DeviceUnavailableError, match=r"g0/csr/indices.*says this test.*decode='auto'"):
        both.engine("device")
    rowpack = opened(tmp_path / "other", [counts("hbx_gpu.rowpack")], backend)
    rowpack.check([3, 5], ("device",))  # which needs none
    with pytest.raises(ValueError, match=r"'auto', 'host'.*'device'.*'gpu'"):
        LoaderOptions(decode="gpu")


def rewrite(path: Path, change: Any, *, sign: bool) -> None:
    """Change a stored chunk; make its CRC32C right where it has one and that is wished."""
    data = bytearray(path.read_bytes())
    change(data)
    if sign:
        data[-4:] = struct.pack("<I", crc32c(bytes(data[:-4])))
    path.write_bytes(bytes(data))


def flip(at: int) -> Any:
    def change(data: bytearray) -> None:
        data[at] ^= 0x11

    return change


@pytest.mark.parametrize("codec", CHECKSUMMED)
def test_a_flipped_bit_never_reaches_the_decompressor(codec: str, tmp_path: Path) -> None:
    backend = Counting()
    both = opened(tmp_path, [counts(codec)], backend)
    engine = both.engine("device")
    engine.csr(*both.read(np.arange(30)))
    backend.streams.clear()
    path = tmp_path / "g0/csr/layers/counts/c/3"
    for at in (0, 20, path.stat().st_size // 2, path.stat().st_size - 1):
        good = path.read_bytes()
        rewrite(path, flip(at), sign=False)  # behind a first look that found it sound
        with pytest.raises(CorruptChunkError, match=r"layers/counts.*CRC32C") as error:
            engine.csr(*both.read(np.arange(30)))
        assert (error.value.chunk, error.value.file) == (3, str(path))
        assert not backend.streams
        path.write_bytes(good)


@pytest.mark.parametrize("verb", ["csr", "dense"])
@pytest.mark.parametrize("codec", PLAIN)
def test_damaged_chunks_are_named_or_decode(codec: str, verb: str, tmp_path: Path) -> None:
    """Without checksums, told to trust: an error that names the chunk, or rows; never a crash."""
    sources, rows = write_sources(tmp_path, [counts(codec)])
    path = tmp_path / "g0/csr/indices/c/0"
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    raised: list[tuple[int | None, str]] = []
    for _ in range(40):
        bad = bytearray(good)
        for at in rng.integers(0, rng.choice([24, len(bad)]), size=rng.integers(1, 4)):
            bad[at] ^= 1 << rng.integers(8)
        if rng.random() < 0.2:
            bad = bad[: rng.integers(1, len(bad))]
        path.write_bytes(bytes(bad))
        both = Opened(sources, rows, 900, EmulatedBackend())
        try:
            found = getattr(both.engine("device"), verb)(*both.read([0, 1]))
        except CorruptChunkError as error:
            raised.append((error.chunk, error.file))
        else:
            assert verb == "dense" or (found[0].min() >= 0 and found[0].max() < 900)
    assert len(raised) > 10
    assert set(raised) == {(0, str(path))}


@pytest.mark.parametrize("codec", ["zstd+crc32c", "lz4+crc32c", "zlib+crc32c"])
def test_what_only_the_decompressor_can_find_is_raised_at_delivery(codec: str, tmp_path: Path) -> None:
    """Damage inside a stream, its CRC32C right: found on the device, told when the batch is received."""
    both = opened(tmp_path, [counts(codec, chunk=2048)], EmulatedBackend())
    path = tmp_path / "g0/csr/indices/c/0"

    def change(data: bytearray) -> None:
        half = len(data) // 2
        data[half : half + 30] = b"\xff" * 30

    rewrite(path, change, sign=True)
    engine, slot = both.engine("auto"), Slot(both.backend)
    staging = engine.measure(*both.read(np.arange(30)))
    engine.pack(staging, slot)
    pending = engine.submit_csr(staging, slot)
    with pytest.raises(CorruptChunkError, match=r"g0/csr/indices.*stream") as error:
        pending.check()
    assert (error.value.chunk, error.value.file) == (0, str(path))


class Hostile(EmulatedBackend):
    """A decompressor that reports what it is told to."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def decompressor(self) -> Any:
        inner, what = super().decompressor(), self.what

        class Liar:
            def decompress(self, algorithm: str, streams: Any) -> None:
                import ctypes

                if what == "nothing":
                    return
                inner.decompress(algorithm, streams)
                n = len(streams.sizes)
                if what == "error":
                    ctypes.c_int32.from_address(streams.states + 4 * (n - 1)).value = 12
                else:
                    ctypes.c_uint64.from_address(streams.actual).value -= 1

        return Liar()


@pytest.mark.parametrize(("what", "chunk"), [("nothing", 0), ("error", None), ("length", 0)])
def test_reports_are_looked_at(what: str, chunk: int | None, tmp_path: Path) -> None:
    both = opened(tmp_path, [counts("zstd+crc32c")], Hostile(what))
    plan, slab = both.read(np.arange(30))
    with pytest.raises(CorruptChunkError, match="stream") as error:
        both.engine("auto").csr(plan, slab)
    last = int(both.directory.layouts[1].shape[0] - 1) // 512
    array = "indices" if chunk == 0 else "counts"
    assert array in error.value.array
    assert error.value.chunk == (last if chunk is None else chunk)


def test_an_absent_chunk_among_compressed_ones(tmp_path: Path) -> None:
    both = opened(tmp_path, [counts("zstd+crc32c")], EmulatedBackend())
    (tmp_path / "g0/csr/layers/counts/c/2").unlink()
    both.check(np.arange(30))


def test_slots_are_used_again(tmp_path: Path) -> None:
    """What a batch left behind does not show in the next one."""
    both = opened(tmp_path, [counts("blosc+crc32c"), counts("zstd+crc32c")], EmulatedBackend())
    engine, slot = both.engine("auto"), Slot(both.backend)
    for seed in range(4):
        selection = np.random.default_rng(seed).integers(0, 60, size=20)
        plan, slab = both.read(selection)
        staging = engine.measure(plan, slab)
        engine.pack(staging, slot)
        indices, values, offsets = engine.submit_csr(staging, slot).result()
        expected = both.host.csr(plan, slab)
        assert np.array_equal(indices.numpy(), expected[0])
        assert np.array_equal(values[0].numpy(), expected[1][0])
        assert np.array_equal(offsets.numpy(), expected[2])


def test_zarr_v2_arrays(backend: Any, tmp_path: Path) -> None:
    import numcodecs
    import zarr

    sources, rows = write_sources(tmp_path, [counts("none")])
    data = counts("none").matrix.data
    for name, compressor in (("a", numcodecs.LZ4()), ("b", numcodecs.Blosc(cname="zstd")), ("c", None)):
        array = zarr.create_array(
            store=str(tmp_path / name), shape=data.shape, dtype=data.dtype, chunks=(700,), zarr_format=2,
            compressors=compressor, filters=None, fill_value=0,
        )  # fmt: skip
        array[:] = data
        layout: ArrayLayout = read_layout(tmp_path / name, name)
        both = Opened([dataclasses.replace(sources[0], layers={"x": layout})], rows, 900, backend)
        both.check([3, 20, 29])
