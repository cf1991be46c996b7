"""Recognizes files that are not .h5ad, and says how to convert them."""

from __future__ import annotations

import errno
from pathlib import Path

import h5py

from hbx_gpu._untrusted import found_at

_LFS = b"version https://git-lfs.github.com/spec/"
# Filters of HDF5 that need a plugin, by their registered numbers (The HDF Group's list).
_FILTERS = {
    307: "bzip2",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32026: "blosc2",
}


A_FOLDER = "it is a directory"
"""What :func:`describe_path` says of a folder of no known kind."""


def describe_path(path: Path) -> str:
    """What a path that is not an HDF5 file holds, and what to do; an empty string if unknown."""
    name = path.name.lower()
    if path.is_dir():
        if {".zgroup", ".zattrs", "zarr.json"} & {p.name for p in path.iterdir()}:
            return (
                "it is a Zarr store; if it holds an AnnData, write it as .h5ad: "
                "anndata.read_zarr(path).write_h5ad('file.h5ad')"
            )
        if any(p.name.removesuffix(".gz") == "matrix.mtx" for p in path.iterdir()):
            return (
                "it is a folder in 10x matrix market format; write it as .h5ad: "
                "scanpy.read_10x_mtx(path).write_h5ad('file.h5ad')"
            )
        return A_FOLDER
    if found := found_at(path):  # opening a named pipe would wait for its writer
        return found
    with open(path, "rb") as file:
        head = file.read(len(_LFS))
    if head == _LFS:
        return "it is a Git LFS pointer, not the file itself; fetch it: git lfs pull"
    if head[:2] == b"\x1f\x8b":
        return f"it is compressed with gzip; unpack it first: gunzip -k {path.name}"
    if head[:4] == b"PK\x03\x04":
        return f"it is a zip archive; unpack it first: unzip {path.name}"
    if head[:4] == b"\x28\xb5\x2f\xfd":
        return f"it is compressed with zstd; unpack it first: zstd -d {path.name}"
    if name.endswith((".mtx", ".tsv", ".csv", ".txt")):
        return "it is a text file; read it with scanpy or anndata, and write it: adata.write_h5ad(...)"
    if name.endswith((".rds", ".rda", ".rdata", ".h5seurat")):
        return "it is a file of R; write it as .h5ad there, for example with zellkonverter or anndataR"
    return ""


def describe_hdf5(file: h5py.Group) -> str:
    """What an HDF5 file without obs and var is, and what to do; an empty string if unknown."""
    keys = set(file)
    if "matrix" in keys and isinstance(file["matrix"], h5py.Group) and "barcodes" in file["matrix"]:
        return (
            "it is a 10x Genomics (Cell Ranger 3 or later) matrix; write it as .h5ad: "
            "scanpy.read_10x_h5(path).write_h5ad('file.h5ad')"
        )
    if any(
        isinstance(file[key], h5py.Group) and {"barcodes", "indptr", "data"} <= set(file[key]) for key in keys
    ):
        return (
            "it is a 10x Genomics (Cell Ranger 2) matrix; write it as .h5ad: "
            "scanpy.read_10x_h5(path).write_h5ad('file.h5ad')"
        )
    if {"matrix", "row_attrs", "col_attrs"} <= keys:
        return "it is a Loom file; write it as .h5ad: anndata.io.read_loom(path).write_h5ad('file.h5ad')"
    if {"mod", "obs"} <= keys:
        return "it is a MuData file; name it .h5mu, so that its modalities are taken"
    return ""


def describe_error(error: OSError, path: Path) -> str:
    """Why an HDF5 file cannot be opened, and what to do."""
    text = str(error)
    if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK) or "unable to lock file" in text:
        if error.errno == errno.EACCES and "lock" not in text:
            return "this user may not read it; change its permissions"
        return (
            "another program has it open for writing (a notebook with backed='r+', a running job?); close it "
            "there and try again"
        )
    if "already open for write" in text or "consistency flags" in text:
        return (
            "it was not closed by the program that wrote it, or that still writes; wait for it, or, if it "
            f"died, clear the mark: h5clear -s {path.name}"
        )
    return f"{text}; it is truncated or damaged"


def missing_filters(node: object) -> str:
    """Filters of stored arrays that this installation lacks, and what to do; an empty string if none."""
    found: set[str] = set()

    def note(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            plan = item.id.get_create_plist()
            for i in range(plan.get_nfilters()):
                number, *_rest, name = plan.get_filter(i)
                if not h5py.h5z.filter_avail(number):
                    known = _FILTERS.get(number) or name.decode(errors="replace") or "unknown"
                    found.add(f"{known} ({number})")

    note("", node)
    if isinstance(node, h5py.Group):
        node.visititems(note)
    if not found:
        return ""
    return (
        f"its arrays are compressed with {', '.join(sorted(found))}, for which HDF5 lacks the filter here: "
        "pip install hdf5plugin"
    )
