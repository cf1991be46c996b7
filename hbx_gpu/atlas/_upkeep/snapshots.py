"""Between ingest and snapshot: global indices, compaction, and the checks that a snapshot must pass."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import Table

from hbx_gpu._storage.metadata import read_document, read_layout
from hbx_gpu._untrusted import Within
from hbx_gpu.atlas._catalog import documents, manifest, tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.snapshot_records import read_records
from hbx_gpu.atlas._model.schema import AtlasVersion
from hbx_gpu.atlas._model.spaces import FeatureSpace, find_layers, get_space, known_spaces
from hbx_gpu.atlas._query.obs import scan
from hbx_gpu.errors import AtlasError, HbxError

_SHOWN = 5


def optimize(catalog: Catalog) -> None:
    """Give new features their global index, copy it to the layouts, and merge small fragments."""
    for name in sorted(set(catalog.names.registries.values())):
        assign_indices(tables.open_table(catalog.root, name), catalog.layouts())
    _fill_layouts(catalog)
    names = catalog.names
    for name in (*names.obs_tables, names.dataset_table, *sorted(set(names.registries.values()))):
        tables.compact(tables.open_table(catalog.root, name))
    tables.compact(catalog.layouts())


def assign_indices(registry: Table, layouts: Table) -> int:
    """Number the features that have no index yet, upward from the largest. Returns how many there were.

    They are numbered in the order in which stored feature lists first name them, then by uid. So the columns
    of the first dataset of an atlas keep their places, and readers need not translate them. Rows
    that repeat a registered uid, or one among the new ones, are removed first.
    """
    if not registry.count_rows("global_index IS NULL"):
        return 0
    tables.drop_repeats(registry, ["uid"], keep_first_by="global_index")
    rows = tables.read(registry, ["uid", "global_index"])
    index = rows.column("global_index")
    fresh = sorted(rows.filter(pc.is_null(index)).column("uid").to_pylist())
    if fresh:
        listed = layouts.search().select(["feature_uid"]).with_row_id(True).to_arrow().sort_by("_rowid")
        place = {uid: i for i, uid in enumerate(listed.column("feature_uid").unique().to_pylist())}
        fresh.sort(key=lambda uid: place.get(uid, len(place)))  # a stable sort keeps the rest in order of uid
        largest = pc.max(index).as_py()
        begin = 0 if largest is None else largest + 1
        update = pa.table({"uid": fresh, "global_index": range(begin, begin + len(fresh))})
        registry.merge_insert("uid").when_matched_update_all().execute(update)
    return len(fresh)


def _fill_layouts(catalog: Catalog) -> None:
    layouts = catalog.layouts()
    new = tables.read(layouts, ["layout_uid"], "global_index IS NULL").column("layout_uid").unique()
    if not len(new):
        return
    chosen = tables.one_of("layout_uid", new.to_pylist())
    # Two writers that do not know of our lock may both have stored the same list.
    tables.drop_repeats(layouts, ["layout_uid", "local_index"], keep_first_by="global_index", where=chosen)
    rows = tables.read(layouts, ["layout_uid", "feature_uid", "local_index"], "global_index IS NULL")
    # A list of uids does not name its feature space; the dataset does. Where two spaces share a list, the
    # first dataset decides; readers resolve through the registry anyway.
    space_of: dict[str, str] = {}
    for row in catalog.dataset_rows():
        space_of.setdefault(row["layout_uid"], row["feature_space"])
    # One merge for all lists, because each is a version of the table.
    spaces = pa.array([space_of.get(uid) for uid in rows.column("layout_uid").to_pylist()], pa.string())
    updates = []
    for space in pc.unique(spaces).drop_null().to_pylist():
        part = rows.filter(pc.equal(spaces, space))
        registry = tables.read(catalog.registry(space), ["uid", "global_index"])
        at = pc.index_in(part.column("feature_uid"), value_set=registry.column("uid").combine_chunks())
        updates.append(
            pa.table(
                {
                    "layout_uid": part.column("layout_uid"),
                    "local_index": part.column("local_index"),
                    "global_index": registry.column("global_index").take(at),
                }
            )
        )
    if updates:
        update = pa.concat_tables(updates).sort_by(
            [("layout_uid", "ascending"), ("local_index", "ascending")]
        )
        layouts.merge_insert(["layout_uid", "local_index"]).when_matched_update_all().execute(update)


def snapshot(catalog: Catalog) -> int:
    """Record the present version of every table; returns the number of the snapshot.

    Raises
    ------
    AtlasError
        The atlas is not fit for reading; the message says what is missing.
    """
    arrays: dict[str, bytes] = {}
    if problems := validate(catalog, arrays):
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise AtlasError(f"no snapshot taken of the atlas at {catalog.root}:\n{listed}")
    names = catalog.names
    versions = catalog.versions()
    taken = tables.read(versions, ["version"]).column("version").to_pylist()
    obs = {name: catalog.obs(name) for name in names.obs_tables}
    record = AtlasVersion(
        version=max(taken, default=-1) + 1,
        obs_table_versions=json.dumps({name: table.version for name, table in obs.items()}),
        dataset_table_name=names.dataset_table,
        dataset_table_version=catalog.datasets().version,
        registry_table_names=json.dumps(dict(names.registries)),
        registry_table_versions=json.dumps(
            {space: catalog.registry(space).version for space in names.registries}
        ),
        feature_layouts_table_version=catalog.layouts().version,
        total_rows=sum(table.count_rows() for table in obs.values()),
    )
    versions.add([record])
    records = read_records(catalog.root, version_table_name=names.version_table)
    documents.write(catalog.root, arrays)
    manifest.write(catalog.root, next(r for r in records if r.version == record.version))
    return record.version


def has_news(catalog: Catalog) -> bool:
    """Whether there are cells that were added after the last snapshot."""
    records = read_records(catalog.root, version_table_name=catalog.names.version_table)
    stored = sum(catalog.obs(name).count_rows() for name in catalog.names.obs_tables)
    return stored > (records[-1].total_rows if records else 0)


def validate(catalog: Catalog, arrays: dict[str, bytes] | None = None) -> list[str]:
    """Reasons why the atlas cannot be read, as sentences; empty if there are none.

    `arrays` gets the metadata documents of all arrays of the groups, by their paths in the zarr store.
    """
    arrays = {} if arrays is None else arrays
    problems = []
    for space, name in catalog.names.registries.items():
        problems += _check_registry(catalog.registry(space), name)
    lengths: dict[tuple[str, str], int] = {}
    layout_sizes = _layout_sizes(catalog, problems)
    for row in catalog.dataset_rows():
        key = (row["zarr_group"], row["feature_space"])
        lengths[key] = -1
        if row["feature_space"] not in known_spaces():
            continue  # a space that is not registered in this process cannot be checked
        described = get_space(row["feature_space"])
        problem, lengths[key] = _check_group(catalog, row["zarr_group"], described, arrays)
        problems += [f"group {row['zarr_group']!r}: {problem}"] if problem else []
        if described.has_features and row["layout_uid"] not in layout_sizes:
            problems.append(
                f"group {row['zarr_group']!r}: its feature list {row['layout_uid']!r} is not stored"
            )
    for name in catalog.names.obs_tables:
        for field_name, space_name in catalog.pointer_spaces(name).items():
            problems += _check_pointers(catalog.obs(name), name, field_name, space_name, lengths)
    return problems


def _check_registry(registry: Table, name: str) -> list[str]:
    rows = tables.read(registry, ["uid", "global_index"])
    index = rows.column("global_index")
    if index.null_count:
        return [f"registry {name!r}: {index.null_count} feature(s) have no global_index yet; run optimize()"]
    problems = []
    if pc.count_distinct(index).as_py() != len(rows):
        problems.append(f"registry {name!r} gives several features the same global_index")
    if pc.count_distinct(rows.column("uid")).as_py() != len(rows):
        problems.append(f"registry {name!r} lists a uid more than once; run optimize()")
    return problems


def _layout_sizes(catalog: Catalog, problems: list[str]) -> dict[str, int]:
    rows = tables.read(catalog.layouts(), ["layout_uid", "local_index", "global_index"])
    used = {row["layout_uid"] for row in catalog.dataset_rows()}
    sums = rows.group_by("layout_uid").aggregate(
        [
            ("local_index", "count"),
            ("local_index", "max"),
            ("local_index", "count_distinct"),
            ("global_index", "count"),
        ]
    )
    sizes = {}
    for row in sums.to_pylist():
        layout, n = row["layout_uid"], row["local_index_count"]
        if layout not in used:
            continue
        sizes[layout] = n
        if row["local_index_max"] != n - 1 or row["local_index_count_distinct"] != n:
            problems.append(f"feature list {layout!r} does not number its {n} features 0..{n - 1}, each once")
        if row["global_index_count"] != n:
            problems.append(f"feature list {layout!r} lacks global indices; run optimize()")
    return sizes


def _check_group(
    catalog: Catalog, zarr_group: str, space: FeatureSpace, found: dict[str, bytes]
) -> tuple[str, int]:
    """Faults of a group (empty if there are none), and the length of its arrays (-1 if unknown).

    `found` gets the metadata of its arrays.
    """
    path = catalog.group_path(zarr_group)
    if not path.is_dir():
        return f"{path} does not exist", -1
    layers = find_layers(path, space)
    known = {**space.required_layers, **space.optional_layers}
    unknown = sorted(set(layers) - set(known))
    if not layers or unknown:
        return f"holds layers {sorted(layers)}, expected some of {sorted(known)}", -1
    arrays = {name: (relative, known[name]) for name, relative in layers.items()}
    if space.index_array is not None:
        arrays[""] = (space.index_array, ())
    shapes = {}
    within = Within("" if catalog.allow_links else str(catalog.store))
    for relative, dtypes in arrays.values():
        name = f"{zarr_group}/{relative}"
        try:
            document = read_document(path / relative, within)
            array = read_layout(path / relative, name, within=within, document=document)
            if document is not None:
                found[name] = document
        except (OSError, HbxError) as error:
            return f"array {relative} cannot be opened: {error}", -1
        if dtypes and array.dtype.name not in dtypes:
            return f"array {relative} has dtype {array.dtype}, expected one of {list(dtypes)}", -1
        shapes[relative] = array.shape
    if space.pointer != "discrete_spatial" and len({shape[0] for shape in shapes.values()}) != 1:
        return f"arrays differ in length: {shapes}", -1
    return "", int(next(iter(shapes.values()))[0])


def _check_pointers(
    table: Table, name: str, field_name: str, space_name: str, lengths: dict[tuple[str, str], int]
) -> list[str]:
    if space_name not in known_spaces() or get_space(space_name).pointer == "discrete_spatial":
        return []
    last = "end" if get_space(space_name).pointer == "sparse" else "position"
    first = "start" if last == "end" else "position"
    members = {"g": "zarr_group", "a": first, "b": last}
    expressions = {short: f"`{field_name}`.`{member}`" for short, member in members.items()}
    reach: dict[str, int] = defaultdict(lambda: -1)
    bad = 0
    for batch in scan(table, expressions):
        groups = batch.column("g")
        chosen = pc.and_(pc.is_valid(groups), pc.not_equal(groups, ""))
        part = pa.Table.from_batches([batch]).filter(chosen)
        a, b = (part.column(c).fill_null(-1).to_numpy() for c in ("a", "b"))
        bad += int(np.count_nonzero((a < 0) | (b < a)))
        for row in part.group_by("g").aggregate([("b", "max")]).to_pylist():
            reach[row["g"]] = max(reach[row["g"]], row["b_max"] if row["b_max"] is not None else -1)
    problems = [f"table {name!r}: {bad} row(s) have no valid extent in {field_name!r}"] if bad else []
    for group, end in reach.items():
        if (group, space_name) not in lengths:
            problems.append(
                f"table {name!r} points to group {group!r}, which the dataset table does not list"
            )
        elif 0 <= lengths[group, space_name] < end + (last == "position"):
            problems.append(
                f"table {name!r} points to element {end} of group {group!r}, which has "
                f"{lengths[group, space_name]}"
            )
    return problems[:_SHOWN] + ([f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
