"""Files that somebody else made: what is not a regular file is refused at once, what is too large unread."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from hbx_gpu._files import write_durably
from hbx_gpu._storage import ChunkDirectory, open_reader, plain_layout, read_layout
from hbx_gpu._storage.metadata import check_last_object
from hbx_gpu._untrusted import Within, check_tree, open_regular, parse_json, read_small
from hbx_gpu.errors import CorruptChunkError, CorruptDataError, HbxError, UnsafePathError


def array(folder: Path, **options: Any) -> Path:
    zarr.create_array(folder, data=np.arange(1000, dtype="u4"), **({"chunks": (100,)} | options))
    return folder


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "zarr.json").read_text())
    (folder / "zarr.json").write_text(json.dumps(document | changes))


def put(kind: str, path: Path) -> None:
    """Put something in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(kind, tmp_path / "x")
    with pytest.raises(UnsafePathError, match=f"(?i)x is a {kind}, a regular file is expected"):
        open_regular(tmp_path / "x")
    with pytest.raises(UnsafePathError, match="(?i)" + kind):
        read_small(tmp_path / "x")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("options", [{}, {"shards": (500,)}], ids=["plain", "sharded"])
@pytest.mark.parametrize("reader", ["mmap", "preadv", "pinned"])
def test_chunks_and_metadata_that_are_no_files(
    tmp_path: Path, kind: str, options: dict[str, Any], reader: str
) -> None:
    folder = array(tmp_path / "a", **options)
    put(kind, folder / "c" / "0")
    directory = ChunkDirectory([read_layout(folder)])
    with pytest.raises(UnsafePathError, match="(?i)" + kind), open_reader(reader, directory) as opened:
        opened.read(directory.extents(np.array([0])))
    put(kind, folder / "zarr.json")
    with pytest.raises(UnsafePathError, match="(?i)" + kind):
        read_layout(folder)


@pytest.mark.parametrize("reader", ["mmap", "preadv", "pinned"])
def test_a_file_that_becomes_a_fifo_after_it_was_looked_up(tmp_path: Path, reader: str) -> None:
    folder = array(tmp_path / "a")
    directory = ChunkDirectory([read_layout(folder)])
    extents = directory.extents(np.array([0]))
    put("fifo", folder / "c" / "0")
    with pytest.raises(HbxError), open_reader(reader, directory) as opened:
        opened.read(extents)


def test_plain_files_that_are_no_files(tmp_path: Path) -> None:
    put("fifo", tmp_path / "x")
    with pytest.raises(UnsafePathError):
        plain_layout(tmp_path / "x", "u4", 0)


def test_large_metadata_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "zarr.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptDataError, match="1,099,511,627,776 bytes; such a file has 16,777,216 at most"):
        read_layout(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"shape": ' + "9" * 5000 + "}", "\xff"]
)
def test_json_that_nobody_wrote_in_earnest(text: str) -> None:
    with pytest.raises(CorruptDataError, match="here"):
        parse_json(text.encode("latin-1"), "here")


def chunks_of(*shape: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [1 << 62]},
        {"shape": [1 << 63]},
        {"shape": [10**4000]},
        {"shape": [1 << 40], "chunk_grid": chunks_of(1)},
        {"shape": [1] * 70, "chunk_grid": chunks_of(*[1] * 70)},
        {
            "shape": [1 << 50, 1 << 50],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 1]}},
        },
        {"chunk_grid": chunks_of(1 << 40)},
    ],
    ids=str,
)
def test_sizes_that_no_store_holds(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = array(tmp_path / "a")
    edit(folder, **changes)
    with pytest.raises(HbxError, match=r"zarr\.json"):
        read_layout(folder)


def test_a_shard_of_too_many_chunks(tmp_path: Path) -> None:
    folder = array(tmp_path / "a", shards=(500,))
    edit(folder, chunk_grid=chunks_of(100 << 32))
    with pytest.raises(HbxError, match="chunks, 4,294,967,296 of them per stored object"):
        read_layout(folder)
    # Fewer than refused, and still more than the file holds: nothing is allocated for them.
    edit(folder, chunk_grid=chunks_of(100 << 25))
    directory = ChunkDirectory([read_layout(folder)])
    with pytest.raises(CorruptDataError, match="its shard index alone takes 536870916"):
        directory.extents(np.array([0]))


def test_a_last_object_that_cannot_be(tmp_path: Path) -> None:
    folder = array(tmp_path / "a")
    check_last_object(read_layout(folder, absent_is_fill=False))
    edit(folder, shape=[1 << 36])
    check_last_object(read_layout(folder))
    with pytest.raises(CorruptChunkError, match=r"c/687194767\): .*missing.*shape \[68719476736\]"):
        check_last_object(read_layout(folder, absent_is_fill=False))


@pytest.mark.parametrize("what", ["file", "folder", "array"])
def test_links_that_lead_out(tmp_path: Path, what: str) -> None:
    store = tmp_path / "store"
    folder = array(store / "group" / "a")
    moved = {"file": folder / "c" / "0", "folder": folder / "c", "array": folder}[what]
    moved.rename(tmp_path / "outside")
    moved.symlink_to(tmp_path / "outside")

    def read(within: str) -> int:
        directory = ChunkDirectory([read_layout(folder, within=within)])
        with open_reader("mmap", directory) as reader:
            return int(reader.read(directory.extents(np.array([0]))).nbytes[0])

    assert read("") > 0
    with pytest.raises(
        UnsafePathError, match=f"leads out of {store}, to {tmp_path / 'outside'}.*allow_links=True"
    ):
        read(str(store))


def test_links_that_stay(tmp_path: Path) -> None:
    (tmp_path / "real" / "b").mkdir(parents=True)
    (tmp_path / "store").symlink_to("real")
    (tmp_path / "real" / "a").symlink_to("b")
    within = Within(str(tmp_path / "store"))
    within.check(str(tmp_path / "store" / "a" / "x"))
    with pytest.raises(UnsafePathError):
        within.check(str(tmp_path / "store" / ".." / "x"))


@pytest.mark.parametrize("at", ["", "a", "a/b", "a/b/c"])
def test_a_link_above_what_was_looked_at(tmp_path: Path, at: str) -> None:
    store = tmp_path / "store"
    (store / "a" / "b" / "c").mkdir(parents=True)
    (store / "a" / "b" / "d").mkdir()
    link = store / at / "link"
    within = Within(str(store))
    for path in ("a/b/c/x", "a/b/d/x", "a/x", "x"):
        within.check(str(store / path))
    outside = tmp_path / "outside" / "y"
    outside.mkdir(parents=True)
    link.symlink_to(tmp_path / "outside")
    for beyond in (link, link / "x", link / "y" / "x"):
        with pytest.raises(UnsafePathError):
            within.check(str(beyond))
    inner = store / "inner"
    inner.symlink_to(store / "a")
    within.check(str(inner / "b" / "x"))


def test_a_tree_is_looked_through(tmp_path: Path) -> None:
    (tmp_path / "t" / "deep").mkdir(parents=True)
    (tmp_path / "t" / "deep" / "file").write_text("x")
    check_tree(tmp_path / "t", links=False)
    (tmp_path / "t" / "deep" / "link").symlink_to("/dev/null")
    with pytest.raises(UnsafePathError, match="leads out"):
        check_tree(tmp_path / "t", links=False)
    with pytest.raises(UnsafePathError, match="link is a device"):
        check_tree(tmp_path / "t", links=True)
    (tmp_path / "t" / "deep" / "link").unlink()
    put("fifo", tmp_path / "t" / "deep" / "fifo")
    with pytest.raises(UnsafePathError, match="fifo is a FIFO"):
        check_tree(tmp_path / "t", links=True)


def test_writing_follows_no_link(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("alive")
    for name in ("note", "note.new"):
        (tmp_path / name).symlink_to(canary)
    write_durably(tmp_path / "note", "text")
    assert canary.read_text() == "alive"
    assert (tmp_path / "note").read_text() == "text"
    assert not (tmp_path / "note").is_symlink()


def test_no_memory_for_a_table(tmp_path: Path) -> None:
    layout = replace(read_layout(array(tmp_path / "a")), shape=(1 << 60,))
    with pytest.raises(CorruptDataError, match=r"no memory for a table of .* chunks.*array 'a'"):
        ChunkDirectory([layout])
