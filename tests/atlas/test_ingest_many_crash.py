"""An ingest of many files that dies: workers, the coordinator, the scheduler; nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import hbx_gpu
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._ingest import many
from hbx_gpu.errors import ResourceError
from tests.atlas.dying import die_at, killed
from tests.atlas.test_ingest_crash import make
from tests.emulation.build import outer_environment

N = 6
CELLS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    for i in range(N):
        adata = make(CELLS, ["a", "b", f"g{i}"], i, age=np.arange(CELLS) / (1 + (i == 4)))
        adata.write_h5ad(folder / f"{i}.h5ad")
    return sorted(folder.iterdir())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An atlas with one snapshot."""
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(make(5, list("ab"), 99, age=np.arange(5)))
    atlas.optimize()
    atlas.snapshot()
    return tmp_path / "a"


def check_whole(root: Path) -> int:
    """Every dataset is whole or not in the atlas, and nothing else lies about. Returns their number."""
    atlas = RaggedAtlas.open(root)  # the next writer, which cleans up
    assert not list((root / ".hbx_gpu").glob("*.json"))
    store = root / "zarr_store"
    assert not (store / ".staging").exists()
    rows = atlas.catalog.dataset_rows()
    groups = {str(path.parent.parent.relative_to(store)) for path in store.rglob("csr/zarr.json")}
    assert groups == {row["zarr_group"] for row in rows}
    cells = tables.read(atlas.catalog.obs("cells"), ["dataset_uid", "obs_name"]).to_pylist()
    assert len(cells) == 5 + CELLS * (len(rows) - 1)
    assert {cell["dataset_uid"] for cell in cells} == {row["dataset_uid"] for row in rows}
    assert len({cell["obs_name"] for cell in cells}) == len(cells)
    lists = set(tables.read(atlas.catalog.layouts(), ["layout_uid"]).column(0).to_pylist())
    assert lists == {row["layout_uid"] for row in rows}
    assert not [name for name in atlas.catalog.obs("cells").schema.names if "hbx_gpu" in name]
    return len(rows) - 1


def check_next_run(root: Path, files: list[Path]) -> None:
    """The same command finishes, and the atlas holds every file once."""
    before = check_whole(root)
    report = hbx_gpu.ingest_many(root, files)
    assert report.n_added == len(files) - before
    assert check_whole(root) == len(files)
    atlas = RaggedAtlas.open(root)
    atlas.optimize()
    found = RaggedAtlas.checkout(root, atlas.snapshot()).query().to_anndata()
    assert found.n_obs == 5 + CELLS * len(files)
    assert set(found.var_names) == {"a", "b", *(f"g{i}" for i in range(len(files)))}
    assert RaggedAtlas.checkout(root, 0).query().count() == 5


# What a run does, in order: committed in batches of three, of which the second changes the type of a column.
_STEPS = [
    ("journal:Journal.write", "after", 1),
    ("tasks:_write", "before", 2),
    ("tasks:_write", "after", 3),
    ("journal:Journal.write", "after", 2),
    ("catalog:Catalog.publish", "after", 2),
    ("additions:Rows.commit", "after", 1),
    ("catalog:Catalog.add_layouts", "after", 1),
    ("additions:Rows.commit", "after", 2),
    ("additions:Rows.commit", "before", 3),
    ("additions:Rows.commit", "after", 3),
    ("journal:Journal.remove", "before", 1),
    ("journal:Journal.remove", "after", 1),
    ("tables:finish_promotions", "before", 3),
    ("journal:Journal.remove", "after", 3),
]
_QUICK = {2, 7, 9, 11}
LONG = [pytest.mark.slow, pytest.mark.long]
# Which random moment a process is killed at.
MOMENTS = [pytest.param(seed, marks=() if seed < 2 else LONG) for seed in range(20)]


def _ingest_and_die(root: Path, files: list[Path], where: str, when: str, n: int) -> None:
    atlas = RaggedAtlas.open(root)
    many._MOST_DATASETS = 3  # of this process alone
    die_at(where, when, n)
    hbx_gpu.ingest_many(atlas, files)


@pytest.mark.parametrize(
    ("where", "when", "n"),
    [pytest.param(*step, marks=() if i in _QUICK else LONG) for i, step in enumerate(_STEPS)],
)
def test_a_coordinator_that_dies_at_any_step(
    root: Path, files: list[Path], where: str, when: str, n: int
) -> None:
    room = "_ingest" if where.startswith("tasks") else "_catalog"
    killed(_ingest_and_die, root, files, f"atlas.{room}.{where}", when, n)
    check_next_run(root, files)


class _Victims(ProcessPoolExecutor):
    """Processes of which one is killed after a while."""

    def __init__(self, after: float) -> None:
        super().__init__(2, mp_context=get_context("forkserver"))
        self._after = after
        self._timer: threading.Timer | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        future = super().submit(fn, *args, **kwargs)
        if self._timer is None:
            # A method of the process, which signals nobody else once it has ended.
            self._timer = threading.Timer(self._after, next(iter(self._processes.values())).kill)
            self._timer.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        super().shutdown(wait, cancel_futures=cancel_futures)


def kill_a_worker(root: Path, files: list[Path], after: float) -> None:
    # The error comes only if the file was not in the atlas by then.
    with _Victims(after) as pool, contextlib.suppress(ResourceError):
        hbx_gpu.ingest_many(root, files, pool)
    check_next_run(root, files)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MOMENTS)
def test_a_worker_that_is_killed(root: Path, files: list[Path], seed: int) -> None:
    kill_a_worker(root, files, float(np.random.default_rng(seed).uniform(0, 5)))


_COORDINATOR = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import hbx_gpu
from hbx_gpu._commands.executors import _follow_parent
from hbx_gpu.atlas._ingest import many

if __name__ == "__main__":
    many._MOST_DATASETS = 2
    with ProcessPoolExecutor(2, get_context("spawn"), _follow_parent) as pool:
        hbx_gpu.ingest_many(sys.argv[1], sys.argv[2:], pool, added=lambda _: print(flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", MOMENTS)
def test_a_coordinator_that_is_killed(root: Path, files: list[Path], tmp_path: Path, seed: int) -> None:
    """Killed at a random moment after its first commit, or before; its workers end by themselves."""
    script = tmp_path / "run.py"
    script.write_text(_COORDINATOR)
    rng = np.random.default_rng(seed)
    with subprocess.Popen(
        [sys.executable, script, root, *files], stdout=subprocess.PIPE, env=outer_environment()
    ) as run:
        assert run.stdout is not None
        if seed % 2:
            run.stdout.readline()
        else:
            time.sleep(rng.uniform(1, 8))
        time.sleep(rng.uniform(0, 0.5))
        children = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
        run.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    check_next_run(root, files)
