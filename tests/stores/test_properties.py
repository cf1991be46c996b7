"""Any AnnData store, however it is chunked, compressed and typed, gives what scipy cuts from the matrix."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import hbx_gpu
from hbx_gpu._stores.lazy import as_stream
from hbx_gpu._stores.recognize import open_store
from tests.stores.written import How, hows, random_matrix, write


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    how=hows(),
    seed=st.integers(0, 1_000),
    n_cells=st.integers(0, 60),
    n_genes=st.integers(1, 50),
    sorted_columns=st.booleans(),
)
def test_rows_and_streams_equal_scipy(
    how: How, seed: int, n_cells: int, n_genes: int, sorted_columns: bool
) -> None:
    matrix = random_matrix(seed, n_cells, n_genes, sorted_columns=sorted_columns)
    dtype = np.dtype(how.data).newbyteorder("=")
    wanted = matrix.toarray().astype(dtype)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / ("x.h5ad" if how.container == "hdf5" else "x.zarr")
        write(path, matrix, how)
        dataset = hbx_gpu.open(path).to_cell_dataset()
        assert (len(dataset), dataset.n_features, dataset.dtype) == (n_cells, n_genes, dtype)
        rng = np.random.default_rng(seed)
        for rows in (np.arange(n_cells), rng.integers(0, max(n_cells, 1), 25 if n_cells else 0)):
            batch: Any = dataset[rows]
            if how.dense:
                np.testing.assert_array_equal(batch.data, wanted[rows])
                continue
            values = batch.values.astype(np.float64)  # which scipy computes with; it has no float16
            found = sp.csr_matrix((values, batch.indices, batch.offsets), shape=(len(rows), n_genes))
            np.testing.assert_array_equal(found.toarray(), wanted[rows])
            assert batch.values.dtype == dtype
        stream = as_stream(open_store(path).parts[0].matrix("X"))
        parts = [np.empty((0, n_genes))]
        for block in stream.blocks(Path(folder)):
            shape, values = (len(block.indptr) - 1, n_genes), block.values.astype(np.float64)
            parts.append(sp.csr_matrix((values, block.indices, block.indptr), shape=shape).toarray())
        np.testing.assert_array_equal(np.concatenate(parts), wanted)
