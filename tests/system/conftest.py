"""A small atlas, and every way to load it that this machine has."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.sampler import CellSampler
from hbx_gpu.synthetic import write_demo_pair
from tests.emulation.backend import EmulatedBackend
from tests.kernels.conftest import on_gpu
from tests.threads import loader_threads

HAS_DALI = (
    importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
)
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
WAYS = [
    "direct",
    "emulated device",
    pytest.param("dali", marks=needs_dali),
    pytest.param("cuda direct", marks=pytest.mark.gpu),
    pytest.param("cuda dali", marks=[pytest.mark.gpu, needs_dali]),
]
"""Through a queue on the CPU, the device engine with kernels run on the CPU, DALI; and on a GPU."""

Load = Callable[..., Any]


@pytest.fixture(scope="session")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 cells of two datasets."""
    folder = tmp_path_factory.mktemp("system")
    made = create_or_open_atlas(folder / "atlas")
    for file in write_demo_pair(folder, n_obs=(300, 200), n_vars=60):
        made.add_from_h5ad(file, chunk_shape=512, shard_shape=2048)
    made.optimize()
    made.snapshot()
    return folder / "atlas"


@pytest.fixture
def dataset(atlas: Path) -> CellDataset:
    """All its cells."""
    found = RaggedAtlas.checkout_latest(str(atlas)).query().to_cell_dataset()
    assert isinstance(found, CellDataset)
    return found


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """One of `WAYS`."""
    return str(request.param)


@pytest.fixture
def load(way: str) -> Load:
    """Makes a loader: ``load(dataset, sampler, layout="dense", ...)``."""
    return ways(way)


def ways(name: str) -> Load:
    """The loader of one of `WAYS`."""

    def make(
        dataset: CellDataset, sampler: Any, *, layout: str = "dense", io: str | None = None, **kwargs: Any
    ) -> Any:
        if name == "emulated device":
            kwargs |= {"io": io} if io else {}
            return device_loader(
                dataset, sampler, EmulatedBackend(), LoaderOptions.of(layout=layout, **kwargs)
            )
        if name.startswith("cuda"):
            on_gpu()
            kwargs |= {"io": io} if io else {}
            executor = name.removeprefix("cuda ")
            return make_loader(dataset, sampler, layout=layout, device="cuda", executor=executor, **kwargs)
        if io:
            dataset._reader = dataset.open_reader("preadv")
        executor = "dali" if name == "dali" else "direct"
        return make_loader(dataset, sampler, layout=layout, executor=executor, **kwargs)

    return make


def sampler_for(dataset: CellDataset, **kwargs: Any) -> CellSampler:
    """A reproducible order in batches of 64."""
    options: Any = {"batch_size": 64, "seed": 5, "num_workers": 0, "locality": "none"} | kwargs
    return CellSampler(dataset.groups_np, **options)


def our_threads() -> list[str]:
    """Names of the threads that loaders started and that still run."""
    return [thread.name for thread in loader_threads("hbx_gpu")]


def descriptors() -> int:
    """Files this process has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    yield
    assert not our_threads()


def index_of(batch: dict[str, Any]) -> list[int]:
    """Row numbers of a batch."""
    found: list[int] = batch["index"].tolist()
    return found
