"""Every batch of every fixture atlas, read as one modality among all: a row for every cell of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu.atlas import AtlasQuery, Snapshot
from hbx_gpu.batch import DenseBatch, MultimodalBatch, RaggedBatch, SparseBatch
from hbx_gpu.dataloader import MultimodalCellDataset, multimodal_to_dense_collate

# (atlas, snapshot, table, suffix of its files)
TABLES = [
    ("all_spaces", 0, "cells", "_v0__cells"),
    ("all_spaces", 0, "spots", "_v0__spots"),
    ("cite_multimodal", 0, "cells", "_v0"),
    ("image_tiles", 0, "cells", "_v0"),
    ("legacy_0_2_3", 0, "cells", "_v0"),
    ("missing_shards", 0, "cells", "_v0"),
    ("ragged_rna", 0, "cells", "_v0"),
    ("ragged_rna", 1, "cells", "_v1"),
    ("seed_2026_05", 0, "cells", "_v0"),
    ("single_rna", 0, "cells", "_v0"),
    ("uid_collision", 0, "cells", "_v0"),
]
FRAGMENTS = ["starts", "lengths"]
MULTIMODAL = ("all_spaces", "cite_multimodal", "legacy_0_2_3", "seed_2026_05")
"""Fixtures with batches of the real package's multimodal dataset."""


class Case:
    """One obs table of a fixture beside what reading it must give."""

    def __init__(self, root: Path, version: int, table: str, suffix: str) -> None:
        self.atlas = root.name
        self.snapshot = Snapshot.open(root / "atlas", version)
        self.table = table
        with np.load(root / f"expected{suffix}.npz") as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        versions = json.loads((root / "expected.json").read_text())["versions"]
        self.expected: dict[str, Any] = versions[version]["tables"][table]
        self.fields: dict[str, dict[str, Any]] = self.expected["fields"]
        self.n_rows = len(self.arrays["uid"])

    def query(self) -> AtlasQuery:
        return AtlasQuery(self.snapshot, self.table)

    def layers(self, field: str) -> list[str]:
        if self.fields[field]["feature_space"] == "chromatin_accessibility":
            return FRAGMENTS
        layers: list[str] = self.fields[field]["layers"]
        return layers[:1]

    def dataset(self, **kwargs: Any) -> MultimodalCellDataset:
        """All fields at once."""
        layers = {name: self.layers(name) for name in self.fields}
        return self.query().to_multimodal_dataset(field_names=list(self.fields), layers=layers, **kwargs)

    def present(self, field: str, rows: Any) -> np.ndarray:
        result: np.ndarray = self.arrays[f"{field}/present"][np.asarray(rows, np.int64)]
        return result

    def numbers(self, field: str, rows: Any) -> np.ndarray:
        """Numbers among the present rows of those of `rows` that are."""
        number = np.cumsum(self.arrays[f"{field}/present"]) - 1
        rows = np.asarray(rows, np.int64)
        result: np.ndarray = number[rows[self.present(field, rows)]]
        return result


@pytest.fixture(scope="module", params=TABLES, ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}")
def case(request: pytest.FixtureRequest, homeobox_fixtures: Path) -> Case:
    atlas, *rest = request.param
    return Case(homeobox_fixtures / atlas, *rest)


@pytest.fixture(scope="module")
def everything(case: Case) -> MultimodalCellDataset:
    return case.dataset()


def check_sparse(part: SparseBatch, present: np.ndarray, wanted: dict[str, np.ndarray], field: str) -> None:
    """`wanted` holds present rows only: rows without the modality have to be empty between them."""
    counts = np.diff(part.offsets)
    assert len(counts) == len(present)
    assert part.offsets[0] == 0
    assert not counts[~present].any()
    assert np.array_equal(counts[present], np.diff(wanted["offsets"]))
    assert part.indices.dtype == np.int32
    assert np.array_equal(part.indices, wanted["indices"]), field
    values = {name: array for name, array in wanted.items() if name not in ("indices", "offsets")}
    if len(values) == 1:
        assert np.array_equal(part.values, next(iter(values.values())))
    else:
        assert set(part.layers) == set(values)
        for name, array in values.items():
            assert np.array_equal(part.layers[name], array)
            assert part.layers[name].dtype.kind == array.dtype.kind


def check_dense(part: DenseBatch, present: np.ndarray, wanted: np.ndarray) -> None:
    assert isinstance(part, DenseBatch)
    assert len(part) == len(present)
    assert np.array_equal(part.data[present], wanted)
    assert not part.data[~present].any()
    assert part.data.dtype == wanted.dtype


def check_images(part: DenseBatch | RaggedBatch, present: np.ndarray, wanted: list[np.ndarray]) -> None:
    """Arrays of one shape may come as one array; then absent rows are zeros, else arrays without elements."""
    assert len(part) == len(present)
    found = [part.data[i] for i in np.flatnonzero(present)]
    assert len(found) == len(wanted)
    for array, expected in zip(found, wanted, strict=True):
        assert array.shape == expected.shape
        assert np.array_equal(array, expected)
    for i in np.flatnonzero(~present):
        if isinstance(part, RaggedBatch):
            assert part.data[i].size == 0
        else:
            assert not part.data[i].any()
    if isinstance(part, DenseBatch):
        assert part.per_cell_shape == part.data.shape[1:]


def check_field(case: Case, batch: MultimodalBatch, field: str, rows: Any, key: str | None) -> None:
    """One modality of a batch of table rows; `key` is where the real package's result is kept."""
    present = case.present(field, rows)
    assert np.array_equal(batch.present[field], present)
    assert batch.present[field].dtype == bool
    part, numbers = batch.modalities[field], case.numbers(field, rows)
    (layer, *others) = case.layers(field)
    arrays = case.arrays
    if f"{field}/{layer}/row0" in arrays:
        assert isinstance(part, DenseBatch | RaggedBatch)
        check_images(part, present, [arrays[f"{field}/{layer}/row{i}"] for i in numbers])
        return
    if isinstance(part, DenseBatch):
        check_dense(part, present, arrays[f"{field}/{layer}/dense"][numbers])
        assert part.n_features == case.fields[field]["n_features"]
        if key is not None and f"{key}/{layer}" in arrays:
            assert np.array_equal(part.data[present], arrays[f"{key}/{layer}"])
        return
    assert isinstance(part, SparseBatch)
    assert part.n_features == case.fields[field]["n_features"]
    if not others:
        dense = np.zeros((len(present), part.n_features), np.float64)
        np.add.at(dense, (np.repeat(np.arange(len(part)), np.diff(part.offsets)), part.indices), part.values)
        assert np.array_equal(dense[present], arrays[f"{field}/{layer}/dense"][numbers])
    if key is not None and f"{key}/indices" in arrays:
        names = ["indices", "offsets", layer, *others]
        wanted = {name: arrays.get(f"{key}/{name}", arrays.get(f"{key}/values")) for name in names}
        check_sparse(part, present, wanted, field)  # type: ignore[arg-type]


def test_the_dataset(case: Case, everything: MultimodalCellDataset) -> None:
    assert everything.n_cells == len(everything) == case.n_rows
    assert list(everything.n_features) == list(case.fields)
    for name, field in case.fields.items():
        if field["feature_space"] not in ("image_tiles", "discrete_image"):
            assert everything.n_features[name] == field["n_features"]
            assert everything.feature_uids[name].tolist() == field["features_by_global_index"]
        assert np.array_equal(everything.present[name], case.arrays[f"{name}/present"])
    first = next(iter(case.fields))
    assert np.array_equal(everything.groups_np, case.arrays[f"{first}/group_ids"])
    assert everything.groups_np.dtype == np.int32


def test_every_batch_of_every_field(case: Case, everything: MultimodalCellDataset) -> None:
    """Repeated rows too, which the real package does not read."""
    n_batches = 0
    for name, field in case.fields.items():
        rows_with = np.flatnonzero(case.arrays[f"{name}/present"])
        for entry in field["batches"]:
            rows = rows_with[np.array(entry["rows"], np.int64)]
            batch = everything.__getitems__(rows.tolist())
            assert batch.n_cells == len(rows)
            for other in case.fields:
                check_field(case, batch, other, rows, entry["key"] if other == name else None)
            n_batches += 1
    assert n_batches >= 8


def test_every_multimodal_batch(case: Case) -> None:
    expected = case.expected.get("multimodal")
    if not expected:
        assert case.atlas not in MULTIMODAL or case.table == "spots"
        return
    dataset = case.query().to_multimodal_dataset(expected["fields"], metadata_columns=["uid"])
    for name in expected["fields"]:
        if case.fields[name]["feature_space"] != "image_tiles":
            assert dataset.n_features[name] == expected["n_features"][name]
    if "multimodal/groups_np" in case.arrays:
        assert np.array_equal(dataset.groups_np, case.arrays["multimodal/groups_np"])
    assert len(expected["batches"]) == 8
    together = dataset.read_batches([entry["rows"] for entry in expected["batches"]])
    for entry, from_window in zip(expected["batches"], together, strict=True):
        key, rows = entry["key"], entry["rows"]
        for batch in (dataset.__getitems__(rows), from_window):
            assert set(batch.modalities) == set(expected["fields"])
            assert batch.n_cells == len(rows)
            assert batch.metadata is not None
            uids = dataset.categories["uid"][batch.metadata["uid"]]
            assert uids.tolist() == case.arrays["uid"][rows].tolist()
            for name in expected["fields"]:
                assert np.array_equal(batch.present[name], case.arrays[f"{key}/{name}/present"])
                assert batch.modalities[name].metadata is None
                check_field(case, batch, name, rows, f"{key}/{name}")


def test_what_the_document_promises_of_tensors(case: Case, everything: MultimodalCellDataset) -> None:
    """All rows backwards: zeros where absent, one row per cell, and nothing measured that is absent."""
    rows = np.arange(case.n_rows)[::-1]
    batch = everything.__getitems__(rows)
    tensors = multimodal_to_dense_collate(batch)
    for name in case.fields:
        present = case.present(name, rows)
        assert np.array_equal(tensors["present"][name].numpy(), present)
        x = tensors[name]["X"]
        assert len(x) == case.n_rows
        layer = case.layers(name)[0]
        if f"{name}/{layer}/dense" not in case.arrays:
            continue
        wanted = case.arrays[f"{name}/{layer}/dense"][case.numbers(name, rows)].astype(np.float32)
        found = x.numpy()
        assert found.dtype == wanted.dtype
        assert np.array_equal(found[present], wanted)
        assert not found[~present].any()
        measured = tensors["measured"][name].numpy()
        assert measured.shape == found.shape
        assert not measured[~present].any()
        assert not found[~measured].any()


def test_metadata_of_every_batch(case: Case) -> None:
    """Columns as the real package returned them, where the fixture keeps them."""
    columns = ["batch", "score"]
    fields = [name for name in case.fields if f"{name}/b0/meta/batch" in case.arrays]
    if not fields:
        assert case.snapshot.record is not None  # newer releases: metadata are kept in the obs files
        return
    dataset = case.dataset(metadata_columns=columns)
    for name in fields:
        rows_with = np.flatnonzero(case.arrays[f"{name}/present"])
        for entry in case.fields[name]["batches"]:
            batch = dataset.__getitems__(rows_with[np.array(entry["rows"], np.int64)])
            assert batch.metadata is not None
            for column in columns:
                wanted = case.arrays[f"{entry['key']}/meta/{column}"]
                np.testing.assert_array_equal(batch.metadata[column], wanted)


@pytest.mark.filterwarnings("ignore:this query selects no cells")
def test_every_query(case: Case) -> None:
    """Filters and panels, with every other modality beside."""
    for query in case.expected.get("queries", []):
        field = query.get("field")
        asked = case.query().where(query.get("where"))
        asked.limit(query.get("limit")).offset(query.get("offset", 0))
        if "features" in query:
            space, uids = query["features"]
            asked.features(uids, space)
        names = list(case.fields)
        layers = {name: case.layers(name)[0] for name in names if len(case.layers(name)) == 1}
        if field is not None:
            layers[field] = query.get("layers", [layers[field]])[0]
        dataset = asked.to_multimodal_dataset(field_names=names, layers=layers, metadata_columns=["uid"])
        batch = dataset.__getitems__(np.arange(len(dataset)))
        assert batch.metadata is not None
        uids = dataset.categories["uid"][batch.metadata["uid"]]
        number = {uid: i for i, uid in enumerate(case.arrays["uid"].tolist())}
        rows = np.array([number[uid] for uid in uids], np.int64)
        if field is None:
            assert uids.tolist() == query["uids"]
            check_field(case, batch, names[0], rows, None)
            continue
        present = batch.present[field]
        assert uids[present].tolist() == query["uids"]
        assert np.array_equal(present, case.present(field, rows))
        assert dataset.n_features[field] == query["n_features"]
        if "features" in query:
            assert dataset.feature_uids[field].tolist() == query["features"][1]
        check_query(batch.modalities[field], present, case.arrays, query, layers[field], dataset, field)


def check_query(
    part: Any,
    present: np.ndarray,
    arrays: dict[str, np.ndarray],
    query: dict[str, Any],
    layer: str,
    dataset: MultimodalCellDataset,
    field: str,
) -> None:
    """The real package's columns of a panel ascend, ours come in the order asked: compared by name."""
    ours = dataset.feature_uids[field]
    theirs = np.array(query.get("feature_columns", ours), dtype=object)
    key = query["key"]
    if isinstance(part, DenseBatch):
        place = [theirs.tolist().index(uid) for uid in ours]
        check_dense(part, present, arrays[f"{key}/{layer}"][:, place])
        return
    counts = np.diff(part.offsets)
    assert not counts[~present].any()
    assert np.array_equal(counts[present], np.diff(arrays[f"{key}/offsets"]))
    assert np.array_equal(ours[part.indices], theirs[arrays[f"{key}/indices"]])
    named = f"{key}/{layer}"
    assert np.array_equal(part.values, arrays[named if named in arrays else f"{key}/values"])
