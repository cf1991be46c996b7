"""The codec and the row order in which a group is stored, and the arrays that another codec would change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._source import ArrayLayout, Codec
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu._untrusted import parse_json, read_small
from hbx_gpu.atlas._model.spaces import FeatureSpace, find_layers
from hbx_gpu.atlas._writing.arrays import ChunkEncoder, Role, codec_names, compressor_for
from hbx_gpu.errors import AtlasError

RowOrder = Literal["layout", "registry"]
"""In which order the elements of each row are known to lie: by local column, or by number in the registry."""
ATTRIBUTE = "hbx_gpu"
"""Attribute of the arrays of a group whose rows repack has ordered."""


def row_order(group: Path, space: FeatureSpace) -> RowOrder | None:
    """In which order repack left the rows of a group; None where it did not order them."""
    assert space.index_array is not None
    path = group / space.index_array / "zarr.json"
    document = parse_json(read_small(path), path) if path.is_file() else None
    attributes = document.get("attributes") if isinstance(document, Mapping) else None
    ours = attributes.get(ATTRIBUTE) if isinstance(attributes, Mapping) else None
    found = ours.get("row_order") if isinstance(ours, Mapping) else None
    return next((order for order in get_args(RowOrder) if order == found), None)


@dataclass(frozen=True)
class StoredArray:
    """An array to be rewritten, and its new compressor."""

    relative: str
    layout: ArrayLayout
    compressor: object

    def encoder(self) -> ChunkEncoder:
        """Make an encoder. It keeps its last chunks in memory, so thousands of groups must not keep one."""
        chunk = self.layout.chunk_shape[0]
        return ChunkEncoder(self.layout.dtype.name, self.compressor, chunk, most=n_chunks(self.layout))


def codec_of(group: Path, space: FeatureSpace, *, within: Path | None = None) -> str:
    """The codec name under which a sparse group's arrays are stored, or ``mixed``.

    Whether a checksum follows each chunk makes no difference: Homeobox writes none, and neither did earlier
    releases of this package.
    """
    for name in codec_names():
        if not plan_arrays(group, group.name, space, name, any_checksum=True, within=within)[1]:
            return name
    return "mixed"


def plan_arrays(
    path: Path,
    name: str,
    space: FeatureSpace,
    codec: str,
    *,
    any_checksum: bool = False,
    within: Path | None = None,
    new_order: RowOrder | None = None,
) -> tuple[tuple[str, ...], tuple[StoredArray, ...], int]:
    """Index and layers of a group, the arrays among them that would change, and the number of values.

    With `any_checksum`, an array that would only gain a checksum counts as unchanged. No link may lead out of
    `within`. All arrays change where rows get a `new_order`.
    """
    assert space.index_array is not None
    # Local columns in the order of the registry go up and down, so differences would take more bits.
    up_and_down = (new_order or row_order(path, space)) == "registry"
    roles: dict[str, Role] = {space.index_array: "values" if up_and_down else "index"}
    for layer, relative in find_layers(path, space).items():
        roles[relative] = "index" if layer in space.ascending_layers else "values"
    rewrite, n_values = [], 0
    for relative, role in roles.items():
        layout = read_layout(path / relative, f"{name}/{relative}", within=within or "")
        inside = [path / relative, *(path / relative).parents[: relative.count("/")]]
        if any(part.is_symlink() for part in inside):
            raise AtlasError(f"array {relative} is reached through a link; repack what it leads to")
        if len(layout.shape) != 1 or not (path / relative / "zarr.json").is_file():
            raise AtlasError(f"array {relative} is not a one-dimensional array of zarr 3")
        n_values = n_values or layout.shape[0]
        compressor = compressor_for(codec, role, layout.dtype, layout.chunk_shape[0])
        array = StoredArray(relative, layout, compressor)
        wanted, found = _chain(array.encoder().codecs), _chain(layout.codecs)
        if any_checksum:
            wanted, found = _unchecked(wanted), _unchecked(found)
        if wanted != found or new_order is not None:
            ChunkCodec(layout)  # raises here if the array cannot be decoded
            rewrite.append(array)
    return tuple(roles), tuple(rewrite), n_values


def n_chunks(layout: ArrayLayout) -> int:
    return -(-layout.shape[0] // layout.chunk_shape[0])


def _chain(codecs: Sequence[Codec]) -> list[tuple[str, dict[str, object]]]:
    return [(codec["name"], codec.get("configuration") or {}) for codec in codecs]


def _unchecked(chain: list[tuple[str, dict[str, object]]]) -> list[tuple[str, dict[str, object]]]:
    return chain[:-1] if chain and chain[-1][0] == "crc32c" else chain
