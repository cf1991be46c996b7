"""What makes tensors of batches: every collate passes the same suite."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu._collates import (
    ArrayCollate,
    CsrCollate,
    DenseCollate,
    FunctionCollate,
    ImagesCollate,
    LayersCollate,
    MatrixCollate,
    MultimodalCollate,
    as_collate,
    dense_to_tensor_collate,
    multimodal_to_dense_collate,
    sparse_to_csr_collate,
    sparse_to_dense_collate,
)
from hbx_gpu._protocols import AnyCollate, Collate
from hbx_gpu.scdl._sources.pairs import PairCollate
from hbx_gpu.transforms import log1p
from tests.conformance.datasets import STORED, of_shared
from tests.dense_stores import on_cpu, same

ROWS = np.array([3, 1, 1, 0, 5], np.int64)


def first_cells(batch: Any) -> Any:
    return batch.metadata["index"][:1]


def images() -> AnyCollate:
    pytest.importorskip("nvidia.dali")
    from hbx_gpu.images import ImageTransform, TileCollate

    return ImagesCollate(TileCollate(ImageTransform(resize=(4, 4)), num_threads=1))


COLLATES: dict[str, tuple[str, Callable[[], AnyCollate]]] = {
    "dense": ("sparse", DenseCollate),
    "dense, transformed": ("sparse", lambda: DenseCollate("bfloat16", log1p)),
    "csr": ("sparse", CsrCollate),
    "layers": ("two_layers", lambda: LayersCollate(CsrCollate())),
    "matrix": ("matrix", lambda: MatrixCollate("float16")),
    "arrays": ("tiles", ArrayCollate),
    "ragged": ("ragged", ArrayCollate),
    "multimodal": ("multimodal", MultimodalCollate),
    "multimodal, csr": ("multimodal", lambda: MultimodalCollate(layout="csr")),
    "pairs": ("pairs", lambda: PairCollate(CsrCollate())),
    "function": ("sparse", lambda: FunctionCollate(first_cells)),
}


@pytest.fixture(scope="module", params=COLLATES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dataset(name: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    kind = COLLATES[name][0]
    if kind in STORED:
        return STORED[kind](tmp_path_factory.mktemp(kind) / "arrays").with_row_numbers()
    return of_shared(request.getfixturevalue("shared"))[kind]().with_row_numbers()


@pytest.fixture
def collate(name: str) -> AnyCollate:
    return COLLATES[name][1]()


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if hasattr(value, "values") else value if isinstance(value, list) else ()
    return [tensor for entry in values for tensor in tensors(entry)]


def test_it_is_one(collate: AnyCollate) -> None:
    assert isinstance(collate, Collate)
    assert as_collate(collate) is collate


def test_the_same_batch_gives_the_same(collate: AnyCollate, dataset: Any) -> None:
    one, other = (on_cpu(collate(batch)) for batch in dataset.read_batches([ROWS, ROWS]))
    same([one], [other]) if isinstance(one, dict) else np.testing.assert_array_equal(one, other)


def test_it_says_what_it_makes(collate: AnyCollate, dataset: Any) -> None:
    made = tensors(collate(dataset[ROWS]))
    assert not collate.on_device
    assert all(tensor.device.type == "cpu" for tensor in made)
    if collate.sparse:
        assert any(tensor.layout is torch.sparse_csr for tensor in made)


def test_it_tells_bytes_or_none(collate: AnyCollate, dataset: Any, name: str) -> None:
    nbytes = collate.nbytes(len(ROWS), dataset.n_features)
    assert nbytes >= collate.nbytes(1, dataset.n_features) >= collate.nbytes(0, dataset.n_features) == 0
    if name.startswith("dense"):
        assert nbytes == collate(dataset[ROWS])["X"].nbytes


def test_epochs_may_be_told(collate: AnyCollate, dataset: Any) -> None:
    collate.set_epoch(3)
    assert collate(dataset[ROWS]) is not None


def test_it_crosses_to_a_worker(collate: AnyCollate, dataset: Any) -> None:
    again = pickle.loads(pickle.dumps(collate))
    one, other = on_cpu(again(dataset[ROWS])), on_cpu(collate(dataset[ROWS]))
    same([one], [other]) if isinstance(one, dict) else np.testing.assert_array_equal(one, other)


def test_images_are_one_too() -> None:
    collate = images()
    assert isinstance(collate, Collate)
    assert (collate.sparse, collate.on_device, collate.nbytes(3, 4)) == (False, False, 0)
    collate.set_epoch(1)


def test_functions_that_users_know_become_what_they_stand_for() -> None:
    assert isinstance(as_collate(sparse_to_dense_collate), DenseCollate)
    assert isinstance(as_collate(sparse_to_csr_collate), CsrCollate)
    assert isinstance(as_collate(dense_to_tensor_collate), ArrayCollate)
    assert isinstance(as_collate(multimodal_to_dense_collate), MultimodalCollate)
    assert isinstance(as_collate(first_cells), FunctionCollate)
