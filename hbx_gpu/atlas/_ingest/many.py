"""Adding many files to an atlas: looked at and written anywhere, committed here, many at a time and in order.

Data flow::

    look (anywhere)     file -> Look: hash, matrix, features, names of obs columns
    plan (here)         all Looks + what is known of the atlas -> one WriteTask per file, in the order given
    write (anywhere)    WriteTask -> Written: a group, obs rows and new features in a folder of their own
    commit (here)       many Written -> one version of each table

Results are taken in the order of the sources, so an atlas does not depend on who wrote what when.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np

from hbx_gpu import _advice
from hbx_gpu._executors import Here, in_turn, result_of
from hbx_gpu._identity.choice import FeatureChoice
from hbx_gpu._identity.tables import FeatureTable
from hbx_gpu._paths import local_path
from hbx_gpu._progress import checked
from hbx_gpu._stores.kinds import is_mudata
from hbx_gpu.atlas._catalog.catalog import in_order
from hbx_gpu.atlas._catalog.journal import IngestNote
from hbx_gpu.atlas._catalog.names import only_table
from hbx_gpu.atlas._catalog.session import Writable, WriteSession
from hbx_gpu.atlas._ingest.already_ingested import best_row, differences, replaced_by, skip
from hbx_gpu.atlas._ingest.anndata import (
    check_layer,
    check_matrix_space,
    field_name_of,
    first_layer,
    storage_of,
)
from hbx_gpu.atlas._ingest.atlas_state import KnownAtlas
from hbx_gpu.atlas._ingest.batch import Batch, Ready
from hbx_gpu.atlas._ingest.cells import ObsNames, reserved_names
from hbx_gpu.atlas._ingest.commit import free_uid, origin
from hbx_gpu.atlas._ingest.identity import choose_together
from hbx_gpu.atlas._ingest.obs_edits import ObsEdits
from hbx_gpu.atlas._ingest.options import ManyOptions, of_each_file, spells_out_options
from hbx_gpu.atlas._ingest.parts import matrix_identity
from hbx_gpu.atlas._ingest.reports import FileReport, ManyReport
from hbx_gpu.atlas._ingest.settings import Settings
from hbx_gpu.atlas._ingest.tasks import Look, Where, WriteTask, Written, look_at, write_file
from hbx_gpu.atlas._model import columns
from hbx_gpu.atlas._model.schema import DatasetSchema, layout_uid, make_uid
from hbx_gpu.atlas._model.spaces import FeatureSpace, get_space
from hbx_gpu.errors import HbxError, ResourceError, UnknownNameError

Source = str | os.PathLike[str]

# A batch is committed when it has so many datasets or cells, or when it has waited so long for the next.
_MOST_DATASETS, _MOST_CELLS, _MOST_SECONDS = 64, 1_000_000, 10.0


@spells_out_options
def add_many(
    atlas: Writable,
    sources: Iterable[Source],
    executor: Executor | None = None,
    **options: Unpack[ManyOptions],
) -> ManyReport:
    """Add many files to an open atlas; see :func:`hbx_gpu.ingest_many`."""
    session = atlas.session
    table = options.get("obs_table") or only_table(session.obs_tables)
    paths = found(sources)
    matrices = _matrices(options.get("layer"), paths)
    several = [source for source, path in paths.items() if is_mudata(path)]
    single = {source: path for source, path in paths.items() if source not in several}
    files: list[FileReport] = []
    added = options.get("added")

    def report(file: FileReport) -> None:
        files.append(file)
        if added is not None:
            added(file)

    with session.writing():
        if single:
            settings = _settings(session, table, options)
            wanted = _wanted(session, table, matrices, options)
            _Run(session, single, wanted, settings, executor or Here(), report).run()
        for source in several:
            from hbx_gpu.atlas._ingest.multimodal import add_multimodal

            made = add_multimodal(
                atlas, paths[source], obs_table=table, exist_ok=True, **of_each_file(options)
            )
            report(FileReport(source, made.dataset_uid, made.n_cells))
    return ManyReport(tuple(files))


def _settings(session: WriteSession, table: str, options: ManyOptions) -> Settings:
    """How the files of one matrix each are stored."""
    codec = options.get("codec")
    return Settings(
        table,
        storage_of(session, codec, options.get("chunk_shape"), options.get("shard_shape")),
        codec is not None,
        edits=ObsEdits(
            options.get("obs_types") or {}, options.get("drop_obs", ()), options.get("rename_obs") or {}
        ),
        exist_ok=True,
        replace=options.get("replace", False),
        accept_duplicates=options.get("accept_duplicates", False),
        progress=options.get("progress"),
    )


def _wanted(
    session: WriteSession, table: str, matrices: Mapping[str, str | None], options: ManyOptions
) -> _Wanted:
    """What the user asks for, once it is known to be possible in this atlas."""
    fields = session.catalog.pointer_spaces(table)
    name = field_name_of(fields, table, options.get("field_name"), options.get("feature_space"))
    space = get_space(fields[name])
    check_matrix_space(name, space)
    layer = options.get("zarr_layer")
    target = first_layer(space) if layer is None else layer
    check_layer(space, target)
    return _Wanted(
        name,
        space,
        target,
        matrices,
        options.get("feature_id_column"),
        options.get("strip_versions", False),
        options.get("require_shared_genes"),
        options.get("allow_rounding", False),
    )


def found(sources: Iterable[Source]) -> dict[str, Path]:
    """Sources as they were given -> local paths.

    Raises
    ------
    FileNotFoundError
        A source does not exist.
    TypeError
        One path was given, where several are expected, or something that is not a path.
    """
    if isinstance(sources, str | os.PathLike):
        raise TypeError(
            f"sources must be a list of paths, got the single path {sources!r}; write [{sources!r}]"
        )
    sources = list(sources)
    for source in sources:
        if not isinstance(source, str | os.PathLike):
            raise TypeError(
                f"sources must be paths, which an executor can open anywhere; got a {type(source).__name__}. "
                "Add what is in memory with add_from_anndata"
            )
    paths = {os.fspath(source): local_path(source) for source in sources}
    if missing := [str(path) for path in paths.values() if not path.exists()]:
        raise FileNotFoundError(f"no such file: {', '.join(missing)}; nothing was added")
    return paths


def _matrices(
    layer: str | Mapping[str, str | None] | Mapping[Path, str | None] | None, paths: Mapping[str, Path]
) -> dict[str, str | None]:
    """Source -> matrix to read of it."""
    if not isinstance(layer, Mapping):
        return dict.fromkeys(paths, layer)
    matrices = {os.fspath(source): matrix for source, matrix in layer.items()}
    if unknown := [source for source in matrices if source not in paths]:
        raise UnknownNameError(f"{_advice.option('layer')} names {unknown}; the sources are {list(paths)}")
    return matrices


@dataclass(frozen=True)
class _Wanted:
    """What the user asks for, beyond :class:`Settings`: see :func:`add_from_anndata`."""

    field_name: str
    space: FeatureSpace
    layer: str
    matrices: Mapping[str, str | None]
    id_column: str | None
    strip_versions: bool
    require_shared: float | None
    allow_rounding: bool


@dataclass(frozen=True)
class _Vocabulary:
    """The features of all files that have the same.

    Attributes
    ----------
    ids
        Their ids in the order of the file.
    positions
        int32. Features of the file in the order in which they are stored; None where that is the same.
    stored
        Ids in that order.
    layout_uid
        Uid of that list.
    """

    ids: Sequence[str]
    positions: np.ndarray | None
    stored: Sequence[str]
    layout_uid: str


@dataclass(frozen=True)
class _Planned:
    """One file: what is to be done about it.

    Attributes
    ----------
    file
        The report if it is in the atlas already, or once it is.
    task
        None where nothing is to be done.
    row, features, replaces
        See :class:`Ready`.
    error
        Why it cannot be added.
    """

    file: FileReport
    task: WriteTask | None = None
    row: Mapping[str, object] | None = None
    features: Sequence[str] = ()
    replaces: tuple[str, ...] = ()
    error: Exception | None = None


class _Run:
    """One ingest of files of one matrix each; the caller holds the write lock.

    Parameters
    ----------
    session, paths, wanted, settings
        The atlas, source -> path, and what the user asks for.
    executor
        Where files are read.
    report
        Called with each file, in order, once it is in the atlas.
    """

    def __init__(
        self,
        session: WriteSession,
        paths: Mapping[str, Path],
        wanted: _Wanted,
        settings: Settings,
        executor: Executor,
        report: Callable[[FileReport], object],
    ) -> None:
        self._session, self._catalog = session, session.catalog
        self._paths, self._wanted, self._settings = paths, wanted, settings
        self._executor, self._report = executor, report
        self._flags = _advice.current()
        self._known = KnownAtlas(self._catalog, settings.obs_table)
        self._vocabularies: dict[str, _Vocabulary] = {}
        obs = self._catalog.obs(settings.obs_table).schema
        schema = session.obs_schema(settings.obs_table)
        pointers = self._catalog.pointer_spaces(settings.obs_table)
        self._names = ObsNames(
            reserved_names(pointers, has_class=schema is not None), columns.names_in_files(obs)
        )
        self._grows = schema is None

    def run(self) -> None:
        """Add all files, in order, up to the first that cannot be added."""
        catalog = self._catalog
        # Groups are written into one folder; whoever writes next removes it if this process is killed.
        note = IngestNote(make_uid(), self._settings.obs_table)
        catalog.journal.write(note)
        try:
            self._staging = catalog.staging(note.staging)
            self._staging.mkdir(parents=True)
            looks = self._look()
            self._choose(looks)
            self._write(looks)
        finally:
            catalog.undo(note)

    # Look

    def _look(self) -> dict[str, Look | Exception]:
        """What each file holds, or why it cannot be read."""
        counts = self._wanted.layer == "counts"
        tables: dict[str, FeatureTable] = {}
        looks: dict[str, Look | Exception] = {}
        tasks = ((s, (self._where(s), self._wanted.matrices.get(s), counts)) for s in self._paths)
        for source, future in in_turn(self._executor, look_at, tasks):
            try:
                look = result_of(future, source)
            except (HbxError, OSError, ValueError) as error:
                if isinstance(error, ResourceError):
                    raise
                looks[source] = error
                continue
            # Most files have the same features, and thousands of copies would fill the memory.
            table = tables.setdefault(look.vocabulary, look.features)
            looks[source] = replace(look, features=table)
        return looks

    def _where(self, source: str) -> Where:
        return Where(self._paths[source], self._catalog.allow_links, self._flags)

    # Plan

    def _choose(self, looks: Mapping[str, Look | Exception]) -> None:
        """Choose for all files together how their features are identified."""
        seen = [look for look in looks.values() if isinstance(look, Look)]
        names = [name for look in seen for name in look.obs_columns]
        if len(seen) == len(looks):
            self._settings.edits.check(names, ", ".join(looks))
        tables = {look.vocabulary: look.features for look in seen}
        chosen = choose_together(
            self._catalog,
            self._wanted.space.name,
            list(tables.values()),
            column=self._wanted.id_column,
            strip_versions=self._wanted.strip_versions,
            require_shared=self._wanted.require_shared,
            lenient=True,
        )
        self._choices = dict(zip(tables, chosen, strict=True))

    def _planned(self, looks: Mapping[str, Look | Exception]) -> Iterator[_Planned]:
        """What is to be done about each file, in order, up to the first that cannot be added."""
        for source in self._paths:
            try:
                # Given away, so that the memory of a look does not outlast its task.
                yield self._plan(source, looks[source])
            except (HbxError, OSError, ValueError) as error:
                yield _Planned(FileReport(source, "", 0), error=error)
                return

    def _plan(self, source: str, look: Look | Exception) -> _Planned:
        if isinstance(look, Exception):
            raise look
        wanted, known = self._wanted, self._known
        choice = self._choices[look.vocabulary]
        if choice is None:
            choose_together(  # raises, and says why
                self._catalog,
                wanted.space.name,
                [look.features],
                column=wanted.id_column,
                strip_versions=wanted.strip_versions,
            )
            raise AssertionError(f"{source}: its features are not identified")
        identity = matrix_identity(look.sha256, [look.matrix], [wanted.layer], choice)
        path = self._paths[source]
        file = FileReport(source, "", look.n_cells, look.words, choice)
        row = best_row(known.rows_of_file(look.sha256, wanted.space.name), identity)
        if row is not None and self._is_there(source, row, identity):
            return _Planned(replace(file, dataset_uid=row["dataset_uid"], n_cells=0))
        replaces: list[str] = []
        if self._settings.replace:
            replaces = replaced_by(known.rows(), look.sha256, path.name)
        uid = free_uid(f"{look.sha256}\0{look.matrix}\0{wanted.field_name}", self._catalog, known.planned)
        first = look.vocabulary not in self._vocabularies
        vocabulary = self._vocabulary(look, choice)
        record = DatasetSchema(
            dataset_uid=uid, zarr_group=f"{uid}/{wanted.field_name}", feature_space=wanted.space.name
        )
        made = (
            record.model_dump()
            | {"layout_uid": vocabulary.layout_uid}
            | origin(wanted.space, identity, path.name, look.n_cells, self._settings)
        )
        known.plan(made)
        # A dataset that is replaced takes features along that no other has; this one may bring them back.
        everything = self._settings.replace or first
        task = WriteTask(
            self._where(source),
            replace(look, features=FeatureTable("", {}), obs_columns=()),
            self._staging,
            uid,
            wanted.field_name,
            wanted.space,
            wanted.layer,
            choice,
            vocabulary.positions,
            self._new_features(vocabulary) if everything else np.zeros(0, np.int32),
            self._obs_names(look),
            self._settings.edits.limited_to(look.obs_columns),
            self._settings.storage,
            wanted.allow_rounding,
        )
        return _Planned(
            replace(file, dataset_uid=uid), task, made, vocabulary.stored, tuple(dict.fromkeys(replaces))
        )

    def _is_there(self, source: str, row: Mapping[str, object], identity: Mapping[str, str]) -> bool:
        """Whether the data are in the atlas, or planned, in the form that is asked for."""
        changed = differences(self._catalog, row, identity, self._wanted.space, self._settings)
        uid = row["dataset_uid"]
        if uid not in self._known.planned and uid not in self._known.has_cells:
            changed.append(f"its cells are in another obs table than {self._settings.obs_table!r}")
        return skip(source, row, changed, self._settings)

    def _vocabulary(self, look: Look, choice: FeatureChoice) -> _Vocabulary:
        if look.vocabulary not in self._vocabularies:
            space, ids = self._wanted.space, choice.ids(look.features)
            stored, positions = ids, None
            if space.pointer == "sparse":
                order = in_order(self._known.places(space.name), ids)
                if not (order == np.arange(len(order))).all():
                    positions = order.astype(np.int32)
                    stored = [ids[at] for at in order]
            self._vocabularies[look.vocabulary] = _Vocabulary(ids, positions, stored, layout_uid(stored))
        return self._vocabularies[look.vocabulary]

    def _new_features(self, vocabulary: _Vocabulary) -> np.ndarray:
        """int32. Numbers, in the file, of features that the registry may lack, in the order of storage."""
        places = self._known.places(self._wanted.space.name)
        order = np.arange(len(vocabulary.ids)) if vocabulary.positions is None else vocabulary.positions
        if not self._settings.replace:
            order = order[[uid not in places for uid in vocabulary.stored]]
        self._known.number(self._wanted.space.name, vocabulary.stored)
        return order.astype(np.int32)

    def _obs_names(self, look: Look) -> ObsNames:
        """Names of obs columns as they are when the files before this one are in the atlas."""
        now, edits = self._names, self._settings.edits
        kept = [edits.rename.get(name, name) for name in look.obs_columns if name not in edits.drop]
        if self._grows:
            given = columns.stored_names(kept, now.reserved, now.known)
            self._names = ObsNames(now.reserved, {**now.known, **given})
        return now

    # Write and commit

    def _write(self, looks: dict[str, Look | Exception]) -> None:
        total = sum(look.n_cells for look in looks.values() if isinstance(look, Look))
        done, progress = 0, checked(self._settings.progress)
        batch = Batch(self._session, self._settings, self._known)
        told: list[FileReport] = []
        committed = time.monotonic()

        def commit() -> None:
            nonlocal committed
            batch.commit()
            self._session.checkpoint()
            committed = time.monotonic()
            for file in told:
                self._report(file)
            told.clear()

        tasks = ((planned, _task(planned)) for planned in self._planned(looks))

        def write(task: WriteTask) -> Written:
            before = done
            return write_file(task, lambda n: progress(before + n, total))

        function = write if isinstance(self._executor, Here) else write_file
        try:
            for planned, future in in_turn(self._executor, function, tasks):
                if not future.done() and time.monotonic() - committed > _MOST_SECONDS:
                    commit()
                written = result_of(future, planned.file.source)
                if written is not None:
                    self._add(batch, planned, written)
                if not len(batch):
                    commit()  # what was told is in the atlas
                told.append(planned.file)
                look = looks.pop(planned.file.source)
                done += look.n_cells if isinstance(look, Look) else 0
                progress(done, total)
                if len(batch) >= _MOST_DATASETS or batch.n_cells >= _MOST_CELLS:
                    commit()
        except Exception:
            if not batch.failed:
                commit()  # files before the one that cannot be added
            raise
        commit()

    def _add(self, batch: Batch, planned: _Planned, written: Written) -> None:
        assert planned.row is not None
        batch.add(
            Ready(
                planned.file.source,
                planned.row,
                self._wanted.field_name,
                self._wanted.space,
                planned.features,
                written,
                planned.replaces,
            )
        )


def _task(planned: _Planned) -> tuple[object, ...] | Future[Written | None]:
    """Arguments of the task, or the result where there is none to do."""
    if planned.task is not None:
        return (planned.task,)
    future: Future[Written | None] = Future()
    if planned.error is not None:
        future.set_exception(planned.error)
    else:
        future.set_result(None)
    return future
