"""Every array of every real atlas, chunk by chunk through directory, reader and codec, equals zarr-python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage import ChunkDirectory, open_reader, read_layout

ATLASES = [
    "all_spaces",
    "cite_multimodal",
    "image_tiles",
    "legacy_0_2_3",
    "missing_shards",
    "ragged_rna",
    "seed_2026_05",
    "single_rna",
    "uid_collision",
]


def arrays_of(store: Path) -> list[ArrayLayout]:
    paths = [p.parent for p in sorted(store.rglob("zarr.json"))]
    paths = [p for p in paths if '"node_type": "array"' in (p / "zarr.json").read_text()]
    return [read_layout(p, str(p.relative_to(store))) for p in paths]


@pytest.mark.parametrize("kind", ["mmap", "preadv"])
@pytest.mark.parametrize("atlas", ATLASES)
def test_every_array_equals_zarr(homeobox_fixtures: Path, assemble: Any, atlas: str, kind: str) -> None:
    store = homeobox_fixtures / atlas / "atlas" / "zarr_store"
    layouts = arrays_of(store)
    assert layouts
    directory = ChunkDirectory(layouts)
    with open_reader(kind, directory) as reader:
        for i, layout in enumerate(layouts):
            expected = zarr.open_array(layout.path, mode="r")[...]
            np.testing.assert_array_equal(assemble(directory, i, reader), expected, err_msg=layout.name)


def test_the_list_of_atlases_is_complete(homeobox_fixtures: Path) -> None:
    assert sorted(p.name for p in homeobox_fixtures.iterdir() if p.is_dir()) == ATLASES


def test_absent_shards_are_seen(homeobox_fixtures: Path) -> None:
    directory = ChunkDirectory(arrays_of(homeobox_fixtures / "missing_shards" / "atlas" / "zarr_store"))
    extents = directory.extents(np.arange(directory.base[-1]))
    absent = extents.nbytes == -1
    assert absent.any()
    assert not absent.all()
    assert (extents.file[absent] == -1).all()
    assert (extents.file[~absent] >= 0).all()
