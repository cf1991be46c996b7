"""Dense spaces whose chunks cross to the device as stored: the batches of the CPU, and no damage unseen."""

from __future__ import annotations

import itertools
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu import RaggedAtlas
from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._collates import ImagesCollate, LayersCollate, MatrixCollate
from hbx_gpu._loading.feeds.multimodal import CopiedFeed, DenseFeed, LayersFeed
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu._source import BoxIndex, RowIndex
from hbx_gpu.dataloader import MultimodalCellDataset
from hbx_gpu.errors import CorruptChunkError, DeviceUnavailableError
from tests.dense_stores import (
    CHECKSUMMED,
    CODECS,
    DECODES,
    DTYPES,
    KINDS,
    LARGE,
    LEFT_TO_THE_HOST,
    THOROUGH,
    WIDTH,
    N,
    backend_called,
    batches_for,
    feed_of,
    matrix,
    on_cpu,
    on_device,
    on_host,
    opened,
    panel,
    partial_panel,
    same,
    shape_of,
    shuffled,
    tiles,
    tiles_of_two_shapes,
    values,
)  # fmt: skip
from tests.emulation.backend import EmulatedBackend
from tests.emulation.streams import StreamBackend


@pytest.fixture(params=["emulated", "streams", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Any:
    return backend_called(request.param)


# The same batches everywhere


EVERY = [
    *(("emulated", codec) for codec in (*CODECS, *CHECKSUMMED, "none+crc32c", *LEFT_TO_THE_HOST)),
    *(("streams", codec) for codec in THOROUGH),
    *(pytest.param("cuda", codec, marks=pytest.mark.gpu) for codec in (*CODECS, *CHECKSUMMED)),
]


@pytest.mark.parametrize(("where", "codec"), EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_every_codec_and_decode(where: str, kind: str, codec: str, tmp_path: Path) -> None:
    backend = backend_called(where)
    dtypes = DTYPES if codec in THOROUGH and where != "streams" else ("uint16",)
    for dtype in dtypes:
        dataset = KINDS[kind](tmp_path / dtype, codec, dtype)
        (tmp_path / dtype / "g0/layers/raw/c" / "/".join("1" + "0" * (len(shape_of(dataset)) - 1))).unlink()
        batches = batches_for(dataset)
        expected = on_host(dataset, batches)
        for decode in DECODES if codec in THOROUGH else DECODES[1:]:
            found, feed = on_device(dataset, batches, backend, decode)
            same(found, expected)
            crosses = codec not in LEFT_TO_THE_HOST and decode != "host"
            crosses &= decode == "device" or codec == "none" or "crc32c" in codec
            assert isinstance(feed, DenseFeed if crosses else CopiedFeed), (decode, dtype)
        assert sorted(expected[0]) == ["X", "index", "name", "number"]


def test_batches_hold_what_was_stored(tmp_path: Path) -> None:
    """Not by way of the host's engine."""
    dataset = partial_panel(tmp_path, "zstd+crc32c", "uint16")
    rows = [4, 0, 11, 4, *np.flatnonzero(dataset.groups_np < 0).tolist()]
    (found,), _ = on_device(dataset, [rows], EmulatedBackend(), "auto")
    index: Any = dataset.row_index
    expected = np.zeros((len(rows), WIDTH), np.float32)
    for i, row in enumerate(rows):
        if (source := int(index.source[row])) >= 0:
            remap = dataset.sources[source].remap
            data = values((N, len(remap)), "uint16", source)[index.lower[row, 0]]
            expected[i, remap[remap >= 0]] = data[remap >= 0]
    np.testing.assert_array_equal(found["X"], expected)
    np.testing.assert_array_equal(found["number"], np.array(rows) * 3)


def test_of_columns_with_one_place_the_last_stays(tmp_path: Path) -> None:
    remap = np.array([4, 0, 4, -1, 0], np.int32)
    dataset = opened(tmp_path, [values((N, 5), "uint8", 0)], "zstd", remaps=[remap], n_features=WIDTH)
    found, feed = on_device(dataset, batches_for(dataset), EmulatedBackend(), "device")
    assert isinstance(feed, DenseFeed)
    same(found, on_host(dataset, batches_for(dataset)))


@pytest.mark.parametrize("kind", ["matrix", "partial_panel", "tiles"])
def test_one_plan_with_every_codec(backend: Any, kind: str, tmp_path: Path) -> None:
    """Sources stored in as many ways as there are, some of a dtype of their own."""
    codecs = [*CODECS, *CHECKSUMMED, "hbx_gpu.rowpack", "homeobox.bitpacking"]
    dtypes = ["uint8", "uint16", "float32", "uint32", "int16"]
    arrays, remaps = [], []
    for i, (codec, dtype) in enumerate(zip(codecs, itertools.cycle(dtypes), strict=False)):
        dtype = "uint32" if codec in ("hbx_gpu.rowpack", "homeobox.bitpacking") else dtype
        width = 2 + i % 7 if kind == "partial_panel" else WIDTH
        remaps.append(panel(i, width) if kind == "partial_panel" else np.arange(WIDTH, dtype=np.int32))
        arrays.append(values((N, 2, 3, 4) if kind == "tiles" else (N, width), dtype, i))
    more: Any = {} if kind == "tiles" else {"remaps": remaps, "n_features": WIDTH}
    dataset = opened(tmp_path, arrays, codecs, **more)
    assert dataset.dtype == np.float64
    batches = batches_for(dataset)
    found, feed = on_device(dataset, batches, backend, "device")
    assert isinstance(feed, DenseFeed)
    same(found, on_host(dataset, batches))


@pytest.mark.parametrize("kind", ["tiles", "encoded"])
@pytest.mark.parametrize("wanted", ["float32", "float16"])
def test_arrays_of_another_dtype(backend: Any, kind: str, wanted: str, tmp_path: Path) -> None:
    for dtype in ("uint8", "float32", "float64", "bool"):
        dataset = KINDS[kind](tmp_path / dtype, "zstd+crc32c", dtype, dtypes={"raw": wanted})
        batches = batches_for(dataset)
        found, feed = on_device(dataset, batches, backend, "auto")
        same(found, on_host(dataset, batches))
        ragged = kind == "encoded" and dtype != wanted
        narrowed = (dtype, wanted) == ("float64", "float16")
        assert isinstance(feed, CopiedFeed if ragged or narrowed else DenseFeed), dtype


@pytest.mark.parametrize("kind", ["matrix", "partial_panel"])
@pytest.mark.parametrize("wanted", ["float32", "float64", "float16", "bfloat16"])
def test_matrices_of_every_dtype(backend: Any, kind: str, wanted: str, tmp_path: Path) -> None:
    """Large numbers, so that every rounding shows; what NumPy rounds twice is left to it."""
    few = isinstance(backend, StreamBackend)
    rng = np.random.default_rng(8)
    own = np.arange(WIDTH, dtype=np.int32)
    remaps = [own, own.copy()] if kind == "matrix" else [panel(3, WIDTH), own]
    for stored_as, asked in itertools.product(
        [("int64", "float64"), ("uint32", "uint32"), ("float64", "float64"), ("uint16", "float32")],
        [None] if few else [None, "float32"],
    ):
        arrays = [(rng.random((N, WIDTH)) * LARGE.get(dtype, 60_000)).astype(dtype) for dtype in stored_as]
        options: Any = {"dtypes": {"raw": asked}} if asked else {}
        dataset = opened(
            tmp_path / f"{stored_as}{asked}", arrays, "zstd", remaps=remaps, n_features=WIDTH, **options
        )
        batches = batches_for(dataset)
        with np.errstate(over="ignore"):
            expected = on_host(dataset, batches, dtype=wanted)
        found, feed = on_device(dataset, batches, backend, "device", dtype=wanted)
        same(found, expected)
        between = dataset.dtype
        final = np.dtype("float32" if wanted == "bfloat16" else wanted)
        exact = all(
            np.array_equal(a.astype(between).astype(np.longdouble), a.astype(np.longdouble)) for a in arrays
        )
        direct = (exact or between == final) and ("float64" not in stored_as or final != np.float16)
        if isinstance(feed, DenseFeed):
            assert direct, (stored_as, asked)
        elif "float64" not in stored_as:
            assert not exact, (stored_as, asked)


def test_several_layers(backend: Any, tmp_path: Path) -> None:
    dataset = partial_panel(tmp_path, "blosc+crc32c", "uint16", layers={"scaled": "float32"})
    batches = [[3, 0, 7, 7], [20, 1, 30, 33, 2]]
    expected = on_host(dataset, batches)
    found, feed = on_device(dataset, batches, backend, "auto")
    same(found, expected)
    assert isinstance(feed, LayersFeed)
    assert sorted(expected[0]) == ["X", "index", "layers", "name", "number"]
    assert list(expected[0]["layers"]) == ["raw", "scaled"]
    tiled = tiles(tmp_path / "tiles", "blosc+crc32c", "uint16", layers={"scaled": "float32"})
    found, feed = on_device(tiled, batches, backend, "auto")
    same(found, on_host(tiled, batches))
    assert isinstance(feed, LayersFeed)
    assert [x.dtype for x in found[0]["layers"].values()] == [np.uint16, np.float32]


@pytest.mark.parametrize("decode", DECODES)
def test_within_a_multimodal_dataset(backend: Any, decode: str, tmp_path: Path) -> None:
    parts = {
        "protein": partial_panel(tmp_path / "p", "zstd+crc32c", "float32", rows=shuffled([N, N, N], 4)),
        "tiles": tiles(tmp_path / "t", "blosc", "uint8", rows=shuffled([N, N], 21)),
        "encoded": tiles_of_two_shapes(tmp_path / "e", "none", "uint8", rows=shuffled([N, N], 21)),
        "cut": tiles(
            tmp_path / "c", "zstd", "uint8", rows=shuffled([N, N], 21), chunk_of=lambda _: (3, 1, 2, 4)
        ),
    }
    dataset = MultimodalCellDataset(parts)
    batches = batches_for(dataset)
    expected = on_host(dataset, batches)
    found, feed = on_device(dataset, batches, backend, decode)
    same(found, expected)
    assert sorted(expected[0]["present"]) == sorted(parts)
    crossing = {name for name, part in feed._feeds.items() if isinstance(part, DenseFeed)}
    assert (
        crossing
        == {
            "host": set(),
            "auto": {"protein", "encoded"},
            "device": {"protein", "tiles", "encoded"},
        }[decode]
    )


def test_atlases_of_homeobox(backend: Any, homeobox_fixtures: Path) -> None:
    query = RaggedAtlas.checkout_latest(homeobox_fixtures / "all_spaces" / "atlas").query("cells")
    spaces = ["rna", "adt", "image_features", "tiles_a", "crop"]
    dataset = query.to_multimodal_dataset(spaces, metadata_columns=["cell_type"])
    batches = batches_for(dataset)
    found, feed = on_device(dataset, batches, backend, "device")
    same(found, on_host(dataset, batches))
    crossing = [name for name, part in feed._feeds.items() if isinstance(part, DenseFeed)]
    assert crossing == ["adt", "image_features", "tiles_a"]
    cite = RaggedAtlas.checkout_latest(homeobox_fixtures / "cite_multimodal" / "atlas").query()
    protein = cite.to_cell_dataset("protein_abundance")
    found, feed = on_device(protein, batches_for(protein), backend, "device")
    same(found, on_host(protein, batches_for(protein)))
    assert isinstance(feed, DenseFeed)
    assert protein.groups_np.max() > 0, "several panels"


@pytest.mark.parametrize("reader", ["preadv", "pinned"])
def test_readers(reader: str, tmp_path: Path) -> None:
    for codec in ("zstd+crc32c", "none", "blosc+crc32c"):
        dataset = partial_panel(tmp_path / codec, codec, "float32", reader=reader)
        batches = batches_for(dataset)
        found, feed = on_device(dataset, batches, StreamBackend(0.001), "auto")
        same(found, on_host(dataset, batches))
        assert isinstance(feed, DenseFeed)


@st.composite
def collections(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "shape": tuple(draw(st.lists(st.integers(1, 5), max_size=3))),
        "lengths": draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)),
        "chunk": draw(st.integers(1, 5)),
        "codec": draw(st.sampled_from([*CODECS, *CHECKSUMMED])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "matrix": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "n": draw(st.integers(0, 20)),
        "order": draw(st.sampled_from(["forward", "reverse", "random:3"])),
    }


@settings(max_examples=40, deadline=None)
@given(collections())
def test_any_collection(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    options: dict[str, Any] = {"chunk_of": lambda a: (case["chunk"], *a.shape[1:])}
    if case["matrix"]:
        widths = rng.integers(1, 8, len(case["lengths"])).tolist()
        shapes = [(n, m) for n, m in zip(case["lengths"], widths, strict=True)]
        options |= {"n_features": WIDTH, "remaps": [panel(int(rng.integers(99)), m) for m in widths]}
        options["rows"] = shuffled(case["lengths"], 2)
    else:
        shapes = [(n, *case["shape"]) for n in case["lengths"]]
        source = rng.integers(-1, len(shapes), 12).astype(np.int32)
        total = np.array(case["lengths"])[source]
        begin = rng.integers(0, total + 1)
        length = np.where(source >= 0, rng.integers(0, total - begin + 1), 0)
        options |= {"positions": False, "rows": RowIndex(source, begin, length.astype(np.int32))}
    arrays = [values(shape, case["dtype"], i) for i, shape in enumerate(shapes)]
    with tempfile.TemporaryDirectory() as folder:
        dataset = opened(Path(folder), arrays, case["codec"], **options)
        feed = feed_of(dataset, "device", EmulatedBackend(case["order"]))
        assert isinstance(feed, DenseFeed)
        parts = np.array_split(rng.integers(0, len(dataset), case["n"]), 3)
        expected = on_host(dataset, [part.tolist() for part in parts])
        same([on_cpu(feed.deliver(made)) for made in feed.make(parts)], expected)
        needed = [dataset.batch_nbytes(part) for part in parts]
        assert all(size >= least for size, least in zip(feed.nbytes(parts), needed, strict=True))


# Where


def test_what_stays_with_the_host(tmp_path: Path) -> None:
    made = partial(feed_of, decode="device")
    assert isinstance(made(tiles(tmp_path / "a", "zstd", "uint8")), DenseFeed)
    cut = tiles(tmp_path / "b", "zstd", "uint8", chunk_of=lambda _: (4, 2, 2, 4))
    assert isinstance(made(cut), CopiedFeed)
    mixed = tiles(tmp_path / "c", ["zstd+crc32c", "blosc-blosclz"], "uint8")
    assert isinstance(made(mixed), CopiedFeed)
    two = opened(tmp_path / "d", [values((N, 4), "uint8", 0), values((N, 3), "uint16", 0)], "zstd")
    assert isinstance(made(two), CopiedFeed), "lists of several dtypes"
    images = ImagesCollate(lambda _, present: {"X": present})  # type: ignore[arg-type]
    assert isinstance(made(tiles(tmp_path / "e", "zstd", "uint8"), collate=images), CopiedFeed)
    layers = partial_panel(tmp_path / "f", "zstd+crc32c", "uint16", layers={"odd": "float64"})
    narrow = LayersCollate(MatrixCollate("float16"))
    assert isinstance(made(layers, collate=narrow), CopiedFeed), "one layer that kernels do not take"
    assert isinstance(made(layers), LayersFeed)
    crops = BoxIndex(np.zeros(2, np.int32), np.array([[0, 1], [3, 0]]), np.array([[2, 1], [1, 2]]))
    boxes = opened(tmp_path / "g", [values((N, 3), "uint8", 0)], "zstd", rows=crops, positions=False)
    assert isinstance(made(boxes), CopiedFeed), "boxes on two axes"
    wide = opened(
        tmp_path / "h", [values((N, 3), "uint8", 0)], "zstd", chunk_of=lambda _: (4, 5)
    )  # chunks wider than their array: rows lie apart
    assert isinstance(made(wide), CopiedFeed)


@pytest.mark.parametrize("kind", ["matrix", "partial_panel", "tiles"])
def test_streams_cross_compressed_and_are_decoded_there(kind: str, tmp_path: Path) -> None:
    uploaded = {}
    for codec in ("zstd+crc32c", "none"):
        dataset = KINDS[kind](tmp_path / codec, codec, "float64", rows=shuffled([N, N], 0))
        backend = EmulatedBackend()
        on_device(dataset, [list(range(2 * N))], backend, "auto")
        uploaded[codec] = backend.uploaded
        assert ("check_streams" in backend.launches) == (codec != "none")
        assert ("place_columns" in backend.launches) == (kind == "partial_panel")
        assert "gather_pieces" in backend.launches
    assert uploaded["zstd+crc32c"] < uploaded["none"]


def test_without_a_decompressor(tmp_path: Path) -> None:
    backend = EmulatedBackend()
    backend.no_decompressor = "nvCOMP is not installed, says this test"
    dataset = matrix(tmp_path, "zstd+crc32c", "uint8")
    batches = batches_for(dataset)
    found, feed = on_device(dataset, batches, backend, "auto")
    same(found, on_host(dataset, batches))
    assert isinstance(feed, CopiedFeed)
    with pytest.raises(DeviceUnavailableError, match=r"g0/layers/raw.*says this test.*decode='auto'"):
        on_device(dataset, batches, backend, "device")


def test_decoded_chunks_count_as_memory(tmp_path: Path) -> None:
    dataset = tiles(tmp_path / "a", "zstd", "uint16")
    rows = np.flatnonzero(dataset.groups_np == 0)[:1]
    assert feed_of(dataset).nbytes([rows]) == [24 * 2 * (1 + 4)]
    assert feed_of(tiles(tmp_path / "b", "none", "uint16")).nbytes([rows]) == [24 * 2]
    assert feed_of(dataset).nbytes([np.flatnonzero(dataset.groups_np < 0)]) == [24 * 2 * 5]


def test_slots_are_used_again(tmp_path: Path) -> None:
    """What a window left behind does not show in the next one."""
    dataset = partial_panel(tmp_path, ["zstd", "blosc", "none"], "float32")
    backend = EmulatedBackend()
    feed = feed_of(dataset, backend=backend)
    for seed in range(4):
        rows = np.random.default_rng(seed).integers(0, len(dataset), 3 + 9 * (3 - seed))
        (made,) = feed.make([rows])
        same([on_cpu(feed.deliver(made))], on_host(dataset, [rows.tolist()]))
    assert len(feed._free) == 1


# Damage


def rewrite(path: Path, change: Callable[[bytearray], None], *, sign: bool) -> None:
    """Change a stored chunk; make its CRC32C right where that is wished."""
    data = bytearray(path.read_bytes())
    change(data)
    if sign:
        data[-4:] = struct.pack("<I", crc32c(bytes(data[:-4])))
    path.write_bytes(data)


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 0x11


def trample(data: bytearray) -> None:
    half = len(data) // 2
    data[half : half + 30] = b"\xff" * len(data[half : half + 30])


@pytest.mark.parametrize(
    ("kind", "codec"),
    [("tiles", codec) for codec in CHECKSUMMED] + [(kind, CHECKSUMMED[0]) for kind in KINDS],
)
def test_a_flipped_bit_never_reaches_the_decompressor(kind: str, codec: str, tmp_path: Path) -> None:
    dataset = KINDS[kind](tmp_path, codec, "uint16")
    where = "/".join("0" * len(shape_of(dataset)))
    path = tmp_path / "g0/layers/raw/c" / where
    rewrite(path, flip, sign=False)
    backend = EmulatedBackend()
    with pytest.raises(CorruptChunkError, match=r"g0/layers/raw.*CRC32C") as error:
        on_device(dataset, batches_for(dataset), backend, "auto")
    assert (error.value.chunk, error.value.file) == (0, str(path))


@pytest.mark.parametrize("kind", ["matrix", "partial_panel", "tiles", "encoded"])
@pytest.mark.parametrize("codec", ["zstd+crc32c", "gzip+crc32c"])
def test_what_only_the_decompressor_can_find_is_raised_by_next(
    backend: Any, kind: str, codec: str, tmp_path: Path
) -> None:
    """Damage inside a stream, its CRC32C right: found on the device, told when the batch is received."""
    options = {} if kind == "encoded" else {"chunk_of": lambda a: (20, *a.shape[1:])}
    if kind == "encoded":
        options["chunk_of"] = lambda _: (60,)
    dataset = KINDS[kind](tmp_path, codec, "float64", **options)
    where = "/".join("0" * len(shape_of(dataset)))
    path = tmp_path / "g0/layers/raw/c" / where
    rewrite(path, trample, sign=True)
    absent = np.flatnonzero(dataset.groups_np == 1).tolist()
    bad = np.flatnonzero(dataset.groups_np == 0).tolist()
    loader = device_loader(
        dataset, [absent, bad], backend, LoaderOptions(layout="dense", decode="auto", threads=1, window=1)
    )
    batches = iter(loader)
    first = next(batches)
    if isinstance(backend, StreamBackend):
        backend.consumer.synchronize()
    same([on_cpu(first)], on_host(dataset, [absent]))
    with pytest.raises(CorruptChunkError, match=r"g0/layers/raw.*stream") as error:
        next(batches)
    assert (error.value.chunk, error.value.file) == (0, str(path))
    loader.close()


def test_a_chunk_of_the_wrong_length_is_named(tmp_path: Path) -> None:
    dataset = tiles(tmp_path, "none", "uint16")
    path = tmp_path / "g0/layers/raw/c/2/0/0/0"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorruptChunkError, match="190 bytes stored, 96 elements of uint16 expected") as error:
        on_device(dataset, batches_for(dataset), EmulatedBackend(), "auto")
    assert (error.value.chunk, error.value.file) == (2, str(path))
