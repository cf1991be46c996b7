"""What every engine must do, as one suite to inherit from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbx_gpu._engine.host.dense import densify
from hbx_gpu._plan.rows import plan_rows, source_table
from hbx_gpu._source import RowIndex, Source
from hbx_gpu._storage.choice import open_reader
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import CorruptChunkError
from hbx_gpu.testing import CODECS, StoredGroup, expected_dense, stored_groups, write_sources


class Rows:
    """Sources opened with one engine: plan, read and decode in one call."""

    def __init__(
        self, engine: Any, sources: list[Source], rows: RowIndex, n_features: int, reader: str = "mmap"
    ) -> None:
        layouts = [layout for s in sources for layout in (s.index, s.layers["counts"]) if layout]
        self.table = source_table(sources, ["counts"], n_features)
        self.directory = ChunkDirectory(layouts)
        self.dtype = np.result_type(*(s.layers["counts"].dtype for s in sources))
        self.engine = engine(self.table, self.directory, [self.dtype])
        self.reader = open_reader(reader, self.directory)
        self.rows = rows

    def csr(self, selection: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        plan = plan_rows(self.table, self.rows, selection)
        slab = self.reader.read(self.directory.extents(plan.chunks))
        indices, (values,), offsets = self.engine.csr(plan, slab)
        return indices, values, offsets


def one_group(codec: str = "homeobox.bitpacking", **kwargs: Any) -> StoredGroup:
    rng = np.random.default_rng(7)
    matrix = sp.random(40, 30, density=0.4, format="csr", random_state=rng)
    matrix.data = rng.integers(1, 1000, size=matrix.nnz).astype(np.uint32)
    return StoredGroup(
        matrix=matrix, remap=rng.permutation(30).astype(np.int32), codec=codec, chunk=64, **kwargs
    )


class EngineSuite:
    """What every engine must do; `engine` names the class under test."""

    engine: ClassVar[type]

    @given(
        case=stored_groups(),
        seed=st.integers(0, 2**32 - 1),
        n=st.integers(0, 50),
        reader=st.sampled_from(["mmap", "preadv"]),
    )
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    def test_rows_equal_the_matrices(
        self, case: tuple[list[StoredGroup], int], seed: int, n: int, reader: str
    ) -> None:
        groups, n_features = case
        with tempfile.TemporaryDirectory() as folder:
            sources, rows = write_sources(Path(folder), groups)
            opened = Rows(self.engine, sources, rows, n_features, reader)
            selection = np.random.default_rng(seed).integers(0, len(rows), size=n)
            indices, values, offsets = opened.csr(selection)
            opened.reader.close()
        assert indices.dtype == np.int32
        assert offsets.dtype == np.int64
        assert values.dtype == opened.dtype
        assert offsets[0] == 0
        assert offsets[-1] == len(indices) == len(values)
        # CSR content and order inside a row, row by row.
        matrices = [(g, r) for g in groups for r in range(g.matrix.shape[0])]
        for i, row in enumerate(selection):
            group, r = matrices[row]
            a, b = group.matrix.indptr[r], group.matrix.indptr[r + 1]
            columns = group.remap[group.matrix.indices[a:b]]
            keep = columns >= 0
            got = slice(offsets[i], offsets[i + 1])
            assert indices[got].tolist() == columns[keep].tolist()
            assert values[got].tolist() == group.matrix.data[a:b][keep].tolist()
        dense = densify(SparseBatch(indices, values, offsets, n_features), dtype="float64")
        assert np.array_equal(dense, expected_dense(groups, n_features)[selection])

    @pytest.mark.parametrize("codec", CODECS)
    def test_absent_objects_are_fill_values(self, codec: str, tmp_path: Path) -> None:
        # Column 0 alone in every row, value 0: a writer that skips empty chunks stores nothing at all.
        matrix = sp.csr_matrix((np.zeros(9, np.uint32), np.zeros(9, np.int32), np.arange(10)), shape=(9, 3))
        group = StoredGroup(
            matrix=matrix, remap=np.array([2, 0, 1], np.int32), codec=codec, chunk=4, chunks_per_shard=2
        )
        sources, rows = write_sources(tmp_path, [group])
        assert not list((tmp_path / "g0/csr/indices").glob("c/*"))
        indices, values, offsets = Rows(self.engine, sources, rows, 3).csr(np.array([8, 0, 3]))
        assert indices.tolist() == [2, 2, 2]
        assert values.tolist() == [0, 0, 0]
        assert offsets.tolist() == [0, 1, 2, 3]

    def test_a_lost_index_object_is_not_a_fill_value(self, tmp_path: Path) -> None:
        sources, rows = write_sources(tmp_path, [one_group()])
        (tmp_path / "g0/csr/indices/c/1").unlink()
        opened = Rows(self.engine, sources, rows, 30)
        with pytest.raises(CorruptChunkError, match=r"missing.*g0/csr/indices|g0/csr/indices.*missing"):
            opened.csr(np.arange(40))

    def test_missing_object_where_the_writer_promised_all(self, tmp_path: Path) -> None:
        import dataclasses

        sources, rows = write_sources(tmp_path, [one_group()])
        layer = dataclasses.replace(sources[0].layers["counts"], absent_is_fill=False)
        sources = [dataclasses.replace(sources[0], layers={"counts": layer})]
        (tmp_path / "g0/csr/layers/counts/c/2").unlink()
        opened = Rows(self.engine, sources, rows, 30)
        with pytest.raises(CorruptChunkError, match="counts"):
            opened.csr(np.arange(40))

    def test_an_absent_chunk_fills_whole_rows_of_its_own_group(self, tmp_path: Path) -> None:
        """Values: every element of the chunk. Columns: the group's own remap, not that of the first one."""
        import dataclasses

        groups = [dataclasses.replace(one_group(), remap=np.arange(30, dtype=np.int32)) for _ in range(2)]
        alone = sp.csr_matrix((np.ones(9, np.uint32), np.zeros(9, np.int32), np.arange(10)), shape=(9, 3))
        groups[1] = StoredGroup(
            matrix=alone, remap=np.array([2, 0, 1], np.int32), codec="none", chunk=4, chunks_per_shard=2
        )
        sources, rows = write_sources(tmp_path, groups)
        assert not list((tmp_path / "g1/csr/indices").glob("c/*"))
        layer = dataclasses.replace(sources[0].layers["counts"], fill_value=7)
        sources = [dataclasses.replace(sources[0], layers={"counts": layer}), sources[1]]
        (tmp_path / "g0/csr/layers/counts/c/2").unlink()
        expected = groups[0].matrix.data.copy()
        expected[2 * 64 : 3 * 64] = 7
        indices, values, offsets = Rows(self.engine, sources, rows, 30).csr(np.arange(49))
        n = groups[0].matrix.nnz
        assert values[:n].tolist() == expected.tolist()
        assert values[n:].tolist() == [1] * 9
        assert indices[n:].tolist() == [2] * 9
        assert offsets[-10:].tolist() == list(range(n, n + 10))

    @pytest.mark.parametrize("known", [20, 29])
    @pytest.mark.parametrize("codec", CODECS)
    def test_column_beyond_the_groups_features(self, codec: str, known: int, tmp_path: Path) -> None:
        group = one_group(codec)
        assert group.matrix.indices.max() == 29  # with 29 known, the last column is the first one outside
        sources, rows = write_sources(tmp_path, [group])
        short = Source("g0", sources[0].index, sources[0].layers, group.remap[:known])
        opened = Rows(self.engine, [short], rows, 30)
        with pytest.raises(CorruptChunkError, match=rf"g0/csr/indices.*outside \[0, {known}\)"):
            opened.csr(np.arange(40))

    @pytest.mark.parametrize("codec", [c for c in CODECS if c != "none"])
    def test_truncated_chunk(self, codec: str, tmp_path: Path) -> None:
        sources, rows = write_sources(tmp_path, [one_group(codec)])
        path = tmp_path / "g0/csr/layers/counts/c/1"
        path.write_bytes(path.read_bytes()[:-3])
        opened = Rows(self.engine, sources, rows, 30)
        with pytest.raises(CorruptChunkError, match="g0/csr/layers/counts") as error:
            opened.csr(np.arange(40))
        assert error.value.chunk == 1
        assert error.value.file == str(path)

    def test_mutated_chunks_raise_or_stay_in_bounds(self, tmp_path: Path) -> None:
        """Flip bytes anywhere: an error, or numbers in range; never a crash."""
        sources, rows = write_sources(tmp_path, [one_group()])
        path = tmp_path / "g0/csr/indices/c/0"
        good = path.read_bytes()
        rng = np.random.default_rng(0)
        raised = 0
        for _ in range(100):
            bad = bytearray(good)
            for at in rng.integers(0, len(bad), size=rng.integers(1, 4)):
                bad[at] ^= 1 << rng.integers(8)
            path.write_bytes(bytes(bad))
            opened = Rows(self.engine, sources, rows, 30)
            try:
                indices, _, _ = opened.csr(np.arange(40))
            except CorruptChunkError:
                raised += 1
            else:
                assert indices.min() >= 0
                assert indices.max() < 30
        assert raised > 50

    def test_repeated_columns(self, tmp_path: Path) -> None:
        matrix = sp.csr_matrix((2, 4), dtype=np.uint32)
        matrix.data = np.array([1, 2, 3], np.uint32)
        matrix.indices = np.array([3, 3, 1], np.int32)
        matrix.indptr = np.array([0, 3, 3], np.int32)
        group = StoredGroup(matrix=matrix, remap=np.arange(4, dtype=np.int32))
        sources, rows = write_sources(tmp_path, [group])
        indices, values, offsets = Rows(self.engine, sources, rows, 4).csr(np.array([1, 0]))
        assert indices.tolist() == [3, 3, 1]
        dense = densify(SparseBatch(indices, values, offsets, 4))
        assert dense.tolist() == [[0, 0, 0, 0], [0, 3, 0, 3]]
