"""An archive becomes an atlas with our codec: streaming, and without loss."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hbx_gpu._identity.choice import FeatureChoice
from hbx_gpu._progress import Progress, checked
from hbx_gpu._remote.lookup import is_dir
from hbx_gpu._remote.places import parse
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl._atlases import origin
from hbx_gpu.scdl._format.archive import Archive, open_archive
from hbx_gpu.scdl._format.names import read_obs_names, read_var_names
from hbx_gpu.scdl._sources.axis import NAMES, POSITION, GeneAxis, gene_axis
from hbx_gpu.scdl._sources.cells import SPACE, gene_blocks

if TYPE_CHECKING:
    import pandas as pd

    from hbx_gpu.atlas._ingest.inputs import Input

COUNTS, NORMALIZED = "counts", "log_normalized"
# Values that are looked at or hashed at once.
_PIECE = 1 << 21


def archive_to_atlas(
    source: str | os.PathLike[str] | Archive,
    target: str | os.PathLike[str],
    *,
    layer: str = "auto",
    feature_id: str | None = None,
    strip_versions: bool = False,
    require_shared_genes: float | None = None,
    codec: str | None = None,
    allow_loss: bool = False,
    allow_links: bool = False,
    progress: Progress | None = None,
) -> int:
    """Add the cells of an archive to an atlas: a dataset per gene block, compressed.

    Rows, columns (their order, repeats and explicit zeros included) and values stay as they are. What the
    atlas's tables do not hold (categories, exact column types, labels, neighbors) is kept beside them, and
    :func:`atlas_to_archive` puts it back as long as nothing is added to the atlas.

    Parameters
    ----------
    source
        The archive.
    target
        The atlas; created if it does not exist. An interrupted conversion continues where it stopped.
    layer
        Where values go: ``counts`` (whole numbers) or a layer of float32 such as ``log_normalized``; ``auto``
        looks at all values and takes `counts` where they are whole numbers that fit.
    feature_id
        Column of var that identifies genes across blocks; see :func:`hbx_gpu.scdl._sources.axis.gene_axis`.
        By default the one that shares most genes with an atlas that exists.
    strip_versions
        Drop the versions of Ensembl ids: ENSG00000000003.15 becomes ENSG00000000003.
    require_shared_genes
        Refuse genes of which less than this fraction of the smaller set is shared, among the blocks of the
        archive and with the atlas. By default a fraction below one half causes a warning.
    codec
        Compression of the arrays; by default the atlas's own.
    allow_loss
        Accept values that float32 rounds.
    allow_links
        Follow links that lead out of the atlas or its zarr store, which are refused otherwise.
    progress
        Called with the rows done and their number.

    Returns
    -------
    int
        Number of cells added; 0 if they were already in the atlas.

    Raises
    ------
    InvalidDataError
        Values that the layer cannot hold; genes that cannot be told apart, or share less than
        `require_shared_genes`.
    AlreadyIngestedError
        The cells are in the atlas in another form.
    """
    from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
    from hbx_gpu.atlas._ingest.identity import known_features

    progress = checked(progress)
    archive = source if isinstance(source, Archive) else open_archive(source, allow_links=allow_links)
    if not archive.n_rows or not archive.nnz:
        raise InvalidDataError(f"{archive.path} holds no values: there is nothing to convert")
    archive.check_pointers()
    blocks = gene_blocks(archive)
    path = parse(target)
    there = is_dir(path / "lance_db")
    atlas = RaggedAtlas.open(path, allow_links=allow_links) if there else None
    axis = gene_axis(
        blocks,
        feature_id,
        strip_versions=strip_versions,
        require_shared=require_shared_genes,
        known=known_features(atlas.catalog, SPACE) if atlas is not None else None,
    )
    frames = [_var_frame(archive, b, axis) for b in range(len(blocks))]
    _warn_of_differences(archive, axis, frames)
    layer = _layer_for(archive) if layer == "auto" else layer
    if atlas is None:
        atlas = create_or_open_atlas(path, codec=codec)
    # Compared with the atlas above, so that nothing is written before the last block is.
    choice = FeatureChoice("index" if axis.column in (NAMES, POSITION) else axis.column, strip_versions)
    added, done = 0, 0
    for b, frame in enumerate(frames):
        block = _block_input(archive, b, frame, axis)
        if block is None:
            continue
        n = block.matrix.shape[0]
        added += atlas.add_from_anndata(
            block,
            zarr_layer=layer,
            feature_id_column=choice,
            codec=codec,
            allow_rounding=allow_loss,
            exist_ok=True,
            progress=lambda rows, _, begin=done: progress(begin + rows, archive.n_rows),
        )
        done += n
        progress(done, archive.n_rows)
    atlas.optimize()
    snapshot = atlas.snapshot()
    n_rows = int(atlas.list_versions(atlas.catalog.root)["total_rows"].iloc[-1])
    if isinstance(path, Path) and n_rows == archive.n_rows:
        origin.keep(archive, path, snapshot, layer)
    return added


def _layer_for(archive: Archive) -> str:
    """`counts` if all values are whole numbers of up to 32 bits."""
    dtype = archive.data.dtype
    if dtype.kind == "u" and dtype.itemsize <= 4:
        return COUNTS
    for first in range(0, archive.nnz, _PIECE):
        values = np.asarray(archive.data[first : first + _PIECE])
        if dtype == np.float16:
            values = values.astype(np.float32)
        with np.errstate(invalid="ignore"):
            if not ((values >= 0) & (values < 2**32) & (np.trunc(values) == values)).all():
                return NORMALIZED
    return COUNTS


def _var_frame(archive: Archive, block: int, axis: GeneAxis) -> pd.DataFrame:
    """Genes of a block, indexed by their ids (or their names, where the ids are a column)."""
    import pandas as pd

    frame, uids = archive.var.frames[block], axis.uids[axis.remaps[block]]
    columns = {name: frame.arrow(name).to_pandas() for name in frame.names}
    if frame.names and frame.n_rows < len(uids):  # columns beyond the recorded genes: nothing describes them
        columns = {name: column.reindex(range(len(uids))) for name, column in columns.items()}
    if axis.column in columns:
        columns[axis.column] = pd.Series(uids)  # as texts, also where they are stored as numbers
    names = read_var_names(archive.path, len(archive.var))[block]
    known = names is not None and len(names) == len(uids)
    index = pd.Index([str(name) for name in (names if known and names is not None else uids)])
    return pd.DataFrame({name: column.to_numpy() for name, column in columns.items()}, index=index)


def _warn_of_differences(archive: Archive, axis: GeneAxis, frames: list[pd.DataFrame]) -> None:
    """Warn about columns that describe a gene differently in two blocks, and show the first such gene."""
    known: dict[str, np.ndarray] = {}
    where: dict[str, np.ndarray] = {}
    for b, frame in enumerate(frames):
        place = axis.remaps[b]
        for name in frame.columns:
            values = known.setdefault(name, np.full(len(axis.uids), None, object))
            first = where.setdefault(name, np.full(len(axis.uids), -1))
            new = frame[name].to_numpy(dtype=object, na_value=None)
            old = values[place]
            differs = (first[place] >= 0) & (old != new) & ~((old != old) & (new != new))
            if differs.any():
                at = int(np.flatnonzero(differs)[0])
                warnings.warn(
                    f"{archive.path}: column {name!r} of var has {old[at]!r} for gene "
                    f"{axis.uids[place[at]]!r} in block {first[place[at]]} and {new[at]!r} in block {b}. An "
                    f"atlas describes a gene once: its table has the first; {origin.FOLDER} keeps both",
                    UserWarning,
                    stacklevel=3,
                )
            unknown = first[place] < 0
            values[place[unknown]], first[place[unknown]] = new[unknown], b


def _block_input(archive: Archive, block: int, var: pd.DataFrame, axis: GeneAxis) -> Input | None:
    """The rows of a gene block as a dataset of an atlas; None without rows."""
    from hbx_gpu._h5ad.matrix import CsrMatrix
    from hbx_gpu.atlas._ingest.inputs import Input

    first, last = (int(row) for row in archive.bounds[block : block + 2])
    if first == last:
        return None
    pointers = archive.indptr[first : last + 1].astype(np.int64)
    elements = slice(int(pointers[0]), int(pointers[-1]))
    name = f"{archive.path}, block {block}" if len(archive.var) > 1 else str(archive.path)
    matrix = CsrMatrix(
        name,
        (last - first, len(var)),
        pointers - pointers[0],
        archive.indices[elements],
        archive.data[elements],
    )
    label = archive.var.labels[block]
    return Input(
        source=name,
        source_name=str(label or archive.path.name),
        sha256=_hash(archive, block, axis),
        matrix_name="X",
        matrix=matrix,
        obs=_obs_frame(archive, first, last),
        var=var,
        available=["X"],
        keeps_order=True,  # an archive made from the atlas again equals this one byte by byte
    )


def _hash(archive: Archive, block: int, axis: GeneAxis) -> str:
    """Identity of a block: its rows, where in the archive they are, and its genes."""
    first, last = (int(row) for row in archive.bounds[block : block + 2])
    begin, end = int(archive.indptr[first]), int(archive.indptr[last])
    digest = hashlib.sha256(f"scdl {first} {last} {archive.data.dtype}\0".encode())
    for array, low, high in (
        (archive.indptr, first, last + 1),
        (archive.indices, begin, end),
        (archive.data, begin, end),
    ):
        for at in range(low, high, _PIECE):
            digest.update(np.ascontiguousarray(array[at : min(at + _PIECE, high)]).data)
    for uid in axis.uids[axis.remaps[block]]:
        digest.update(uid.encode() + b"\0")
    return digest.hexdigest()


def _obs_frame(archive: Archive, first: int, last: int) -> pd.DataFrame:
    """Cells of a block. Columns that only other files have are left out."""
    import pandas as pd

    names = read_obs_names(archive.path, archive.n_rows)
    index = (
        [str(row) for row in range(first, last)]
        if names is None
        else [name or str(first + i) for i, name in enumerate(names.slice(first, last - first).to_pylist())]
    )
    columns: dict[str, object] = {}
    obs = archive.obs
    if obs is not None:
        touched = (obs.bounds[:-1] < last) & (obs.bounds[1:] > first)
        present = {name for k in np.flatnonzero(touched) for name in obs.frames[k].names}
        for name in obs.names:
            if name in present:
                part = obs.column(name).slice(first, last - first)
                if pa.types.is_dictionary(part.type):
                    part = part.cast(part.type.value_type)
                columns[name] = pd.Series(part.to_pandas(types_mapper=_exact).array, index=index)
    return pd.DataFrame(columns, index=index)


def _exact(kind: pa.DataType) -> object:
    """pandas' own nullable types, which keep whole numbers and truth values beside missing ones."""
    import pandas as pd

    if pa.types.is_integer(kind):
        return pd.Series(
            [], dtype=f"{'U' if pa.types.is_unsigned_integer(kind) else ''}Int{kind.bit_width}"
        ).dtype
    return pd.BooleanDtype() if pa.types.is_boolean(kind) else None
