"""Queries of the stored fixtures, and what they must return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hbx_gpu.atlas._catalog.snapshot import Snapshot
from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.atlas._query.query import AtlasQuery
from tests import npz

# (atlas, snapshot, table, suffix of its files)
TABLES = [
    ("all_spaces", 0, "cells", "_v0__cells"),
    ("all_spaces", 0, "spots", "_v0__spots"),
    ("cite_multimodal", 0, "cells", "_v0"),
    ("legacy_0_2_3", 0, "cells", "_v0"),
    ("missing_shards", 0, "cells", "_v0"),
    ("ragged_rna", 0, "cells", "_v0"),
    ("ragged_rna", 1, "cells", "_v1"),
    ("seed_2026_05", 0, "cells", "_v0"),
    ("single_rna", 0, "cells", "_v0"),
    ("uid_collision", 0, "cells", "_v0"),
]


class Case:
    """One obs table of a fixture beside what reading it must give."""

    def __init__(self, root: Path, version: int, table: str, suffix: str) -> None:
        self.snapshot = Snapshot.open(root / "atlas", version)
        self.table = table
        self.arrays = npz.load(root / f"expected{suffix}.npz")
        versions = json.loads((root / "expected.json").read_text())["versions"]
        self.expected = versions[version]["tables"][table]
        self.sparse = {
            name: field
            for name, field in self.expected["fields"].items()
            if self.snapshot.pointer_fields(table)[name].kind == "sparse"
        }

    def query(self) -> AtlasQuery:
        return AtlasQuery(self.snapshot, self.table)

    def matrices(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(field, layer, expectation) of rows-by-features matrices."""
        return [
            (name, layer, field)
            for name, field in self.sparse.items()
            if not get_space(field["feature_space"]).repeats
            for layer in field["layers"]
        ]
