"""An SCDL archive from elsewhere waits for nothing, and takes no memory without end."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hbx_gpu.errors import CorruptDataError, HbxError, UnsafePathError
from hbx_gpu.scdl._format.archive import open_archive
from hbx_gpu.scdl._format.labels import read_labels
from hbx_gpu.scdl._writing.convert import convert_h5ad
from tests.security.stores import anndata


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A small archive."""
    anndata(1).write_h5ad(tmp_path / "a.h5ad")
    convert_h5ad(tmp_path / "a.h5ad", tmp_path / "archive")
    return tmp_path / "archive"


def whole(folder: Path) -> list[Any]:
    """Everything of an archive."""
    opened = open_archive(folder)
    found: list[Any] = [*opened.gather(np.arange(opened.n_rows))]
    for index in (opened.var, opened.obs):
        if index is not None:
            found += [index.frames[0][name] for name in index.frames[0].names]
    return found


def relative_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_not_a_file(archive: Path, kind: str) -> None:
    names = relative_files(archive)
    assert {"header.sch", "metadata.json", "data.npy"} <= set(names)
    for name in names:
        path, kept = archive / name, archive / f"{name}.kept"
        path.rename(kept)
        if kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(UnsafePathError, match=f"{path.name} is a"):
            whole(archive)
        path.unlink()
        kept.rename(path)
    whole(archive)


def test_nothing_is_written_through_links(archive: Path, outside: Path) -> None:
    (archive / "data.npy").rename(outside / "data.npy")
    (archive / "data.npy").symlink_to(outside / "data.npy")
    whole(archive)
    with pytest.raises(UnsafePathError, match="leads out"):
        open_archive(archive, writable=True)


def bomb(doublings: int) -> bytes:
    """A pickle of a path that is joined to itself again and again."""
    start = b"\x80\x04\x8c\x07pathlib\x8c\x0dPurePosixPath\x93\x94" + b"\x8c\x40" + b"a" * 64 + b"\x85R\x94"
    steps = (
        b"h\x00h" + bytes([k - 1]) + b"h" + bytes([k - 1]) + b"\x86R\x94" for k in range(2, 2 + doublings)
    )
    return start + b"".join(steps) + b"."


@pytest.mark.parametrize("many", [False, True])
def test_labels_that_double(tmp_path: Path, many: bool) -> None:
    pickled = bomb(40)
    if many:  # long paths, each short of the limit, again and again
        pickled = bomb(9)[:-1] + b"(" + b"h\x00h\x0ah\x01\x86R" * 200_000 + b"l."
    with open(tmp_path / "labels.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        file.write(pickled)
    assert read_labels(tmp_path, 1) == [None]


@pytest.mark.parametrize("shape", [(1 << 60,), (1 << 40,), (1 << 33,)])
@pytest.mark.parametrize("name", ["labels.npy", "cumulative_sum_index.npy"])
def test_headers_of_arrays_that_promise_too_much(archive: Path, name: str, shape: tuple[int, ...]) -> None:
    path = archive / "var_features" / name
    (archive / "var_features" / "labels.json").unlink(missing_ok=True)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    if name == "labels.npy":
        whole(archive)  # labels are nothing that rows need
    else:
        with pytest.raises(CorruptDataError, match="cannot be read"):
            whole(archive)


@pytest.mark.parametrize("name", ["metadata.json", "header.sch", "version.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff" * 100, b"", None])
def test_metadata(archive: Path, name: str, content: bytes | None) -> None:
    if content is None:
        with open(archive / name, "wb") as file:
            file.truncate(1 << 40)
    else:
        (archive / name).write_bytes(content)
    try:
        whole(archive)
    except HbxError as error:
        named = str(error)
        assert name in named or "SCDL" in named
    else:
        # The header and the version may be missing: then sizes decide.
        assert name != "metadata.json" or content == b"9" * 5000


def feature_file(archive: Path) -> Path:
    return next((archive / "var_features").glob("*.parquet"))


def test_features_that_claim_rows_without_end(archive: Path) -> None:
    file = feature_file(archive)
    pq.write_table(pq.read_table(file), file, compression="none")
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack("<I", raw[-8:-4])
    for at in range(len(raw) - 8 - length, len(raw) - 8, 3):
        for value in (0xFF, 0x7F):
            changed = bytearray(raw)
            changed[at] = value
            file.write_bytes(changed)
            try:
                whole(archive)
            except HbxError:
                continue


def test_a_page_that_decompresses_without_end(archive: Path) -> None:
    file = feature_file(archive)
    n = pq.read_metadata(file).num_rows
    text = ["x" * (8 << 20)] + ["y"] * (n - 1)
    columns = dict.fromkeys(pq.read_schema(file).names, text)
    pq.write_table(
        pa.table({**columns, "more": ["z" * (90 << 20)] + [""] * (n - 1)}), file, compression="zstd"
    )
    assert file.stat().st_size < 1 << 20
    with pytest.raises(CorruptDataError, match="claim"):
        whole(archive)
