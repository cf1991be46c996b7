"""The zarr codec: entry point, configuration, exact metadata, arrays written and read through zarr-python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.registry import get_codec_class
from zarr.storage import MemoryStore

from hbx_gpu._codecs.zarr_codec import BitpackingCodec
from hbx_gpu.errors import CorruptChunkError


def test_is_registered_by_entry_point() -> None:
    assert get_codec_class("homeobox.bitpacking") is BitpackingCodec


@pytest.mark.parametrize("transform", ["none", "delta", "delta_zigzag"])
@pytest.mark.parametrize(
    ("dtype", "element_size"), [("uint32", 4), ("int64", 8), ("int64", 4), ("uint16", 4)]
)
@pytest.mark.parametrize("shards", [None, (64,)])
def test_arrays_round_trip(transform: str, dtype: str, element_size: int, shards: Any) -> None:
    values = np.random.default_rng(0).integers(0, 60000, 150).astype(dtype)
    codec = BitpackingCodec(transform=transform, element_size=element_size)
    store = MemoryStore()
    zarr.create_array(store, data=values, chunks=(32,), shards=shards, compressors=[codec])
    np.testing.assert_array_equal(zarr.open_array(store, mode="r")[...], values)


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.integers(0, 2**32 - 1), min_size=0, max_size=300), chunk=st.integers(1, 200))
def test_any_values_round_trip(values: list[int], chunk: int) -> None:
    store = MemoryStore()
    codec = BitpackingCodec(transform="delta")
    data = np.array(values, np.uint32)
    zarr.create_array(store, data=data, chunks=(chunk,), compressors=[codec])
    np.testing.assert_array_equal(zarr.open_array(store, mode="r")[...], data)


def bitpacked_arrays(store: Path) -> list[Path]:
    return [p for p in sorted(store.rglob("zarr.json")) if "homeobox.bitpacking" in p.read_text()]


def test_metadata_are_those_of_the_real_writer(homeobox_fixtures: Path, tmp_path: Path) -> None:
    seen = 0
    for number, file in enumerate(bitpacked_arrays(homeobox_fixtures)):
        expected = json.loads(file.read_text())
        sharding = expected["codecs"][0]["configuration"]
        codec = BitpackingCodec(**sharding["codecs"][1]["configuration"])
        assert codec.to_dict() == sharding["codecs"][1]
        assert BitpackingCodec.from_dict(codec.to_dict()) == codec
        zarr.create_array(
            str(tmp_path / str(number)),
            shape=tuple(expected["shape"]),
            dtype=expected["data_type"],
            chunks=tuple(sharding["chunk_shape"]),
            shards=tuple(expected["chunk_grid"]["configuration"]["chunk_shape"]),
            compressors=[codec],
        )
        written = json.loads((tmp_path / str(number) / "zarr.json").read_text())
        assert written == expected
        seen += 1
    assert seen == 31


def test_zarr_reads_real_arrays_through_it(homeobox_fixtures: Path) -> None:
    file = homeobox_fixtures / "single_rna" / "atlas" / "zarr_store"
    found: Any = zarr.open_array(bitpacked_arrays(file)[0].parent, mode="r")
    assert any(isinstance(c, BitpackingCodec) for c in found.metadata.codecs[0].codecs)
    assert found[...].size


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"transform": "zigzag"}, "unknown bitpacking transform 'zigzag'; known: none, delta, delta_zigzag"),
        ({"transform": ["none"]}, "unknown bitpacking transform"),
        ({"element_size": 2}, "element_size must be 4 or 8, not 2"),
        ({"element_size": 4.0}, "element_size must be 4 or 8, not 4.0"),
        ({"element_size": "4"}, "element_size must be 4 or 8, not '4'"),
        ({"level": 3}, "unknown configuration level; it takes transform and element_size"),
    ],
)
def test_configuration_is_checked(configuration: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitpackingCodec.from_dict({"name": "homeobox.bitpacking", "configuration": configuration})


def test_chunks_of_odd_length_are_refused_when_written() -> None:
    array = zarr.create_array(
        MemoryStore(), shape=(9,), dtype="uint16", chunks=(3,), compressors=[BitpackingCodec()]
    )
    with pytest.raises(ValueError, match="words of 4 bytes, the input has 6 bytes"):
        array[:] = 1


def test_damaged_chunks_raise_through_zarr(tmp_path: Path) -> None:
    array = zarr.create_array(
        str(tmp_path), shape=(64,), dtype="uint32", chunks=(64,), compressors=[BitpackingCodec()]
    )
    array[:] = np.arange(64)
    chunk = tmp_path / "c" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(CorruptChunkError, match="reaches beyond the end"):
        array[:]


def test_beside_another_codec_of_the_same_name(homeobox_fixtures: Path) -> None:
    """Homeobox registers ``homeobox.bitpacking`` when it is imported; zarr warns unless one is chosen."""
    store = homeobox_fixtures / "single_rna" / "atlas" / "zarr_store"
    (group,) = [path.parent for path in store.rglob("csr/indices")]
    code = f"""
import warnings
warnings.simplefilter("error")
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.registry import get_codec_class, register_codec
class Theirs(BytesBytesCodec):
    pass
register_codec("homeobox.bitpacking", Theirs)
import hbx_gpu._codecs.zarr_codec as ours
assert get_codec_class("homeobox.bitpacking") is ours.BitpackingCodec
assert zarr.open_array({str(group / "indices")!r}, mode="r")[:5].dtype == "uint32"
assert get_codec_class("bytes").__name__ == "BytesCodec"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    chosen = """
import zarr
theirs = "zarr.codecs.bytes.BytesCodec"
zarr.config.set({"codecs": {**zarr.config.get("codecs"), "hbx_gpu.rowpack": theirs}})
import hbx_gpu._codecs.zarr_codec
assert zarr.config.get("codecs")["hbx_gpu.rowpack"] == theirs, "what the user chose stays"
"""
    subprocess.run([sys.executable, "-c", chosen], check=True, timeout=300)
