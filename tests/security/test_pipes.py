"""What is no regular file is named wherever the user passes a file; a named pipe is never waited for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import hbx_gpu
from hbx_gpu.atlas import FragmentsInput, ImageInput, RaggedAtlas, create_or_open_atlas
from hbx_gpu.chromatin import Peaks
from hbx_gpu.chromatin._chromosomes import read_sizes
from hbx_gpu.scdl import SingleCellMemMapDataset
from hbx_gpu.tokens._tables import read_table

FRAGMENTS = "chr1\t1\t10\tc0\nchr1\t5\t9\tc1\n"


def add(path: Path, modality: str, data: Any) -> object:
    return create_or_open_atlas(path.parent / "atlas").add_multimodal({modality: data})


def barcodes(path: Path) -> object:
    fragments = path.parent / "fragments.tsv"
    fragments.write_text(FRAGMENTS)
    return add(path, "fragments", FragmentsInput(fragments, path))


CALLS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "h5ad": ("x.h5ad", lambda path: create_or_open_atlas(path.parent / "atlas").add_from_h5ad(path)),
    "h5mu": ("x.h5mu", lambda path: create_or_open_atlas(path.parent / "atlas").add_multimodal(path)),
    "10x": ("x.h5", lambda path: create_or_open_atlas(path.parent / "atlas").add_from_h5ad(path)),
    "in place": ("x.h5ad", hbx_gpu.open),
    "archive": ("x.h5ad", lambda path: SingleCellMemMapDataset(str(path.parent / "s"), h5ad_path=str(path))),
    "fragments": ("x.tsv", lambda path: add(path, "fragments", path)),
    "barcodes": ("x.tsv", barcodes),
    "tiles": ("x.csv", lambda path: add(path, "tiles", ImageInput(path.parent / "tiles.npy", path))),
    "image": (
        "x.npy",
        lambda path: add(path, "tiles", ImageInput(path, pd.DataFrame({"cell_id": ["a"], "tile": [0]}))),
    ),
    "peaks": ("x.bed", lambda path: Peaks(path)),
    "packed peaks": ("x.bed.gz", lambda path: Peaks(path)),
    "sizes": ("x.sizes", read_sizes),
    "vocabulary": ("x.json", lambda path: read_table(path, "the vocabulary")),
    "pickle": ("x.pkl", lambda path: read_table(path, "the vocabulary")),
    "atlas": ("atlas", RaggedAtlas.checkout_latest),
}


@pytest.fixture
def impatient() -> Iterator[None]:
    """Whoever waits for a pipe fails instead."""

    def fail(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a folder", "missing"])
@pytest.mark.parametrize("what", CALLS)
def test_what_is_no_file_is_named(tmp_path: Path, what: str, kind: str) -> None:
    name, call = CALLS[what]
    path = tmp_path / name
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")  # endless
    elif kind == "a folder":
        path.mkdir()
    with pytest.raises((OSError, ValueError)) as error:
        call(path)
    said = str(error.value)
    assert path.name in said
    if kind == "missing" or what != "atlas":
        assert any(
            word in said
            for word in (
                kind,
                "does not exist",
                "a directory",
                "no store",
                "zarr",
                "No atlas",
                "not exist",
                "could not find",
            )
        )
