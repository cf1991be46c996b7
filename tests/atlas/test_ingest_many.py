"""Many files at once: the same atlas as file by file, whatever the executor, and whatever goes wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hbx_gpu
from hbx_gpu.atlas import HoxBaseSchema, PointerField, RaggedAtlas, SparseZarrPointer, create_or_open_atlas
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.additions import Rows
from hbx_gpu.atlas._ingest import many
from hbx_gpu.errors import AlreadyIngestedError, HbxError, InvalidDataError, ResourceError, UnknownNameError
from tests.atlas.test_ingest_crash import make
from tests.emulation.build import outer_environment
from tests.executors import Twice

# Dask leaves sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files with other genes in another order, obs columns that come and go, and one whose type changes."""
    folder = tmp_path_factory.mktemp("files")
    genes = [list("dcba"), list("abcd"), list("exab"), list("abcd"), list("qa"), list("dcba")]
    out = []
    for i, names in enumerate(genes):
        more: dict[str, Any] = {"age": np.arange(8) / 2 if i == 3 else np.arange(8)}
        if i % 2:
            more["percent.mt"] = np.linspace(0, 1, 8)
        make(8, names, i, **more).write_h5ad(folder / f"{i}.h5ad")
        out.append(folder / f"{i}.h5ad")
    return out


def content(root: Path) -> dict[str, Any]:
    """Everything a reader can see of the newest state, in order, but for versions of tables."""
    atlas = RaggedAtlas.open(root)
    catalog = atlas.catalog
    atlas.optimize()
    version = atlas.snapshot()
    names = ("cells", "datasets", "_feature_layouts", "gene_registry")
    out: dict[str, Any] = {}
    for name in names:
        table = tables.open_table(root, name)
        rows = table.search().with_row_id(True).to_arrow().sort_by("_rowid").drop_columns(["_rowid"])
        moments = [column for column in rows.column_names if column == "created_at"]
        out[name] = rows.drop_columns(moments).to_pylist()
    found = RaggedAtlas.checkout(root, version).query().to_anndata()
    store = root / "zarr_store"
    out |= {
        "X": found.X.toarray().tolist(),
        "genes": list(found.var_names),
        "files": sorted(str(path.relative_to(store)) for path in store.rglob("*")),
        "notes": sorted(path.name for path in (root / ".hbx_gpu").glob("*.json")),
        "columns": catalog.obs("cells").schema.names,
    }
    return out


@pytest.fixture(scope="module")
def expected(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The atlas as it is if the files are added one after the other."""
    root = tmp_path_factory.mktemp("expected") / "a"
    atlas = create_or_open_atlas(root)
    for path in files:
        atlas.add_from_h5ad(path)
    return content(root)


@contextmanager
def dask(*, processes: bool) -> Iterator[Executor]:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": processes, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client.get_executor()


@pytest.mark.parametrize(
    "executor",
    [
        "none",
        "threads",
        "twice",
        "dask",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("processes", "dask processes")),
    ],
)
def test_the_atlas_is_the_same_whatever_the_executor(
    files: list[Path], expected: dict[str, Any], tmp_path: Path, executor: str
) -> None:
    made: dict[str, Callable[[], Any]] = {
        "none": nullcontext,
        "threads": lambda: ThreadPoolExecutor(3),
        "processes": lambda: ProcessPoolExecutor(2, mp_context=get_context("spawn")),
        "twice": Twice,
        "dask": lambda: dask(processes=False),
        "dask processes": lambda: dask(processes=True),
    }
    calls: list[tuple[int, int]] = []
    kept: list[str] = []
    atlas = tmp_path / "a" if executor == "none" else create_or_open_atlas(tmp_path / "a")
    with made[executor]() as pool:
        report = hbx_gpu.ingest_many(
            atlas,
            files,
            pool,
            progress=lambda *call: calls.append(call),
            added=lambda file: kept.append(file.source),
        )
    assert content(tmp_path / "a") == expected
    assert [file.n_cells for file in report.files] == [8] * 6
    assert (report.n_added, report.n_cells) == (6, 48)
    assert sorted(set(calls)) == [(8 * i, 48) for i in range(1, 7)]
    assert kept == [str(path) for path in files]


def test_the_next_run_goes_on(
    files: list[Path], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "_MOST_DATASETS", 2)
    atlas = create_or_open_atlas(tmp_path / "a")
    hbx_gpu.ingest_many(atlas, files[:3])
    report = hbx_gpu.ingest_many(atlas, files)
    assert [file.n_cells for file in report.files] == [0, 0, 0, 8, 8, 8]
    assert hbx_gpu.ingest_many(atlas, files).n_added == 0
    assert content(tmp_path / "a") == expected


def test_a_path_gets_a_snapshot_of_what_is_new(files: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "a"
    hbx_gpu.ingest_many(root, files[:2])
    assert RaggedAtlas.checkout_latest(root).query().count() == 16
    hbx_gpu.ingest_many(root, files[:2])
    assert list(RaggedAtlas.list_versions(root)["total_rows"]) == [16]
    # What an earlier run left without a snapshot is in the next one.
    hbx_gpu.ingest_many(RaggedAtlas.open(root), files[2:3])
    assert list(RaggedAtlas.list_versions(root)["total_rows"]) == [16]
    assert hbx_gpu.ingest_many(root, files[:3]).n_added == 0
    assert list(RaggedAtlas.list_versions(root)["total_rows"]) == [16, 24]


def test_few_versions(files: list[Path], tmp_path: Path) -> None:
    """All files that fit a table as it is share one version of it."""
    atlas = create_or_open_atlas(tmp_path / "a")
    before = {
        name: tables.open_table(atlas.catalog.root, name).version for name in ("datasets", "_feature_layouts")
    }
    hbx_gpu.ingest_many(atlas, [path for path in files if path.stem != "3"])
    assert {name: tables.open_table(atlas.catalog.root, name).version - n for name, n in before.items()} == {
        "datasets": 2,  # its columns, its rows
        "_feature_layouts": 1,
    }


class Late(Executor):
    """Runs a task when somebody waits for it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        class Awaited(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                if not self.done():
                    self.set_result(fn(*args, **kwargs))
                return super().result(timeout)

        return Awaited()


@pytest.mark.parametrize(
    ("limit", "value", "commits"),
    [("_MOST_DATASETS", 2, 3), ("_MOST_CELLS", 16, 3), ("_MOST_SECONDS", -1.0, 5)],
)
def test_datasets_are_committed_after_so_many_of_them_or_cells_or_seconds(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, commits: int
) -> None:
    monkeypatch.setattr(many, limit, value)
    atlas = create_or_open_atlas(tmp_path / "a")
    before = tables.open_table(atlas.catalog.root, "datasets").version
    told: list[str] = []
    some = [path for path in files if path.stem != "3"]
    hbx_gpu.ingest_many(atlas, some, Late(), added=lambda file: told.append(file.source))
    # One version has the columns of the table, each other one the rows of a commit.
    assert tables.open_table(atlas.catalog.root, "datasets").version - before == 1 + commits
    assert told == [str(path) for path in some]
    # Three files have the same four features, whose list is stored once, as are those of four and of two.
    lists = atlas.catalog.layouts().to_arrow().select(["layout_uid", "local_index"]).to_pylist()
    assert len(lists) == len({tuple(row.values()) for row in lists}) == 10


def test_files_before_a_bad_one_are_in(files: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.h5ad"
    broken = make(4, ["p", "p"], 9)
    broken.write_h5ad(bad)
    told: list[str] = []
    with pytest.raises(InvalidDataError, match=r"bad\.h5ad.*more than once"):
        hbx_gpu.ingest_many(
            tmp_path / "a",
            [*files[:2], bad, *files[2:]],
            added=lambda file: told.append(file.source),
            feature_id_column="index",
        )
    atlas = RaggedAtlas.open(tmp_path / "a")
    assert told == [str(path) for path in files[:2]]
    assert [row["source_name"] for row in atlas.catalog.dataset_rows()] == ["0.h5ad", "1.h5ad"]
    assert not (tmp_path / "a" / "zarr_store" / ".staging").exists()
    bad.write_bytes(b"no file")
    with pytest.raises(HbxError, match=r"bad\.h5ad"):
        hbx_gpu.ingest_many(atlas, [bad])
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad; nothing was added"):
        hbx_gpu.ingest_many(atlas, [files[2], tmp_path / "none.h5ad"])
    assert len(atlas.catalog.dataset_rows()) == 2


def test_a_commit_that_fails_adds_nothing(
    files: list[Path], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    real = Rows.commit

    def full(self: Rows) -> None:
        if self.name == "cells":
            raise OSError(28, "No space left on device")
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "commit", full)
        with pytest.raises(OSError, match="No space"):
            hbx_gpu.ingest_many(tmp_path / "a", files, added=lambda file: told.append(file.source))
    assert not told
    atlas = RaggedAtlas.open(tmp_path / "a")
    assert not atlas.catalog.dataset_rows()
    assert not len(atlas.feature_registry("gene_expression"))
    assert hbx_gpu.ingest_many(atlas, files).n_added == 6
    assert content(tmp_path / "a") == expected


class Uids(HoxBaseSchema):
    """Cells whose files give their uids."""

    gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")


def test_cells_of_two_files_with_one_uid(tmp_path: Path) -> None:
    for i, uids in enumerate((["u0", "u1"], ["u1", "u2"])):
        make(2, list("ab"), i, uid=uids).write_h5ad(tmp_path / f"{i}.h5ad")
    atlas = create_or_open_atlas(tmp_path / "a", {"cells": Uids})
    with pytest.raises(InvalidDataError, match=r"1\.h5ad, obs: 1 cell uid\(s\) are in table 'cells' already"):
        hbx_gpu.ingest_many(atlas, [tmp_path / "0.h5ad", tmp_path / "1.h5ad"])
    assert atlas.catalog.obs("cells").count_rows() == 2


def test_the_same_cells_again(files: list[Path], tmp_path: Path) -> None:
    """Copies are recognized by their bytes, the same cells in other files by names and values."""
    again = make(8, list("dcba"), 0, age=np.arange(8))
    again.obs["new"] = 1
    again.write_h5ad(tmp_path / "again.h5ad")
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(files[0].read_bytes())
    sources = [files[0], copy, tmp_path / "again.h5ad"]
    with pytest.raises(AlreadyIngestedError, match=r"again\.h5ad: 8 of its 8 cells are in the atlas already"):
        hbx_gpu.ingest_many(tmp_path / "a", sources)
    atlas = RaggedAtlas.open(tmp_path / "a")
    assert atlas.catalog.obs("cells").count_rows() == 8
    report = hbx_gpu.ingest_many(atlas, sources, accept_duplicates=True)
    assert [file.n_cells for file in report.files] == [0, 0, 8]
    assert atlas.catalog.obs("cells").count_rows() == 16


def test_replacing(files: list[Path], tmp_path: Path) -> None:
    """A corrected file takes the place of its old form, with the features that files after it need."""
    folder = tmp_path / "new"
    folder.mkdir()
    for i, genes in ((0, list("dc")), (2, list("exab"))):
        make(8, genes, i + 20, age=np.arange(8)).write_h5ad(folder / f"{i}.h5ad")
    atlas = create_or_open_atlas(tmp_path / "a")
    hbx_gpu.ingest_many(atlas, [files[0], files[2]])
    report = hbx_gpu.ingest_many(atlas, sorted(folder.iterdir()), replace=True)
    assert report.n_added == 2
    assert [row["source_name"] for row in atlas.catalog.dataset_rows()] == ["0.h5ad", "2.h5ad"]
    atlas.optimize()
    found = RaggedAtlas.checkout(atlas.path, atlas.snapshot()).query().to_anndata()
    assert sorted(found.var_names) == list("abcdex")
    assert {name[:3] for name in found.obs["obs_name"]} == {"s20", "s22"}


def test_features_that_went_with_a_replaced_file_come_back_with_the_next(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "_MOST_DATASETS", 1)
    folder = tmp_path / "new"
    folder.mkdir()
    make(8, list("ab"), 24).write_h5ad(folder / "4.h5ad")  # its old form has the only q
    make(8, list("qb"), 25).write_h5ad(folder / "6.h5ad")
    atlas = create_or_open_atlas(tmp_path / "a")
    hbx_gpu.ingest_many(atlas, [files[4]])
    hbx_gpu.ingest_many(atlas, sorted(folder.iterdir()), replace=True)
    atlas.optimize()
    found = RaggedAtlas.checkout(atlas.path, atlas.snapshot()).query().to_anndata()
    assert sorted(found.var_names) == list("abq")


def test_an_executor_that_is_dead_before_the_first_task(files: list[Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(1, initializer=lambda: 1 / 0) as dead:
        with pytest.raises(BrokenExecutor):
            dead.submit(int).result()
        with pytest.raises(ResourceError, match="run the same again"):
            hbx_gpu.ingest_many(tmp_path / "atlas", files[:1], dead)


def test_sources_that_are_wrong_make_no_atlas(files: list[Path], tmp_path: Path) -> None:
    atlas = tmp_path / "atlas"
    with pytest.raises(FileNotFoundError, match="no such file"):
        hbx_gpu.ingest_many(atlas, [files[0], tmp_path / "missing.h5ad"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'codex'"):
        hbx_gpu.ingest_many(atlas, files[:1], codex="zstd")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'codex'"):
        create_or_open_atlas(tmp_path / "other").ingest_many(files[:1], codex="zstd")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="list of paths"):
        hbx_gpu.ingest_many(atlas, str(files[0]))
    assert not atlas.exists()


def test_matrices_are_named_by_the_sources(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"names \['other.h5ad'\]"):
        hbx_gpu.ingest_many(tmp_path / "atlas", files[:1], layer={"other.h5ad": "raw"})
    with pytest.raises(InvalidDataError, match="no matrix 'nope'"):
        hbx_gpu.ingest_many(tmp_path / "atlas", files[:1], layer={files[0]: "nope"})


def test_workers_do_without_the_database() -> None:
    code = "import sys, hbx_gpu.atlas._ingest.tasks; print(sorted({'lancedb', 'torch'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=outer_environment(), check=True
    )
    assert done.stdout.strip() == b"[]"
