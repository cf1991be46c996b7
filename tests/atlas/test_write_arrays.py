"""Arrays that we write: metadata as the real package's, readable by zarr-python, every chunk present."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.atlas._writing.arrays import (
    DEFAULT_CODEC,
    HOMEOBOX_CODEC,
    DenseGroupWriter,
    SparseGroupWriter,
    check_codec,
    codec_names,
    compressor_for,
    flat_shape,
)

SPACE = get_space("gene_expression")


def write_group(
    path: Path,
    indices: np.ndarray,
    values: np.ndarray,
    *,
    pieces: int = 1,
    layer: str = "counts",
    **options: object,
) -> None:
    dtype = "float32" if values.dtype.kind == "f" else "uint32"
    writer = SparseGroupWriter(path, SPACE, layers={layer: dtype}, **options)  # type: ignore[arg-type]
    for part_indices, part_values in zip(
        np.array_split(indices.astype(np.uint32), pieces),
        np.array_split(values.astype(dtype), pieces),
        strict=True,
    ):
        writer.append(part_indices, {layer: part_values})
    writer.close()


def shard_index(path: Path, n_chunks: int) -> np.ndarray:
    """(n_chunks, 2) offsets and sizes, from the end of a shard object."""
    return np.frombuffer(path.read_bytes()[-16 * n_chunks - 4 : -4], "<u8").reshape(-1, 2)


def without_checksum(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata of an array of ours as Homeobox writes them, which has no checksum of chunks."""
    if metadata["node_type"] == "array":
        assert metadata["codecs"][0]["configuration"]["codecs"].pop()["name"] == "crc32c"
    return metadata


@pytest.mark.parametrize("layer", ["counts", "log_normalized"])
def test_metadata_are_those_of_a_real_atlas(homeobox_fixtures: Path, tmp_path: Path, layer: str) -> None:
    real = homeobox_fixtures / "ragged_rna" / "atlas" / "zarr_store" / "set0" / "gene_expression"
    kind = np.float32 if layer == "log_normalized" else np.uint32
    write_group(
        tmp_path / "g",
        np.arange(211),
        np.ones(211, kind),
        layer=layer,
        codec=HOMEOBOX_CODEC,
        chunk=64,
        shard=256,
    )
    for name in ("", "csr", "csr/layers", "csr/indices", f"csr/layers/{layer}"):
        mine = json.loads((tmp_path / "g" / name / "zarr.json").read_text())
        assert without_checksum(mine) == json.loads((real / name / "zarr.json").read_text()), name


def test_our_own_codec_is_the_default(tmp_path: Path) -> None:
    assert DEFAULT_CODEC == "hbx_gpu.rowpack"
    write_group(tmp_path / "g", np.arange(7), np.ones(7, np.uint32))
    for array, transform in (("indices", "gaps"), ("layers/counts", "none")):
        metadata = json.loads((tmp_path / "g" / "csr" / array / "zarr.json").read_text())
        assert metadata["codecs"][0]["configuration"]["codecs"] == [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "hbx_gpu.rowpack", "configuration": {"transform": transform, "element_size": 4}},
        ]


@pytest.mark.parametrize(
    ("codec", "role", "dtype", "chunk", "expected"),
    [
        ("hbx_gpu.rowpack", "index", "uint8", 64, ("hbx_gpu.rowpack", "gaps", 1)),
        ("hbx_gpu.rowpack", "values", "uint16", 63, ("hbx_gpu.rowpack", "none", 2)),
        ("hbx_gpu.rowpack", "values", "int64", 64, ("hbx_gpu.rowpack", "none", 8)),
        ("hbx_gpu.rowpack", "values", "float32", 64, ("zstd",)),
        ("homeobox.bitpacking", "index", "uint32", 64, ("homeobox.bitpacking", "delta", 4)),
        ("homeobox.bitpacking", "values", "uint16", 64, ("homeobox.bitpacking", "none", 4)),
        ("homeobox.bitpacking", "values", "uint16", 63, ("zstd",)),  # no whole number of words
        ("homeobox.bitpacking", "values", "int64", 63, ("homeobox.bitpacking", "none", 4)),
        ("homeobox.bitpacking", "index", "uint8", 64, ("zstd",)),
        ("homeobox.bitpacking", "values", "bool", 64, ("zstd",)),
    ],
)
def test_codec_of_an_array(codec: str, role: str, dtype: str, chunk: int, expected: tuple[Any, ...]) -> None:
    chosen: Any = compressor_for(codec, role, dtype, chunk)  # type: ignore[arg-type]
    first, *others = (one.to_dict() for one in chosen)
    assert [one["name"] for one in others] == (
        [] if codec == first["name"] == "hbx_gpu.rowpack" else ["crc32c"]
    )
    found = first
    setting = found["configuration"]
    packed = (setting["transform"], setting["element_size"]) if found["name"] != "zstd" else ()
    assert (found["name"], *packed) == expected


def test_default_shapes_are_those_of_a_real_atlas(homeobox_fixtures: Path, tmp_path: Path) -> None:
    store = homeobox_fixtures / "single_rna" / "atlas" / "zarr_store"
    real = json.loads(next(store.rglob("csr/indices/zarr.json")).read_text())
    write_group(tmp_path / "g", np.arange(7), np.ones(7, np.uint32), codec=HOMEOBOX_CODEC)
    mine = json.loads((tmp_path / "g" / "csr" / "indices" / "zarr.json").read_text())
    for metadata in (real, mine):
        metadata["shape"] = None
    assert without_checksum(mine) == real


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 400),
    chunk=st.sampled_from([1, 8, 32, 100]),
    per_shard=st.integers(1, 5),
    pieces=st.integers(1, 5),
    codec=st.sampled_from(codec_names()),
    layer=st.sampled_from(["counts", "log_normalized"]),
    seed=st.integers(0, 99),
)
def test_zarr_reads_back_what_was_written(
    n: int, chunk: int, per_shard: int, pieces: int, codec: str, layer: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32)
    values = (
        rng.random(n, np.float32) if layer == "log_normalized" else rng.integers(0, 9, n).astype(np.uint32)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "g"
        write_group(
            path,
            indices,
            values,
            pieces=pieces,
            layer=layer,
            codec=codec,
            chunk=chunk,
            shard=chunk * per_shard,
        )
        group: Any = zarr.open_group(path, mode="r")
        np.testing.assert_array_equal(group["csr/indices"][:], indices)
        np.testing.assert_array_equal(group[f"csr/layers/{layer}"][:], values)


def test_every_chunk_exists_even_if_all_zero(tmp_path: Path) -> None:
    write_group(tmp_path / "g", np.zeros(25), np.zeros(25, np.uint32), codec="zstd", chunk=4, shard=12)
    for array in ("csr/indices", "csr/layers/counts"):
        folder = tmp_path / "g" / array / "c"
        assert sorted(p.name for p in folder.iterdir()) == ["0", "1", "2"]
        for shard, present in (("0", 3), ("1", 3), ("2", 1)):
            index = shard_index(folder / shard, 3)
            assert (index[:present, 1] > 0).all()
            assert (index[present:] == 2**64 - 1).all()
            assert index[0, 0] == 0
            np.testing.assert_array_equal(np.cumsum(index[: present - 1, 1]), index[1:present, 0])


def test_last_chunk_is_padded_with_fill_value(tmp_path: Path) -> None:
    # A long batch first, so that leftovers of it would show behind the end of the short one.
    write_group(
        tmp_path / "g", np.full(13, 7), np.full(13, 7, np.uint32), pieces=13, codec="none", chunk=8, shard=8
    )
    raw = (tmp_path / "g" / "csr" / "indices" / "c" / "1").read_bytes()
    assert np.frombuffer(raw[:32], "<u4").tolist() == [7] * 5 + [0] * 3


def test_an_empty_group_is_readable(tmp_path: Path) -> None:
    write_group(tmp_path / "g", np.empty(0), np.empty(0, np.uint32))
    assert zarr.open_array(tmp_path / "g/csr/indices", mode="r").shape == (0,)


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    write_group(tmp_path / "g", np.arange(3), np.ones(3, np.uint32))
    with pytest.raises(FileExistsError):
        write_group(tmp_path / "g", np.arange(3), np.ones(3, np.uint32))


def test_shapes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"30 must be a multiple of chunk shape 8; for example 24"):
        write_group(tmp_path / "g", np.arange(3), np.ones(3, np.uint32), chunk=8, shard=30)
    assert flat_shape(None, 5, name="chunk_shape") == 5
    assert flat_shape((8,), 5, name="chunk_shape") == 8
    for bad in (0, -1, (2, 3), ()):
        with pytest.raises(ValueError, match="chunk_shape must be one positive number"):
            flat_shape(bad, 5, name="chunk_shape")


def test_unknown_codec_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown codec 'lzma'.*homeobox\.bitpacking.*zstd"):
        check_codec("lzma")


# Dense groups


def test_dense_metadata_are_those_of_a_real_atlas_but_for_the_checksum(
    homeobox_fixtures: Path, tmp_path: Path
) -> None:
    store = homeobox_fixtures / "all_spaces" / "atlas" / "zarr_store" / "mix"
    for group, space, layer, dtype, shape, chunk, shard in (
        ("adt", "protein_abundance", "counts", "uint32", (14, 6), 24, 48),
        ("tiles_a", "image_tiles", "raw", "uint16", (14, 2, 4, 5), 120, 240),
    ):
        writer = DenseGroupWriter(
            tmp_path / group,
            get_space(space),
            layers={layer: dtype},
            row_shape=shape[1:],
            chunk=chunk,
            shard=shard,
        )
        writer.append({layer: np.ones(shape, dtype)})
        writer.close()
        mine, real = (
            json.loads((root / group / "layers" / layer / "zarr.json").read_text())
            for root in (tmp_path, store)
        )
        inner = mine["codecs"][0]["configuration"]["codecs"]
        assert inner.pop() == {"name": "crc32c"}
        assert mine == real


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 40),
    row_shape=st.sampled_from([(), (1,), (7,), (2, 3, 4)]),
    chunk=st.sampled_from([1, 20, 64, 1000]),
    per_shard=st.integers(1, 4),
    pieces=st.integers(1, 5),
    codec=st.sampled_from(codec_names()),
    dtype=st.sampled_from(["uint8", "uint16", "uint32", "float32"]),
)
def test_dense_arrays_come_back(
    n: int,
    row_shape: tuple[int, ...],
    chunk: int,
    per_shard: int,
    pieces: int,
    codec: str,
    dtype: str,
) -> None:
    values = np.random.default_rng(n).integers(0, 200, (n, *row_shape)).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "g"
        writer = DenseGroupWriter(
            path,
            get_space("image_tiles"),
            layers={"raw": dtype},
            row_shape=row_shape,
            codec=codec,
            chunk=chunk,
            shard=chunk * per_shard,
        )
        for part in np.array_split(values, pieces):
            writer.append({"raw": part})
        writer.close()
        assert writer.length == n
        found: Any = zarr.open_group(path, mode="r")["layers/raw"]
        np.testing.assert_array_equal(found[:], values)
        width = int(np.prod(row_shape))
        assert found.chunks == (max(1, chunk // width), *row_shape)


def test_dense_default_shapes(tmp_path: Path) -> None:
    """What the format prescribes: whole rows, at most 40,960 values per chunk and 41,943,040 per shard."""
    for i, (row_shape, rows, shard) in enumerate(
        [((6,), 6826, 6990506), ((3, 5, 7), 390, 399360), ((50_000,), 1, 838)]
    ):
        writer = DenseGroupWriter(
            tmp_path / str(i), get_space("image_tiles"), layers={"raw": "uint8"}, row_shape=row_shape
        )
        writer.append({"raw": np.ones((2, *row_shape), np.uint8)})
        writer.close()
        found: Any = zarr.open_group(tmp_path / str(i), mode="r")["layers/raw"]
        assert found.chunks == (rows, *row_shape)
        assert found.shards == (shard // rows * rows, *row_shape)
