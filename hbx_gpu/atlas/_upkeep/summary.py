"""What an atlas holds, as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from hbx_gpu._remote.lookup import size_below
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu.atlas._model.columns import NAME_IN_FILE
from hbx_gpu.atlas._model.spaces import find_layers
from hbx_gpu.atlas._query.obs import scan
from hbx_gpu.errors import HbxError

if TYPE_CHECKING:
    from hbx_gpu.atlas._catalog.snapshot import Snapshot
    from hbx_gpu.atlas._upkeep.repack import RepackReport


@dataclass(frozen=True)
class GroupSummary:
    """One stored group.

    Attributes
    ----------
    name
        Name of the source file, or else the path of the group in the store.
    feature_space, layers, codecs
        Feature space, layers and codecs of the group; `codecs` lists each codec of index and layers once.
    n_cells, n_features, n_values
        Counts of the group; None where the atlas does not record them or the space has none.
    n_bytes
        Bytes on disk of everything in the folder of the group.
    n_array_bytes
        Bytes on disk of index and layers alone.
    uid
        Uid of the dataset.
    ids
        Column of var from which the feature ids were taken.
    """

    name: str
    feature_space: str
    layers: list[str]
    codecs: list[str]
    n_cells: int | None
    n_features: int | None
    n_values: int | None
    n_bytes: int
    n_array_bytes: int
    uid: str = ""
    ids: str = ""

    @property
    def bits_per_value(self) -> float | None:
        """Bits on disk per nonzero, index and layers together."""
        return 8 * self.n_array_bytes / self.n_values if self.n_values else None


def summarize_groups(snapshot: Snapshot) -> list[GroupSummary]:
    """All groups of a snapshot, in the order in which they were added."""
    rows = snapshot.datasets().to_dict("records")
    cells = _cells_per_group(snapshot)
    return [_summarize(snapshot, row, cells) for row in rows]


def _cells_per_group(snapshot: Snapshot) -> dict[str, int]:
    counts: dict[str, int] = {}
    for table in snapshot.obs_tables:
        for field in snapshot.pointer_fields(table):
            expression = {"group": f"`{field}`.zarr_group"}
            for batch in scan(snapshot.obs_table(table), expression):
                for item in pc.value_counts(batch.column("group")).to_pylist():
                    counts[item["values"]] = counts.get(item["values"], 0) + item["counts"]
    return counts


def _summarize(snapshot: Snapshot, row: dict[str, Any], cells: dict[str, int]) -> GroupSummary:
    name, space_name = row["zarr_group"], row["feature_space"]
    path = snapshot.group_path(name)
    layers: dict[str, str] = {}
    codecs: dict[str, None] = {}
    n_values, n_array_bytes = None, 0
    try:
        space = snapshot.space(snapshot.group(name, space_name))
        layers = find_layers(path, space)
        for relative in (*layers.values(), *([space.index_array] if space.index_array else [])):
            within = "" if snapshot.allow_links else snapshot.store_path
            layout = read_layout(path / relative, f"{name}/{relative}", within=within)
            n_array_bytes += size_below(path / relative)
            codecs.update(
                dict.fromkeys(
                    str(codec["name"]) for codec in layout.codecs if codec["name"] not in ("bytes", "crc32c")
                )
            )
            if space.index_array:
                n_values = layout.shape[0]
    except (HbxError, OSError):
        codecs["unreadable"] = None
    label = row.get("source_name")
    return GroupSummary(
        label if isinstance(label, str) and label else name,
        space_name,
        sorted(layers),
        list(codecs) or ["none"],
        cells.get(name),
        len(snapshot.remap(name, space_name)) if row.get("layout_uid") else None,
        n_values,
        size_below(path),
        n_array_bytes,
        str(row["dataset_uid"]),
        _ids_of(row),
    )


def _ids_of(row: dict[str, object]) -> str:
    column, versions = row.get("feature_id_column"), row.get("feature_id_versions")
    if not isinstance(column, str) or not column or not row.get("layout_uid"):
        return "-"
    return f"{column}, no versions" if versions == "stripped" else column


def describe(snapshot: Snapshot) -> str:
    """A readable page about a snapshot: tables, datasets, feature spaces, obs columns."""
    from hbx_gpu.atlas._catalog.snapshot_records import list_versions

    versions = list_versions(snapshot.path, version_table_name=snapshot.version_table_name)
    groups = summarize_groups(snapshot)
    lines = [
        f"atlas      {snapshot.path}",
        f"snapshot   {snapshot.version}, taken {snapshot.record.created_at}",
        f"snapshots  {', '.join(map(str, versions['version']))}",
        f"cells      {snapshot.record.total_rows:,}",
        f"on disk    {_size(sum(group.n_bytes for group in groups))} in arrays",
        "",
        "feature spaces",
        *_columns(
            [
                [space, f"{snapshot.registry(space).n_features:,} features"]
                for space in snapshot.record.registries
            ]
        ),
        "",
        "datasets",
        *_columns(
            [
                [
                    "name",
                    "space",
                    "cells",
                    "features",
                    "nonzeros",
                    "layers",
                    "codec",
                    "on disk",
                    "bits/nonzero",
                    "ids from",
                    "uid",
                ],
                *(_group_row(group) for group in groups),
            ],
            right=(2, 3, 4, 7, 8),
        ),
    ]
    for table in snapshot.obs_tables:
        lines += ["", f"table {table!r}: {snapshot.obs_table(table).count_rows():,} cells"]
        pointers = snapshot.pointer_fields(table)
        kinds = [
            [
                field.name,
                f"pointer into {pointers[field.name].feature_space}"
                if field.name in pointers
                else str(field.type),
            ]
            for field in snapshot.obs_schema(table)
        ]
        for kind, field in zip(kinds, snapshot.obs_schema(table), strict=True):
            if name := (field.metadata or {}).get(NAME_IN_FILE):
                kind[1] += f", {name.decode()!r} in files"
        lines += _columns(kinds)
    return "\n".join(lines)


def describe_repack(report: RepackReport) -> str:
    """A readable table of what `repack` did."""
    rows = [["group", "space", "outcome", "values", "before", "after", "bits/value", "seconds"]]
    for group in report.groups:
        changed = group.outcome == "repacked"
        bits = 8 * group.bytes_after / group.n_values if group.n_values else 0.0
        told = group.reason or group.order
        outcome = f"{group.outcome} ({told})" if told else group.outcome
        rows.append(
            [
                group.zarr_group,
                group.feature_space,
                outcome,
                f"{group.n_values:,}" if group.n_values else "-",
                _size(group.bytes_before) if group.bytes_before else "-",
                _size(group.bytes_after) if group.bytes_after else "-",
                f"{bits:.1f}" if bits else "-",
                f"{group.seconds:.1f}" if changed else "-",
            ]
        )
    n = sum(group.outcome == "repacked" for group in report.groups)
    total = (
        f"{n} of {len(report.groups)} groups repacked as {report.codec}: {_size(report.bytes_before)} "
        f"before, {_size(report.bytes_after)} after, {report.seconds:.1f} s"
    )
    return "\n".join([*_columns(rows, right=(3, 4, 5, 6, 7)), total])


def _group_row(group: GroupSummary) -> list[str]:
    bits = group.bits_per_value
    return [
        group.name,
        group.feature_space,
        *("-" if n is None else f"{n:,}" for n in (group.n_cells, group.n_features, group.n_values)),
        ",".join(group.layers) or "-",
        ",".join(group.codecs),
        _size(group.n_bytes),
        "-" if bits is None else f"{bits:.1f}",
        group.ids,
        group.uid,
    ]


def _columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as text, columns aligned, indented by two blanks."""
    if not rows:
        return ["  none"]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cell = [str.rjust if i in right else str.ljust for i in range(len(widths))]
    return [
        "  "
        + "  ".join(align(text, width) for align, text, width in zip(cell, row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError
