"""Stores of real packages, sound and damaged: rows equal what was written, or an error says why."""

from __future__ import annotations

import json
import os
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import hbx_gpu
from hbx_gpu.errors import HbxError

FIXTURES = (
    Path(os.environ.get("HBX_SHARED", Path(__file__).parents[2] / ".." / "shared")) / "fixtures" / "inplace"
)
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/manifest.json"))
ERRORS = (HbxError, ValueError, FileNotFoundError)


class Case:
    """One fixture: the query over its stores, and what was written."""

    def __init__(self, name: str) -> None:
        folder = FIXTURES / name
        self.manifest = json.loads((folder / "manifest.json").read_text())
        stores = self.manifest["store"]
        self.paths = [folder / store for store in ([stores] if isinstance(stores, str) else stores)]
        with np.load(folder / "expected.npz") as found:
            self.expected = {key: found[key] for key in found.files}

    def open(self) -> Any:
        return hbx_gpu.open(self.paths)

    def may_refuse(self) -> bool:
        """Whether an error is a right answer to this case."""
        return "refuse" in self.manifest["accept"] or "raise" in self.manifest["accept"]


def rows_of(dataset: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(columns, values) of every row; of a dense dataset the nonzeros."""
    batch = dataset.__getitems__(np.arange(len(dataset)))
    if hasattr(batch, "offsets"):
        return [(batch.indices[a:b], batch.values[a:b]) for a, b in pairwise(batch.offsets)]
    return [(np.flatnonzero(row), row[np.flatnonzero(row)]) for row in batch.data]


def wanted_rows(expected: dict[str, np.ndarray], prefix: str) -> list[tuple[np.ndarray, np.ndarray]]:
    indptr, indices, data = (expected[f"{prefix}/{part}"] for part in ("indptr", "indices", "data"))
    return [(indices[a:b], data[a:b]) for a, b in pairwise(indptr)]


def assert_rows(found: list[Any], wanted: list[Any], rename: np.ndarray | None = None) -> None:
    """Columns and values equal, the values in the order of their columns and bit for bit."""
    assert len(found) == len(wanted)
    for (columns, values), (expected_columns, expected) in zip(found, wanted, strict=True):
        if rename is not None:
            expected_columns = rename[expected_columns]
        order, expected_order = (
            np.argsort(columns, kind="stable"),
            np.argsort(expected_columns, kind="stable"),
        )
        np.testing.assert_array_equal(columns[order], expected_columns[expected_order])
        kept = expected[expected_order]
        assert np.array_equal(values[order], kept, equal_nan=kept.dtype.kind == "f")


def sorted_rows(cells: Any, dataset: Any, case: Case) -> list[Any]:
    """Rows in the order of the expectations: a collection is shuffled, so by name there."""
    rows = rows_of(dataset)
    if case.manifest["format"] != "annbatch-collection":
        return rows
    names = cells.to_pandas().index.tolist()
    place = {name: k for k, name in enumerate(names)}
    return [rows[place[name]] for name in case.expected["obs_names"].tolist()]


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith(("bad_", "join_"))])
def test_equals_what_was_written(name: str) -> None:
    case = Case(name)
    expected = case.expected
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = case.open()
            if "mod_names" in expected:
                check_modalities(cells, expected)
                return
            assert cells.n_cells == expected["X/shape"][0]
            for layer in matrices(expected):
                check_matrix(cells, case, layer)
            check_obs(cells, case)
    except ERRORS as error:
        if not case.may_refuse():
            raise
        refusal = error
    else:
        return
    assert case.paths[0].name in str(refusal)


def matrices(expected: dict[str, np.ndarray]) -> dict[str, str]:
    """Layer -> prefix of its arrays among the expectations."""
    found = {"X": "X"} if str(expected["X/kind"]) != "none" else {}
    found |= {str(layer): f"layers/{layer}" for layer in expected.get("layer_names", [])}
    return found | ({"raw": "raw/X"} if "raw/X/kind" in expected else {})


def check_matrix(cells: Any, case: Case, layer: str) -> None:
    expected, prefix = case.expected, matrices(case.expected)[layer]
    dataset = cells.to_cell_dataset(layer=layer)
    names = expected["raw/var_names" if layer == "raw" else "var_names"].astype(str)
    assert set(dataset.feature_uids) == set(names)
    place = {str(uid): k for k, uid in enumerate(dataset.feature_uids)}
    same = dataset.feature_uids.tolist() == names.tolist()
    rename = None if same else np.array([place[n] for n in names])
    assert dataset.dtype == expected[f"{prefix}/data"].dtype
    wanted = wanted_rows(expected, prefix)
    if str(expected[f"{prefix}/kind"]) == "dense":
        wanted = [(columns[values != 0], values[values != 0]) for columns, values in wanted]
    assert_rows(sorted_rows(cells, dataset, case), wanted, rename)


def check_obs(cells: Any, case: Case) -> None:
    expected = case.expected
    names = expected["obs_names"].astype(str)
    frame = cells.to_pandas()
    if case.manifest["format"] == "annbatch-collection":
        frame = frame.loc[names]
    assert frame.index.tolist() == names.tolist()
    for column in expected.get("obs_columns", np.empty(0)).tolist():
        if f"obs/{column}/values" not in expected:
            continue
        missing = expected.get(f"obs/{column}/missing", np.zeros(len(names), bool))
        values = expected[f"obs/{column}/values"]
        found = frame[column]
        assert found.isna().to_numpy()[missing].all(), column
        kept = ~missing
        if values.dtype.kind == "U":
            assert found[kept].astype(str).tolist() == values[kept].tolist(), column
        else:
            got = np.asarray(found[kept].to_numpy(), values.dtype)
            assert np.array_equal(got, values[kept], equal_nan=values.dtype.kind == "f"), column


def check_modalities(cells: Any, expected: dict[str, np.ndarray]) -> None:
    names = [str(name) for name in expected["mod_names"]]
    assert sorted(cells.modalities) == sorted(names)
    dataset = cells.to_multimodal_dataset(names)
    batch = dataset.__getitems__(np.arange(len(dataset)))
    for name in names:
        rows = expected[f"obsmap/{name}"]
        np.testing.assert_array_equal(batch.present[name], rows >= 0)
        prefix = f"mod/{name}/X"
        wanted = wanted_rows(expected, prefix)
        single = cells.to_cell_dataset(name)
        if str(expected[f"{prefix}/kind"]) == "dense":
            wanted = [(columns[values != 0], values[values != 0]) for columns, values in wanted]
        assert_rows(rows_of(single), [wanted[row] for row in rows if row >= 0])


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("join_")])
@pytest.mark.parametrize("join", ["outer", "inner"])
def test_joins(name: str, join: str) -> None:
    case = Case(name)
    expected = case.expected
    cells = case.open()
    dataset = cells.to_cell_dataset(join=join)
    names = expected[f"join/{join}/var_names"].astype(str)
    assert sorted(dataset.feature_uids) == sorted(names)
    place = {str(uid): k for k, uid in enumerate(dataset.feature_uids)}
    rename = np.array([place[n] for n in names])
    assert_rows(rows_of(dataset), wanted_rows(expected, f"join/{join}/X"), rename)
    measured = dataset.measured_masks(np.arange(dataset.n_groups))
    np.testing.assert_array_equal(measured[:, rename], expected[f"join/{join}/measured"])
    np.testing.assert_array_equal(dataset.groups_np, expected["join/store_of_row"])
    frame = cells.to_pandas()
    assert frame.index.tolist() == expected["join/obs_names"].astype(str).tolist()
    columns = {key.split("/")[2] for key in expected if key.startswith("join/obs/")}
    for column in columns:
        missing = expected.get(f"join/obs/{column}/missing", np.zeros(len(frame), bool))
        values, found = expected[f"join/obs/{column}/values"], frame[column]
        assert found[~missing].astype(str).tolist() == values[~missing].astype(str).tolist()


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("bad_")])
def test_damage_is_an_error(name: str) -> None:
    """At opening, or when an affected row is read; rows that are sound are right until then."""
    case = Case(name)
    affected = case.manifest.get("rows_affected", "all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset, error = opened(case)
        if dataset is None:
            assert case.paths[0].name in error
            return
        rows = range(len(dataset)) if isinstance(affected, str) else affected
        wanted = wanted_rows(case.expected, "X")
        raised = 0
        for row in range(len(dataset)):
            try:
                found = rows_of_one(dataset, row)
            except ERRORS:
                raised += 1
                assert row in rows
                continue
            if case.manifest["accept"] == "raise":
                assert isinstance(affected, str) or row not in rows, f"row {row} was returned"
                assert_rows([found], [wanted[row]])
        if case.manifest["accept"] == "raise":
            assert raised
        elif not raised:
            names = case.expected["var_names"].astype(str)
            cells = case.open()
            place = {str(uid): k for k, uid in enumerate(dataset.feature_uids)}
            assert_rows(sorted_rows(cells, dataset, case), wanted, np.array([place[n] for n in names]))


def opened(case: Case) -> tuple[Any, str]:
    """The dataset, or what was said against it."""
    try:
        return case.open().to_cell_dataset(), ""
    except ERRORS as error:
        return None, str(error)


def rows_of_one(dataset: Any, row: int) -> tuple[np.ndarray, np.ndarray]:
    batch = dataset.__getitems__([row])
    if hasattr(batch, "offsets"):
        return batch.indices, batch.values
    columns = np.flatnonzero(batch.data[0])
    return columns, batch.data[0][columns]


@pytest.mark.parametrize(
    "name", ["zarr_ad013_default_multichunk", "h5ad_ad012_odd_chunks", "tenx_v3_gex_adt"]
)
def test_random_rows_equal_slices(name: str) -> None:
    case = Case(name)
    expected = case.expected
    matrix = sp.csr_matrix(
        (expected["X/data"], expected["X/indices"], expected["X/indptr"]), shape=tuple(expected["X/shape"])
    )
    dataset = case.open().to_cell_dataset()
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows = rng.integers(0, len(dataset), 37)
        batch = dataset[rows]
        found = sp.csr_matrix((batch.values, batch.indices, batch.offsets), shape=(37, dataset.n_features))
        assert (found != matrix[rows]).nnz == 0
