"""Real archives with the values that they must give, and archives written by hand with chosen flaws."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu.scdl._format.header import archive_header
from hbx_gpu.scdl._format.index_writer import write_feature_index
from tests import npz


@dataclass(frozen=True)
class Case:
    """A real archive and its truth."""

    archive: Path
    expected: dict[str, Any]
    info: dict[str, Any]

    def frames(self, kind: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = json.loads(str(self.expected[f"{kind}_json"]))
        return result


@pytest.fixture(scope="session")
def scdl_cases(shared: Path) -> dict[str, Case]:
    """Name -> case, of all real archives."""
    cases = {}
    for file in sorted((shared / "fixtures" / "scdl").glob("*/expected*.npz")):
        expected = npz.load(file)
        info = json.loads(str(expected["info_json"]))
        name = file.parent.name + file.stem.removeprefix("expected").removeprefix("_archive")
        cases[name] = Case(file.parent / info["archive"], expected, info)
    return cases


@dataclass
class Handmade:
    """An archive written file by file; attributes that are changed before `write` become its flaws."""

    path: Path
    n_rows: int = 40
    n_vars: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        lengths = rng.integers(0, 20, self.n_rows)
        lengths[-1] = 3
        self.indptr = np.concatenate([[0], np.cumsum(lengths)])
        self.indices = np.concatenate(
            [np.sort(rng.choice(self.n_vars, n, replace=False)) for n in lengths]
        ).astype(np.int64)
        self.data: np.ndarray = rng.integers(1, 40, len(self.indices)).astype("f4")
        self.dtypes = {"ROWPTR": "u2", "COLPTR": "u1"}
        self.stated: dict[str, str] = {}
        self.header = self.metadata = True
        self.var_folder, self.version = "var_features", "0.1.3"
        self.obs_rows: int | None = self.n_rows

    def write(self) -> Path:
        self.path.mkdir()
        stored = {
            "DATA": self.data,
            "ROWPTR": self.indptr.astype(self.dtypes["ROWPTR"]),
            "COLPTR": self.indices.astype(self.dtypes["COLPTR"]),
        }
        for name, file in (("DATA", "data.npy"), ("ROWPTR", "row_ptr.npy"), ("COLPTR", "col_ptr.npy")):
            stored[name].tofile(self.path / file)
        genes = {"gene": np.array([f"g{i}" for i in range(self.n_vars)], object)}
        records = [write_feature_index(self.path / self.var_folder, [(self.n_rows, genes)], ["a.h5ad"])]
        if self.obs_rows is not None:
            cells = {"cell": np.array([f"c{i}" for i in range(self.obs_rows)], object)}
            records.append(
                write_feature_index(self.path / "obs_features", [(self.obs_rows, cells)], ["a.h5ad"])
            )
        for labels in self.path.glob("*_features/labels.json"):
            labels.unlink()  # release 0.1.3 writes labels.npy alone
        if self.header:
            lengths = {name: len(array) for name, array in stored.items()}
            dtypes = {name: array.dtype for name, array in stored.items()} | self.stated
            (self.path / "header.sch").write_bytes(archive_header(lengths, dtypes, records).to_bytes())
        if self.metadata:
            (self.path / "metadata.json").write_text(json.dumps({"num_rows": self.n_rows}))
        (self.path / "version.json").write_text(json.dumps(self.version))
        return self.path


@pytest.fixture
def handmade(tmp_path: Path) -> Handmade:
    """A sound archive to be given flaws."""
    return Handmade(tmp_path / "archive")
