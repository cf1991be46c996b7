"""The first moments of an atlas: two writers at once, one that is killed, one whose file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbx_gpu import cli
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
from hbx_gpu.atlas._catalog import creation, tables
from hbx_gpu.atlas._catalog.journal import FOLDER
from hbx_gpu.atlas._catalog.lock import WriteLock
from hbx_gpu.errors import AtlasError, AtlasLockedError
from hbx_gpu.synthetic import write_demo_pair


class Killed(BaseException):
    """What happens to a process that is killed, as far as files are concerned."""


@pytest.mark.parametrize("step", range(6))
def test_a_killed_creation_is_known_as_such_and_made_anew(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    real = tables.ensure_table

    def dying(*args: object) -> object:
        nonlocal made
        if made == step:
            if step % 2:  # the folder of a table is there, and nothing usable in it
                (tmp_path / "a" / "lance_db" / f"{args[1]}.lance").mkdir(parents=True, exist_ok=True)
            raise Killed
        made += 1
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "ensure_table", dying)
    with pytest.raises(Killed) if step < 5 else pytest.MonkeyPatch.context():
        create_or_open_atlas(tmp_path / "a")
    monkeypatch.setattr(tables, "ensure_table", real)
    if step < 5 and (tmp_path / "a" / "lance_db").is_dir():
        with pytest.raises(AtlasError, match="was interrupted, and nothing is in it"):
            RaggedAtlas.open(tmp_path / "a")
    atlas = create_or_open_atlas(tmp_path / "a")
    assert atlas.obs_tables == ["cells"]
    assert not creation.is_unfinished(tmp_path / "a")
    assert RaggedAtlas.open(tmp_path / "a").obs_tables == ["cells"]


def test_the_command_goes_on_where_a_first_ingest_was_killed(tmp_path: Path) -> None:
    write_demo_pair(tmp_path, n_obs=(20, 20), n_vars=10)
    (file, *_) = sorted(tmp_path.glob("*.h5ad"))
    root = tmp_path / "a"
    (root / FOLDER).mkdir(parents=True)
    (root / "lance_db").mkdir()
    (root / FOLDER / "making").touch()
    assert cli.main(["ingest", str(file), "--atlas", str(root)]) == 0
    assert RaggedAtlas.checkout_latest(root).query().count() == 20


def test_whoever_comes_while_an_atlas_is_made_is_told_who_makes_it(tmp_path: Path) -> None:
    root = tmp_path / "a"
    (root / FOLDER).mkdir(parents=True)
    (root / "lance_db").mkdir()
    (root / FOLDER / "making").touch()
    with WriteLock(root).hold():
        for enter in (RaggedAtlas.open, create_or_open_atlas):
            with pytest.raises(AtlasLockedError, match="another writer holds the atlas"):
                enter(root)
    assert create_or_open_atlas(root).obs_tables == ["cells"]


def test_a_refused_first_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.h5ad").write_bytes(b"nothing")
    assert cli.main(["ingest", str(tmp_path / "bad.h5ad"), "--atlas", str(tmp_path / "a")]) == 1
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").touch()
    assert cli.main(["ingest", str(tmp_path / "bad.h5ad"), "--atlas", str(tmp_path / "b")]) == 1
    assert (tmp_path / "b" / "notes.txt").exists()
