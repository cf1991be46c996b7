"""Archives joined into one: rows, genes, cells, neighbors, dtypes, and what must not happen on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl._format.archive import open_archive
from hbx_gpu.scdl._format.values import Tolerance, widest
from hbx_gpu.scdl._writing.concat import concat_archives
from tests import npz
from tests.scdl.files import content, counts, leftovers, make

GOOD = [
    "single_f32",
    "uint16_counts",
    "ragged_two",
    "neighbors",
    "empty_rows",
    "raw_default",
    "ragged_ten",
    "stale_cast",
    "stale_cast_same_width",
    "stale_lengths",
    "unsorted_columns",
    "merge_blocks",
    "index_only",
    "legacy_v012",
    "legacy_v007",
    "legacy_v007_float64",
    "labels_json",
]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_real_archive_keeps_its_rows(shared: Path, tmp_path: Path, name: str) -> None:
    real = shared / "fixtures" / "scdl" / name
    expected = npz.load(real / "expected.npz")
    concat_archives([real / "archive"] * 2, tmp_path / "a", copy_size=7)
    archive = open_archive(tmp_path / "a")
    n = int(expected["row_ptr"][-1])
    assert archive.indptr.tolist() == [*expected["row_ptr"], *(expected["row_ptr"][1:] + n)]
    assert archive.indices.tolist() == [*expected["col_idx"]] * 2
    np.testing.assert_array_equal(archive.data, np.tile(expected["values"], 2))
    # No row lost its genes or its columns.
    before, after = content(real / "archive"), content(tmp_path / "a")
    assert _frames_by_row(after, "obs") == _frames_by_row(before, "obs") * 2
    assert after["var"][: len(before["var"])] == before["var"]
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"header.sch", "metadata.json", "version.json", "var_features", "obs_features"} <= names
    for folder in ("var_features", "obs_features"):
        np.load(tmp_path / "a" / folder / "labels.npy", allow_pickle=False)


def _frames_by_row(found: dict[str, Any], kind: str) -> list[Any]:
    rows = []
    for frame in found[kind]:
        columns = sorted(frame)
        rows += [tuple((c, _comparable(frame[c][i])) for c in columns) for i in range(len(frame[columns[0]]))]
    return rows


def _comparable(value: Any) -> Any:
    return None if value != value else value


def test_rows_genes_and_cells(tmp_path: Path) -> None:
    same = make(tmp_path, "one", cells="x")
    also = make(tmp_path, "three", seed=2, cells="y")
    other = make(tmp_path, "other", x=counts(3, 300), genes="h", cells="z")
    parts = [content(p) for p in (same, also, other)]
    concat_archives([same, also, other], tmp_path / "a")
    found = content(tmp_path / "a")
    assert found["rows"] == [row for part in parts for row in part["rows"]]
    assert found["bounds"] == [0, 10, 13]
    assert found["var"] == [parts[0]["var"][0], parts[2]["var"][0]]
    assert found["genes"] == [parts[0]["genes"][0], parts[2]["genes"][0]]
    assert found["cells"] == [name for part in parts for name in part["cells"]]
    (obs,) = found["obs"]
    assert obs["text"] == [text for part in parts for text in part["obs"][0]["text"]]
    assert found["dtypes"] == ["float32", "uint16", "uint8"]
    sources: Any = open_archive(tmp_path / "a").metadata["sources"]
    assert [s["rows"] for s in sources] == [5, 5, 3]


def test_onto_itself(tmp_path: Path) -> None:
    path = make(tmp_path, "one")
    before = content(path)
    (path / "notes.txt").write_text("mine")
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps({**metadata, "mine": 1}))
    concat_archives([path, path], path, overwrite=True)
    assert content(path)["rows"] == before["rows"] * 2
    # What others put into the folder stays.
    assert (path / "notes.txt").read_text() == "mine"
    assert open_archive(path).metadata["mine"] == 1
    assert open_archive(path).metadata["num_rows"] == 10
    assert not leftovers(tmp_path)


def test_neighbors_move_with_their_rows(tmp_path: Path) -> None:
    parts = [make(tmp_path, "a1", near=True), make(tmp_path, "without"), make(tmp_path, "a2", near=True)]
    concat_archives(parts, tmp_path / "a", copy_size=2)
    found = content(tmp_path / "a")["neighbors"]
    one = content(parts[0])["neighbors"]
    assert found[:5] == one
    assert found[5:10] == [([], [])] * 5
    assert found[10:] == [([n + 10 for n in near], weights) for near, weights in one]


def test_neighbors_of_other_rows_are_left_out(tmp_path: Path) -> None:
    path = make(tmp_path, "a1", near=True)
    pointers = np.fromfile(path / "neighbor_indptr.npy", "u8")
    pointers[:-1].tofile(path / "neighbor_indptr.npy")
    with pytest.warns(UserWarning, match="Neighbors are left out"):
        concat_archives([path], tmp_path / "a")
    assert open_archive(tmp_path / "a").neighbors is None


@pytest.mark.parametrize("copy_size", [1, 3, 10**6])
def test_copy_size_changes_nothing(tmp_path: Path, copy_size: int) -> None:
    parts = [make(tmp_path, "p1"), make(tmp_path, "part2")]
    concat_archives(parts, tmp_path / "a", copy_size=copy_size)
    concat_archives(parts, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.filterwarnings("ignore:.* X holds counts with fractions")
def test_dtypes(tmp_path: Path) -> None:
    x = counts(5, 4, seed=1)
    small, wide = make(tmp_path, "s", x=x, dtype="uint8"), make(tmp_path, "w", x=x, dtype="uint32")
    floats = make(tmp_path, "f", x=x * 0.5, dtype="float64")
    concat_archives([small, wide], tmp_path / "a")
    assert content(tmp_path / "a")["dtypes"][0] == "uint32"
    for parts in ([small, floats], [floats, small]):
        with pytest.raises(ValueError, match=r"mix of int and float.*uint8.*float64"):
            concat_archives(parts, tmp_path / "b")
    concat_archives([small, floats], tmp_path / "b", data_dtype="auto")
    assert content(tmp_path / "b")["dtypes"][0] == "float32"
    assert open_archive(tmp_path / "b").data.tolist() == [*x.data, *(x.data * 0.5)]
    with pytest.raises(InvalidDataError, match="allow_loss"):
        concat_archives([small, floats], tmp_path / "c", data_dtype="uint8")
    assert not (tmp_path / "c").exists()
    concat_archives([small, floats], tmp_path / "c", data_dtype="uint8", tolerance=Tolerance(0.5))
    assert content(tmp_path / "c")["dtypes"][0] == "uint8"


def test_signed_values_of_old_releases_count_as_integers() -> None:
    assert widest([np.dtype("i8"), np.dtype("u2")]) == np.uint64
    with pytest.raises(ValueError, match="mix of int and float"):
        widest([np.dtype("i4"), np.dtype("f4")])


def test_pointers_of_any_width_join(shared: Path, tmp_path: Path) -> None:
    # SCDL empties `row_ptr.npy` of the first one here: wider pointers than needed.
    old = shared / "fixtures" / "scdl" / "legacy_v012" / "archive"
    new = make(tmp_path, "new", x=counts(3, 2))
    for parts in ([old, new], [new, old]):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        concat_archives(parts, tmp_path / "a")
        found = content(tmp_path / "a")
        assert found["rows"] == [row for part in parts for row in content(part)["rows"]]
        # The old one has no cell columns; the rows of the new one keep theirs.
        assert found["dtypes"] == ["float32", "uint32", "uint8"]
        obs = open_archive(tmp_path / "a").obs
        assert obs is not None
        first = 0 if parts[0] is new else open_archive(old).n_rows
        assert [obs.lookup(first + i, ["text"])[0] for i in range(3)] == [["t0"], ["t1"], ["t2"]]


def test_destroy_removes_the_parts_in_the_end(tmp_path: Path) -> None:
    parts = [make(tmp_path, "p1"), make(tmp_path, "part2")]
    (parts[1] / "data.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data\.npy"):
        concat_archives(parts, tmp_path / "a", destroy=True)
    assert parts[0].exists()
    shutil.rmtree(parts[1])
    parts[1] = make(tmp_path, "part2")
    concat_archives(parts, parts[0], overwrite=True, destroy=True)
    assert open_archive(parts[0]).n_rows == 10
    assert not parts[1].exists()


def test_refusals(tmp_path: Path) -> None:
    path = make(tmp_path, "p1")
    with pytest.raises(ValueError, match="at least one archive"):
        concat_archives([], tmp_path / "a")
    with pytest.raises(FileExistsError):
        concat_archives([path], path)
    with pytest.raises(ValueError, match="Invalid data_dtype"):
        concat_archives([path], tmp_path / "a", data_dtype="int8")
    with pytest.raises(FileNotFoundError):
        concat_archives([tmp_path / "nope"], tmp_path / "a")
    assert not leftovers(tmp_path)
