"""What a loader takes: every dataset passes the same suite."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._protocols import Chunked, Loadable
from tests.conformance.datasets import KINDS, STORED, of_shared

ROWS = np.array([3, 1, 1, 0, 5], np.int64)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dataset(kind: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    if kind in STORED:
        return STORED[kind](tmp_path_factory.mktemp(kind) / "arrays")
    return of_shared(request.getfixturevalue("shared"))[kind]()


def equal(one: Any, other: Any) -> bool:
    """Whether two batches hold the same, array by array."""
    if is_dataclass(one):
        mine = {f.name: getattr(one, f.name) for f in fields(one)}
        return type(one) is type(other) and equal(mine, {name: getattr(other, name) for name in mine})
    if hasattr(one, "items"):
        return list(one) == list(other) and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def without(batch: Any, name: str) -> Any:
    batch.metadata = {key: column for key, column in batch.metadata.items() if key != name} or None
    return batch


def test_it_is_one(dataset: Any) -> None:
    assert len(dataset) == dataset.n_cells > 5
    assert isinstance(dataset, Loadable)
    assert isinstance(dataset, Chunked)


def test_batches_of_a_window_are_those_read_alone(dataset: Any) -> None:
    selections = [ROWS, np.empty(0, np.int64), ROWS[::-1].copy()]
    together = dataset.read_rows(selections)
    assert len(together) == 3
    for rows, batch in zip(selections, together, strict=True):
        assert len(batch) == len(rows)
        assert equal(batch, dataset.__getitems__(rows))


def test_row_numbers_are_checked_whatever_they_are_given_as(dataset: Any) -> None:
    n = len(dataset)
    mask = np.zeros(n, bool)
    mask[[1, 4]] = True
    found = dataset.checked([[0, -1], np.array([2], np.uint8), mask, []])
    assert [rows.tolist() for rows in found] == [[0, n - 1], [2], [1, 4], []]
    assert all(rows.dtype == np.int64 for rows in found)
    assert [rows.tolist() for rows in dataset.checked([ROWS - n, ROWS])] == [ROWS.tolist()] * 2
    for bad in ([n], [-n - 1], [0.5], [[0]], np.zeros(n + 1, bool)):
        with pytest.raises(IndexError):
            dataset.checked([bad])
        with pytest.raises(IndexError):
            dataset.__getitems__(bad)


def test_one_row_and_slices(dataset: Any) -> None:
    # One row says which rows of other datasets go with it, as torch asks for rows one by one.
    assert equal(dataset[2], dataset.marked(dataset.__getitems__([2])))
    assert equal(dataset[1:6:2], dataset.__getitems__([1, 3, 5]))


def test_bytes_are_told_together_as_alone(dataset: Any) -> None:
    selections = [ROWS, ROWS[:1], np.empty(0, np.int64)]
    sizes = dataset.rows_nbytes(selections)
    assert sizes == [dataset.batch_nbytes(rows) for rows in selections]
    assert sizes[0] >= sizes[1] >= sizes[2] == 0


def test_numbered_batches_carry_their_row_numbers(dataset: Any) -> None:
    numbered = dataset.with_row_numbers()
    assert type(numbered) is type(dataset)
    for rows, batch in zip(
        [ROWS, ROWS[:2]], numbered.read_batches([ROWS - len(dataset), ROWS[:2]]), strict=True
    ):
        assert batch.metadata["index"].tolist() == rows.tolist()
        assert batch.metadata["index"].dtype == np.int64
        assert list(batch.metadata)[-1] == "index"
        assert equal(without(batch, "index"), dataset.__getitems__(rows))
    assert "index" not in (dataset.__getitems__(ROWS).metadata or {})
    assert equal(numbered.with_row_numbers().__getitems__(ROWS), numbered.__getitems__(ROWS))


def test_wide_columns_change_nothing_that_a_tensor_shows(dataset: Any) -> None:
    wide = dataset.with_wide_columns()
    assert type(wide) is type(dataset)
    assert wide.columns.keys() == dataset.columns.keys()
    assert len(wide.__getitems__(ROWS)) == len(ROWS)


@pytest.mark.parametrize("reader", ["mmap", "preadv", "pinned"])
def test_other_readers_read_the_same(dataset: Any, reader: str) -> None:
    other = dataset.reading_with(dataset.open_reader(reader))
    assert type(other) is type(dataset)
    assert equal(other.__getitems__(ROWS), dataset.__getitems__(ROWS))
    assert dataset.reader_kind in ("mmap", "preadv")


def test_needed_chunks(dataset: Any) -> None:
    chunks = dataset.needed_chunks()
    assert chunks.dtype == np.int64
    assert len(np.unique(chunks)) == len(chunks) > 0


def folder_of(dataset: Any) -> str | None:
    """Where a stored dataset has written its arrays for other processes."""
    result: str | None = dataset._spill.folder
    return result


VARIANTS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda dataset: dataset,
    "with row numbers": lambda dataset: dataset.with_row_numbers(),
    "with wide columns": lambda dataset: dataset.with_wide_columns(),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pickled(dataset: Any, variant: str) -> None:
    changed = VARIANTS[variant](dataset)
    again = pickle.loads(pickle.dumps(changed))
    assert type(again) is type(dataset)
    assert equal(again.__getitems__(ROWS), changed.__getitems__(ROWS))


STORED_VARIANTS: dict[str, Callable[[Any], Any]] = VARIANTS | {
    "without metadata": lambda dataset: dataset.without_metadata(),
    "with more columns": lambda dataset: dataset.with_columns({"more": np.arange(len(dataset))}),
    "with one layer": lambda dataset: dataset.with_layers(dataset.layers[-1]),
    "with several changes": lambda dataset: (
        dataset.with_layers(dataset.layers[-1]).without_metadata().with_wide_columns().with_row_numbers()
    ),
}


@pytest.mark.parametrize("variant", STORED_VARIANTS)
@pytest.mark.parametrize("stored", STORED)
def test_a_variant_stays_what_it_is_when_its_folder_has_gone(
    stored: str, variant: str, tmp_path: Path
) -> None:
    dataset = STORED[stored](tmp_path / "arrays")
    changed = STORED_VARIANTS[variant](dataset)
    expected = changed.__getitems__(ROWS)
    data = pickle.dumps(changed)
    assert equal(pickle.loads(data).__getitems__(ROWS), expected)
    shutil.rmtree(folder_of(changed) or "")
    late = pickle.loads(data)  # this one runs the recipe
    assert equal(late.__getitems__(ROWS), expected)
    assert equal(pickle.loads(pickle.dumps(late)).__getitems__(ROWS), expected)
    assert late.categories.keys() == changed.categories.keys()


def test_variants_share_one_folder(tmp_path: Path) -> None:
    dataset = STORED["sparse"](tmp_path / "arrays")
    numbered = dataset.with_row_numbers()
    pickle.dumps(numbered)
    assert folder_of(numbered) is not None
    assert folder_of(dataset) == folder_of(numbered) == folder_of(numbered.without_metadata())


def test_columns_that_a_batch_has_another_meaning_for(tmp_path: Path) -> None:
    dataset = STORED["sparse"](tmp_path / "arrays")
    for name in ("index", "X"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            dataset.with_columns({name: np.arange(len(dataset))}).with_row_numbers()
