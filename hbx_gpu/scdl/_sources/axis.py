"""One global feature axis for blocks of different genes: which column tells genes apart, and the remaps."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hbx_gpu._advice import option
from hbx_gpu._identity.choice import FeatureChoice, KnownFeatures, choose
from hbx_gpu._identity.overlap import compare, require
from hbx_gpu._identity.tables import INDEX, UNIQUE_NAMES, FeatureTable, numbered, without_versions
from hbx_gpu.errors import InvalidDataError, UnknownNameError

if TYPE_CHECKING:
    from hbx_gpu.scdl._format.frames import Frame

POSITION, NAMES = "position", "names"
_SHOWN = 5


@dataclass(frozen=True)
class GeneBlock:
    """Genes that columns of some rows count in.

    Attributes
    ----------
    where
        Archive and block, for messages.
    n_genes
        As recorded.
    width
        Columns that rows use; more than `n_genes` where the archive records the genes of another matrix.
    frame
        Columns of var.
    names
        object, (n_genes,). Names of the genes, None where the archive does not know them.
    """

    where: str
    n_genes: int
    width: int
    frame: Frame
    names: np.ndarray | None


@dataclass(frozen=True)
class GeneAxis:
    """The axis that all blocks share.

    Attributes
    ----------
    column
        Where the ids come from: a column of var, `NAMES`, `UNIQUE_NAMES` or `POSITION`.
    uids
        object, (n,). Id of every output column, in order of first appearance.
    remaps
        int32, (width of the block,) per block: column -> output column. Blocks with the same genes share
        the array.
    """

    column: str
    uids: np.ndarray
    remaps: list[np.ndarray]


def gene_axis(
    blocks: Sequence[GeneBlock],
    feature_id: str | None = None,
    *,
    strip_versions: bool = False,
    require_shared: float | None = None,
    known: KnownFeatures | None = None,
) -> GeneAxis:
    """Lay the genes of several blocks onto one axis.

    Parameters
    ----------
    blocks
        All blocks of the dataset.
    feature_id
        Column of var that identifies a gene; ``names`` for their names, where the archive has them;
        ``unique_names`` for the names with repeats numbered; ``position`` for the number of the column, which
        takes the genes of all blocks to be the same ones.
        By default what identifies genes in all blocks, see :func:`hbx_gpu._identity.choice.choose`: ids of
        a database, else their names, else one of the usual columns, else the only column of text
        without repeats. A warning names blocks that share few genes. A single block needs no ids.
    strip_versions
        Drop the versions of Ensembl ids: ENSG00000000003.15 becomes ENSG00000000003.
    require_shared
        Refuse a block that shares less than this fraction of the smaller set of genes with the blocks before
        it. None: a fraction below one half causes a warning.
    known
        Genes of the collection that the blocks are to join; the column that shares most with them is chosen.

    Raises
    ------
    UnknownNameError
        A block lacks the column.
    InvalidDataError
        Genes cannot be told apart: ids repeat within a block or are missing, or no column qualifies. A block
        shares less than `require_shared`.
    """
    wide = [block for block in blocks if block.width > block.n_genes]
    if feature_id is None and wide and len(blocks) == 1:
        # Raw's matrix beside the genes of X: the recorded ids belong to other columns.
        feature_id = POSITION
    column = feature_id or _choose(blocks, known)
    if column not in (POSITION,) and not wide:
        say_differences(
            blocks,
            column,
            known.uids if known is not None else (),
            strip_versions=strip_versions,
            require_shared=require_shared,
        )
    if column == POSITION:
        width = max((block.width for block in blocks), default=0)
        remaps = {block.width: np.arange(block.width, dtype=np.int32) for block in blocks}
        return GeneAxis(column, _texts(range(width)), [remaps[block.width] for block in blocks])
    if wide:
        raise InvalidDataError(
            f"{wide[0].where}: rows use {wide[0].width} columns, but {wide[0].n_genes} genes are recorded: "
            "the real package stores raw.X beside the genes of X. Which gene a column is cannot be known; "
            f"{option('feature_id', POSITION)} numbers them instead"
        )
    place: dict[object, int] = {}
    found: dict[bytes, np.ndarray] = {}
    remaps_of: list[np.ndarray] = []
    for block in blocks:
        ids = _ids(block, column, unique=len(blocks) > 1, strip_versions=strip_versions)
        digest = hashlib.blake2b("\0".join(ids).encode(), digest_size=16).digest()
        if digest not in found:
            if len(blocks) == 1:
                place = dict.fromkeys(ids, 0)
                found[digest] = np.arange(len(ids), dtype=np.int32)
            else:
                found[digest] = np.array([place.setdefault(uid, len(place)) for uid in ids], np.int32)
        remaps_of.append(found[digest])
    uids = _texts(ids if len(blocks) == 1 else place)
    return GeneAxis(column, uids, remaps_of)


def _texts(values: Iterable[object]) -> np.ndarray:
    texts = [str(value) for value in values]
    out = np.empty(len(texts), object)
    out[:] = texts
    return out


def _choose(blocks: Sequence[GeneBlock], known: KnownFeatures | None = None) -> str:
    """What identifies the genes of all blocks."""
    if not blocks:
        return POSITION
    tables = [_table(block) for block in blocks]
    if known is not None and known.uids:
        columns = {choice.column for choice in choose(tables, known)}
        if len(columns) == 1 and all(table.identifies(*columns) for table in tables):
            (column,) = columns
            return NAMES if column == INDEX else column
    if chosen := choose(tables, same_column=True):
        column = chosen[0].column
        if len(blocks) > 1 and all(table.names_positions(column) for table in tables):
            warnings.warn(
                f"{blocks[0].where} to {blocks[-1].where}: nothing but positions tells their genes apart, so "
                f"column k is taken for the same gene in all of them; name a column of var with "
                f"{option('feature_id')} if that is wrong",
                UserWarning,
                stacklevel=4,
            )
        return NAMES if column == INDEX else column
    if len(blocks) == 1:
        # Columns of one block need not be told apart by name: names may repeat, as in the file they are from.
        return NAMES if tables[0].texts(INDEX) is not None else POSITION
    shared = [name for name in blocks[0].frame.names if all(name in b.frame.names for b in blocks)]
    good = [name for name in shared if all(table.identifies(name) for table in tables)]
    names_repeat = all(table.texts(INDEX) is not None for table in tables)
    numbering = f"{option('feature_id', UNIQUE_NAMES)} to number repeated names, " if names_repeat else ""
    found = f"several columns would do: {good}" if good else f"none of the columns they share, {shared}, does"
    raise InvalidDataError(
        f"{blocks[0].where} to {blocks[-1].where}: {len(blocks)} blocks with genes of their own need an id "
        f"that identifies a gene in all of them; {found}. Name a column of var with {option('feature_id')}, "
        f"{numbering}or {option('feature_id', POSITION)} if column k is the same gene in all blocks"
    )


def _table(block: GeneBlock) -> FeatureTable:
    names = block.names
    readers: dict[str, Callable[[], Iterable[object]]] = {}
    if names is not None:
        readers[INDEX] = lambda: names
    for name in block.frame.names:
        if name != INDEX:
            readers[name] = functools.partial(_values, block.frame, name)
    return FeatureTable(block.where, readers)


def _values(frame: Frame, name: str) -> list[object]:
    return list(frame.arrow(name).to_pylist())


def say_differences(
    blocks: Sequence[GeneBlock],
    column: str,
    before: Collection[str] = (),
    *,
    strip_versions: bool = False,
    require_shared: float | None = None,
) -> None:
    """Warn of blocks that share less than half of the smaller set with what comes before them.

    Parameters
    ----------
    blocks
        Each is compared with the genes in `before` and the blocks before it.
    column
        What identifies the genes.
    before
        Ids of the collection that the blocks are to join.
    strip_versions, require_shared
        As for :func:`gene_axis`.

    Raises
    ------
    InvalidDataError
        A block shares less than `require_shared`.
    """
    known = set(before)
    choice = FeatureChoice(INDEX if column == NAMES else column, strip_versions)
    seen: set[bytes] = set()
    for block in blocks if len(blocks) > 1 or known else ():
        table = _table(block)
        if table.texts(choice.column) is None or not table.identifies(choice.column):
            continue  # numbers as ids, or ids that repeat, which is an error elsewhere
        ids = choice.ids(table, parameter="feature_id")
        digest = hashlib.blake2b("\0".join(ids).encode(), digest_size=16).digest()
        if digest not in seen and known:
            overlap = compare(table, choice, known, parameter="feature_id")
            require(overlap, require_shared)
            if overlap.is_small:
                warnings.warn(str(overlap), UserWarning, stacklevel=4)
        seen.add(digest)
        known.update(ids)


def _ids(
    block: GeneBlock, column: str, *, unique: bool, text_only: bool = False, strip_versions: bool = False
) -> list[str]:
    if column in block.frame.names:
        values = block.frame.arrow(column)
    elif column in (NAMES, UNIQUE_NAMES) and block.names is not None:
        names = block.names if column == NAMES else numbered(block.names.tolist())
        values = pa.chunked_array([pa.array(names, pa.string())])
    else:
        has = [*block.frame.names, *([NAMES] if block.names is not None else []), POSITION]
        raise UnknownNameError(f"{block.where}: var has no column {column!r}; it has {has}")
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if values.null_count or not (is_text or (pa.types.is_integer(kind) and not text_only)):
        raise InvalidDataError(
            f"{block.where}: column {column!r} of var holds {values.null_count} missing values and is of "
            f"type {kind}; ids must be texts or whole numbers, one for every gene"
        )
    ids = [str(value) for value in values.to_pylist()]
    ids = without_versions(ids) if strip_versions else ids
    if unique and len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = list(dict.fromkeys(uid for uid in ids if uid in seen or seen.add(uid)))  # type: ignore[func-returns-value]
        raise InvalidDataError(
            f"{block.where}: column {column!r} of var names {len(twice)} genes more than once, for example "
            f"{twice[:_SHOWN]}; choose another with {option('feature_id')}"
        )
    return ids
