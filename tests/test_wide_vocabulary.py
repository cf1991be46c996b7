"""400,000 features: what is sparse works as ever, and what is dense is refused with the arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.errors import ResourceError
from hbx_gpu.testing import example_groups, write_sources

WIDTH = 400_000
"""Genes, transcripts, peaks and guides of several species together."""


def wide(root: Path, width: int = WIDTH) -> tuple[CellDataset, list[np.ndarray]]:
    """Two matrices whose columns are spread over the vocabulary, and where each of their columns goes."""
    places, groups = [], []
    for seed, group in enumerate(example_groups(40)):
        remap = np.random.default_rng(seed).choice(WIDTH, group.matrix.shape[1], replace=False)
        places.append(remap)
        groups.append(replace(group, remap=np.where(remap < width, remap, -1).astype(np.int32)))
    sources, rows = write_sources(root, groups)
    uids = np.array([f"f{i}" for i in range(width)], dtype=object)
    return CellDataset(sources, rows, layer="counts", n_features=width, feature_uids=uids), places


def test_csr_batches_have_the_columns_of_the_vocabulary(tmp_path: Path) -> None:
    dataset, places = wide(tmp_path)
    plain = [group.matrix for group in example_groups(40)]
    with make_loader(dataset, batch_size=16, layout="csr") as loader:
        seen = 0
        for batch in loader:
            x = batch["X"]
            assert x.shape == (len(batch["index"]), WIDTH)
            pointers, columns, values = (
                part.numpy() for part in (x.crow_indices(), x.col_indices(), x.values())
            )
            for i, row in enumerate(batch["index"].tolist()):
                part = slice(pointers[i], pointers[i + 1])
                matrix, remap = plain[row // 40], places[row // 40]
                stored = matrix[row % 40].toarray()[0]
                order = np.argsort(remap[stored > 0])
                assert np.array_equal(columns[part], remap[stored > 0][order])
                assert np.array_equal(values[part], stored[stored > 0][order])
                seen += 1
    assert seen == 80


def test_a_panel_drops_the_columns_outside_it(tmp_path: Path) -> None:
    dataset, places = wide(tmp_path, width=WIDTH // 2)
    batch = dataset[np.arange(80)]
    assert batch.indices.max() < WIDTH // 2
    kept = sum(
        int((group.matrix.toarray()[:, place < WIDTH // 2] > 0).sum())
        for group, place in zip(example_groups(40), places, strict=True)
    )
    assert len(batch.indices) == kept


def test_dense_batches_that_do_not_fit_are_refused_with_the_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, places = wide(tmp_path)
    monkeypatch.setattr("hbx_gpu._loading.dense_size.free_host_memory", lambda: 8_000_000_000)
    with pytest.raises(ResourceError) as refused:
        make_loader(dataset, batch_size=16_384, layout="dense")
    assert str(refused.value) == (
        "a dense batch of 16,384 rows x 400,000 features x 4 bytes takes 26.2 GB, and 8.0 GB of memory are "
        "free: make the batches smaller, select fewer features with query.features(...), or load CSR "
        "batches, which hold stored values only"
    )
    make_loader(dataset, batch_size=16_384, layout="csr").close()
    with make_loader(dataset, batch_size=4, layout="dense") as loader:
        first = next(iter(loader))
    stored = example_groups(40)[0].matrix[0].toarray()[0]
    assert np.array_equal(first["X"][0].numpy()[places[0]], stored)
