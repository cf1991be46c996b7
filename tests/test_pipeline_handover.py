"""Pipelines hand their batches to DALI's own iterator and to JAX."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.errors import CorruptChunkError
from hbx_gpu.pipeline import CellPipeline, cell_pipeline, jax_batches
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups
from tests.dali import need_dali
from tests.loading import sampler_for
from tests.threads import loader_threads


@pytest.fixture(autouse=True)
def dali() -> None:
    need_dali()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), example_groups())


def direct(dataset: CellDataset, **kwargs: Any) -> list[dict[str, Any]]:
    options = {"layout": "dense", **kwargs}
    return list(make_loader(dataset, sampler_for(dataset), executor="direct", **options))


# -- DALI's own iterator -----------------------------------------------------------------------------


def generic(loader: Any, **kwargs: Any) -> Any:
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    pipe: Any = loader.pipeline()
    return DALIGenericIterator(pipe, list(pipe.names), **kwargs)


@pytest.mark.parametrize("depth", [1, 3])
def test_dali_generic_iterator(dataset: CellDataset, depth: int) -> None:
    loader = cell_pipeline(dataset, sampler_for(dataset), prefetch_queue_depth=depth)
    plain = make_loader(dataset, sampler_for(dataset), layout="dense", executor="direct")
    iterator = generic(loader)
    for epoch in range(3):
        plain.set_epoch(epoch)
        if epoch:
            loader.set_epoch(epoch)
            iterator.reset()
        for (found,), want in zip(iterator, plain, strict=True):
            assert set(found) == {"X", "type", "score", "index"}  # dates are not there
            for name, tensor in found.items():
                assert torch.equal(tensor[0], want[name])  # one sample: the batch
    loader.close()
    assert not loader_threads()


def test_dali_generic_iterator_sees_errors(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    path = next(iter(sorted((tmp_path / "g1/csr/layers/counts/c").iterdir())))
    path.write_bytes(path.read_bytes()[:-1])
    sampler = sampler_for(dataset, locality="group", shuffle=False)
    with cell_pipeline(dataset, sampler, window=1, threads=1) as loader:
        iterator = generic(loader)
        with pytest.raises(CorruptChunkError, match="g1/csr"):
            for _ in iterator:  # it has no len(), which list() would ask for
                pass
    assert not loader_threads()


def test_what_dali_generic_iterator_cannot_carry(tmp_path: Path) -> None:
    """As the documentation says: bfloat16 are bits, unsigned columns are refused. Our iterator has both."""
    dataset = example_dataset(tmp_path, example_groups())
    unsigned = dataset.with_columns({"unsigned": np.arange(120, dtype=np.uint32)})
    with (
        cell_pipeline(unsigned, sampler_for(dataset)) as loader,
        pytest.raises(KeyError, match="UINT32"),
    ):
        generic(loader)
    with cell_pipeline(dataset, sampler_for(dataset), dtype="bfloat16") as loader:
        assert isinstance(loader, CellPipeline)
        pipe = loader.pipeline()
        (x, *_) = pipe.run()
        bits = from_dlpack(x.as_tensor())[0]
    want = direct(dataset, dtype="bfloat16")[0]["X"]
    assert bits.dtype == torch.uint16
    assert torch.equal(bits.view(torch.bfloat16), want)


def test_a_pipeline_after_the_last_batch_is_of_the_next_epoch(dataset: CellDataset) -> None:
    loader = cell_pipeline(dataset, sampler_for(dataset))
    list(loader)
    other = cell_pipeline(dataset, sampler_for(dataset))
    other.load_state_dict(loader.state_dict())
    assert other.epoch == 1
    found = other.pipeline()
    assert found.max_batch_size >= 1
    other.close()


# -- JAX ---------------------------------------------------------------------------------------------


class Sparse:
    """What our batches need of ``jax.experimental.sparse.BCSR``."""

    def __init__(self, parts: tuple[Any, Any, Any], *, shape: tuple[int, int]) -> None:
        (self.data, self.indices, self.indptr), self.shape = parts, shape

    def todense(self) -> np.ndarray:
        dense = np.zeros(self.shape, self.data.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))
        dense[rows, self.indices] = self.data
        return dense


@pytest.fixture(params=["stand-in", "jax"])
def jax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """JAX, or where it is not installed modules with the names that we use of it."""
    if request.param == "jax":
        if importlib.util.find_spec("jax") is None:
            pytest.skip("jax is not installed")
    else:
        dlpack = types.SimpleNamespace(from_dlpack=np.from_dlpack)
        modules = {
            "jax": types.SimpleNamespace(dlpack=dlpack),
            "jax.dlpack": dlpack,
            "jax.experimental": types.SimpleNamespace(sparse=types.SimpleNamespace(BCSR=Sparse)),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    result: Iterator[str] = request.param
    return result


@pytest.mark.parametrize("executor", ["dali", "direct"])
def test_jax_dense(dataset: CellDataset, jax: str, executor: str) -> None:
    loader = make_loader(dataset, sampler_for(dataset), layout="dense", executor=executor)
    for epoch in range(2):
        loader.set_epoch(epoch)
        found = list(jax_batches(loader))
        loader.set_epoch(epoch)
        for batch, want in zip(found, loader, strict=True):
            assert list(batch) == list(want)
            assert type(batch["X"]).__module__.split(".")[0] == ("numpy" if jax == "stand-in" else "jaxlib")
            for name, value in want.items():
                assert np.allclose(
                    np.asarray(batch[name], dtype=np.float64), np.asarray(value, dtype=np.float64)
                )


def test_jax_sparse_and_resume(dataset: CellDataset, jax: str) -> None:  # noqa: ARG001
    loader = cell_pipeline(dataset, sampler_for(dataset), layout="csr")
    whole = [np.asarray(batch["X"].todense()) for batch in jax_batches(loader)]
    for batch, want in zip(whole, direct(dataset), strict=True):
        assert np.array_equal(batch, want["X"])
    batches = jax_batches(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    del batches
    assert not loader_threads()
    loader.load_state_dict(state)
    rest = [np.asarray(batch["X"].todense()) for batch in jax_batches(loader)]
    assert all(map(np.array_equal, rest, whole[2:]))
    assert len(rest) == len(whole) - 2


def test_jax_tuples(dataset: CellDataset, jax: str) -> None:  # noqa: ARG001
    loader = cell_pipeline(dataset, sampler_for(dataset), graph=lambda fields: (fields["X"],))
    ((x,), *_) = jax_batches(loader)
    assert x.shape == (16, N_FEATURES)
