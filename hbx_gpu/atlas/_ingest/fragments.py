"""Fragments files (chromosome, start, end, barcode) as a modality, sorted by cell in bounded memory."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from hbx_gpu._h5ad.matrix import row_runs
from hbx_gpu._untrusted import check_file
from hbx_gpu.atlas._ingest.inputs import hash_file
from hbx_gpu.atlas._ingest.joining import Role
from hbx_gpu.atlas._ingest.parts import Features, Part, Storage, Tick, sparse_pointers
from hbx_gpu.atlas._model.spaces import FeatureSpace
from hbx_gpu.atlas._writing.arrays import SparseGroupWriter
from hbx_gpu.errors import InvalidDataError

_COLUMNS = ("chrom", "start", "end", "barcode")
_BLOCK_BYTES = 1 << 23
# Fragments that are sorted in memory at once.
_BUCKET = 1 << 22
_MAX_BUCKETS = 4096
_RECORD = np.dtype([("cell", "<u4"), ("chrom", "u1"), ("start", "<u4"), ("length", "<u4")])
_MAX_CHROMOSOMES = 256


@dataclass(frozen=True)
class FragmentsInput:
    """A fragments file; an argument of :func:`hbx_gpu.atlas.add_multimodal`, where a path alone will do too.

    Attributes
    ----------
    path
        Tab-separated ``chrom, start, end, barcode[, count, ...]``, plain or gzip, no header but ``#`` lines.
        Coordinates are half-open and begin at 0. In any order.
    barcodes
        Barcodes that are cells: a sequence, or a file with one per line. Others are left out. By default
        the cells of the other modalities, or all barcodes if there is no other modality.
    """

    path: str | os.PathLike[str]
    barcodes: Sequence[str] | str | os.PathLike[str] | None = None

    def read_barcodes(self) -> list[str] | None:
        """The barcodes; None where none were given.

        Raises
        ------
        FileNotFoundError
            No such file.
        InvalidDataError
            It names no barcode.
        """
        if self.barcodes is None:
            return None
        if isinstance(self.barcodes, str | os.PathLike):
            path = Path(self.barcodes)
            check_file(path, "a list of barcodes")
            with _open(path) as file:
                found = [line.split("\t")[0].strip() for line in file.read().decode().splitlines()]
        else:
            found = [str(barcode) for barcode in self.barcodes]
        listed = list(dict.fromkeys(barcode for barcode in found if barcode))
        if not listed:
            raise InvalidDataError(f"{self.barcodes!r} names no barcode")
        return listed


class FragmentsPart(Part):
    """The fragments of a file, read twice: once to check and count them, once to store them.

    Parameters
    ----------
    name, field_name, space
        As in :class:`hbx_gpu.atlas._ingest.parts.Part`.
    given
        The file.

    Raises
    ------
    FileNotFoundError
        No such file.
    InvalidDataError
        A line is not a fragment, there are too many chromosomes, or no fragment belongs to a cell.
    """

    def __init__(self, name: str, field_name: str, space: FeatureSpace, given: FragmentsInput) -> None:
        self.name, self.field_name, self.space = name, field_name, space
        self.role: Role = "reads"
        self._path = Path(given.path)
        self.source, self.source_name, self.obs = str(self._path), self._path.name, None
        check_file(self._path, "a fragments file")
        barcodes = given.read_barcodes()
        self._wanted = None if barcodes is None else pa.array(barcodes, pa.string())
        self._count()
        chromosomes = list(self._chromosomes)
        self.features: Features | None = Features(
            "index",
            chromosomes,
            lambda rows: pa.table({"uid": pa.array([chromosomes[i] for i in rows], pa.string())}),
        )
        chosen = "" if barcodes is None else hashlib.sha256("\0".join(barcodes).encode()).hexdigest()
        self.identity = {
            "source_sha256": hash_file(self._path),
            "source_matrix": f"fragments {chosen[:16]}".strip(),
            "zarr_layer": "starts,lengths",
            "feature_id_column": "index",
        }

    def _count(self) -> None:
        """Barcodes and chromosomes in order of appearance; how many fragments each barcode has."""
        barcodes: dict[str, int] = {}
        chromosomes: dict[str, int] = {}
        counts: list[int] = []
        self._longest, total = 0, 0
        for block in self._blocks():
            total += len(block)
            block = self._chosen(block)
            if not len(block):
                continue
            self._longest = max(self._longest, int((_ends(block) - _starts(block)).max()))
            for entry in pc.unique(block.column("chrom")).to_pylist():
                chromosomes.setdefault(entry, len(chromosomes))
            for entry in pc.value_counts(block.column("barcode").combine_chunks()).to_pylist():
                at = barcodes.setdefault(entry["values"], len(barcodes))
                if at == len(counts):
                    counts.append(0)
                counts[at] += entry["counts"]
        if not counts:
            what = "no fragments" if not total else f"{total} fragments, none of a barcode asked for"
            raise InvalidDataError(f"{self._path} holds {what}: nothing to ingest")
        if len(chromosomes) > _MAX_CHROMOSOMES:
            raise InvalidDataError(
                f"{self._path} names {len(chromosomes)} chromosomes, but they are stored as uint8, at most "
                f"{_MAX_CHROMOSOMES}; leave out scaffolds, for example the fragments of "
                f"{list(chromosomes)[-1]!r}"
            )
        self.ids = list(barcodes)
        self._counts = np.array(counts, np.int64)
        self._chromosomes = {
            uid: i for i, uid in enumerate(sorted(chromosomes, key=lambda uid: _natural(uid)))
        }

    def _chosen(self, block: pa.Table) -> pa.Table:
        if self._wanted is None:
            return block
        return block.filter(pc.is_in(block.column("barcode"), value_set=self._wanted))

    def _blocks(self) -> Iterator[pa.Table]:
        """The file in pieces of some megabytes, checked: columns chrom, start, end, barcode."""
        line = 0
        for block, first in _parse(self._path):
            line = first
            starts, ends = _starts(block), _ends(block)
            bad = np.flatnonzero((starts < 0) | (ends <= starts) | (ends > 2**32 - 1))
            if bad.size:
                at = int(bad[0])
                raise InvalidDataError(
                    f"{self._path}: fragment {line + at} runs from {starts[at]} to {ends[at]}; expected "
                    "0 <= start < end < 2^32"
                )
            for name in ("chrom", "barcode"):
                empty = pc.equal(pc.utf8_length(block.column(name)), 0)
                if pc.any(empty).as_py():
                    at = int(np.flatnonzero(empty.to_numpy())[0])
                    raise InvalidDataError(f"{self._path}: fragment {line + at} has no {name}")
            yield block

    def write(self, group: Path, scratch: Path, keep: np.ndarray, storage: Storage, tick: Tick) -> pa.Array:
        """See :class:`hbx_gpu.atlas._ingest.parts.Part`."""
        counts = self._counts * keep
        bounds = np.concatenate([[0], np.cumsum(counts)])
        size = max(_BUCKET, int(bounds[-1]) // _MAX_BUCKETS)
        runs = list(row_runs(bounds, size))
        files = [scratch / f"bucket{i}" for i in range(len(runs))]
        self._scatter(runs, files, keep)
        layers = {"starts": "uint32", "lengths": "uint16" if self._longest < 2**16 else "uint32"}
        writer = SparseGroupWriter(group, self.space, layers=layers, index_dtype="uint8", **vars(storage))
        try:
            for (first, last), file in zip(runs, files, strict=True):
                items = np.fromfile(file, _RECORD) if file.exists() else np.empty(0, _RECORD)
                file.unlink(missing_ok=True)
                if len(items) != bounds[last] - bounds[first]:
                    raise InvalidDataError(f"{self._path} changed while it was read; try again")
                items = items[np.lexsort((items["length"], items["start"], items["chrom"], items["cell"]))]
                columns = {"starts": items["start"], "lengths": items["length"].astype(layers["lengths"])}
                writer.append(items["chrom"], columns)
                tick(last)
            writer.close()
        finally:
            writer.abort()
        return sparse_pointers(counts, np.cumsum(keep) - 1)

    def _scatter(self, runs: Sequence[tuple[int, int]], files: Sequence[Path], keep: np.ndarray) -> None:
        cells, chromosomes = pa.array(self.ids, pa.string()), pa.array(list(self._chromosomes), pa.string())
        lasts = np.array([last for _, last in runs])
        for block in self._blocks():
            cell = pc.fill_null(pc.index_in(block.column("barcode"), value_set=cells), -1).to_numpy()
            kept = cell >= 0
            kept[kept] = keep[cell[kept]]
            items = np.empty(int(kept.sum()), _RECORD)
            chrom = pc.fill_null(pc.index_in(block.column("chrom"), value_set=chromosomes), 0).to_numpy()
            items["cell"], items["chrom"] = cell[kept], chrom[kept]
            starts = _starts(block)[kept]
            items["start"], items["length"] = starts, _ends(block)[kept] - starts
            bucket = np.searchsorted(lasts, items["cell"], side="right")
            order = np.argsort(bucket, kind="stable")
            items, bucket = items[order], bucket[order]
            edges = np.searchsorted(bucket, np.arange(len(runs) + 1))
            for i in np.flatnonzero(np.diff(edges)).tolist():
                # Opened per piece: there may be more buckets than a process may hold files.
                with open(files[i], "ab") as file:
                    file.write(items[edges[i] : edges[i + 1]].tobytes())


def _starts(block: pa.Table) -> np.ndarray:
    result: np.ndarray = block.column("start").to_numpy()
    return result


def _ends(block: pa.Table) -> np.ndarray:
    result: np.ndarray = block.column("end").to_numpy()
    return result


def _natural(uid: str) -> tuple[bool, int, str]:
    """chr2 before chr10, numbered ones before the others."""
    number = uid.lower().removeprefix("chr")
    return not number.isdecimal(), int(number) if number.isdecimal() else 0, uid


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.GzipFile(path) if packed else path.open("rb")


def _parse(path: Path) -> Iterator[tuple[pa.Table, int]]:
    """Blocks of the file, and the number of the first fragment of each, from 1."""
    done = 0
    try:
        with _open(path) as file:
            first = file.readline()
            while first.startswith(b"#"):
                first = file.readline()
            if not first.strip():
                return
            width = len(first.rstrip(b"\r\n").split(b"\t"))
            if width < len(_COLUMNS):
                raise InvalidDataError(
                    f"{path}: expected at least 4 tab-separated columns (chromosome, start, end, barcode), "
                    f"the first line has {width}: {first[:80]!r}"
                )
            names = [*_COLUMNS, *(f"more{i}" for i in range(width - len(_COLUMNS)))]
            with pyarrow.csv.open_csv(
                pa.PythonFile(_Rest(first, file), mode="r"),
                pyarrow.csv.ReadOptions(column_names=names, block_size=_BLOCK_BYTES, use_threads=False),
                pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
                pyarrow.csv.ConvertOptions(
                    column_types={
                        "chrom": pa.string(),
                        "start": pa.int64(),
                        "end": pa.int64(),
                        "barcode": pa.string(),
                    },
                    include_columns=list(_COLUMNS),
                    null_values=[],
                    strings_can_be_null=False,
                ),
            ) as reader:
                for batch in reader:
                    if len(batch):
                        yield pa.Table.from_batches([batch]), done + 1
                    done += len(batch)
    except (pa.ArrowException, EOFError, gzip.BadGzipFile, OSError, UnicodeDecodeError) as error:
        raise InvalidDataError(
            f"{path}: cannot read the fragments after number {done}: {error}; expected lines of chromosome, "
            "start, end, barcode"
        ) from error


class _Rest:
    """A file of which one line was read already."""

    closed = False

    def __init__(self, first: bytes, file: BinaryIO | gzip.GzipFile) -> None:
        self._first, self._file = first, file

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        if not self._first:
            return self._file.read(size)
        part = self._first if size < 0 else self._first[:size]
        self._first = self._first[len(part) :]
        return part + self._file.read(size - len(part) if size >= 0 else -1)

    def readable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """The file belongs to somebody else."""
        self.closed = True
