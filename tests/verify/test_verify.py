"""hbx-gpu verify finds damage of every kind, names the dataset that has it, and calls the others whole."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hbx_gpu import cli
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._verify import dataset as dataset_check
from hbx_gpu._verify import raw
from hbx_gpu._verify.dataset import Level, Stored
from hbx_gpu._verify.field_rows import FieldRows
from hbx_gpu._verify.stores import Verdict
from hbx_gpu._verify.stores import verify as check
from hbx_gpu.errors import ResourceError
from hbx_gpu.scdl import SingleCellMemMapDataset
from tests.executors import LostWorkers, Twice
from tests.security.stores import anndata, arrays, make_atlas, rewrite


def verify(path: Path, *options: str) -> int:
    return cli.main(["verify", str(path), *options])


def chunk_file(atlas: Path, name: str) -> Path:
    """The file with the chunks of an array of the first dataset."""
    (found,) = [path for path in arrays(atlas)[: len(arrays(atlas)) // 2] if str(path).endswith(name)]
    return found / "c" / "0"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("options", [(), ("--fast",), ("--full",), ("--threads", "1")])
@pytest.mark.parametrize("codec", ["hbx_gpu.rowpack", "homeobox.bitpacking", "zstd", "none"])
def test_a_whole_atlas(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codec: str, options: tuple[str, ...]
) -> None:
    assert verify(make_atlas(tmp_path / "a", codec), *options) == 0
    out = capsys.readouterr().out
    assert out.count("whole, 40 cells") == 2
    assert "2 whole, 0 damaged" in out


@pytest.mark.parametrize(
    ("damage", "found_fast"),
    [
        (lambda atlas: flip(chunk_file(atlas, "csr/indices"), 40), False),
        (lambda atlas: flip(chunk_file(atlas, "layers/counts"), 40), False),
        (lambda atlas: cut(chunk_file(atlas, "csr/indices")), True),
        (lambda atlas: chunk_file(atlas, "layers/counts").unlink(), True),
        (lambda atlas: flip(chunk_file(atlas, "csr/indices"), -1), True),  # of the shard's index
        (lambda atlas: (chunk_file(atlas, "csr/indices").parents[1] / "zarr.json").write_text("{"), True),
    ],
)
def test_a_damaged_dataset_is_named_and_the_other_is_whole(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    found_fast: bool,
) -> None:
    atlas = make_atlas(tmp_path / "a")
    damage(atlas)
    for options in ((), ("--full",)):
        assert verify(atlas, *options) == 1
        out = capsys.readouterr().out
        assert "1 whole, 1 damaged" in out
        assert "DAMAGED\n  " in out
    assert verify(atlas, "--fast") == int(found_fast)


def test_a_pointer_beyond_its_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas = make_atlas(tmp_path / "a")

    def beyond(record: dict[str, dict[str, int]]) -> None:
        record["gene_expression"]["end"] += 1_000_000

    rewrite(atlas, "cells", beyond)
    assert verify(atlas, "--fast") == 1
    assert "pointer beyond the array" in capsys.readouterr().out


def test_every_damaged_chunk_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas = make_atlas(tmp_path / "a")
    file = chunk_file(atlas, "csr/indices")
    middle = file.stat().st_size // 2
    flip(file, 40)
    flip(file, middle)
    assert verify(atlas) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(lines) == 2
    assert all("csr/indices" in line for line in lines)


def test_a_checksum_after_a_general_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas = make_atlas(tmp_path / "a", "zstd")
    flip(chunk_file(atlas, "layers/counts"), 40)
    assert verify(atlas) == 1
    out = capsys.readouterr().out
    assert "CRC32C is" in out
    assert "1 whole, 1 damaged" in out
    assert verify(atlas, "--fast") == 0


@pytest.mark.parametrize("form", ["h5ad", "zarr", "archive"])
def test_stores_without_checksums_are_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    data, path = anndata(1), tmp_path / f"store.{form}"
    if form == "zarr":
        data.write_zarr(path)
    else:
        data.write_h5ad(tmp_path / "store.h5ad")
    if form == "archive":
        SingleCellMemMapDataset(str(path), tmp_path / "store.h5ad")
    assert verify(path) == 0
    assert "whole, 40 cells" in capsys.readouterr().out
    if form == "archive":
        cut(path / "data.npy")
    elif form == "h5ad":
        with h5py.File(path, "r+") as file:
            file["X/indices"][3] = 10_000
    else:
        data.X.indices[3] = 10_000
        data.write_zarr(path)
    assert verify(path) == 1
    said = capsys.readouterr()
    assert ("data.npy" if form == "archive" else "a column number is outside [0, 30)") in said.out + said.err


def test_raw_chunks_are_looked_at_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are decoded only where something may be wrong with uncompressed chunks; then they say what."""
    decoded: list[int] = []
    content = dataset_check._content

    def counted(dataset: Stored, rows: np.ndarray, nbytes: int) -> tuple[list[str], int]:
        decoded.append(len(rows))
        return content(dataset, rows, nbytes)

    monkeypatch.setattr(dataset_check, "_content", counted)
    monkeypatch.setattr(dataset_check, "ROWS", 16)
    file, archive = tmp_path / "store.h5ad", tmp_path / "archive"
    anndata(1).write_h5ad(file)
    SingleCellMemMapDataset(str(archive), file)
    atlas = make_atlas(tmp_path / "a", "none")
    with ThreadPoolExecutor(2) as threads:
        for executor in (None, threads):
            for store in (archive, atlas, file):
                assert not any(verdict.damage for verdict in checked(store, "full", executor))
        assert not decoded
        flip(chunk_file(atlas, "layers/counts"), 40)
        with h5py.File(file, "r+") as opened:
            opened["X/indices"][3] = 30
        for store in (atlas, file):
            expected = checked(store, "full")
            assert any(verdict.damage for verdict in expected)
            assert checked(store, "full", threads) == expected
    assert decoded


@pytest.mark.parametrize(
    ("dtype", "values", "largest"), [("<u2", [3, 65_535, 0], 65_535), ("<i4", [3, -1, 0], 2**32 - 1)]
)
def test_the_largest_column_of_raw_chunks(dtype: str, values: list[int], largest: int) -> None:
    """Negative ones count as larger than any other; memory that follows itself is one stretch."""
    memory = np.array(values, dtype)
    address = memory.ctypes.data + np.arange(3, dtype=np.uint64) * np.uint64(memory.itemsize)
    nbytes = np.full(3, memory.itemsize)
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        assert raw.largest(address[order], nbytes[order], memory, memory.dtype) == largest
    assert raw.largest(address[:0], nbytes[:0], memory, memory.dtype) == -1


def test_several_modalities(homeobox_fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cite_multimodal", "all_spaces"):
        assert verify(homeobox_fixtures / name / "atlas", "--full") == 0
        out = capsys.readouterr().out
        assert "protein_abundance: whole" in out
    assert "image_tiles: whole" in out


def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path / "nothing") == 1
    assert "nothing" in capsys.readouterr().err
    assert verify(make_atlas(tmp_path / "a"), "--threads", "0") == 1
    assert "--threads must be at least 1" in capsys.readouterr().err


def checked(
    path: Path, level: Level, executor: Executor | None = None, said: list[int] | None = None
) -> list[Verdict]:
    said = [] if said is None else said
    return list(check(path, level, threads=2, progress=said.append, executor=executor))


def damage_nothing(_: Path) -> None:
    pass


def damage_chunks(atlas: Path) -> None:
    file = chunk_file(atlas, "csr/indices")
    for place in (40, file.stat().st_size // 2):
        flip(file, place)


def damage_places(atlas: Path) -> None:
    """Where the chunks of one array lie is not known, so that damage of the other does not count."""
    flip(chunk_file(atlas, "csr/indices"), -1)
    flip(chunk_file(atlas, "layers/counts"), 40)


@pytest.mark.parametrize("level", ["fast", "checksums", "full"])
@pytest.mark.parametrize("damage", [damage_nothing, damage_chunks, damage_places])
def test_any_executor_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: Level, damage: Callable[[Path], None]
) -> None:
    """Also in small shares, and where a task runs twice."""
    atlas = make_atlas(tmp_path / "a")
    damage(atlas)
    monkeypatch.setattr(dataset_check, "_CHUNKS", 1)
    monkeypatch.setattr(dataset_check, "ROWS", 16)
    here: list[int] = []
    expected = checked(atlas, level, None, here)
    assert any(verdict.damage for verdict in expected) == (
        damage is damage_places or (damage is damage_chunks and level != "fast")
    )
    with ThreadPoolExecutor(2) as threads:
        for executor in (threads, Twice()):
            there: list[int] = []
            assert checked(atlas, level, executor, there) == expected
            if damage is damage_nothing and level != "full":
                assert sum(there) == sum(here)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_worker_that_is_gone_is_no_damage(tmp_path: Path, at_once: bool) -> None:
    with pytest.raises(ResourceError, match="the process that worked on it is gone"):
        checked(make_atlas(tmp_path / "a"), "checksums", LostWorkers(at_once))


def test_workers_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas = make_atlas(tmp_path / "a")
    assert verify(atlas, "--threads", "2", "--workers", "2") == 1
    assert "--threads is for this process; leave it out with --workers" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas = make_atlas(tmp_path / "a")
    assert verify(atlas, "--workers", "2") == 0
    assert "2 whole, 0 damaged" in capsys.readouterr().out


def test_rows_are_dealt_to_their_groups(tmp_path: Path) -> None:
    """Rows read together give the datasets of queries, also where groups take turns in the table."""
    from hbx_gpu.atlas import Snapshot
    from hbx_gpu.atlas._query.obs import ModalityRows

    snapshot = Snapshot.open(make_atlas(tmp_path / "a"))
    pointer = snapshot.pointer_fields("cells")["gene_expression"]
    groups = sorted(snapshot.datasets()["zarr_group"])
    rows = FieldRows(snapshot, "cells", pointer)
    assert rows.dataset("no such group", ["counts"]) is None
    assert rows.queried("no such group", ["counts"]) is None
    for group in groups:
        dealt, queried = (make(group, ["counts"]) for make in (rows.dataset, rows.queried))
        assert isinstance(dealt, CellDataset)
        assert isinstance(queried, CellDataset)
        assert np.array_equal(dealt.needed_chunks(), queried.needed_chunks())
        batch, expected = (data.read_rows([np.arange(40)])[0] for data in (dealt, queried))
        assert np.array_equal(batch.indices, expected.indices)
        assert np.array_equal(batch.values, expected.values)

    found = rows._found
    assert isinstance(found, ModalityRows)
    turns = np.arange(80).reshape(2, 40).T.ravel()[np.r_[0:3, 5:80]]
    mixed = FieldRows(snapshot, "cells", pointer)
    vars(mixed)["_found"] = replace(found, rows=found.rows.at(turns))
    for number, group in enumerate(groups):
        assert np.array_equal(mixed._rows_of(group), np.flatnonzero(turns // 40 == number))

    vars(mixed)["_found"] = None  # the table cannot be read as a whole
    one = mixed.dataset(groups[1], ["counts"])
    assert one is not None
    assert len(one) == 40
