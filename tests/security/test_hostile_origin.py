"""What an atlas keeps of the archive that it was made of is as foreign as the atlas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hbx_gpu import cli
from hbx_gpu.errors import CorruptDataError, UnsafePathError
from hbx_gpu.scdl import SingleCellMemMapDataset
from hbx_gpu.scdl._atlases import origin
from hbx_gpu.scdl._writing.writer import read_metadata
from tests.security.stores import anndata, content
from tests.security.test_hostile_store import make, move_out


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas made of an archive."""
    place = tmp_path_factory.mktemp("converted")
    anndata(1).write_h5ad(place / "a.h5ad")
    assert cli.main(["convert", str(place / "a.h5ad"), str(place / "archive")]) == 0
    assert cli.main(["convert", str(place / "archive"), str(place / "atlas")]) == 0
    assert cli.main(["convert", str(place / "atlas"), str(place / "again")]) == 0
    return place / "atlas"


@pytest.fixture
def kept(converted: Path, tmp_path: Path) -> Path:
    """The folder with the parts of the archive, in a copy of the atlas."""
    return Path(shutil.copytree(converted, tmp_path / "atlas")) / origin.FOLDER


@pytest.mark.parametrize("place", ["", "origin.json", "var_features", "obs_features/dataframe_0.parquet"])
def test_links_out_of_what_is_kept(kept: Path, outside: Path, tmp_path: Path, place: str) -> None:
    move_out(kept / place, outside)
    before = content(outside)
    with pytest.raises(UnsafePathError, match=r"leads out of .*, to .*outside"):
        origin.find(kept.parent, 0)
    convert = ["convert", str(kept.parent), str(tmp_path / "archive")]
    assert cli.main(convert) == 1
    assert cli.main([*convert, "--allow-links"]) == 0
    assert len(SingleCellMemMapDataset(tmp_path / "archive")) == 40
    assert content(outside) == before


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_not_a_file_of_what_is_kept(kept: Path, kind: str) -> None:
    for path in sorted(p for p in kept.rglob("*") if p.is_file()):
        path.rename(path.with_name("moved"))
        make(kind, path)
        with pytest.raises(UnsafePathError, match=f"{path.name} (is a|leads out)"):
            origin.find(kept.parent, 0)
        path.unlink()
        path.with_name("moved").rename(path)
    assert origin.find(kept.parent, 0) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("snapshot", "0"),
        ("snapshot", 2**70),
        ("n_rows", -1),
        ("n_rows", None),
        ("n_columns", 0),
        ("n_columns", 2**70),
        ("n_columns", 1e300),
        ("n_columns", "x"),
        ("data_dtype", "O"),
        ("data_dtype", ["u1"]),
        ("data_dtype", "x" * 100_000),
        ("layer", 7),
        ("another", 7),
    ],
)
def test_a_record_that_was_changed(kept: Path, name: str, value: Any) -> None:
    file = kept / "origin.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(CorruptDataError, match=r"origin\.json is damaged.*Remove the folder") as caught:
        origin.find(kept.parent, 0)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["[" * 100_000, "[1, 2]", "7", "\xff"])
def test_metadata_that_are_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "metadata.json").write_text(text, encoding="latin-1")
    assert read_metadata(tmp_path) == {}
