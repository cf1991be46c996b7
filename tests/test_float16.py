"""Numbers that float16 does not hold: whichever way they take into a batch, what becomes infinite is said."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu import _float16
from hbx_gpu._collates import DenseCollate
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.batch import SparseBatch
from hbx_gpu.dataloader import CellDataset, MultimodalCellDataset, make_loader
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups
from hbx_gpu.transforms import chain, log1p, normalize_total
from tests.dense_stores import batches_for, on_device, on_host, opened
from tests.emulation.backend import EmulatedBackend

SAID = "larger than float16 holds"


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_float16, "_said", set())
    caplog.set_level(logging.WARNING)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    """Counts, one of them 70,000."""
    groups = example_groups(20)
    groups[0].matrix.data[0] = 70_000
    return example_dataset(tmp_path_factory.mktemp("counts"), groups)


@pytest.mark.parametrize(("dtype", "said"), [("float16", True), ("bfloat16", False), ("float32", False)])
def test_overflow_is_said(dtype: str, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    batch = SparseBatch(np.array([1], np.int32), np.array([70_000], np.uint32), np.array([0, 1], np.int64), 2)
    x = DenseCollate(dtype)(batch)["X"]
    assert bool(np.isinf(float(x[0, 1]))) == said
    assert (SAID in caplog.text) == said
    assert ("70,000" in caplog.text) == said
    DenseCollate(dtype)(batch)
    assert caplog.text.count(SAID) == said, "once per process"


@pytest.mark.parametrize(
    ("values", "said"),
    [([65_519], False), ([65_520], True), ([40_000, 40_000], True), ([-65_520], True), ([np.inf], False)],
)
def test_where_it_begins(values: list[float], said: bool, caplog: pytest.LogCaptureFixture) -> None:
    """At the first number that rounds to infinity; repeated columns are summed first."""
    n = len(values)
    batch = SparseBatch(np.ones(n, np.int32), np.array(values, np.float32), np.array([0, n], np.int64), 2)
    DenseCollate("float16")(batch)
    assert (SAID in caplog.text) == said


def loaders(dataset: CellDataset, **options: Any) -> dict[str, Any]:
    """The same batches on the host, through DALI's place in line, and on a device."""
    sampler = CellSampler(dataset.groups_np, batch_size=8, shuffle=False)
    options = {"layout": "dense", "dtype": "float16", **options}
    device = LoaderOptions.of(**options, num_workers=0)
    return {
        "host": make_loader(dataset, sampler, executor="direct", **options),
        "device": device_loader(dataset, sampler, EmulatedBackend(), device),
    }


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (None, True),
        (normalize_total(1e6), True),
        (normalize_total(1e4), False),
        (log1p, False),
        (chain([normalize_total(1e6), log1p]), False),
    ],
)
def test_every_transform(
    dataset: CellDataset, where: str, steps: Any, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    batches = list(loaders(dataset, transform=steps)[where])
    assert any(bool(batch["X"].isinf().any()) for batch in batches) == said
    assert caplog.text.count(SAID) == said


@pytest.mark.parametrize("where", ["host", "device"])
def test_with_the_mask(dataset: CellDataset, where: str, caplog: pytest.LogCaptureFixture) -> None:
    for batch in loaders(dataset, measured=True)[where]:
        assert batch["measured"].shape == batch["X"].shape
    assert SAID in caplog.text


def test_by_space(dataset: CellDataset, caplog: pytest.LogCaptureFixture) -> None:
    both = MultimodalCellDataset({"genes": dataset, "again": dataset})
    sampler = CellSampler(dataset.groups_np, batch_size=8, shuffle=False)
    options: dict[str, Any] = {"layout": {"genes": "dense", "again": "csr"}, "dtype": {"genes": "float16"}}
    for batch in make_loader(both, sampler, executor="direct", **options):
        assert str(batch["again"]["X"].dtype) == "torch.float32"
    assert SAID in caplog.text
    caplog.clear()
    _float16._said.clear()
    list(device_loader(both, sampler, EmulatedBackend(), LoaderOptions.of(**options, num_workers=0)))
    assert SAID in caplog.text


@pytest.mark.parametrize("asked", ["batch", "dataset"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_dense_spaces(tmp_path: Path, asked: str, where: str, caplog: pytest.LogCaptureFixture) -> None:
    """Their dtype is asked for where the dataset is made, or of the loader; NumPy's own warning stays out."""
    array = np.full((8, N_FEATURES), 70_000, np.float32)
    of_dataset: dict[str, Any] = {"dtypes": {"raw": "float16"}} if asked == "dataset" else {}
    of_batch: dict[str, Any] = {"dtype": "float16"}
    dense = opened(
        tmp_path, [array], "zstd", n_features=N_FEATURES, remaps=[np.arange(N_FEATURES)], **of_dataset
    )
    batches = batches_for(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if where == "host":
            found = on_host(dense, batches, **of_batch)
        else:
            found, _ = on_device(dense, batches, EmulatedBackend(), "auto", **of_batch)
    assert any(bool(np.isinf(batch["X"]).any()) for batch in found)
    assert SAID in caplog.text


def test_csr_is_refused_as_documented(dataset: CellDataset) -> None:
    with pytest.raises(ValueError, match='layout="csr" gives float32'):
        make_loader(dataset, batch_size=8, layout="csr", dtype="float16")
