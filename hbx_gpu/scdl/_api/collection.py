"""Several archives in one folder, made of .h5ad files and flattened into one."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import uuid
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._files import make_folder
from hbx_gpu._progress import Progress, checked
from hbx_gpu.errors import InvalidDataError, ResourceError
from hbx_gpu.scdl._api.dataset import SingleCellMemMapDataset
from hbx_gpu.scdl._format.archive import local_archive
from hbx_gpu.scdl._format.features import VariableFeatureIndex
from hbx_gpu.scdl._format.layout import LAYOUT_VERSION, METADATA, VERSION
from hbx_gpu.scdl._format.values import DEFAULT_TOLERANCE, Tolerance, check_dtype
from hbx_gpu.scdl._writing.concat import concat_archives
from hbx_gpu.scdl._writing.convert import ConvertOptions, MixedValuesError, convert_h5ad, look_at_files
from hbx_gpu.scdl._writing.writer import check_target

if TYPE_CHECKING:
    from hbx_gpu.dataloader import CellDataset
    from hbx_gpu.scdl._sources.pairs import PairedDataset


_log = logging.getLogger(__name__)


class SingleCellCollection:
    """Archives below one folder, one per .h5ad file.

    Parameters
    ----------
    data_path
        The folder; made if it is not there. Archives that are in it are not taken in: see :meth:`open`.

    Attributes
    ----------
    data_path
        As given.
    fname_to_mmap
        Path of every archive -> dataset, in the order of their rows.
    """

    def __init__(self, data_path: str | os.PathLike[str]) -> None:
        self.data_path: str | os.PathLike[str] = local_archive(data_path)
        self.fname_to_mmap: dict[Path, SingleCellMemMapDataset] = {}
        folder = Path(self.data_path)
        make_folder(folder, "a collection of archives")
        if not (folder / VERSION).exists():
            (folder / VERSION).write_text(json.dumps(LAYOUT_VERSION))

    @classmethod
    def open(cls, data_path: str | os.PathLike[str], **options: Any) -> SingleCellCollection:
        """A collection of the archives that are in a folder, in the order of their names.

        Parameters
        ----------
        data_path
            The folder. Nothing is written to it.
        **options
            For every :class:`SingleCellMemMapDataset` (``load_neighbors=True``, for example).

        Returns
        -------
        SingleCellCollection
            The collection, of archives that are open for reading.

        Raises
        ------
        FileNotFoundError
            No such folder, or no archive in it.
        """
        folder = Path(local_archive(data_path))
        archives = sorted(path.parent for path in folder.glob(f"*/{METADATA}"))
        if not archives:
            raise FileNotFoundError(f"expected a folder with SCDL archives at {folder}, found none")
        collection = cls.__new__(cls)
        collection.data_path = data_path
        collection.fname_to_mmap = {path: SingleCellMemMapDataset(path, **options) for path in archives}
        return collection

    def load_h5ad(
        self,
        h5ad_path: str | os.PathLike[str],
        paginated_load_cutoff: float = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,
        *,
        data_dtype: str | None = None,
        data_dtype_tolerance: float = DEFAULT_TOLERANCE,
        allow_loss: bool = False,
        matrix: str | None = None,
        allow_normalized: bool = False,
        load_neighbors: bool = False,
        neighbor_key: str = "next_cell_ids",
    ) -> None:
        """Convert one file and add it; its archive is named after the file.

        Parameters are those of :class:`SingleCellMemMapDataset`.
        """
        options = ConvertOptions(
            matrix=matrix,
            allow_normalized=allow_normalized,
            use_X_not_raw=use_X_not_raw,
            paginated_load_cutoff=paginated_load_cutoff,
            load_block_row_size=load_block_row_size,
            neighbor_key=neighbor_key if load_neighbors else None,
        )
        path = Path(self.data_path) / Path(h5ad_path).stem
        tolerance = Tolerance(data_dtype_tolerance, allow_loss)
        convert_h5ad(h5ad_path, path, options=options, data_dtype=data_dtype, tolerance=tolerance)
        self.fname_to_mmap[path] = _open(path, options)

    def load_h5ad_multi(
        self,
        directory_path: str | os.PathLike[str],
        max_workers: int = 5,
        use_processes: bool = False,
        data_dtype: str | None = None,
        paginated_load_cutoff: float = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,
        *,
        data_dtype_tolerance: float = DEFAULT_TOLERANCE,
        allow_loss: bool = False,
        matrix: str | None = None,
        allow_normalized: bool = False,
        load_neighbors: bool = False,
        neighbor_key: str = "next_cell_ids",
        progress: Progress | None = None,
        executor: Executor | None = None,
    ) -> None:
        """Convert all .h5ad files below a folder and add them in the order of their paths.

        Archives are named after their files; files of one name get that of their folders before it.
        Parameters that are not described here are those of :class:`SingleCellMemMapDataset`.

        Parameters
        ----------
        directory_path
            The folder, searched with all its subfolders; or one file.
        max_workers
            Largest number of files that are converted at once.
        use_processes
            Convert in processes of their own instead of threads.
        progress
            Called with the files done and their total.
        executor
            Any ``concurrent.futures.Executor``, instead of the two before: files are converted where it runs
            them. Its workers need the same paths to the files and to the collection. A task may run twice.

        Raises
        ------
        FileNotFoundError
            No .h5ad file there.
        RuntimeError
            A file could not be converted. Then no archive is added and none stays on disk.
        """
        check_dtype(data_dtype)
        options = ConvertOptions(
            matrix=matrix,
            allow_normalized=allow_normalized,
            use_X_not_raw=use_X_not_raw,
            paginated_load_cutoff=paginated_load_cutoff,
            load_block_row_size=load_block_row_size,
            neighbor_key=neighbor_key if load_neighbors else None,
        )
        tolerance = Tolerance(data_dtype_tolerance, allow_loss)
        if executor is not None:
            self.add_folder(directory_path, executor, options, data_dtype, tolerance, progress)
            return
        n = max(1, min(max_workers, len(find_h5ad(directory_path))))
        # Spawned: HDF5 and Arrow have threads and locks that do not survive a fork.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(n, mp_context=spawn) if use_processes else ThreadPoolExecutor(n) as own:
            self.add_folder(directory_path, own, options, data_dtype, tolerance, progress)

    def add_folder(
        self,
        folder: str | os.PathLike[str],
        executor: Executor,
        options: ConvertOptions,
        data_dtype: str | None,
        tolerance: Tolerance,
        progress: Progress | None = None,
    ) -> None:
        """Convert all .h5ad files below a folder on an executor and add them in the order of their paths.

        Parameters
        ----------
        folder
            The folder, searched with all its subfolders; or one file.
        executor
            Where files are converted. Its workers need the same paths to the files and to the collection. A
            task may run twice.
        options, data_dtype, tolerance
            How they are converted.
        progress
            Called with the files done and their total.

        Raises
        ------
        FileNotFoundError, RuntimeError
            As in :meth:`load_h5ad_multi`.
        """
        from hbx_gpu._executors import in_turn, result_of

        progress = checked(progress)
        files = find_h5ad(folder)
        paths = [Path(self.data_path) / name for name in _archive_names(files, Path(folder))]
        for path in paths:
            check_target(path, overwrite=False)
        each = [options] * len(files)
        try:
            chosen = look_at_files(files, options)
        except MixedValuesError:
            raise
        except Exception:  # a file that cannot be read: its own conversion says which and why
            _log.debug("the values of the files could not be compared", exc_info=True)
        else:
            options = replace(options, allow_normalized=True)  # the warnings have been given
            each = [options] * len(files)
            if options.choose:
                each = [replace(options, matrix=choice.name, choose=False) for choice in chosen]
        # Each run of a task makes a folder of its own here, and the one that was waited for is taken.
        staging = Path(self.data_path).resolve() / f".converting-{uuid.uuid4().hex}"
        staging.mkdir()
        made: dict[Path, Path] = {}
        failed: list[tuple[Path, Exception]] = []
        try:
            tasks = (
                ((file, path), (file, staging, chosen_options, data_dtype, tolerance))
                for file, path, chosen_options in zip(files, paths, each, strict=True)
            )
            for (file, path), future in in_turn(executor, _convert_apart, tasks):
                try:
                    made[path] = staging / result_of(future, str(file), goes_on=False)
                except ResourceError:
                    raise  # a worker that is gone says nothing of the file
                except Exception as error:
                    failed.append((file, error))
                progress(len(made) + len(failed), len(files))
            if failed:
                file, first = failed[0]
                more = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
                raise RuntimeError(f"Error in processing file {file}: {first}{more}") from first
            for path, folder_made in made.items():
                os.rename(folder_made, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self.fname_to_mmap.update({path: _open(path, options) for path in paths})

    def flatten(
        self,
        output_path: str | os.PathLike[str],
        destroy_on_copy: bool = False,
        extend_copy_size: int = 10 * 1_024 * 1_024,
        *,
        overwrite: bool = False,
        data_dtype: str | None = None,
        require_shared_genes: float | None = None,
    ) -> None:
        """Write all rows into one archive, in the order of the datasets.

        Parameters
        ----------
        output_path
            Folder of the new archive.
        destroy_on_copy
            Remove the folder of the collection when the new archive is in its place; the collection is
            empty then.
        extend_copy_size
            Values copied at once.
        overwrite
            Whether an archive at the output may be replaced.
        data_dtype
            Dtype of the values: by default the widest of all, which must be all integers or all floats; see
            :func:`hbx_gpu.scdl._writing.concat.concat_archives`.
        require_shared_genes
            Refuse archives that share less than this fraction of the smaller set of genes with those before
            them. By default a fraction below one half causes a warning.

        Raises
        ------
        FileExistsError
            The output exists and may not be replaced.
        ValueError
            The collection is empty, or mixes integers and floats.
        InvalidDataError
            Archives share fewer genes than `require_shared_genes` says.
        """
        if not self.fname_to_mmap:
            raise ValueError(
                f"the collection at {self.data_path} is empty: load .h5ad files before flattening"
            )
        self._say_differences(require_shared_genes)
        concat_archives(
            list(self.fname_to_mmap),
            output_path,
            data_dtype=data_dtype,
            overwrite=overwrite,
            copy_size=extend_copy_size,
        )
        if destroy_on_copy:
            self.fname_to_mmap.clear()
            shutil.rmtree(self.data_path)

    def _say_differences(self, require_shared: float | None) -> None:
        """Warn of archives that share few genes with the others, or whose genes nothing identifies."""
        from hbx_gpu.scdl._sources.axis import gene_axis
        from hbx_gpu.scdl._sources.cells import gene_blocks

        archives = [dataset.archive for dataset in self.fname_to_mmap.values()]
        try:
            blocks = [block for archive in archives for block in gene_blocks(archive)]
            gene_axis(blocks, require_shared=require_shared)
        except InvalidDataError as error:
            if require_shared is not None:
                raise
            warnings.warn(str(error), UserWarning, stacklevel=3)

    def number_of_rows(self) -> int:
        """Rows of all datasets."""
        return sum(dataset.number_of_rows() for dataset in self.fname_to_mmap.values())

    def number_of_variables(self) -> list[int]:
        """Genes per gene block of the flattened archive; ``[0]`` if there is none."""
        return self._var_features().column_dims() or [0]

    def number_of_values(self) -> int:
        """Rows times genes, summed over the datasets."""
        return sum(int(dataset.number_of_values()) for dataset in self.fname_to_mmap.values())

    def number_nonzero_values(self) -> int:
        """Stored values of all datasets."""
        return sum(dataset.number_nonzero_values() for dataset in self.fname_to_mmap.values())

    def shape(self) -> tuple[int, list[int]]:
        """Rows, and genes per gene block."""
        return self.number_of_rows(), self.number_of_variables()

    def sparsity(self) -> float:
        """Share of values that are not stored; 0 without values."""
        total = self.number_of_values()
        return (total - self.number_nonzero_values()) / total if total else 0.0

    def version(self) -> str:
        """Release of SCDL whose layout the archives have."""
        return LAYOUT_VERSION

    @property
    def groups_np(self) -> np.ndarray:
        """int32, (n_rows,). Gene block of every row, counted through all archives."""
        from hbx_gpu.scdl._sources.cells import groups_of

        return groups_of([dataset.archive for dataset in self.fname_to_mmap.values()])

    def to_cell_dataset(
        self, metadata_columns: Sequence[str] | None = None, **options: Any
    ) -> CellDataset | PairedDataset:
        """All cells on one feature axis, archive after archive, as `make_loader` takes them.

        Parameters
        ----------
        metadata_columns, **options
            As :func:`hbx_gpu.scdl._sources.cells.dataset_of`.
        """
        from hbx_gpu.scdl._sources.cells import dataset_of

        datasets = list(self.fname_to_mmap.values())
        if first := next((dataset for dataset in datasets if dataset.load_neighbors), None):
            options = {
                "neighbors": first.neighbor_sampling_strategy,
                "seed": first.neighbor_seed or 0,
            } | options
        archives = [dataset.archive for dataset in datasets]
        return dataset_of(archives, metadata_columns=metadata_columns, **options)

    def _var_features(self) -> VariableFeatureIndex:
        whole = VariableFeatureIndex()
        for dataset in self.fname_to_mmap.values():
            whole.concat(dataset.var_features())
        return whole


def find_h5ad(path: str | os.PathLike[str]) -> list[Path]:
    """All .h5ad files below a folder in the order of their paths; or the one file that is named.

    Raises
    ------
    FileNotFoundError
        There is none.
    """
    folder = Path(path)
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.h5ad"))
    if not files:
        raise FileNotFoundError(f"There a no h5ad files in {path}.")
    return files


def _archive_names(files: Sequence[Path], root: Path) -> list[str]:
    stems = [file.stem for file in files]
    named = [
        stem if stems.count(stem) == 1 else "__".join(file.relative_to(root).with_suffix("").parts)
        for stem, file in zip(stems, files, strict=True)
    ]
    return named


def _convert_apart(
    file: Path,
    staging: Path,
    options: ConvertOptions,
    data_dtype: str | None,
    tolerance: Tolerance,
) -> str:
    """Convert a file into a new folder below `staging`, whose name is returned: may run twice at once."""
    name = uuid.uuid4().hex
    if not staging.is_dir():
        raise FileNotFoundError(f"{staging} is gone: whoever asked for {file} has ended")
    convert_h5ad(file, staging / name, options=options, data_dtype=data_dtype, tolerance=tolerance)
    return name


def _open(path: Path, options: ConvertOptions) -> SingleCellMemMapDataset:
    if options.neighbor_key is None:
        return SingleCellMemMapDataset(path)
    return SingleCellMemMapDataset(path, load_neighbors=True, neighbor_key=options.neighbor_key)
