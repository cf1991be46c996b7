"""Tables and classes of a new atlas, from arguments in the order of any release of Homeobox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hbx_gpu.atlas._catalog.session import ObsSchemas
from hbx_gpu.atlas._model.schema import DatasetSchema, FeatureBaseSchema, HoxBaseSchema

RegistrySchemas = Mapping[str, type[FeatureBaseSchema]]
"""Feature space -> class of its features."""

Given = ObsSchemas | RegistrySchemas | str | type[HoxBaseSchema] | type[DatasetSchema] | None
"""What a caller may pass by position."""

ClassT = TypeVar("ClassT")

# By position after the path: now, and in Homeobox 0.2.3, which has one obs table.
_NOW = ("obs_schemas", "dataset_table_name", "dataset_schema", "registry_schemas")
_BEFORE = ("cell_table_name", "cell_schema", "dataset_table_name", "dataset_schema")


@dataclass(frozen=True)
class Declared:
    """What a caller declares about a new atlas.

    Attributes
    ----------
    obs_schemas
        Obs table -> its class; None for one table without a class.
    cell_table_name
        Name of that table.
    dataset_table_name, dataset_schema
        The table of groups and its class.
    registry_schemas
        Feature space -> class of its features.
    """

    obs_schemas: dict[str, type[HoxBaseSchema] | None] | None = None
    cell_table_name: str = "cells"
    dataset_table_name: str = "datasets"
    dataset_schema: type[DatasetSchema] = DatasetSchema
    registry_schemas: RegistrySchemas | None = None


def read_declared(given: Sequence[Given], named: Mapping[str, Given]) -> Declared:
    """Read the arguments of a call that makes an atlas.

    Parameters
    ----------
    given
        Arguments by position after the path: ``obs_schemas, dataset_table_name, dataset_schema,
        registry_schemas``; or, if the first is a text, those of Homeobox 0.2.3: ``cell_table_name,
        cell_schema, dataset_table_name, dataset_schema``.
    named
        Arguments by name, None for those that were left out.

    Raises
    ------
    TypeError
        Too many arguments, one that is given twice, or one of a wrong type.
    """
    names = _BEFORE if given and isinstance(given[0], str) else _NOW
    if len(given) > len(names):
        raise TypeError(f"expected a path and at most {', '.join(names)}, got {1 + len(given)} arguments")
    found: dict[str, Given] = {name: value for name, value in named.items() if value is not None}
    for name, value in zip(names, given, strict=False):
        if value is None:
            continue
        if name in found:
            raise TypeError(f"{name} is given by position and by name; pass it once")
        found[name] = value
    if {"obs_schemas", "cell_schema"} <= set(found):
        raise TypeError("obs_schemas and cell_schema both say the classes of obs tables; pass one of them")
    schemas, table = found.get("obs_schemas"), _text(found, "cell_table_name", "cells")
    if schemas is None and (schema := _class(found, "cell_schema", HoxBaseSchema)):
        schemas = {table: schema}
    elif schemas is not None and not isinstance(schemas, Mapping):
        raise TypeError(f"obs_schemas must be {{table: class or None}}, got {schemas!r}")
    registries = found.get("registry_schemas")
    if registries is not None and not isinstance(registries, Mapping):
        raise TypeError(f"registry_schemas must be {{feature space: class}}, got {registries!r}")
    return Declared(
        dict(schemas) if schemas else None,  # type: ignore[arg-type]
        table,
        _text(found, "dataset_table_name", "datasets"),
        _class(found, "dataset_schema", DatasetSchema) or DatasetSchema,
        registries,  # type: ignore[arg-type]
    )


def _text(found: Mapping[str, Given], name: str, default: str) -> str:
    value = found.get(name, default)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be the name of a table, got {value!r}")
    return value


def _class(found: Mapping[str, Given], name: str, base: type[ClassT]) -> type[ClassT] | None:
    value = found.get(name)
    if value is None:
        return None
    if not isinstance(value, type) or not issubclass(value, base):
        raise TypeError(f"{name} must be a class derived from {base.__name__}, got {value!r}")
    return value
