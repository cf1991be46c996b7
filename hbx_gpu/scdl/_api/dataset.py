"""`SingleCellMemMapDataset`: the API of SCDL over an opened archive; what writes is done in other modules."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from hbx_gpu.scdl._api.neighbors import NeighborDraws
from hbx_gpu.scdl._api.rows import RowReader
from hbx_gpu.scdl._format.archive import local_archive, open_archive
from hbx_gpu.scdl._format.neighbors import NeighborSamplingStrategy
from hbx_gpu.scdl._format.values import DEFAULT_TOLERANCE, check_dtype

if TYPE_CHECKING:
    import pandas as pd

    from hbx_gpu.dataloader import CellDataset
    from hbx_gpu.scdl._sources.pairs import PairedDataset

_NEVER = float("inf")


class Mode(StrEnum):
    """How a dataset is opened. Only ``w+`` changes anything: the folder must not exist then."""

    CREATE_APPEND = "w+"
    READ_APPEND = "r+"
    READ = "r"
    CREATE = "w"


class SingleCellMemMapDataset(RowReader):
    """Cells of an SCDL archive: a map-style dataset for PyTorch, and SCDL's API.

    An archive that exists is opened in place, for reading only: nothing is written, and the cost does not
    depend on the number of cells. Row numbers below 0 count from the end.

    Parameters
    ----------
    data_path
        Folder of the archive. Opened if it exists, created otherwise.
    h5ad_path
        Source of a new archive.
    num_elements, num_rows
        Room of a new, empty archive (both are needed). Its arrays can be written until it is opened again.
    mode
        As :class:`Mode`.
    paginated_load_cutoff, load_block_row_size, var_feature_index_name, obs_feature_index_name
        As :class:`hbx_gpu.scdl._writing.convert.ConvertOptions`.
    load_neighbors
        Use the neighbors of the archive; store those of the source when one is created.
    neighbor_key
        Name in `.obsp` of the source.
    neighbor_sampling_strategy, fallback_to_identity
        How :meth:`sample_neighbor_index` draws, and whether cells without neighbors pass without a warning.
    data_dtype
        Creating: dtype of the stored values, float32 if None, ``auto`` for the smallest exact one.
        Opening: the dtype that the values have, where header and values do not tell.
    data_dtype_tolerance
        Largest difference between source and stored values that counts as equal.
    use_X_not_raw
        Store `.X` even if the source has `.raw.X`.
    matrix
        Creating: ``X``, ``raw``, a layer, or ``auto`` for the one that holds counts, instead of
        `use_X_not_raw`.
    allow_normalized
        Creating: take a matrix that does not look like counts without a warning.
    allow_loss
        Creating: store values that `data_dtype` does not hold nevertheless, with a warning.
    overwrite
        Creating: replace an archive that exists.
    neighbor_seed
        Seed of the generator that draws neighbors. Workers of a DataLoader draw differently, by their
        number; without a seed, by torch's seed of the worker.
    allow_links
        Follow links that lead out of the archive, or out of a zarr store that it is made of; refused
        otherwise.

    Raises
    ------
    ValueError
        Nothing to open or to create from; a bad dtype or strategy.
    FileExistsError
        A source, or mode ``w+``, and a folder that exists, without `overwrite`.
    FileNotFoundError, CorruptDataError
        As :func:`hbx_gpu.scdl.open_archive`.

    Attributes
    ----------
    archive
        The opened archive.
    data, col_index, row_index
        Its memory maps.
    dtypes
        File name -> name of the dtype.
    """

    _neighbors: NeighborDraws | None

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        h5ad_path: str | os.PathLike[str] | None = None,
        num_elements: int | None = None,
        num_rows: int | None = None,
        mode: Mode | str = Mode.READ_APPEND,
        paginated_load_cutoff: float = 10_000,
        load_block_row_size: int = 1_000_000,
        var_feature_index_name: str = "var_feature_id",
        obs_feature_index_name: str = "obs_feature_id",
        load_neighbors: bool = False,
        neighbor_key: str = "next_cell_ids",
        neighbor_sampling_strategy: NeighborSamplingStrategy | str = NeighborSamplingStrategy.RANDOM,
        fallback_to_identity: bool = True,
        data_dtype: str | None = None,
        data_dtype_tolerance: float = DEFAULT_TOLERANCE,
        use_X_not_raw: bool = False,
        *,
        matrix: str | None = None,
        allow_normalized: bool = False,
        allow_loss: bool = False,
        overwrite: bool = False,
        neighbor_seed: int | None = None,
        allow_links: bool = False,
    ) -> None:
        check_dtype(data_dtype)
        self.allow_links = allow_links
        self.data_path = local_archive(data_path)
        self.mode = Mode(mode)
        self.paginated_load_cutoff = paginated_load_cutoff
        self.load_block_row_size = load_block_row_size
        self.var_feature_index_name = var_feature_index_name
        self.obs_feature_index_name = obs_feature_index_name
        self.use_X_not_raw, self.matrix, self.allow_loss = use_X_not_raw, matrix, allow_loss
        self.allow_normalized = allow_normalized
        self.data_dtype_tolerance = data_dtype_tolerance
        self.load_neighbors = load_neighbors
        if load_neighbors:
            self.neighbor_key = neighbor_key
            self.neighbor_sampling_strategy = NeighborSamplingStrategy.parse(neighbor_sampling_strategy)
            self.fallback_to_identity = fallback_to_identity
        self.neighbor_seed = neighbor_seed
        self._create_or_open(h5ad_path, num_elements, num_rows, data_dtype, overwrite=overwrite)

    def _create_or_open(
        self,
        h5ad_path: str | os.PathLike[str] | None,
        num_elements: int | None,
        num_rows: int | None,
        data_dtype: str | None,
        *,
        overwrite: bool,
    ) -> None:
        from hbx_gpu.scdl._writing import new_folder as swap
        from hbx_gpu.scdl._writing import writer

        exists = os.path.exists(self.data_path) or swap.recover(self.data_path)
        creating = h5ad_path is not None or self.mode is Mode.CREATE_APPEND
        if exists and creating and not overwrite:
            raise FileExistsError(
                f"Output directory already exists: {self.data_path}. Open it without a source and mode, "
                "choose another path, or replace it with overwrite=True"
            )
        if h5ad_path is not None:
            self._convert(h5ad_path, data_dtype, self.paginated_load_cutoff, overwrite=overwrite)
        elif exists and not creating:
            self._open(self.data_path, data_dtype=None if data_dtype == "auto" else data_dtype)
        elif isinstance(num_rows, int) and isinstance(num_elements, int):
            if num_rows < 1 or num_elements < 1:
                raise ValueError(
                    f"expected num_rows and num_elements above 0, found {num_rows}, {num_elements}"
                )
            writer.allocate(self.data_path, n_rows=num_rows, n_elements=num_elements)
            self._open(self.data_path, writable=True)
        else:
            raise ValueError(
                "An np.memmap path, an h5ad path, or the number of elements and rows is required: there is "
                f"no archive at {self.data_path}, and neither h5ad_path nor num_elements and num_rows"
            )

    def _open(
        self, path: str | os.PathLike[str], *, data_dtype: str | None = None, writable: bool = False
    ) -> None:
        self.archive = open_archive(
            path, data_dtype=data_dtype, writable=writable, allow_links=self.allow_links
        )
        self.data_path = path
        self._neighbors = None
        if self.load_neighbors:
            self._neighbors = NeighborDraws(
                self.archive, self.neighbor_sampling_strategy, self.fallback_to_identity, self.neighbor_seed
            )
            if self._neighbors.missing:
                warnings.warn(
                    f"{self._neighbors.missing}: there is no neighbor data", UserWarning, stacklevel=4
                )

    @property
    def groups_np(self) -> np.ndarray:
        """int32, (n_rows,). Gene block of every row: what samplers keep together."""
        from hbx_gpu.scdl._sources.cells import groups_of

        return groups_of([self.archive])

    def get_neighbor_indices_for_cell(self, cell_index: int) -> np.ndarray:
        """uint32, (n_neighbors,). Row numbers of the neighbors of a cell; empty without `load_neighbors`.

        Raises
        ------
        ValueError
            The archive has no neighbors.
        IndexError
            No such row.
        """
        return np.empty(0, np.uint32) if self._neighbors is None else self._neighbors.of(cell_index)[0]

    def get_neighbor_weights_for_cell(self, cell_index: int) -> np.ndarray:
        """float32, (n_neighbors,). Weights of the neighbors; otherwise as the method for their indices."""
        return np.empty(0, np.float32) if self._neighbors is None else self._neighbors.of(cell_index)[1]

    def sample_neighbor_index(self, cell_index: int) -> int | np.uint32:
        """Row number of one neighbor, drawn as `neighbor_sampling_strategy` says.

        The cell itself if it has none, or without `load_neighbors`. Errors as
        :meth:`get_neighbor_indices_for_cell`.
        """
        return cell_index if self._neighbors is None else self._neighbors.one(cell_index)

    def sample_neighbor_indices(
        self, cell_indices: Sequence[int] | np.ndarray, n: int | None = None
    ) -> np.ndarray:
        """Neighbors of many cells, drawn together.

        Parameters
        ----------
        cell_indices
            Row numbers.
        n
            Neighbors per cell, with replacement; None for one.

        Returns
        -------
        np.ndarray
            int64, (n_cells,) or (n_cells, n). A cell without neighbors is its own.
        """
        rows = np.array([self._row(index) for index in cell_indices], np.int64)
        if self._neighbors is None:
            return rows if n is None else np.repeat(rows[:, None], n, axis=1)
        return self._neighbors.many(rows, n)

    def get_row_with_neighbor(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: Sequence[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """One cell and a neighbor of it.

        Parameters and errors are those of :meth:`get_row`.

        Returns
        -------
        dict
            ``current_cell`` and ``next_cell``: values and columns; ``current_cell_index``,
            ``next_cell_index``; ``var_features``, ``obs_features`` of the current cell, or None.

        Raises
        ------
        ValueError
            Opened without `load_neighbors`, or no neighbors in the archive.
        """
        if self._neighbors is None or self._neighbors.missing:
            reason = self._neighbors.missing if self._neighbors else ""
            raise ValueError(
                "Cannot include neighbor data: "
                + (reason or "no neighbors were loaded; open with load_neighbors=True")
            )
        row = self._row(index)
        current, var, obs = self.get_row(
            row, return_var_features, var_feature_names, return_obs_features, obs_feature_names
        )
        other = self.sample_neighbor_index(row)
        return {
            "current_cell": current,
            "next_cell": self.get_row(int(other))[0],
            "current_cell_index": row,
            "next_cell_index": other,
            "var_features": var,
            "obs_features": obs,
        }

    def get_row_padded_with_neighbor(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: Sequence[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """As :meth:`get_row_with_neighbor`, with dense rows as :meth:`get_row_padded` has them."""
        found = self.get_row_with_neighbor(
            index, return_var_features, var_feature_names, return_obs_features, obs_feature_names
        )
        for cell in ("current_cell", "next_cell"):
            found[cell] = self._padded(int(found[f"{cell}_index"]), found[cell])
        return found

    def get_neighbor_stats(self) -> dict[str, bool | int | float]:
        """``has_neighbors``; with neighbors also counts of them over all cells."""
        if self._neighbors is None or self._neighbors.missing:
            return {"has_neighbors": False}
        return self._neighbors.stats()

    def to_cell_dataset(
        self, metadata_columns: Sequence[str] | None = None, **options: Any
    ) -> CellDataset | PairedDataset:
        """The cells as the loaders of hbx_gpu take them; `make_loader` calls this.

        Parameters
        ----------
        metadata_columns, **options
            As :func:`dataset_of`; `neighbors` and `seed` by default as this dataset
            draws neighbors, if it was opened with `load_neighbors`.
        """
        from hbx_gpu.scdl._sources.cells import dataset_of

        if self.load_neighbors:
            options = {
                "neighbors": self.neighbor_sampling_strategy,
                "seed": self.neighbor_seed or 0,
            } | options
        return dataset_of([self.archive], metadata_columns=metadata_columns, **options)

    def load(self, stored_path: str | os.PathLike[str]) -> None:
        """Open another archive in place of this one."""
        self._open(stored_path)

    def _convert(
        self, h5ad_path: str | os.PathLike[str], data_dtype: str | None, cutoff: float, *, overwrite: bool
    ) -> Any:
        from hbx_gpu.scdl._format.values import Tolerance
        from hbx_gpu.scdl._writing.convert import ConvertOptions, convert_h5ad

        done = convert_h5ad(
            h5ad_path,
            self.data_path,
            options=ConvertOptions(
                matrix=self.matrix,
                allow_normalized=self.allow_normalized,
                use_X_not_raw=self.use_X_not_raw,
                paginated_load_cutoff=cutoff,
                load_block_row_size=self.load_block_row_size,
                var_feature_index_name=self.var_feature_index_name,
                obs_feature_index_name=self.obs_feature_index_name,
                neighbor_key=self.neighbor_key if self.load_neighbors else None,
                allow_links=self.allow_links,
            ),
            data_dtype=data_dtype,
            tolerance=Tolerance(self.data_dtype_tolerance, self.allow_loss),
            overwrite=overwrite,
        )
        self._open(self.data_path)
        return done

    def load_h5ad(self, anndata_path: str | os.PathLike[str]) -> None:
        """Fill an empty archive from an .h5ad file.

        Raises
        ------
        FileExistsError
            The archive has rows; :meth:`concat` appends.
        """
        self._fill(anndata_path, self.paginated_load_cutoff)

    def regular_load_h5ad(
        self, anndata_path: str | os.PathLike[str]
    ) -> tuple[pd.DataFrame, pd.DataFrame, int]:
        """As :meth:`load_h5ad`, in few large blocks; returns genes, cells and the number of cells."""
        return self._fill(anndata_path, _NEVER)

    def paginated_load_h5ad(
        self, anndata_path: str | os.PathLike[str]
    ) -> tuple[pd.DataFrame, pd.DataFrame, int]:
        """As :meth:`load_h5ad`, in blocks of `load_block_row_size` rows; returns as `regular_load_h5ad`."""
        return self._fill(anndata_path, 0)

    def _fill(self, path: str | os.PathLike[str], cutoff: float) -> tuple[pd.DataFrame, pd.DataFrame, int]:
        if self.number_of_rows():
            raise FileExistsError(
                f"{self.data_path} has {self.number_of_rows()} rows; convert the file to an archive of its "
                "own and append that with concat(), or create with overwrite=True"
            )
        done = self._convert(path, self.data.dtype.name, cutoff, overwrite=True)
        return done.var, done.obs, done.n_rows

    def save(self, output_path: str | os.PathLike[str] | None = None) -> bool:
        """Return True: archives are complete on disk from the moment they exist.

        Only what was written to the arrays of a new, empty archive (`num_rows`, `num_elements`) is flushed.

        Parameters
        ----------
        output_path
            Where a copy of the archive goes too; this dataset stays where it is.

        Raises
        ------
        FileExistsError
            There is something at the output.
        """
        for array in (self.data, self.col_index, self.row_index):
            if isinstance(array, np.memmap) and array.flags.writeable:
                array.flush()
        if output_path is not None:
            from hbx_gpu.scdl._writing.writer import copy_archive

            copy_archive(self.data_path, output_path)
        return True

    def cast_data_to_dtype(self, dtype: str, *, allow_loss: bool = False) -> None:
        """Change the dtype of the stored values, on disk and here.

        Parameters
        ----------
        dtype
            One of the seven names, or ``auto``.
        allow_loss
            Store values that it does not hold nevertheless, with a warning.

        Raises
        ------
        ValueError
            No such dtype.
        InvalidDataError
            A value would change by more than `data_dtype_tolerance`; the archive is as before.
        """
        from hbx_gpu.scdl._format.values import Tolerance
        from hbx_gpu.scdl._writing.cast import cast_archive

        if dtype is None:
            raise ValueError(f"Invalid data_dtype {dtype!r}. Name one")
        check_dtype(dtype)
        cast_archive(self.archive, dtype, tolerance=Tolerance(self.data_dtype_tolerance, allow_loss))
        self._open(self.data_path)

    def concat(
        self,
        other_dataset: SingleCellMemMapDataset | list[SingleCellMemMapDataset],
        extend_copy_size: int = 10 * 1024 * 1024,
        output_path: str | os.PathLike[str] | None = None,
        destroy_on_copy: bool = False,
        *,
        data_dtype: str | None = None,
    ) -> None:
        """Append the cells of other archives, in their order; this dataset is then the result.

        Parameters
        ----------
        other_dataset
            One dataset, or a list.
        extend_copy_size
            Values that are copied at once.
        output_path
            Where the result goes; None for in place of this archive. This one stays as it is then.
        destroy_on_copy
            Remove the archives that were appended, and this one if there is an `output_path`.
        data_dtype
            Dtype of the values of the result; None for the widest.

        Raises
        ------
        ValueError
            Not datasets; integers and floats, without `data_dtype`.
        InvalidDataError
            Cell columns that cannot be joined. Nothing was changed.
        """
        from hbx_gpu.scdl._writing.concat import concat_archives

        others = [other_dataset] if isinstance(other_dataset, SingleCellMemMapDataset) else other_dataset
        if not isinstance(others, list) or not all(isinstance(o, SingleCellMemMapDataset) for o in others):
            raise ValueError(
                "Expecting either a SingleCellMemMapDataset or a list thereof. Actually got: "
                f"{type(other_dataset).__name__}"
            )
        if not others and output_path is None:
            return
        target = self.data_path if output_path is None else output_path
        concat_archives(
            [self.archive, *(other.archive for other in others)],
            target,
            overwrite=output_path is None,
            data_dtype=data_dtype,
            destroy=destroy_on_copy,
            copy_size=extend_copy_size,
        )
        self._open(Path(target) if isinstance(self.data_path, Path) else os.fspath(target))
