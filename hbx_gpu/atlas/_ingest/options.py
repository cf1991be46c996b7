"""Options of adding many files: one list, for the function, for the method and for what carries them out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ForwardRef, ParamSpec, TypedDict, TypeVar, cast

if TYPE_CHECKING:
    from hbx_gpu._progress import Progress
    from hbx_gpu.atlas._ingest.reports import FileReport

P = ParamSpec("P")
R = TypeVar("R")


class FileOptions(TypedDict, total=False):
    """How each file is added, whether it has one matrix or several; see :func:`hbx_gpu.add_from_anndata`."""

    feature_id_column: str | None
    strip_versions: bool
    require_shared_genes: float | None
    chunk_shape: int | tuple[int, ...] | None
    shard_shape: int | tuple[int, ...] | None
    codec: str | None
    allow_rounding: bool
    obs_types: Mapping[str, str] | None
    drop_obs: Sequence[str]
    rename_obs: Mapping[str, str] | None
    replace: bool
    accept_duplicates: bool


class ManyOptions(FileOptions, total=False):
    """Options of :func:`hbx_gpu.ingest_many` and of :meth:`hbx_gpu.atlas.RaggedAtlas.ingest_many`."""

    progress: Progress | None
    added: Callable[[FileReport], object] | None
    layer: str | Mapping[str, str | None] | Mapping[Path, str | None] | None
    zarr_layer: str | None
    field_name: str | None
    feature_space: str | None
    obs_table: str | None


DEFAULTS: ManyOptions = {
    "strip_versions": False,
    "allow_rounding": False,
    "drop_obs": (),
    "replace": False,
    "accept_duplicates": False,
}
"""Values of the options that are not given; None for all others."""


def of_each_file(options: ManyOptions) -> FileOptions:
    """Those of the options that say how a file is added."""
    names = FileOptions.__annotations__
    return cast(FileOptions, {name: value for name, value in options.items() if name in names})


def spells_out_options(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``help()`` show each of `ManyOptions` for a function that takes them as ``**options``.

    A name that is none of them raises TypeError, as Python does for parameters.
    """
    shown = _spelled_out(inspect.signature(function))

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            shown.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        return function(*args, **kwargs)

    checked.__signature__ = shown  # type: ignore[attr-defined]
    return checked


def _spelled_out(signature: inspect.Signature) -> inspect.Signature:
    """The signature with a parameter for each option in the place of ``**options``."""
    own = list(signature.parameters.values())
    positional = [p for p in own if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    keywords = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=dict(DEFAULTS).get(name),
            annotation=kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind,
        )
        for name, kind in ManyOptions.__annotations__.items()
    ]
    return signature.replace(parameters=[*positional, *options, *keywords])
