"""A process that dies, a full disk, an exception: the last snapshot stays, and the next ingest works."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hbx_gpu.atlas import ImageInput, RaggedAtlas, create_or_open_atlas
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._ingest import commit as ingest
from hbx_gpu.atlas._writing import arrays
from tests import fresh
from tests.atlas.dying import die_at, killed

_SLOW_INGEST = """
import sys
from hbx_gpu.atlas import RaggedAtlas
atlas = RaggedAtlas.open(sys.argv[1])
print(flush=True)
atlas.add_from_h5ad(sys.argv[2], chunk_shape=1, shard_shape=2)
"""

# Everything an ingest does, in order.
_STEPS = [
    pytest.param("atlas._catalog.journal:Journal.write", "before", 1, marks=pytest.mark.slow),
    ("atlas._catalog.journal:Journal.write", "after", 1),
    pytest.param("atlas._writing.arrays:ShardedArrayWriter.append", "after", 1, marks=pytest.mark.slow),
    pytest.param("atlas._writing.arrays:ShardedArrayWriter.close", "after", 1, marks=pytest.mark.slow),
    pytest.param("atlas._catalog.catalog:Catalog.publish", "before", 1, marks=pytest.mark.slow),
    ("atlas._catalog.catalog:Catalog.publish", "after", 1),
    pytest.param("atlas._catalog.tables:Addition.commit", "before", 1, marks=pytest.mark.slow),
    ("atlas._catalog.tables:Addition.commit", "after", 1),  # features
    pytest.param("atlas._catalog.catalog:Catalog.add_layout", "after", 1, marks=pytest.mark.slow),
    ("atlas._catalog.tables:Addition.commit", "after", 2),  # dataset
    ("atlas._catalog.tables:finish_promotions", "before", 1),  # a column of the obs table is half promoted
    pytest.param("atlas._catalog.tables:Addition.commit", "before", 3, marks=pytest.mark.slow),
    ("atlas._catalog.tables:Addition.commit", "after", 3),  # cells: complete from here on
    pytest.param("atlas._catalog.journal:Journal.remove", "after", 1, marks=pytest.mark.slow),
    pytest.param("atlas._catalog.catalog:Catalog.layouts", "after", 4, marks=pytest.mark.slow),  # in optimize
]


def _ingest_and_die(root: Path, file: Path, where: str, when: str, n: int) -> None:
    atlas = RaggedAtlas.open(root)
    die_at(where, when, n)
    atlas.add_from_h5ad(file, chunk_shape=64, shard_shape=128)
    atlas.optimize()
    atlas.snapshot()


def _ingest_modalities_and_die(root: Path, file: Path, where: str, when: str, n: int) -> None:
    """An ingest that extends the atlas by two modalities."""
    atlas = RaggedAtlas.open(root)
    die_at(where, when, n)
    tiles = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 1, 4, 4)
    table = {"cell_id": ["s2c0", "s2c1", "s2c29"], "tile": [2, 0, 1]}
    given = {"rna": file, "protein": file, "tiles": ImageInput(tiles, table)}
    atlas.add_multimodal(given, chunk_shape=64, shard_shape=128)


def make(n: int, genes: list[str], seed: int, **obs: Any) -> anndata.AnnData:
    x = sp.random(n, len(genes), 0.5, "csr", random_state=np.random.default_rng(seed))
    x.data = np.ceil(x.data * 9)
    frame = pd.DataFrame(obs, index=[f"s{seed}c{i}" for i in range(n)])
    return anndata.AnnData(x.astype(np.float32), obs=frame, var=pd.DataFrame(index=genes))


def digest(root: Path, version: int) -> tuple[Any, ...]:
    """Everything snapshot `version` says."""
    found = RaggedAtlas.checkout(root, version).query().to_anndata()
    return found.X.toarray().tolist(), found.obs.to_dict(), list(found.var_names)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas with one snapshot, and two files with other genes and a column that must be promoted."""
    folder = tmp_path_factory.mktemp("template")
    root = folder / "a"
    atlas = create_or_open_atlas(root)
    atlas.add_from_anndata(make(20, list("abcd"), 0, age=np.arange(20)))
    atlas.optimize()
    atlas.snapshot()
    for seed, genes in ((1, list("cdexyz")), (2, list("aq"))):
        make(30, genes, seed, age=np.arange(30) / 2, kind=["k"] * 30).write_h5ad(folder / f"{seed}.h5ad")
    return folder


@pytest.fixture
def scene(template: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A copy of the atlas, and the two files."""
    return shutil.copytree(template / "a", tmp_path / "a"), template / "1.h5ad", template / "2.h5ad"


def check_recovery(root: Path, first: Path, second: Path, before: tuple[Any, ...]) -> None:
    """What must hold after any accident while `first` was being added."""
    assert digest(root, 0) == before
    atlas = RaggedAtlas.open(root)
    atlas.optimize()
    atlas.snapshot()
    assert not list((root / ".hbx_gpu").glob("ingest-*"))
    assert not (root / "zarr_store" / ".staging").exists()
    rows = atlas.catalog.dataset_rows()
    groups = {
        str(p.parent.parent.relative_to(root / "zarr_store"))
        for p in (root / "zarr_store").rglob("csr/zarr.json")
    }
    assert groups == {row["zarr_group"] for row in rows}
    stored = set(tables.read(atlas.catalog.obs("cells"), ["dataset_uid"]).column(0).to_pylist())
    assert stored == {row["dataset_uid"] for row in rows}
    assert not [name for name in atlas.catalog.obs("cells").schema.names if "hbx_gpu" in name]
    known = set(atlas.feature_registry("gene_expression")["uid"])
    assert known == (set("abcdexyz") if len(rows) == 2 else set("abcd"))
    assert digest(root, 0) == before

    for file in (second, first):
        atlas.add_from_h5ad(file, exist_ok=True)
    atlas.optimize()
    version = atlas.snapshot()
    found = RaggedAtlas.checkout(root, version).query().to_anndata()
    assert found.n_obs == 80
    assert sorted(found.var_names) == list("abcdeqxyz")
    for file in (first, second):
        adata = anndata.read_h5ad(file)
        part = found[found.obs["obs_name"].isin(adata.obs_names)]
        order = part.obs.reset_index().set_index("obs_name").loc[list(adata.obs_names), "uid"]
        part = part[order.tolist(), list(adata.var_names)]
        np.testing.assert_array_equal(part.X.toarray(), adata.X.toarray())
        assert part.obs["age"].tolist() == adata.obs["age"].tolist()
    assert digest(root, 0) == before


@pytest.mark.parametrize(("where", "when", "n"), _STEPS)
def test_killed_at_any_step(scene: tuple[Path, Path, Path], where: str, when: str, n: int) -> None:
    root, first, second = scene
    before = digest(root, 0)
    killed(_ingest_and_die, root, first, where, when, n)
    check_recovery(root, first, second, before)


def test_killed_while_a_note_is_written(scene: tuple[Path, Path, Path]) -> None:
    root, first, second = scene
    before = digest(root, 0)
    (root / ".hbx_gpu" / "ingest-0123456789abcdef.new").write_text('{"staging": "012')
    check_recovery(root, first, second, before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))])
def test_killed_at_any_time(scene: tuple[Path, Path, Path], seed: int) -> None:
    root, first, second = scene
    before = digest(root, 0)
    with fresh.popen([sys.executable, "-c", _SLOW_INGEST, root, first], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(np.random.default_rng(seed).random() * 1.5)
        run.kill()
    check_recovery(root, first, second, before)


_EXCEPTIONS = [
    (arrays.ShardedArrayWriter, "append"),
    (arrays.ShardedArrayWriter, "close"),
    (Catalog, "publish"),
    (Catalog, "add_layout"),
    (tables.Addition, "commit"),
    (ingest, "_commit_dataset"),
    (ingest, "_commit_cells"),
]


@pytest.mark.parametrize(("owner", "name"), _EXCEPTIONS)
def test_an_exception_leaves_nothing(
    scene: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
) -> None:
    root, first, second = scene
    before = digest(root, 0)
    atlas = RaggedAtlas.open(root)
    # Not even an Exception at one of the steps.
    error: BaseException = OSError(errno.ENOSPC, "No space left on device")
    if name == "publish":
        error = KeyboardInterrupt()

    def failing(*_args: Any, **_kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(type(error)):
            atlas.add_from_h5ad(first)
    assert not (root / "zarr_store" / ".staging").exists()
    assert len(atlas.catalog.dataset_rows()) == 1
    assert atlas.snapshot() == 1  # not even optimize() is needed
    check_recovery(root, first, second, before)


def test_a_full_disk(scene: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write to an array fails once the limit on file size, standing in for the disk, is reached."""
    root, first, second = scene
    before = digest(root, 0)
    real = arrays.ObjectWriter.put

    def put(self: arrays.ObjectWriter, encoded: bytes | None) -> None:
        real(self, encoded)
        if self._objects or len(self._index) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(arrays.ObjectWriter, "put", put)
        with pytest.raises(OSError, match="No space left on device"):
            RaggedAtlas.open(root).add_from_h5ad(first, chunk_shape=16, shard_shape=64)
    check_recovery(root, first, second, before)


def test_cleaning_up_may_fail_too(scene: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full to the brim takes no deletion either: the next writer does it."""
    root, first, second = scene
    before = digest(root, 0)
    atlas = RaggedAtlas.open(root)

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_commit_cells", full)
        patch.setattr(Catalog, "undo", full)
        with pytest.raises(OSError, match="No space left"):
            atlas.add_from_h5ad(first)
    assert len(list((root / ".hbx_gpu").glob("ingest-*"))) == 1
    check_recovery(root, first, second, before)


def test_killed_while_being_undone(scene: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root, first, second = scene
    before = digest(root, 0)

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError

    for step in ("_remove_group", "remove_layout", "_remove_features"):
        with monkeypatch.context() as patch:
            patch.setattr(ingest, "_commit_cells", fail)
            patch.setattr(Catalog, step, fail)
            with pytest.raises(RuntimeError):
                RaggedAtlas.open(root).add_from_h5ad(first)
    check_recovery(root, first, second, before)


_MULTIMODAL_STEPS = [
    ("atlas._catalog.journal:Journal.write", "after", 1),  # the note of what the atlas is extended by
    pytest.param("atlas._catalog.tables:ensure_table", "after", 1, marks=pytest.mark.slow),
    pytest.param("atlas._catalog.catalog:Names.save", "before", 1, marks=pytest.mark.slow),
    ("atlas._catalog.catalog:Names.save", "after", 1),
    ("atlas._catalog.catalog:Catalog.extend", "after", 1),
    pytest.param("atlas._catalog.journal:Journal.write", "after", 2, marks=pytest.mark.slow),
    pytest.param("atlas._writing.arrays:DenseGroupWriter.close", "after", 1, marks=pytest.mark.slow),
    ("atlas._catalog.catalog:Catalog.publish", "after", 2),
    pytest.param("atlas._catalog.catalog:Catalog.publish", "after", 3, marks=pytest.mark.slow),
    pytest.param("atlas._catalog.tables:Addition.commit", "after", 1, marks=pytest.mark.slow),
    ("atlas._catalog.tables:Addition.commit", "after", 2),  # features of both spaces
    pytest.param("atlas._catalog.catalog:Catalog.add_layout", "after", 1, marks=pytest.mark.slow),
    pytest.param("atlas._catalog.tables:Addition.commit", "after", 3, marks=pytest.mark.slow),  # datasets
    ("atlas._catalog.tables:Addition.commit", "after", 4),  # cells: complete from here on
]


def everything(root: Path) -> dict[str, Any]:
    """The state of an atlas, as far as it is not about versions of tables."""
    atlas = RaggedAtlas.open(root)
    names = sorted(p.name for p in (root / "lance_db").iterdir())
    store = root / "zarr_store"
    return {
        "tables": {
            name: sorted(
                map(str, tables.open_table(root, name.removesuffix(".lance")).to_arrow().to_pylist())
            )
            for name in names
        },
        "schema": atlas.catalog.obs("cells").schema,
        "registries": dict(atlas.catalog.names.registries),
        "config": (root / "hbx_gpu.json").read_text(),
        "files": sorted(str(p.relative_to(store)) for p in store.rglob("*")),
        "notes": list((root / ".hbx_gpu").glob("ingest-*")),
    }


@pytest.mark.parametrize(("where", "when", "n"), _MULTIMODAL_STEPS)
def test_killed_with_several_modalities(
    scene: tuple[Path, Path, Path], where: str, when: str, n: int
) -> None:
    root, _, second = scene
    before, found = everything(root), digest(root, 0)
    killed(_ingest_modalities_and_die, root, second, where, when, n)
    assert digest(root, 0) == found
    after = everything(root)  # opening it undid what was left
    complete = (where, n) == ("atlas._catalog.tables:Addition.commit", 4)
    if not complete:
        assert after == before
    atlas = RaggedAtlas.open(root)
    report = atlas.add_multimodal({"rna": second, "protein": second}, exist_ok=True)
    assert report.n_cells == (0 if complete else 30)
    atlas.optimize()
    version = atlas.snapshot()
    dataset = RaggedAtlas.checkout(root, version).query().to_cell_dataset("gene_expression")
    assert dataset.n_cells == 50
    if complete:
        cells = atlas.catalog.obs("cells").to_arrow().to_pylist()
        tiles = {row["obs_name"]: row["image_tiles"]["position"] for row in cells if row["image_tiles"]}
        assert tiles == {"s2c0": 2, "s2c1": 0, "s2c29": 1}
    assert digest(root, 0) == found


def test_undoing_an_extension_twice(scene: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is dropped already does not stop the next writer."""
    root, _, _ = scene
    before = everything(root)
    adata = make(5, list("pqr"), 7)
    adata.var["panel"] = "x"

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_commit_cells", fail)
        patch.setattr("hbx_gpu.atlas._catalog.journal.Journal.remove", fail)
        with pytest.raises(RuntimeError):
            RaggedAtlas.open(root).add_multimodal({"protein": adata})
    assert everything(root) == before
    assert RaggedAtlas.open(root).add_multimodal({"protein": adata}).n_cells == 5
