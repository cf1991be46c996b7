"""What stores hold, as text for people; matrices are described from metadata alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hbx_gpu._codecs.chain import V2_CHAIN
from hbx_gpu._source import ArrayLayout
from hbx_gpu._stores.matrix import StoredMatrix
from hbx_gpu._stores.store import Part, Store


def describe_stores(stores: Sequence[Store]) -> str:
    """A paragraph per store: format, cells, matrices with dtype and codec, columns of obs."""
    return "\n\n".join("\n".join(_lines(store)) for store in stores)


def _lines(store: Store) -> Iterator[str]:
    yield f"{store.path}: {store.format}"
    if store.modalities:
        for name, (part, rows) in store.modalities.items():
            yield f"modality {name}: {int((rows >= 0).sum()):,} of {len(rows):,} cells"
            yield from _matrices(part)
        return
    for part in store.parts:
        if len(store.parts) > 1:
            yield f"{part.name}: {part.n_cells:,} cells"
        yield from _matrices(part)
    names = list(dict.fromkeys(str(name) for part in store.parts for name in part.obs.columns))
    yield f"obs: {', '.join(names) or 'names only'}"


def _matrices(part: Part) -> Iterator[str]:
    for name, matrix in part.matrices.items():
        yield f"  {name}: {_matrix(matrix)}"
    for name, error in part.unreadable.items():
        yield f"  {name}: cannot be read, {error}"


def _matrix(matrix: StoredMatrix) -> str:
    n_cells, n_features = matrix.shape
    values = matrix.values
    stored = "" if matrix.form == "dense" else f", {matrix.nnz:,} values"
    chunks = " x ".join(f"{n:,}" for n in values.chunk_shape)
    return (
        f"{n_cells:,} cells x {n_features:,} features, {matrix.form}{stored}, {values.dtype}, "
        f"{codec_of(values)}" + ("" if _is_uncompressed(values) else f", chunks of {chunks}")
    )


def _is_uncompressed(layout: ArrayLayout) -> bool:
    return codec_of(layout) == "uncompressed"


def codec_of(layout: ArrayLayout) -> str:
    """Names of what compresses the chunks of an array, joined by ``+``; ``"uncompressed"``."""
    names = []
    for codec in layout.codecs:
        setting = codec.get("configuration") or {}
        if codec["name"] == V2_CHAIN:
            steps = [*(setting["filters"] or []), *([setting["compressor"]] if setting["compressor"] else [])]
            names += [str(step["id"]) for step in steps]
        elif codec["name"] not in ("bytes", "transpose"):
            inner = setting.get("cname")
            names.append(f"{codec['name']} ({inner})" if inner else str(codec["name"]))
    return "+".join(names) or "uncompressed"
