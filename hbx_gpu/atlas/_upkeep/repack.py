"""Rewriting the sparse groups of an atlas in another codec or row order: in place, one group at a time."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu._devices import cores
from hbx_gpu._executors import Here, in_turn, result_of
from hbx_gpu._files import sync
from hbx_gpu._progress import Progress, checked
from hbx_gpu._remote.places import Place, local_only, parse
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu.atlas._catalog import documents, swap, tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.journal import Journal, RepackNote
from hbx_gpu.atlas._catalog.lock import WriteLock
from hbx_gpu.atlas._catalog.mirror import Mirror
from hbx_gpu.atlas._catalog.names import Names, OlderGenerationError, set_default_codec
from hbx_gpu.atlas._catalog.paths import check_database, check_store, group_path, staging_path
from hbx_gpu.atlas._catalog.snapshot_records import (
    VERSION_TABLE,
    SnapshotRecord,
    atlas_root,
    read_records,
    resolve_store,
)
from hbx_gpu.atlas._model.schema import make_uid
from hbx_gpu.atlas._model.spaces import FeatureSpace, get_space, guess_space, known_spaces
from hbx_gpu.atlas._upkeep.ordered_rows import compare_ordered, in_order, write_ordered
from hbx_gpu.atlas._upkeep.row_orders import Key, Rows, rows_to_order
from hbx_gpu.atlas._upkeep.stored_arrays import decoded_chunks, write_metadata
from hbx_gpu.atlas._writing.arrays import HOMEOBOX_CODEC, ObjectWriter, check_codec
from hbx_gpu.atlas._writing.recoding import StoredArray, plan_arrays, row_order
from hbx_gpu.errors import AtlasError, CorruptChunkError, UnsafePathError, UnsupportedCodecError

_log = logging.getLogger(__name__)

Tick = Callable[[int], object]
Outcome = Literal["repacked", "unchanged", "left alone"]
# Errors of a file system that cannot hard-link at all, or not this file; the file is then copied.
_CANNOT_LINK = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_THREADS = 4
# Groups that are handed out at a time; each takes its space twice.
_WINDOW = 64
_NOT_A_MATRIX = "order kept: fragments have one of their own"


@dataclass(frozen=True)
class GroupReport:
    """What happened to one group.

    Attributes
    ----------
    zarr_group, feature_space
        Path and feature space of the group.
    outcome
        ``repacked``, ``unchanged`` (it had the codec), or ``left alone`` for the `reason` given.
    n_values
        Elements of its index array; 0 where it has none.
    bytes_before, bytes_after
        Bytes on disk of the group's index and layers.
    seconds
        Wall time.
    order
        Where an order was asked for: ``ordered``, ``in order before``, or ``order kept:`` and a reason.
    """

    zarr_group: str
    feature_space: str
    outcome: Outcome
    reason: str
    n_values: int
    bytes_before: int
    bytes_after: int
    seconds: float
    order: str = ""


@dataclass(frozen=True)
class RepackReport:
    """What happened to all groups of an atlas, in the order of their names."""

    codec: str
    groups: tuple[GroupReport, ...]

    @property
    def bytes_before(self) -> int:
        """Of index and layers of all groups."""
        return sum(group.bytes_before for group in self.groups)

    @property
    def bytes_after(self) -> int:
        """Of index and layers of all groups."""
        return sum(group.bytes_after for group in self.groups)

    @property
    def seconds(self) -> float:
        """Wall time, over all groups."""
        return sum(group.seconds for group in self.groups)


@dataclass(frozen=True)
class _Plan:
    """The work to be done on one group."""

    zarr_group: str
    feature_space: str
    arrays: tuple[str, ...] = ()
    rewrite: tuple[StoredArray, ...] = ()
    n_values: int = 0
    left_alone: str = ""
    rows: Rows | None = None
    order: str = ""


def repack(
    atlas_path: str | os.PathLike[str],
    codec: str | None = None,
    *,
    order_features: bool = False,
    executor: Executor | None = None,
    allow_links: bool = False,
    progress: Progress | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> RepackReport:
    """Rewrite index and layers of every sparse group in another codec or row order, in place.

    A group is built beside the one in use, compared with it value by value, and put in its place in one
    step; nothing but bytes on disk changes, so pointers and snapshots stay what they are. Groups that have
    the codec, and the order if one is asked for, are skipped. An interruption leaves each group
    whole in its old or its new form: run it again. While it runs, each group that is being rewritten takes
    its space twice: one at a time, with an executor up to 64.

    A dataset that was opened before goes on with the files that it has mapped or open; anything else raises
    `CorruptChunkError` with the advice to open the dataset anew.

    Parameters
    ----------
    atlas_path
        Directory of an atlas, written by hbx_gpu or by any release of Homeobox.
    codec
        One of `codec_names`. Layers of floats take the general codec that belongs to it.
        It also becomes the codec of later ingests, in an atlas that hbx_gpu made. None: the codec of later
        ingests as it is, which is allowed with `order_features` only.
    order_features
        Store the elements of each row in the order in which the registry numbers their features, so that
        loaders of sparse batches need not sort rows. Local columns keep their numbers, because snapshots
        record them; where these come in another order than the registry's, the index is stored without
        differences and takes more bytes. By default rows keep their order, whatever it is.
    executor
        Where groups are rewritten and compared, see :func:`hbx_gpu.ingest_many`; None: in this process. They
        are put in their places by this process.
    allow_links
        Follow a link to the tables or to the zarr store that leads out of the atlas. Groups that are links,
        or have links in them, are left alone in any case.
    progress
        Called with the number of values done and of all values; each counts twice, written and compared.
    storage_options
        Credentials and settings of an address in object storage, under the names of obstore. An atlas there
        is copied to the temporary folder of this machine, rewritten and uploaded; readers of a group whose
        objects are exchanged get an error meanwhile.

    Returns
    -------
    RepackReport
        What happened to each group, including dense groups, which are left alone.

    Raises
    ------
    ValueError
        No such codec, or neither a codec nor an order is asked for.
    FileNotFoundError
        No atlas, or no zarr store.
    AtlasError
        Nothing says what the atlas holds, or its folders cannot be written.
    AtlasLockedError
        Somebody else is writing.
    CorruptChunkError
        A chunk cannot be decoded; its group is as it was.
    """
    progress = checked(progress)
    place = parse(atlas_path, storage_options)
    if isinstance(place, Place):
        mirror = Mirror(place, VERSION_TABLE)
        with mirror.exchange():
            mirror.fetch_all()
            return repack(
                mirror.root, codec, order_features=order_features, executor=executor, progress=progress
            )
    if codec is not None:
        check_codec(codec)
    elif not order_features:
        raise ValueError(
            f"nothing to do: pass {option('codec')} to change the codec, or "
            f"{option('order_features', 'True')} to order rows"
        )
    root = local_only(atlas_root(atlas_path))
    check_database(root, allow_links=allow_links)
    records = read_records(root)
    # The oldest generation records a path that may belong to another atlas; nothing outside this one is
    # rewritten.
    sibling = root / "zarr_store"
    found = local_only(resolve_store(root, records[-1], allow_links=allow_links)) if records else sibling
    store = check_store(root, found, allow_links=allow_links and found == sibling)
    _check_writable(root, store)
    with WriteLock(root).hold():
        names = _recover(root, store, records, allow_links=allow_links)
        codec = codec or names.codec
        plans = [
            _plan(store, name, space, has_features, codec)
            for (name, space), has_features in sorted(_groups(root, records, names.dataset_table).items())
        ]
        if order_features:
            to_order = {
                (plan.zarr_group, plan.feature_space) for plan in plans if _may_be_ordered(store, plan)
            }
            rows = rows_to_order(root, store, records, names.obs_tables, to_order, allow_links=allow_links)
            plans = [_with_order(store, plan, codec, rows) for plan in plans]
        for plan in plans:
            if plan.rewrite:
                _check_writable(store / plan.zarr_group, (store / plan.zarr_group).parent)
        tick = _Ticks(sum(2 * a.layout.shape[0] for plan in plans for a in plan.rewrite), progress)
        here = executor or Here()
        # What the atlas keeps of the metadata of these arrays must not outlive them.
        known = documents.begin_changes(root) if any(plan.rewrite for plan in plans) else []
        try:
            groups = tuple(_repack_groups(Journal(root), store, plans, here, tick))
        finally:
            documents.end_changes(root, store, known)
        set_default_codec(root, codec)
    return RepackReport(codec, groups)


# What there is to do


def _check_writable(*folders: Path) -> None:
    for folder in folders:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise AtlasError(
                f"cannot repack: {folder} is read-only for this user; repack a copy of the atlas, or ask who "
                "owns it"
            )


def _recover(root: Path, store: Path, records: Sequence[SnapshotRecord], *, allow_links: bool) -> Names:
    """Clean up after killed writers; returns the names of the tables."""
    try:
        names = Names.load(root, allow_links=allow_links)
    except OlderGenerationError:
        # This package does not ingest into such an atlas, so only a repack can have been interrupted.
        swap.recover(Journal(root), store)
        last = records[-1]
        registries = {space: name for space, (name, _) in last.registries.items()}
        return Names(tuple(last.obs_tables), last.dataset_table[0], registries, codec=HOMEOBOX_CODEC)
    if names is None:
        raise AtlasError(
            f"the atlas at {root} has no snapshot and was not made by hbx_gpu, so nothing says what it "
            "holds; take a snapshot with the program that made it"
        )
    Catalog(root, store, names, allow_links=allow_links).recover()
    return names


def _groups(root: Path, records: Sequence[SnapshotRecord], datasets: str) -> dict[tuple[str, str], bool]:
    """(group, feature space) of all snapshots and of the current state -> whether it has a feature layout."""
    found: dict[tuple[str, str], bool] = {}
    versions: set[tuple[str, int | None]] = {record.dataset_table for record in records}
    for name, version in [*sorted(versions, key=str), (datasets, None)]:
        table = tables.open_table(root, name)
        try:
            if version is not None:
                table.checkout(version)
            rows = tables.read(table, ["zarr_group", "feature_space", "layout_uid"]).to_pylist()
        except (ValueError, RuntimeError, OSError) as error:
            if version is None:
                raise
            _log.warning("version %s of table %r cannot be read, left out: %s", version, name, error)
            continue
        found.update({(r["zarr_group"], r["feature_space"]): bool(r["layout_uid"]) for r in rows})
    return found


def _plan(store: Path, name: str, space_name: str, has_features: bool, codec: str) -> _Plan:
    path = group_path(store, name, allow_links=True)
    try:
        if path.is_symlink() or not path.is_dir():
            raise AtlasError(f"{path} is not a directory")
        group_path(store, name)
        space = _space(path, space_name, has_features=has_features)
        if space.index_array is None:
            return _Plan(name, space_name, left_alone=space.pointer.replace("_", " "))
        arrays, rewrite, n_values = plan_arrays(path, name, space, codec, within=store)
    except UnsafePathError as error:
        told = str(error).partition(";")[0]
        return _Plan(name, space_name, left_alone=f"{told}; repack rewrites only what lies in the store")
    except (AtlasError, FileNotFoundError, UnsupportedCodecError) as error:
        return _Plan(name, space_name, left_alone=str(error))
    return _Plan(name, space_name, arrays, rewrite, n_values)


def _space(path: Path, name: str, *, has_features: bool = True) -> FeatureSpace:
    return get_space(name) if name in known_spaces() else guess_space(name, path, has_features=has_features)


def _may_be_ordered(store: Path, plan: _Plan) -> bool:
    """Whether a group has rows of a matrix, and repack has not ordered them before."""
    if plan.left_alone or not plan.arrays:
        return False
    path = group_path(store, plan.zarr_group)
    space = _space(path, plan.feature_space)
    return not space.repeats and row_order(path, space) is None


def _with_order(store: Path, plan: _Plan, codec: str, found: Mapping[Key, Rows | str]) -> _Plan:
    """The plan of a group whose rows are to be ordered as well, if that is possible and not done yet."""
    if plan.left_alone:
        return plan
    path = group_path(store, plan.zarr_group)
    space = _space(path, plan.feature_space)
    rows = found.get((plan.zarr_group, plan.feature_space))
    if rows is None:
        return replace(plan, order=_NOT_A_MATRIX if space.repeats else "in order before")
    if isinstance(rows, str):
        return replace(plan, order=f"order kept: {rows}")
    arrays, rewrite, n_values = plan_arrays(
        path, plan.zarr_group, space, codec, within=store, new_order=rows.order
    )
    if {array.layout.shape for array in rewrite} != {(n_values,)} or (rows.ends > n_values).any():
        return replace(plan, order="order kept: its arrays and rows disagree in length")
    if rows.order == "layout":
        with ThreadPoolExecutor(min(_THREADS, cores())) as pool:
            if in_order(rewrite[0], rows, pool):
                return replace(plan, order="in order before")
    return replace(plan, arrays=arrays, rewrite=rewrite, rows=rows, order="ordered")


class _Ticks:
    """Adds up the finished work for the progress callback."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, n: int) -> None:
        self._done += n
        self._progress(self._done, self._total)


# Rewriting


def _repack_groups(
    journal: Journal, store: Path, plans: Sequence[_Plan], executor: Executor, tick: _Ticks
) -> Iterator[GroupReport]:
    """Rewrite groups wherever the executor runs, and put them in their places here, in order."""
    open_notes: dict[str, RepackNote] = {}

    def tasks() -> Iterator[tuple[_Plan, tuple[object, ...] | Future[_Built]]]:
        for plan in plans:
            if not plan.rewrite:
                nothing: Future[_Built] = Future()
                nothing.set_result(_Built("", 0.0))
                yield plan, nothing
                continue
            note = open_notes[plan.zarr_group] = RepackNote(plan.zarr_group, make_uid())
            journal.write(note)
            folder = staging_path(store, note.staging)
            folder.mkdir(parents=True)
            path = group_path(store, plan.zarr_group, allow_links=True)  # links are left alone
            yield plan, (path, folder, plan.rewrite, plan.rows)

    def build(path: Path, folder: Path, rewrite: Sequence[StoredArray], rows: Rows | None) -> _Built:
        return build_group(path, folder, rewrite, rows, tick)

    here = isinstance(executor, Here)
    try:
        for plan, future in in_turn(executor, build if here else build_group, tasks(), window=_WINDOW):
            before = _n_bytes(group_path(store, plan.zarr_group, allow_links=True), plan.arrays)
            built = result_of(future, plan.zarr_group)
            if plan.rewrite:
                note = open_notes[plan.zarr_group]
                folder = staging_path(store, note.staging)
                os.rename(folder / built.name, folder / swap.NEW)
                swap.replace_group(store, note)
                swap.settle(journal, store, note)
                del open_notes[plan.zarr_group]
                if not here:
                    tick(sum(2 * array.layout.shape[0] for array in plan.rewrite))
            yield _reported(store, plan, before, built.seconds)
    finally:
        for note in open_notes.values():
            try:
                swap.settle(journal, store, note)
            except Exception:
                # The note stays, so the next writer tries again; the first error is the one to report.
                _log.warning("%s: cannot clean up yet", note.zarr_group, exc_info=True)


def _reported(store: Path, plan: _Plan, before: int, seconds: float) -> GroupReport:
    outcome: Outcome = "left alone" if plan.left_alone else "repacked" if plan.rewrite else "unchanged"
    after = _n_bytes(group_path(store, plan.zarr_group, allow_links=True), plan.arrays)
    return GroupReport(
        plan.zarr_group,
        plan.feature_space,
        outcome,
        plan.left_alone,
        plan.n_values,
        before,
        after,
        seconds,
        plan.order,
    )


@dataclass(frozen=True)
class _Built:
    """A new group: its name in the staging folder, and the wall time that it took."""

    name: str
    seconds: float


def build_group(
    path: Path,
    folder: Path,
    rewrite: Sequence[StoredArray],
    rows: Rows | None = None,
    tick: Tick = lambda _: None,
) -> _Built:
    """Build the new form of a group, in any process, under a name that no other run of the task uses.

    Parameters
    ----------
    path
        The group.
    folder
        Its staging folder, which exists as long as somebody waits for the result.
    rewrite
        Arrays to be rewritten.
    rows
        The rows whose elements are ordered meanwhile; None leaves all where they are.
    tick
        Called with the number of values that are done, where the caller is in this process.
    """
    begin = time.perf_counter()
    new = folder / uuid.uuid4().hex
    new.mkdir()  # without its parents, see write_file
    _build(path, new, rewrite, rows, tick)
    return _Built(new.name, time.perf_counter() - begin)


def _n_bytes(group: Path, arrays: Sequence[str]) -> int:
    files = (file for relative in arrays for file in (group / relative).rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _build(path: Path, new: Path, rewrite: Sequence[StoredArray], rows: Rows | None, tick: Tick) -> None:
    """Build the complete new group on disk and compare it with the old one."""
    _take_over(path, new, {path / array.relative for array in rewrite})
    with ThreadPoolExecutor(min(_THREADS, cores())) as pool:
        if rows is not None:
            write_ordered(rewrite, new, rows, pool, tick)
            compare_ordered(rewrite, new, rows, pool, tick)
        for array in rewrite if rows is None else ():
            _rewrite(array, new / array.relative, pool, tick)
            _compare(array, new / array.relative, pool, tick)
    for folder, _, _ in os.walk(new):
        sync(Path(folder))


def _take_over(path: Path, new: Path, rewritten: set[Path]) -> None:
    """Take over every unchanged file, as a hard link where the file system allows it."""
    for name, folders, files in os.walk(path):
        folder = Path(name)
        target = new / folder.relative_to(path)
        target.mkdir(exist_ok=True)
        shutil.copymode(folder, target)
        links = [
            entry for entry in folders if (folder / entry).is_symlink() and folder / entry not in rewritten
        ]
        folders[:] = [entry for entry in folders if folder / entry not in rewritten]
        for entry in (*files, *links):
            _link_or_copy(folder / entry, target / entry)


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copy2(file, target, follow_symlinks=False)
        if not target.is_symlink():
            sync(target)


def _rewrite(array: StoredArray, target: Path, pool: ThreadPoolExecutor, tick: Tick) -> None:
    """Decode and encode chunk by chunk. An absent chunk (fill value, or lost) stays absent."""
    layout, encoder = array.layout, array.encoder()
    chunk = layout.chunk_shape[0]
    objects = ObjectWriter(target, layout.shard_shape[0] // chunk if layout.sharded else 0)
    try:
        for chunks in decoded_chunks(layout, encoder.batch, pool):
            present = [values for values in chunks if values is not None]
            encoded = iter(encoder.encode(np.concatenate(present)) if present else ())
            for values in chunks:
                objects.put(None if values is None else next(encoded))
            tick(min(len(chunks) * chunk, layout.shape[0]))
        objects.close()
    finally:
        objects.abort()
    write_metadata(Path(layout.path) / "zarr.json", target / "zarr.json", layout, encoder.codecs)
    shutil.copymode(layout.path, target)
    for file in (target / "c").iterdir():
        shutil.copymode(Path(layout.path) / "zarr.json", file)


def _compare(array: StoredArray, target: Path, pool: ThreadPoolExecutor, tick: Tick) -> None:
    """Read both arrays back and compare them bit by bit.

    Raises
    ------
    CorruptChunkError
        They differ.
    """
    old, new = array.layout, read_layout(target, array.layout.name)
    kept = ("shape", "dtype", "chunk_shape", "shard_shape", "fill_value", "sharded")
    changed = [name for name in kept if getattr(old, name) != getattr(new, name)]
    if changed:
        raise CorruptChunkError(f"rewritten with another {', '.join(changed)}", array=old.name)
    batch, first = array.encoder().batch, 0
    pairs = zip(decoded_chunks(old, batch, pool), decoded_chunks(new, batch, pool), strict=True)
    for before, after in pairs:
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            same = a is b if a is None or b is None else np.array_equal(a.view(np.uint8), b.view(np.uint8))
            if not same:
                raise CorruptChunkError(
                    "rewritten, it decodes to other values than before; the group was left as it was",
                    array=old.name,
                    chunk=first + i,
                )
        first += len(before)
        tick(min(len(before) * old.chunk_shape[0], old.shape[0]))
