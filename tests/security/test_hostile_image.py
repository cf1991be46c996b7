"""Images from elsewhere, opened for ingest, show nothing of other files and wait for nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from hbx_gpu.atlas._ingest.image_files import open_image
from hbx_gpu.errors import InvalidDataError, UnsafePathError
from tests.security.test_hostile_store import make, move_out

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small OME-Zarr image."""
    group = zarr.open_group(tmp_path / "image.zarr", mode="w")
    group.attrs["ome"] = {
        "multiscales": [{"axes": [{"name": n} for n in "cyx"], "datasets": [{"path": "s0"}]}]
    }
    group.create_array("s0", data=PIXELS)
    return tmp_path / "image.zarr"


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@pytest.mark.parametrize("name", ["zarr.json", "s0/zarr.json", "s0/c/0/0/0"])
def test_what_is_not_a_file_of_an_image(image: Path, name: str, kind: str) -> None:
    (image / name).unlink()
    make(kind, image / name)
    with pytest.raises(UnsafePathError, match=f"{Path(name).name} (is a|leads out)"):
        open_image(image)
    if kind == "device":
        with pytest.raises(UnsafePathError, match="is a device"):
            open_image(image, allow_links=True)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_an_image_that_is_not_a_file(tmp_path: Path, suffix: str, kind: str) -> None:
    make(kind, tmp_path / f"image{suffix}")
    with pytest.raises(UnsafePathError, match="a regular file is expected"):
        open_image(tmp_path / f"image{suffix}")


@pytest.mark.parametrize("place", ["s0", "s0/zarr.json", "s0/c"])
def test_links_out_of_an_image(image: Path, outside: Path, place: str) -> None:
    move_out(image / place, outside)
    with pytest.raises(UnsafePathError, match=r"leads out of .*allow_links=True"):
        open_image(image)
    np.testing.assert_array_equal(open_image(image, allow_links=True).read(()), PIXELS)


@pytest.mark.parametrize(
    "ome",
    [
        {"multiscales": [{"datasets": [{"path": "../outside"}]}]},
        {"multiscales": [{"datasets": [{"path": ["s0"]}]}]},
        {"multiscales": [{"datasets": []}]},
        {"multiscales": [7]},
        {"multiscales": [{"axes": 7, "datasets": [{"path": "s0"}]}]},
        [],
    ],
    ids=str,
)
def test_levels_that_an_image_does_not_have(image: Path, outside: Path, ome: Any) -> None:
    zarr.create_array(outside, data=PIXELS, overwrite=True)
    zarr.open_group(image, mode="r+").attrs["ome"] = ome
    with pytest.raises(InvalidDataError, match=r"image\.zarr"):
        open_image(image)


def test_a_level_is_hashed_where_it_is_read(image: Path, outside: Path) -> None:
    """zarr takes an absolute path as one below the group; it was hashed where it points to."""
    group = zarr.open_group(image, mode="r+")
    inside = group.create_array(os.fspath(outside).strip("/"), data=PIXELS)
    group.attrs["ome"] = {"multiscales": [{"datasets": [{"path": os.fspath(outside)}]}]}
    opened = open_image(image)
    assert Path(opened.source) == image / inside.path
    before = opened.digest()
    (outside / "thesis.txt").write_text("finished")
    assert opened.digest() == before


@pytest.mark.parametrize("text", ["[" * 100_000, json.dumps({"zarr_format": 3}), "{}", "", "\0"])
def test_metadata_of_an_image(image: Path, text: str) -> None:
    (image / "s0" / "zarr.json").write_text(text)
    with pytest.raises(InvalidDataError, match=r"image\.zarr"):
        open_image(image)
