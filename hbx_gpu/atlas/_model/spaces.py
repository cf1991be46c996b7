"""Which arrays a group holds, per feature space, as data: an atlas itself does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hbx_gpu._remote.lookup import folders, is_dir, is_file
from hbx_gpu._remote.places import AnyPath
from hbx_gpu.errors import AtlasError, UnknownNameError

PointerKind = Literal["sparse", "dense", "discrete_spatial"]


@dataclass(frozen=True, slots=True)
class FeatureSpace:
    """The arrays of one kind of group, relative to the group's path.

    Attributes
    ----------
    name
        Name of the space in the atlas: ``gene_expression``, ``protein_abundance``, ...
    pointer
        How an obs row addresses its data: elements ``[start, end)`` of flat arrays, a position on
        axis 0, or a box on the leading axes.
    index_array
        Array of local feature numbers (sparse matrices, fragments). None elsewhere, and also where a sparse
        pointer gives the stretch of flat layers that belongs to a row (encoded images).
    layers_path
        Folder whose members are the layers.
    required_layers, optional_layers
        Layer name -> dtypes a writer may use, its default first.
    has_features
        False where columns are not registered features (images).
    repeats
        True where one row may hold the same feature many times (chromosomes of fragments); such rows are not
        rows of a matrix.
    old_layers
        Layer name -> path where earlier releases kept the layer.
    ascending_layers
        Layers whose values mostly ascend, like column numbers within a row; they are coded as differences.
    """

    name: str
    pointer: PointerKind
    index_array: str | None
    layers_path: str
    required_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has_features: bool = True
    repeats: bool = False
    old_layers: Mapping[str, str] = field(default_factory=dict)
    ascending_layers: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        indexed = self.index_array is not None
        if indexed != (self.pointer == "sparse" and self.has_features):
            raise ValueError(
                f"feature space {self.name!r}: a sparse space with features needs index_array, the others "
                f"have none; got pointer={self.pointer!r}, index_array={self.index_array!r}, "
                f"has_features={self.has_features}"
            )


_IMAGE_DTYPES = ("float32", "uint8", "uint16")
EMBEDDINGS = "embeddings"
"""Space of the results of models: a row of numbers per cell, whose columns are no features."""

_SPACES: dict[str, FeatureSpace] = {
    space.name: space
    for space in (
        FeatureSpace(
            "gene_expression",
            "sparse",
            "csr/indices",
            "csr/layers",
            required_layers={"counts": ("uint32",)},
            optional_layers={
                "log_normalized": ("float32",),
                "tpm": ("float32",),
                # Counts with fractions, after correction for ambient RNA (SoupX, CellBender) or
                # assignment in parts (proseg).
                "corrected_counts": ("float32",),
            },
        ),
        FeatureSpace(
            "protein_abundance",
            "dense",
            None,
            "layers",
            required_layers={"counts": ("uint32",)},
            optional_layers={"clr_normalized": ("float32",), "dsb_normalized": ("float32",)},
        ),
        FeatureSpace(
            "image_features",
            "dense",
            None,
            "layers",
            required_layers={"ctrl_standardized": ("float32",)},
            optional_layers={"raw": ("float32",), "log_normalized": ("float32",)},
        ),
        FeatureSpace(
            "image_tiles",
            "dense",
            None,
            "layers",
            required_layers={"raw": _IMAGE_DTYPES},
            has_features=False,
            old_layers={"raw": "data"},
        ),
        FeatureSpace(
            "discrete_image",
            "discrete_spatial",
            None,
            "layers",
            required_layers={"raw": _IMAGE_DTYPES},
            optional_layers={"semantic_masks": ("bool",), "instance_masks": ("uint32",)},
            has_features=False,
        ),
        FeatureSpace(
            "encoded_images",
            "sparse",
            None,
            "layers",
            required_layers={"raw": ("uint8",)},
            has_features=False,
        ),
        FeatureSpace(
            "chromatin_accessibility",
            "sparse",
            "cell_sorted/chromosomes",
            "cell_sorted/layers",
            required_layers={"starts": ("uint32",), "lengths": ("uint16", "uint32")},
            repeats=True,
            old_layers={"starts": "cell_sorted/starts", "lengths": "cell_sorted/lengths"},
            ascending_layers=frozenset({"starts"}),
        ),
        # Cells x peaks as Cell Ranger ARC, MuData and muon have it; fragments are chromatin_accessibility.
        FeatureSpace(
            "chromatin_peaks",
            "sparse",
            "csr/indices",
            "csr/layers",
            required_layers={"counts": ("uint32",)},
            optional_layers={"log_normalized": ("float32",), "tfidf": ("float32",)},
        ),
        FeatureSpace(
            EMBEDDINGS,
            "dense",
            None,
            "layers",
            required_layers={"values": ("float32", "float16")},
            has_features=False,
        ),
    )
}


def register_space(space: FeatureSpace) -> None:
    """Make a feature space known to this process, so that atlases that use it can be read and written.

    Registering an equal space again changes nothing.

    Raises
    ------
    ValueError
        The name is already registered for a different space.
    """
    if _SPACES.setdefault(space.name, space) != space:
        raise ValueError(
            f"feature space {space.name!r} is already registered as {_SPACES[space.name]}; "
            "give the new one another name"
        )


def known_spaces() -> list[str]:
    """Names of all registered feature spaces, sorted."""
    return sorted(_SPACES)


def get_space(name: str) -> FeatureSpace:
    """The feature space called `name`.

    Raises
    ------
    UnknownNameError
        No such space is registered.
    """
    try:
        return _SPACES[name]
    except KeyError:
        raise UnknownNameError(
            f"unknown feature space {name!r}; known: {known_spaces()}. Add one with "
            "hbx_gpu.atlas.register_space(hbx_gpu.atlas.FeatureSpace(...))"
        ) from None


def guess_space(name: str, group: AnyPath, *, has_features: bool = True) -> FeatureSpace:
    """A feature space that nobody registered, guessed from what one of its groups holds.

    Parameters
    ----------
    name
        Name of the space.
    group
        Directory of a group of that space.
    has_features
        Whether the group has a feature layout.

    Raises
    ------
    AtlasError
        The group looks like neither a sparse nor a dense matrix.
    """
    if _is_array(group / "csr" / "indices"):
        return FeatureSpace(name, "sparse", "csr/indices", "csr/layers", has_features=has_features)
    if is_dir(group / "layers"):
        return FeatureSpace(name, "dense", None, "layers", has_features=has_features)
    raise AtlasError(
        f"feature space {name!r} is not registered and group {group} holds neither csr/indices nor layers/; "
        "describe it with hbx_gpu.atlas.register_space(hbx_gpu.atlas.FeatureSpace(...))"
    )


def find_layers(group: AnyPath, space: FeatureSpace) -> dict[str, str]:
    """Layers that a group holds: name -> path relative to the group."""
    below = folders(group / space.layers_path)
    found = {path.name: f"{space.layers_path}/{path.name}" for path in below if _is_array(path)}
    for name, old in space.old_layers.items():
        if name not in found and _is_array(group / old):
            found[name] = old
    return found


def _is_array(path: AnyPath) -> bool:
    return is_file(path / "zarr.json") or is_file(path / ".zarray")
