"""Small stores to attack, and a folder outside of them that must stay as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas

N, GENES = 40, 30


def anndata(seed: int) -> ad.AnnData:
    """Counts of 40 cells."""
    rng = np.random.default_rng(seed)
    counts = sp.random(N, GENES, density=0.2, random_state=seed, format="csr")
    counts.data = (1 + rng.geometric(0.3, counts.nnz)).astype(np.float32)
    obs = pd.DataFrame({"cell_type": rng.choice(list("abc"), N)}, index=[f"c{seed}_{i}" for i in range(N)])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))


def make_atlas(root: Path, codec: str = "hbx_gpu.rowpack") -> Path:
    """An atlas of two datasets and one snapshot."""
    atlas = create_or_open_atlas(root, codec=codec)
    for seed in (1, 2):
        atlas.add_from_anndata(anndata(seed), chunk_shape=64, shard_shape=256)
    atlas.optimize()
    atlas.snapshot()
    return root


def read(root: Path, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All rows of an atlas: columns, values, offsets."""
    dataset = RaggedAtlas.checkout_latest(root, **options).query().to_cell_dataset("gene_expression")
    batch: Any = dataset[np.arange(len(dataset))]
    return batch.indices, batch.values, batch.offsets


def arrays(root: Path) -> list[Path]:
    """Directories of all arrays."""
    found = sorted((root / "zarr_store").rglob("zarr.json"))
    return [path.parent for path in found if json.loads(path.read_text())["node_type"] == "array"]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def rewrite(root: Path, table: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change every row of a table and pin the result in the last snapshot, as the maker of an atlas can."""
    import lancedb

    shutil.rmtree(root / ".hbx_gpu" / "snapshots", ignore_errors=True)
    database = lancedb.connect(str(root / "lance_db"))
    changed = database.open_table(table)
    rows = changed.to_arrow()
    records = rows.to_pylist()
    for record in records:
        change(record)
    changed.delete("true")
    changed.add(pa.Table.from_pylist(records, schema=rows.schema))
    if table == "atlas_versions":
        return
    versions = database.open_table("atlas_versions")
    stored = versions.to_arrow()
    last = stored.to_pylist()[-1]
    now = database.open_table(table).version
    for key in ("obs_table_versions", "registry_table_versions"):
        names = json.loads(last["registry_table_names"]) if key.startswith("registry") else {}
        pinned = json.loads(last[key])
        last[key] = json.dumps({k: now if names.get(k, k) == table else v for k, v in pinned.items()})
    if table == last["dataset_table_name"]:
        last["dataset_table_version"] = now
    if table == "_feature_layouts":
        last["feature_layouts_table_version"] = now
    versions.delete("true")
    versions.add(pa.Table.from_pylist([last], schema=stored.schema))


def move_group(root: Path, target: Path, name: str) -> None:
    """Move one group out of the store and let all tables call it `name`."""
    group = next(p for p in sorted((root / "zarr_store").iterdir()) if p.is_dir())
    shutil.move(group, target)
    old = f"{group.name}/gene_expression"

    def of_dataset(row: dict[str, Any]) -> None:
        row["zarr_group"] = name if row["zarr_group"] == old else row["zarr_group"]

    rewrite(root, "datasets", of_dataset)
    rewrite(root, "cells", lambda row: of_dataset(row["gene_expression"]))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
