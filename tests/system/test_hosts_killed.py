"""Two hosts that share a folder lose a worker, a host or the scheduler at a random moment of any work.

Nothing is lost and nothing doubled, and the next run finishes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import hbx_gpu
from hbx_gpu._verify.stores import verify
from hbx_gpu.atlas import RaggedAtlas, repack
from hbx_gpu.errors import ResourceError
from hbx_gpu.scdl import SingleCellCollection
from hbx_gpu.statistics import Statistics, compute
from tests.atlas.test_ingest_crash import make
from tests.scdl.files import content
from tests.statistics.test_compute import equal
from tests.system.hosts import Cluster, namespaces, two_hosts

# Dask leaves sockets to the garbage collector, and says that it lost a scheduler.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
N, CELLS = 8, 40
LONG = [pytest.mark.slow, pytest.mark.long]


class Work:
    """Something that an executor does for the files of a folder, and how one sees that all of it is done."""

    def __init__(self, files: Path, root: Path) -> None:
        self.files, self.root = files, root

    def run(self, executor: Executor | None) -> None:
        """Do it, or what is left of it."""
        raise NotImplementedError

    def check(self) -> None:
        """Everything is there once, and nothing else."""
        raise NotImplementedError


class Ingest(Work):
    def run(self, executor: Executor | None) -> None:
        hbx_gpu.ingest_many(self.root / "atlas", sorted(self.files.iterdir()), executor)

    def check(self) -> None:
        found = RaggedAtlas.checkout_latest(self.root / "atlas").query().to_pandas()
        expected = [f"s{i}c{j}" for i in range(N) for j in range(CELLS)]
        assert sorted(found["obs_name"]) == sorted(expected)
        store = self.root / "atlas" / "zarr_store"
        assert len(list(store.rglob("csr/zarr.json"))) == N
        assert not (store / ".staging").exists()


class Repack(Ingest):
    def __init__(self, files: Path, root: Path) -> None:
        super().__init__(files, root)
        super().run(None)
        self.before = RaggedAtlas.checkout_latest(root / "atlas").query().to_anndata().X.toarray()

    def run(self, executor: Executor | None) -> None:
        repack(self.root / "atlas", "zstd", executor=executor)

    def check(self) -> None:
        super().check()
        after = RaggedAtlas.checkout_latest(self.root / "atlas").query().to_anndata().X.toarray()
        np.testing.assert_array_equal(after, self.before)
        assert {group.outcome for group in repack(self.root / "atlas", "zstd").groups} == {"unchanged"}


class Convert(Work):
    def run(self, executor: Executor | None) -> None:
        if (self.root / "archives" / "0").exists():
            return  # whole, as check() sees: a collection gets all archives of a folder or none
        SingleCellCollection(self.root / "archives").load_h5ad_multi(self.files, executor=executor)

    def check(self) -> None:
        made = sorted(path for path in (self.root / "archives").iterdir() if path.is_dir())
        assert [path.name for path in made] == [str(i) for i in range(N)]
        assert all(len(content(path)["rows"]) == CELLS for path in made)


class Count(Ingest):
    """Statistics, which write nothing while they are made."""

    def __init__(self, files: Path, root: Path) -> None:
        super().__init__(files, root)
        super().run(None)
        self.dataset = RaggedAtlas.checkout_latest(root / "atlas").query().to_cell_dataset()
        self.whole = compute(self.dataset)
        self.found: Statistics | None = None

    def run(self, executor: Executor | None) -> None:
        self.found = compute(self.dataset, executor=executor)

    def check(self) -> None:
        assert self.found is not None
        assert equal(self.found, self.whole)


class Verify(Count):
    def run(self, executor: Executor | None) -> None:
        found = verify(self.root / "atlas", "full", threads=1, progress=lambda _: None, executor=executor)
        self.verdicts = [(part.cells, part.damage) for part in found]

    def check(self) -> None:
        assert self.verdicts == [(CELLS, [])] * N


WORKS: dict[str, type[Work]] = {
    "ingest": Ingest,
    "repack": Repack,
    "convert": Convert,
    "statistics": Count,
    "verify": Verify,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    for i in range(N):
        make(CELLS, ["a", "b", f"g{i}"], i).write_h5ad(folder / f"{i}.h5ad")
    return folder


def finish(work: Work, executor: Executor, strike: Callable[[], object], after: float) -> None:
    """Let something happen in the middle of a work, then do what is left."""
    timer = threading.Timer(after, strike)
    timer.start()
    with contextlib.suppress(ResourceError):  # whoever asks is told, unless others did the rest
        work.run(executor)
    timer.join()
    work.run(None)
    work.check()


MOMENTS = [
    pytest.param(kind, seed, marks=LONG if seed or kind not in ("repack", "statistics") else ())
    for kind in WORKS
    for seed in range(20)
]


@pytest.mark.parametrize(("kind", "seed"), MOMENTS)
def test_a_process_that_is_killed(files: Path, tmp_path: Path, kind: str, seed: int) -> None:
    work = WORKS[kind](files, tmp_path)
    after = float(np.random.default_rng(seed).uniform(0, 1.5))
    with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as pool:
        # Both are there before one is killed: Python waits forever for one that starts in that moment.
        for begun in [pool.submit(time.sleep, 0.1) for _ in range(2)]:
            begun.result()
        assert len(pool._processes) == 2
        victim = next(iter(pool._processes.values()))
        finish(work, pool, victim.kill, after)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    with two_hosts() as made:
        yield made


STRIKES = [
    pytest.param(kind, what, seed, marks=LONG if seed or kind != "ingest" or what == "host" else ())
    for kind in WORKS
    for what in ("worker", "host", "scheduler")
    for seed in range(20 if kind == "ingest" else 4)
]


@pytest.mark.parametrize(("kind", "what", "seed"), STRIKES)
def test_a_cluster_that_loses_a_part(
    cluster: Cluster, files: Path, tmp_path: Path, kind: str, what: str, seed: int
) -> None:
    from distributed import Client

    work = WORKS[kind](files, tmp_path)
    rng = np.random.default_rng(seed)
    after, host = float(rng.uniform(0, 2)), cluster.hosts[int(rng.integers(2))]
    strike = {
        "worker": lambda: cluster.kill_worker(host),
        "host": host.kill,
        "scheduler": cluster.here.kill,
    }[what]
    cluster.restart()
    client = Client(cluster.address, timeout=60)
    try:
        client.wait_for_workers(2, timeout=60)
        if namespaces():
            assert len({worker.split(":")[1] for worker in client.scheduler_info()["workers"]}) == 2
        finish(work, client.get_executor(), strike, after)
    finally:
        # A client that waits for a scheduler that is gone would wait for long.
        with contextlib.suppress(Exception):
            client.close(timeout=1)
