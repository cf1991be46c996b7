"""An atlas from elsewhere reaches, removes and rewrites nothing outside of itself, and waits for nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu import cli
from hbx_gpu._bench.settings import open_dataset
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
from hbx_gpu.atlas._catalog.journal import IngestNote, Journal, RepackNote
from hbx_gpu.errors import AtlasError, HbxError, UnsafePathError
from tests.security.stores import anndata, arrays, content, edit, move_group, read, rewrite


def commands(root: Path, folder: Path) -> dict[str, list[str]]:
    """Everything that the command line does to an atlas."""
    file = folder / "new.h5ad"
    if not file.exists():
        anndata(3).write_h5ad(file)
    return {
        "ingest": ["ingest", str(file), "--atlas", str(root)],
        "repack": ["repack", str(root), "--codec", "zstd"],
        "info": ["info", str(root)],
        "convert": ["convert", str(root), str(folder / "archive")],
    }


def note(root: Path, kind: str, name: str, fields: dict[str, Any]) -> None:
    """Plant a note as its writer would have named and signed it."""
    folder = root / ".hbx_gpu"
    folder.mkdir(exist_ok=True)
    signed = {"format": 2, "atlas": Journal(root)._uid()} | fields
    (folder / f"{kind}-{name}.json").write_text(json.dumps(signed))


INGEST = {
    "staging": "x",
    "obs_table": "cells",
    "dataset_uids": [],
    "groups": [],
    "new_columns": {},
    "replaces": [],
    "new_registries": [],
}
GROUP = {
    "zarr_group": "a/b",
    "feature_space": "gene_expression",
    "field_name": "gene_expression",
    "layout_uid": "",
    "new_features": [],
}


@pytest.mark.parametrize("command", ["ingest", "repack"])
@pytest.mark.parametrize("kind", ["ingest", "repack"])
@pytest.mark.parametrize("where", ["absolute", "relative", "dots", "nested"])
@pytest.mark.parametrize("signed", [True, False])
def test_folders_that_notes_name(
    atlas: Path, outside: Path, tmp_path: Path, kind: str, command: str, where: str, signed: bool
) -> None:
    staging = {
        "absolute": str(outside),
        "relative": "../../../outside",
        "dots": "..",
        "nested": "x/../../../../outside",
    }[where]
    (atlas / "zarr_store" / ".staging" / "x").mkdir(parents=True)
    fields = INGEST | {"staging": staging} if kind == "ingest" else {"staging": staging, "zarr_group": "/"}
    if signed:
        note(atlas, kind, "x", fields)
    else:
        (atlas / ".hbx_gpu" / f"{kind}-x.json").write_text(json.dumps(fields))
    before, stored = content(outside), content(atlas / "zarr_store")
    assert cli.main(commands(atlas, tmp_path)[command]) == 1
    assert content(outside) == before
    assert content(atlas / "zarr_store") == stored


@pytest.mark.parametrize(
    "fields",
    [
        {"groups": [GROUP | {"zarr_group": "../../outside"}]},
        {"groups": [GROUP | {"zarr_group": "/etc"}]},
        {"groups": [GROUP | {"field_name": "a` = 1 OR `b"}]},
        {"groups": [GROUP | {"zarr_group": 7}]},
        {"groups": "all"},
        {"new_registries": ["cells"]},
        {"new_registries": ["gene_registry"]},
        {"new_registries": ["datasets"]},
        {"new_registries": ["_feature_layouts"]},
        {"new_registries": ["../../outside"]},
        {"new_columns": {"cells": ["cell_type"]}},
        {"new_columns": {"cells": ["uid"]}},
        {"new_columns": {"../../outside": ["x"]}},
        {"obs_table": "../../outside"},
        {"obs_table": "datasets"},
        {"atlas": "another"},
        {"format": 3},
        {"staging": "y"},
        {"dataset_uids": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["ingest", "repack"])
def test_what_else_notes_name(
    atlas: Path, outside: Path, tmp_path: Path, fields: dict[str, Any], command: str
) -> None:
    note(atlas, "ingest", "x", INGEST | fields)
    before, expected = content(outside), read(atlas)
    assert cli.main(commands(atlas, tmp_path)[command]) == 1
    assert content(outside) == before
    for mine, true in zip(read(atlas), expected, strict=True):
        np.testing.assert_array_equal(mine, true)


def test_a_group_of_a_snapshot_is_not_undone(atlas: Path) -> None:
    name = RaggedAtlas.open(atlas).catalog.dataset_rows()[0]["zarr_group"]
    note(atlas, "ingest", "x", INGEST | {"groups": [GROUP | {"zarr_group": name, "field_name": "other"}]})
    with pytest.raises(AtlasError, match=r"is part of a snapshot.*Nothing was changed"):
        RaggedAtlas.open(atlas)
    read(atlas)


def test_notes_of_ours_are_believed(atlas: Path) -> None:
    journal = Journal(atlas)
    ours = (IngestNote("abc", "cells"), RepackNote("a/b", "def"))
    for one in ours:
        journal.write(one)
    assert [*journal.notes(), *journal.repacks()] == [*ours]
    journal.remove(ours[1])
    RaggedAtlas.open(atlas)
    assert not journal.notes()


@pytest.mark.parametrize("kind", ["fifo", "device", "huge", "nested", "list", "folder"])
def test_notes_that_are_no_notes(atlas: Path, kind: str) -> None:
    path = atlas / ".hbx_gpu" / "ingest-x.json"
    plant(kind, path)
    with pytest.raises(HbxError):
        RaggedAtlas.open(atlas)


def plant(kind: str, path: Path) -> None:
    """Put something else in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_text("[]" if kind == "list" else "[" * 100_000)


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "lock": lambda root, to: link(root / ".hbx_gpu" / "lock", to / "thesis.txt"),
    "notes": lambda root, to: link(root / ".hbx_gpu", to),
    "staging": lambda root, to: link(root / "zarr_store" / ".staging", to),
    "new config": lambda root, to: link(root / "hbx_gpu.json.new", to / "thesis.txt"),
    "store": lambda root, to: link(root / "zarr_store", to),
    "database": lambda root, to: link(root / "lance_db", to),
    "table": lambda root, to: link(root / "lance_db" / "cells.lance", to),
    "snapshots": lambda root, to: link(root / ".hbx_gpu" / "snapshots", to),
    "group": lambda root, to: link(arrays(root)[0].parents[1], to),
    "array": lambda root, to: link(arrays(root)[0], to),
    "chunks": lambda root, to: link(arrays(root)[0] / "c", to),
}


def link(path: Path, to: Path) -> None:
    """A link in the place of a file or folder, whose content moves to where it leads."""
    if path.is_dir():
        for entry in path.iterdir():
            shutil.move(entry, to)
        path.rmdir()
    path.unlink(missing_ok=True)
    path.symlink_to(to)


@pytest.mark.parametrize("planted", LINKS)
@pytest.mark.parametrize("command", ["ingest", "repack", "info", "convert"])
def test_links_that_lead_out(atlas: Path, outside: Path, tmp_path: Path, planted: str, command: str) -> None:
    if command == "ingest":
        note(atlas, "repack", "deep", {"staging": "deep", "zarr_group": "a/b"})
    LINKS[planted](atlas, outside)
    (outside / "victim.new").write_text("alive")
    before = content(outside)
    code = cli.main(commands(atlas, tmp_path)[command])
    assert content(outside) == before
    # Reading needs none of the first four; what only looks at a group leaves it alone and says so.
    may_succeed = planted in (
        "lock",
        "notes",
        "staging",
        "new config",
        "snapshots",
        "group",
        "array",
        "chunks",
    )
    assert code == 1 or may_succeed
    if command == "convert" and planted in ("group", "array", "chunks", "store", "database", "table"):
        assert code == 1


def test_links_are_followed_where_asked_for(atlas: Path, outside: Path) -> None:
    expected = read(atlas)
    LINKS["group"](atlas, outside)
    with pytest.raises(UnsafePathError, match="allow_links=True"):
        read(atlas)
    for mine, true in zip(read(atlas, allow_links=True), expected, strict=True):
        np.testing.assert_array_equal(mine, true)


@pytest.mark.parametrize("planted", ["store", "table"])
def test_commands_follow_links_where_asked_for(
    atlas: Path, outside: Path, tmp_path: Path, planted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    LINKS[planted](atlas, outside)
    arguments = commands(atlas, tmp_path) | {
        "bench": ["bench", str(atlas)],
        "remove": ["remove", str(atlas), "new.h5ad"],
    }
    for name in ("info", "convert", "bench", "ingest", "repack", "remove"):
        before = content(outside)
        assert cli.main(arguments[name]) == 1
        told = capsys.readouterr().err
        assert "leads out of" in told
        assert "pass --allow-links\n" in told
        assert content(outside) == before
        if name == "bench":  # which measures for too long
            assert len(open_dataset(atlas, allow_links=True)) == 80
            continue
        assert cli.main([*arguments[name], "--allow-links"]) == 0, capsys.readouterr().err
        capsys.readouterr()
    read(atlas, allow_links=True)


def test_repack_leaves_linked_groups_alone_in_any_case(
    atlas: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LINKS["array"](atlas, outside)
    before = content(outside)
    assert cli.main(["repack", str(atlas), "--codec", "zstd", "--allow-links"]) == 0
    told = capsys.readouterr().out
    assert "repack rewrites only what lies in the store" in told
    assert "allow" not in told
    assert content(outside) == before


@pytest.mark.parametrize("planted", ["lock", "notes", "staging"])
def test_no_option_writes_through_a_link(
    atlas: Path, outside: Path, tmp_path: Path, planted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if planted == "staging":
        (atlas / "zarr_store" / ".staging").mkdir(exist_ok=True)
    LINKS[planted](atlas, outside)
    before = content(outside)
    assert cli.main([*commands(atlas, tmp_path)["ingest"], "--allow-links"]) == 1
    told = capsys.readouterr().err
    assert "put what it leads to in its place" in told
    assert "pass" not in told
    assert content(outside) == before


@pytest.mark.parametrize("name", ["../../outside/gene_expression", "/etc", "a/../b", ".staging/x", "a//b"])
def test_names_of_groups_that_lead_out(atlas: Path, outside: Path, tmp_path: Path, name: str) -> None:
    move_group(atlas, outside / "moved", name)
    before = content(outside)
    with pytest.raises(HbxError, match="zarr_group"):
        read(atlas)
    for command in ("repack", "info"):
        assert cli.main(commands(atlas, tmp_path)[command]) == 1
    assert content(outside) == before


@pytest.mark.parametrize(
    "change",
    [
        {"dataset_table_name": "../../outside"},
        {"dataset_table_name": "/etc"},
        {"dataset_table_version": -1},
        {"obs_table_versions": '{"../../outside": 1}'},
        {"obs_table_versions": '{"cells": 18446744073709551616}'},
        {"obs_table_versions": '{"cells": "1"}'},
        {"obs_table_versions": "[" * 100_000},
        {"obs_table_versions": "[]"},
        {"obs_table_versions": "nonsense"},
        {"registry_table_names": '{"gene_expression": "../../outside"}'},
        {"registry_table_names": '{"gene_expression": ["x"]}'},
    ],
    ids=lambda change: str(change)[:60],
)
def test_records_of_snapshots_that_lead_out(atlas: Path, change: dict[str, Any]) -> None:
    rewrite(atlas, "atlas_versions", lambda row: row.update(change))
    with pytest.raises(HbxError):
        read(atlas)
    with pytest.raises(HbxError):
        RaggedAtlas.open(atlas)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 100_000,
        '{"obs_tables": 7}',
        '{"obs_tables": ["../../outside"], "dataset_table": "datasets", "registries": {}}',
        '{"dataset_table": "../../outside", "obs_tables": [], "registries": {}}',
        '{"version_table": 7}',
        '{"codec": "rm -rf"}',
    ],
    ids=lambda text: text[:40],
)
def test_our_own_file(atlas: Path, text: str) -> None:
    (atlas / "hbx_gpu.json").write_text(text)
    with pytest.raises(HbxError, match=r"hbx_gpu\.json"):
        RaggedAtlas.open(atlas)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "huge", "nested", "list"])
@pytest.mark.parametrize("place", ["zarr.json", "chunk", "hbx_gpu.json", "manifest", "data", "snapshot"])
def test_what_is_not_a_file(atlas: Path, kind: str, place: str) -> None:
    path = {
        "zarr.json": arrays(atlas)[0] / "zarr.json",
        "chunk": arrays(atlas)[0] / "c" / "0",
        "hbx_gpu.json": atlas / "hbx_gpu.json",
        "manifest": min((atlas / "lance_db" / "cells.lance" / "_versions").glob("*.manifest")),
        "data": next((atlas / "lance_db" / "cells.lance" / "data").glob("*")),
        "snapshot": atlas / ".hbx_gpu" / "snapshots" / "0.json",
    }[place]
    plant(kind, path)
    if place != "hbx_gpu.json" and not (place in ("manifest", "data") and kind in ("folder", "huge")):
        with pytest.raises(HbxError):
            read(atlas)
    if place == "hbx_gpu.json":
        with pytest.raises(HbxError):
            RaggedAtlas.open(atlas)


def zarr_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        for array in arrays(root):
            edit(array / "zarr.json", change)

    return apply


def chunks(document: dict[str, Any], *shape: int, inner: int | None = None) -> None:
    document["chunk_grid"]["configuration"]["chunk_shape"] = list(shape)
    if inner is not None:
        document["codecs"][0]["configuration"]["chunk_shape"] = [inner]


def shaped(document: dict[str, Any], k: int) -> None:
    document["shape"] = [1 << k]


def of_70_axes(document: dict[str, Any]) -> None:
    document["shape"] = [1] * 70
    chunks(document, *[1] * 70)


METADATA: dict[str, Callable[[Path], None]] = {
    **{f"shape 2^{k}": zarr_json(partial(shaped, k=k)) for k in (40, 45, 56, 62, 63, 64, 4000)},
    "outer chunk x 2^32": zarr_json(lambda d: chunks(d, 256 << 32)),
    "outer chunk x 2^20": zarr_json(lambda d: chunks(d, 256 << 20)),
    "inner chunk 2^40": zarr_json(lambda d: chunks(d, 1 << 40, inner=1 << 40)),
    "70 axes": zarr_json(of_70_axes),
    "float index": zarr_json(lambda d: d.update(data_type="float64")),
    "separator": zarr_json(lambda d: d["chunk_key_encoding"].update(configuration={"separator": "/../"})),
    "long integer": zarr_json(lambda d: d.update(fill_value=10**4299)),
}


@pytest.mark.parametrize("name", METADATA)
def test_impossible_metadata(atlas: Path, name: str) -> None:
    METADATA[name](atlas)
    with pytest.raises(HbxError):
        read(atlas)


def planted_staging(root: Path, outside: Path) -> None:
    """A folder of unfinished files that lies outside, where an interrupted repack would have left a group."""
    (root / "zarr_store" / ".staging").mkdir()
    (root / "zarr_store" / ".staging" / "x").symlink_to(outside)
    (outside / "replaced").mkdir()
    (outside / "replaced" / "zarr.json").write_text("{}")
    note(root, "repack", "x", {"staging": "x", "zarr_group": "a"})


def planted_parent(root: Path, outside: Path) -> None:
    (root / "zarr_store" / "p").symlink_to(outside)
    note(root, "ingest", "x", INGEST | {"groups": [GROUP | {"zarr_group": "p/deep"}]})


def hard_link(name: str) -> Callable[[Path, Path], None]:
    def plant(root: Path, outside: Path) -> None:
        (root / name).unlink(missing_ok=True)
        os.link(outside / "thesis.txt", root / name)

    return plant


HIDDEN: dict[str, tuple[Callable[[Path, Path], None], bool]] = {
    "staging that is a link": (planted_staging, False),
    "group below a link": (planted_parent, False),
    "hard link to the lock": (hard_link(".hbx_gpu/lock"), False),
    "hard link to a note": (hard_link(".hbx_gpu/ingest-x.json"), False),
    "hard link to the names": (hard_link("hbx_gpu.json.new"), True),
    "hard link to the next snapshot": (hard_link(".hbx_gpu/snapshots/1.json"), True),
}


@pytest.mark.parametrize("planted", HIDDEN)
@pytest.mark.parametrize("options", [[], ["--allow-links"]], ids=["", "allow links"])
def test_what_a_writer_would_reach(
    atlas: Path, outside: Path, tmp_path: Path, planted: str, options: list[str]
) -> None:
    plant, succeeds = HIDDEN[planted]
    plant(atlas, outside)
    before = content(outside)
    assert (cli.main([*commands(atlas, tmp_path)["ingest"], *options]) == 0) == succeeds
    assert content(outside) == before


def test_an_unfinished_atlas_that_leads_out(atlas: Path, outside: Path) -> None:
    (atlas / "hbx_gpu.json").unlink()
    (atlas / ".hbx_gpu" / "making").symlink_to(outside / "made")
    link(atlas / "lance_db", outside)
    before = content(outside)
    with pytest.raises(HbxError):
        create_or_open_atlas(atlas, pointer_fields={"gene_expression": "gene_expression"})
    assert content(outside) == before
    assert not (outside / "made").exists()


def test_a_new_atlas_writes_into_no_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "zarr_store").symlink_to(outside)
    before = content(outside)
    with pytest.raises(UnsafePathError, match="allow_links=True"):
        create_or_open_atlas(tmp_path / "new")
    assert content(outside) == before
    create_or_open_atlas(tmp_path / "new", allow_links=True)
    assert (outside / "zarr.json").exists()


@pytest.mark.parametrize("kind", ["fifo", "file"])
@pytest.mark.parametrize("place", [".hbx_gpu", ".hbx_gpu/snapshots", "zarr_store/.staging"])
def test_what_is_not_a_folder(atlas: Path, place: str, kind: str) -> None:
    shutil.rmtree(atlas / place, ignore_errors=True)
    if kind == "fifo":
        os.mkfifo(atlas / place)
    else:
        (atlas / place).write_text("x")

    def write() -> None:
        opened = RaggedAtlas.open(atlas)
        opened.add_from_anndata(anndata(3))
        opened.optimize()
        opened.snapshot()

    with pytest.raises(UnsafePathError, match="folder"):
        write()


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800", "x/" * 600 + "x", "a\nb"], ids=ascii)
@pytest.mark.parametrize("kind", ["ingest", "repack"])
def test_names_that_no_file_has(atlas: Path, name: str, kind: str) -> None:
    fields = INGEST | {"groups": [GROUP | {"zarr_group": name}]}
    note(atlas, kind, "x", fields if kind == "ingest" else {"staging": "x", "zarr_group": name})
    with pytest.raises(AtlasError, match="zarr_group"):
        RaggedAtlas.open(atlas)


@pytest.mark.parametrize(
    "name", ["a\0b", "data/" + "a" * 5000, "data/..", "/etc/passwd", "_versions/../x"], ids=ascii
)
def test_files_that_a_manifest_names(atlas: Path, name: str) -> None:
    def rename(document: dict[str, Any]) -> None:
        for version in document["tables"]["cells"]:
            document["tables"]["cells"][version] = {name: [1, "x"]}

    edit(atlas / ".hbx_gpu" / "snapshots" / "0.json", rename)
    with pytest.raises(AtlasError, match="is not the manifest of a snapshot"):
        read(atlas)


@pytest.mark.parametrize("index", [(1 << 31) - 1, 1 << 26])
def test_an_index_far_beyond_all_features(atlas: Path, index: int) -> None:
    rewrite(
        atlas, "gene_registry", lambda row: row.update(global_index=index) if row["uid"] == "g3" else None
    )
    with pytest.raises(AtlasError, match="global_index"):
        read(atlas)


def test_features_that_are_missing_are_an_error(atlas: Path) -> None:
    rewrite(atlas, "gene_registry", lambda row: row.update(uid=row["uid"] + "x" * (row["uid"] == "g3")))
    with pytest.raises(AtlasError, match=r"not in the registry of 'gene_expression'.*g3"):
        read(atlas)


def test_a_changed_list_of_features_is_an_error(atlas: Path) -> None:
    swap = {"g3": "g4", "g4": "g3"}
    rewrite(
        atlas,
        "_feature_layouts",
        lambda row: row.update(feature_uid=swap.get(row["feature_uid"], row["feature_uid"])),
    )
    with pytest.raises(AtlasError, match="features make layout"):
        read(atlas)


@pytest.mark.parametrize(
    "table", ["cells", "datasets", "gene_registry", "_feature_layouts", "atlas_versions"]
)
def test_altered_tables_are_found(atlas: Path, table: str) -> None:
    expected = read(atlas)
    rng = np.random.default_rng(5)
    for file in sorted((atlas / "lance_db" / f"{table}.lance").rglob("*")):
        if not file.is_file() or file.suffix not in (".lance", ".manifest"):
            continue
        whole = file.read_bytes()
        for at in rng.integers(0, len(whole), 4).tolist():
            altered = bytearray(whole)
            altered[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(altered)
            named = ""
            try:
                for mine, true in zip(read(atlas), expected, strict=True):
                    np.testing.assert_array_equal(mine, true)
            except HbxError as error:
                named = str(error)
            assert not named or str(atlas) in named
        file.write_bytes(whole)
