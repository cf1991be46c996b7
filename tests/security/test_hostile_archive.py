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
from hbx_gpu.scdl._format.frames import StoredFrame
from hbx_gpu.scdl._format.labels import read_labels
from hbx_gpu.scdl._format.names import read_obs_names
from hbx_gpu.scdl._format.parquet_pages import check_pages
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
        told = f"{path.name} is a" if kind == "fifo" else f"{path.name} leads out of"
        with pytest.raises(UnsafePathError, match=told):
            whole(archive)
        if kind == "device":
            with pytest.raises(UnsafePathError, match=f"{path.name} is a device"):
                open_archive(archive, allow_links=True)
        path.unlink()
        kept.rename(path)
    whole(archive)


def test_nothing_is_written_through_links(archive: Path, outside: Path) -> None:
    (archive / "data.npy").rename(outside / "data.npy")
    (archive / "data.npy").symlink_to(outside / "data.npy")
    open_archive(archive, allow_links=True)
    for allow_links in (False, True):
        with pytest.raises(UnsafePathError, match=r"leads out.*nothing is written through"):
            open_archive(archive, writable=True, allow_links=allow_links)


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


@pytest.mark.filterwarnings("ignore:Failed to load SCDL header")
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


def test_a_text_that_every_row_repeats(archive: Path) -> None:
    file = feature_file(archive)
    n = pq.read_metadata(file).num_rows
    names = pq.read_schema(file).names
    pq.write_table(pa.table(dict.fromkeys(names, ["x" * (8 << 20)] * n)), file, compression="zstd")
    assert file.stat().st_size < 1 << 20
    with pytest.raises(CorruptDataError, match="texts of column"):
        whole(archive)


def test_pages_that_claim_more_than_the_footer(archive: Path) -> None:
    """The footer of a file may lie about what its pages decompress to; Arrow believes the pages."""
    file = feature_file(archive)
    n = pq.read_metadata(file).num_rows
    columns = {name: ["y"] * n for name in pq.read_schema(file).names}
    pq.write_table(
        pa.table({**columns, "more": ["z" * (2 << 20)] + [""] * (n - 1)}), file, compression="zstd"
    )
    check_pages(file, len(columns), [3 << 20])
    with pytest.raises(CorruptDataError, match=r"pages of column \d+ claim"):
        check_pages(file, len(columns), [1 << 20])
    raw, claim = file.read_bytes(), pq.read_metadata(file).row_group(0).column(len(columns))
    assert claim.total_uncompressed_size > 2 << 20
    for at in range(len(raw) - 8 - int.from_bytes(raw[-8:-4], "little"), len(raw) - 8):
        file.write_bytes(raw[:at] + b"\x7f" + raw[at + 1 :])
        try:
            check_pages(file, len(columns), [3 << 20])
        except CorruptDataError:
            continue


def test_rows_without_bytes(archive: Path) -> None:
    file = feature_file(archive)
    names, n = pq.read_schema(file).names, 40_000_000
    table = pa.table(dict.fromkeys(names, pa.nulls(n)))
    try:
        pq.write_table(table, file, row_group_size=n, max_rows_per_page=n, write_batch_size=n)
    except TypeError:
        pytest.skip("this release of Arrow makes small pages only")
    with pytest.raises(CorruptDataError, match="rows in"):
        whole(archive)


@pytest.mark.parametrize("kind", ["int", "text", "nested"])
def test_pages_are_found_where_they_lie(tmp_path: Path, kind: str) -> None:
    values: dict[str, list[Any]] = {
        "int": [1, None, 3],
        "text": ["a", None, "c"],
        "nested": [[1], None, [2, 3]],
    }
    table = pa.table({"first": [["x"]] * 300, "second": values[kind] * 100, "third": [1.0] * 300})
    for version, dictionary in (("1.0", True), ("2.0", True), ("2.0", False)):
        for codec in ("none", "zstd", "snappy", "gzip"):
            pq.write_table(
                table,
                tmp_path / "a.parquet",
                compression=codec,
                data_page_version=version,
                use_dictionary=dictionary,
                row_group_size=70,
                data_page_size=64,
            )
            frame = StoredFrame(tmp_path / "a.parquet")
            assert frame.arrow("second").to_pylist() == values[kind] * 100
            assert pa.concat_tables(frame.pieces()).equals(table)


def test_names_of_cells_are_bounded_too(archive: Path) -> None:
    file = archive / "names" / "obs.parquet"
    n = pq.read_metadata(file).num_rows
    pq.write_table(pa.table({"name": ["x" * (8 << 20)] * n}), file)
    with pytest.raises(CorruptDataError, match="texts of column"):
        read_obs_names(archive, n)
    pq.write_table(pa.table({"nume": ["x"] * n}), file)
    with pytest.raises(CorruptDataError, match="'name' is missing"):
        read_obs_names(archive, n)
    file.write_bytes(b"PAR1")
    with pytest.raises(CorruptDataError, match="parquet"):
        read_obs_names(archive, n)
