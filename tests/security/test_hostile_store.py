"""Stores of other programs, opened in place or ingested, show nothing of other files and wait for nothing."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest

import hbx_gpu
from hbx_gpu import cli
from hbx_gpu.errors import CorruptDataError, HbxError, UnsafePathError
from hbx_gpu.scdl import SingleCellMemMapDataset
from hbx_gpu.scdl._writing.convert import convert_h5ad
from tests.security.stores import anndata, content, edit


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Kernels are compiled, so that no test's time goes into that."""
    file = tmp_path_factory.mktemp("compiled") / "a.h5ad"
    anndata(1).write_h5ad(file)
    whole(file)


@pytest.fixture
def zarr_store(tmp_path: Path, compiled: None) -> Path:  # noqa: ARG001
    """A small AnnData store."""
    with ad.settings.override(zarr_write_format=3):
        anndata(1).write_zarr(tmp_path / "store.zarr")
    return tmp_path / "store.zarr"


@pytest.fixture
def h5ad(tmp_path: Path, compiled: None) -> Path:  # noqa: ARG001
    """A small AnnData file."""
    anndata(1).write_h5ad(tmp_path / "file.h5ad")
    return tmp_path / "file.h5ad"


def whole(path: Path, *, allow_links: bool = False) -> tuple[np.ndarray, ...]:
    """Everything of a store."""
    dataset = hbx_gpu.open(path, allow_links=allow_links).to_cell_dataset(metadata_columns=["cell_type"])
    batch: Any = dataset[np.arange(len(dataset))]
    assert batch.metadata is not None
    return batch.indices, batch.values, batch.offsets, np.asarray(batch.metadata["cell_type"]).astype(str)


def move_out(path: Path, outside: Path) -> None:
    """Put a link in the place of a file or folder, which goes outside."""
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)


PLACES = [
    "X",
    "X/data",
    "X/data/zarr.json",
    "X/data/c",
    "obs",
    "obs/cell_type",
    "obs/cell_type/codes/c/0",
    "var",
    "zarr.json",
]


@pytest.mark.parametrize("place", PLACES)
def test_links_out_of_a_zarr_store(zarr_store: Path, outside: Path, tmp_path: Path, place: str) -> None:
    expected = whole(zarr_store)
    move_out(zarr_store / place, outside)
    before = content(outside)
    with pytest.raises(UnsafePathError, match=r"leads out of .*, to .*outside.*pass allow_links=True"):
        whole(zarr_store)
    for mine, true in zip(whole(zarr_store, allow_links=True), expected, strict=True):
        np.testing.assert_array_equal(mine, true)
    assert cli.main(["convert", str(zarr_store), str(tmp_path / "archive")]) == 1
    assert cli.main(["convert", str(zarr_store), str(tmp_path / "archive"), "--allow-links"]) == 0
    assert content(outside) == before


def test_links_are_followed_by_workers_and_ingest_too(
    zarr_store: Path, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    move_out(zarr_store / "X", outside)
    dataset: Any = hbx_gpu.open(zarr_store, allow_links=True).to_cell_dataset()
    rebuilt = pickle.loads(pickle.dumps(dataset._recipe)).rebuild()
    np.testing.assert_array_equal(rebuilt[np.arange(5)].indices, dataset[np.arange(5)].indices)
    ingest = ["ingest", str(zarr_store), "--atlas", str(tmp_path / "atlas")]
    assert cli.main(ingest) == 1
    assert "pass --allow-links" in capsys.readouterr().err
    assert cli.main([*ingest, "--allow-links"]) == 0


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_not_a_file_of_a_zarr_store(zarr_store: Path, kind: str) -> None:
    expected = whole(zarr_store)
    for path in sorted(p for p in zarr_store.rglob("*") if p.is_file() and "uns" not in p.parts):
        if not {"X", "obs", "var"} & {*path.relative_to(zarr_store).parts}:
            continue
        kept = path.with_name("kept")
        path.rename(kept)
        make(kind, path)
        with pytest.raises(HbxError):
            whole(zarr_store)
        path.unlink()
        kept.rename(path)
    np.testing.assert_array_equal(whole(zarr_store)[0], expected[0])


def make(kind: str, path: Path) -> None:
    """Something that no regular file is."""
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mknod(path, (0o010000 if kind == "fifo" else 0o140000) | 0o600)


@pytest.mark.parametrize("rows", [1 << 33, 1 << 40, 1 << 62, 1 << 63, -1])
@pytest.mark.parametrize("array", ["X/indptr", "obs/_index", "obs/cell_type/codes", "X/data", "X/indices"])
def test_shapes_of_a_zarr_store(zarr_store: Path, array: str, rows: int) -> None:
    edit(zarr_store / array / "zarr.json", lambda document: document.update(shape=[rows]))
    with pytest.raises(HbxError):
        whole(zarr_store)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[]", "7", '"x"', "\0", '{"node_type": "array"}']
)
@pytest.mark.parametrize(
    "place", ["X/zarr.json", "X/data/zarr.json", "obs/zarr.json", "obs/_index/zarr.json"]
)
def test_metadata_of_a_zarr_store(zarr_store: Path, place: str, text: str) -> None:
    (zarr_store / place).write_text(text)
    with pytest.raises(HbxError):
        whole(zarr_store)


def external_link(file: h5py.File, other: Path) -> None:
    del file["obs/cell_type"]
    file["obs/cell_type"] = h5py.ExternalLink(str(other), "/secret")


def external_storage(file: h5py.File, other: Path) -> None:
    del file["obs/_index"]
    made = file["obs"].create_dataset("_index", (40,), "S4", external=[(str(other), 0, 160)])
    made.attrs["encoding-type"], made.attrs["encoding-version"] = "string-array", "0.2.0"


def virtual(file: h5py.File, other: Path) -> None:
    del file["X/data"]
    layout = h5py.VirtualLayout((file["X/indices"].shape[0],), "f4")
    layout[:10] = h5py.VirtualSource(str(other), "/secret", (10,), "f4")
    file["X"].create_virtual_dataset("data", layout)


def linked_group(file: h5py.File, other: Path) -> None:
    del file["X"]
    file["X"] = h5py.ExternalLink(str(other), "/")


@pytest.mark.parametrize("plant", [external_link, external_storage, virtual, linked_group])
def test_content_of_other_files(
    h5ad: Path, outside: Path, tmp_path: Path, plant: Callable[[h5py.File, Path], None]
) -> None:
    other = outside / "other.h5"
    with h5py.File(other, "w") as file:
        file["secret"] = np.arange(10, dtype="f4")
        file.create_dataset("padding", data=np.zeros(200))
    with h5py.File(h5ad, "r+") as file:
        plant(file, other)
    with pytest.raises(UnsafePathError, match=r"leads out of it, to .*other\.h5; .*allow_links"):
        whole(h5ad)
    before = content(outside)
    assert cli.main(["convert", str(h5ad), str(tmp_path / "archive")]) == 1
    assert cli.main(["ingest", str(h5ad), "--atlas", str(tmp_path / "atlas")]) == 1
    assert content(outside) == before


def test_a_group_that_holds_itself(h5ad: Path) -> None:
    with h5py.File(h5ad, "r+") as file:
        file["obs/again"] = file["obs"]
        file["obs/other"] = file["/"]
    whole(h5ad)


@pytest.mark.parametrize("rows", [1 << 33, 1 << 40, 1 << 62])
@pytest.mark.parametrize("place", ["obs/_index", "X/indptr", "X/data"])
def test_shapes_of_a_file(h5ad: Path, place: str, rows: int) -> None:
    with h5py.File(h5ad, "r+") as file:
        attributes = dict(file[place].attrs)
        dtype = file[place].dtype
        del file[place]
        made = file.create_dataset(place, (rows,), dtype, chunks=(1 << 20,))
        made.attrs.update(attributes)
    with pytest.raises(HbxError):
        whole(h5ad)


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_a_path_that_is_not_a_file(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(kind, tmp_path / "a.h5ad")
    with pytest.raises((HbxError, FileNotFoundError)):
        hbx_gpu.open(tmp_path / "a.h5ad")
    assert cli.main(["ingest", str(tmp_path / "a.h5ad"), "--atlas", str(tmp_path / "atlas")]) == 1
    capsys.readouterr()
    assert cli.main(["convert", str(tmp_path / "a.h5ad"), str(tmp_path / "archive")]) == 1
    said = {"fifo": "it is a FIFO", "device": "it is a device", "socket": "it is a socket"}[kind]
    assert said in capsys.readouterr().err


def test_links_out_of_an_archive(h5ad: Path, outside: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    convert_h5ad(h5ad, archive)
    expected = SingleCellMemMapDataset(archive)[3]
    move_out(archive / "data.npy", outside)
    move_out(archive / "obs_features", outside)
    before = content(outside)
    with pytest.raises(UnsafePathError, match=r"leads out of .*, to .*allow_links=True"):
        SingleCellMemMapDataset(archive)
    with pytest.raises(UnsafePathError):
        hbx_gpu.open(archive)
    assert cli.main(["convert", str(archive), str(tmp_path / "atlas")]) == 1
    opened = SingleCellMemMapDataset(archive, allow_links=True)
    np.testing.assert_array_equal(np.asarray(opened[3]), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(opened))[3]), np.asarray(expected))
    assert len(hbx_gpu.open(archive, allow_links=True).to_cell_dataset()) == 40
    assert len(opened.to_cell_dataset()) == 40
    assert cli.main(["convert", str(archive), str(tmp_path / "atlas"), "--allow-links"]) == 0
    with pytest.raises((UnsafePathError, CorruptDataError)):
        SingleCellMemMapDataset(archive)
    assert content(outside) == before
