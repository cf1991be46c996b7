"""Classes with which users declare the tables of an atlas, and the Arrow schemas that follow from them."""

from __future__ import annotations

import datetime
import hashlib
import re
import types
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Union, get_args, get_origin

import pyarrow as pa
from lancedb.pydantic import LanceModel
from pydantic import Field, create_model, model_validator
from pydantic.fields import FieldInfo

from hbx_gpu.atlas._model.columns import fits
from hbx_gpu.atlas._model.spaces import PointerKind, get_space
from hbx_gpu.errors import AtlasError

FEATURE_SPACE_KEY = b"homeobox.feature_space"
# Both constants are part of the format: every writer must derive the same uid from the same identity.
_STABLE_UID_NAMESPACE = uuid.UUID("b3e7a9f1-6c2d-4a8b-9f01-3d5e7a2b8c4f")
_STABLE_UID_KEY = b"homeobox.stable_uid"


def make_uid() -> str:
    """A random uid: 16 hexadecimal digits."""
    return uuid.uuid4().hex[:16]


def make_stable_uid(*identity: str) -> str:
    """The uid, 16 hexadecimal digits, that belongs to an identity: the same wherever it is computed."""
    return uuid.uuid5(_STABLE_UID_NAMESPACE, "|".join(identity)).hex[:16]


def layout_uid(feature_uids: Iterable[str]) -> str:
    """Name of an ordered list of features: 16 hexadecimal digits, the same for the same list."""
    ended = "\0".join([*feature_uids, ""])  # a zero byte after each
    return hashlib.sha256(ended.encode("utf-8")).hexdigest()[:16]


class SparseZarrPointer(LanceModel):
    """Elements ``[start, end)`` of a group's flat arrays; `zarr_row` numbers the rows of the group."""

    pointer_kind: ClassVar[PointerKind] = "sparse"

    zarr_group: str | None = None
    start: int | None = None
    end: int | None = None
    zarr_row: int | None = None


class DenseZarrPointer(LanceModel):
    """A position on the first axis of a group's arrays."""

    pointer_kind: ClassVar[PointerKind] = "dense"

    zarr_group: str | None = None
    position: int | None = None


class DiscreteSpatialPointer(LanceModel):
    """A half-open box on the leading axes of a group's arrays; trailing axes are taken in full."""

    pointer_kind: ClassVar[PointerKind] = "discrete_spatial"

    zarr_group: str | None = None
    min_corner: list[int] | None = None
    max_corner: list[int] | None = None


Pointer = SparseZarrPointer | DenseZarrPointer | DiscreteSpatialPointer
_POINTERS = get_args(Pointer)


@dataclass(frozen=True)
class PointerField:
    """One pointer column of an obs table.

    Attributes
    ----------
    field_name
        Name of the column.
    feature_space
        Feature space that the column points into; several columns may point into the same one.
    """

    field_name: str
    feature_space: str

    @staticmethod
    def declare(
        *,
        feature_space: str,
        feature_registry_schema: type | str | None = None,
        default: object = None,
        **kwargs: Any,
    ) -> Any:
        """Declare a pointer column in the body of a :class:`HoxBaseSchema` subclass.

        Parameters
        ----------
        feature_space
            A registered feature space, see `hbx_gpu.atlas._model.spaces`.
        feature_registry_schema
            Class of the registry that names the features of the space. It documents the code and is not
            stored.
        default
            Value for rows without this modality.
        **kwargs
            Passed to ``pydantic.Field``.
        """
        extra = {**(kwargs.pop("json_schema_extra", None) or {}), "feature_space": feature_space}
        if feature_registry_schema is not None:
            given = feature_registry_schema
            extra["feature_registry_schema"] = given if isinstance(given, str) else given.__name__
        return Field(default=default, json_schema_extra=extra, **kwargs)


class StableUIDField:
    """Marks the field of a registry class that identifies a feature; the feature's uid is derived from it."""

    @staticmethod
    def declare(*, default: object = ..., **kwargs: Any) -> Any:
        """Declare the identifying field in the body of a :class:`FeatureBaseSchema` subclass."""
        extra = {**(kwargs.pop("json_schema_extra", None) or {}), "stable_uid": True}
        return Field(default=default, json_schema_extra=extra, **kwargs)


class HoxBaseSchema(LanceModel):
    """Base of obs tables: one row per cell.

    A subclass declares at least one pointer column with :meth:`PointerField.declare` and any further
    obs columns; ``T | None`` means that a row may lack the value.
    """

    uid: str = Field(default_factory=make_uid)
    dataset_uid: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        declared = [
            _check_pointer(cls, name) for name, info in cls.model_fields.items() if _pointer_class(info)
        ]
        if not declared:
            raise TypeError(
                f"{cls.__name__} declares no pointer column; add for example gene_expression: "
                'SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")'
            )

    @classmethod
    def pointer_fields(cls) -> dict[str, PointerField]:
        """Pointer columns of this class by name."""
        return {
            name: PointerField(name, str(_extra(info)["feature_space"]))
            for name, info in cls.model_fields.items()
            if _pointer_class(info)
        }

    @classmethod
    def to_arrow_schema(cls) -> pa.Schema:
        """Arrow schema of the table, pointer columns marked with their feature space."""
        schema = super().to_arrow_schema()  # type: ignore[no-untyped-call]  # lancedb does not annotate it
        for name, pointer in cls.pointer_fields().items():
            at = schema.get_field_index(name)
            mark = {FEATURE_SPACE_KEY: pointer.feature_space.encode("utf-8")}
            schema = schema.set(at, schema.field(at).with_metadata(mark))
        return schema


class FeatureBaseSchema(LanceModel):
    """Base of feature registries: one row per feature.

    Attributes
    ----------
    uid
        Durable id of the feature. Derived where a field is declared with :class:`StableUIDField`.
    global_index
        Column in the global feature space: assigned once by ``optimize()``, so it stays None here.
    """

    uid: str = Field(default_factory=make_uid)
    global_index: int | None = None

    @classmethod
    def _identity_fields(cls) -> list[str]:
        return [name for name, info in cls.model_fields.items() if _extra(info).get("stable_uid")]

    @model_validator(mode="after")
    def _check_identity(self) -> FeatureBaseSchema:
        if self.global_index is not None:
            raise ValueError("global_index is assigned by optimize(); leave it None in new features")
        identity = [getattr(self, name) for name in self._identity_fields()]
        if identity:
            expected = make_stable_uid(*map(str, identity))
            if "uid" in self.model_fields_set and self.uid != expected:
                raise ValueError(f"uid {self.uid!r} does not follow from {identity}; leave uid out")
            self.uid = expected
        return self

    @classmethod
    def to_arrow_schema(cls) -> pa.Schema:
        """Arrow schema of the registry, the identifying field marked."""
        schema = super().to_arrow_schema()  # type: ignore[no-untyped-call]  # lancedb does not annotate it
        for name in cls._identity_fields():
            at = schema.get_field_index(name)
            schema = schema.set(at, schema.field(at).with_metadata({_STABLE_UID_KEY: b"true"}))
        return schema


class DatasetSchema(LanceModel):
    """One stored group: one dataset in one feature space. Unknown keywords (``n_cells``) are ignored.

    Attributes
    ----------
    dataset_uid
        Shared by all modalities of one dataset and by its cells.
    zarr_group
        Path of the group in the store; unique.
    feature_space
        Feature space of the group.
    layout_uid
        Uid of the group's ordered feature list, ``''`` where the space has no features. The ingest fills it.
    created_at
        Time of creation, ISO 8601 in UTC.
    """

    dataset_uid: str = Field(default_factory=make_uid)
    zarr_group: str = Field(default_factory=make_uid)
    feature_space: str
    layout_uid: str = ""
    created_at: str = Field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat())


DatasetRecord = DatasetSchema


class FeatureLayout(LanceModel):
    """One feature of one ordered feature list."""

    layout_uid: str
    feature_uid: str
    local_index: int
    global_index: int | None = None


class AtlasVersion(LanceModel):
    """One snapshot: the version of every table, table names included."""

    version: int
    obs_table_versions: str
    dataset_table_name: str
    dataset_table_version: int
    registry_table_names: str
    registry_table_versions: str
    feature_layouts_table_version: int
    total_rows: int
    created_at: str = Field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat())


def _extra(info: FieldInfo) -> dict[str, object]:
    extra = info.json_schema_extra
    return dict(extra) if isinstance(extra, dict) else {}


def _pointer_class(info: FieldInfo) -> type[Pointer] | None:
    """The pointer class in ``P`` or ``P | None``, None for any other annotation."""
    annotation = info.annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((member for member in members if member in _POINTERS), None)


def _check_pointer(cls: type[HoxBaseSchema], name: str) -> str:
    info = cls.model_fields[name]
    pointer = _pointer_class(info)
    assert pointer is not None
    space_name = _extra(info).get("feature_space")
    if not isinstance(space_name, str) or not space_name:
        raise TypeError(
            f"{cls.__name__}.{name} is a {pointer.__name__} but names no feature space; declare it as "
            f'{name}: {pointer.__name__} | None = PointerField.declare(feature_space="...")'
        )
    space = get_space(space_name)
    if space.pointer != pointer.pointer_kind:
        wanted = next(p.__name__ for p in _POINTERS if p.pointer_kind == space.pointer)
        raise TypeError(
            f"{cls.__name__}.{name}: feature space {space_name!r} is addressed by {wanted}, "
            f"not by {pointer.__name__}"
        )
    return name


class Cell(HoxBaseSchema):
    """Obs table of an atlas for which no class was given; its other columns come from the data."""

    gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")


class Gene(FeatureBaseSchema):
    """Feature registry of an atlas for which no class was given; its other columns come from the data."""


def cells_class(fields: Mapping[str, str]) -> type[HoxBaseSchema]:
    """An obs table with these pointer columns, name -> feature space, and no further ones.

    Raises
    ------
    UnknownNameError
        No such feature space.
    """
    declared: dict[str, Any] = {
        name: (_pointer_of(space) | None, PointerField.declare(feature_space=space))
        for name, space in fields.items()
    }
    return create_model("Cell", __base__=HoxBaseSchema, **declared)


def pointer_column(name: str, feature_space: str) -> pa.Field:
    """Arrow field of a pointer column into a feature space."""
    return cells_class({name: feature_space}).to_arrow_schema().field(name)


def _pointer_of(feature_space: str) -> type[Pointer]:
    kind = get_space(feature_space).pointer
    result: type[Pointer] = next(pointer for pointer in _POINTERS if pointer.pointer_kind == kind)
    return result


def default_registry(feature_space: str) -> str:
    """Table with the features of a space for which no class was given.

    Each space has its own table, because spaces that share a table would share global indices.
    """
    return registry_table_name(Gene) if feature_space == "gene_expression" else f"{feature_space}_registry"


def registry_table_name(schema: type[FeatureBaseSchema]) -> str:
    """Table that holds the features of a registry class: ``GeneFeature`` -> ``gene_feature_registry``."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", schema.__name__)
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return re.sub(r"_+", "_", name).strip("_").lower() + "_registry"


def check_schema(
    declared: type[HoxBaseSchema] | type[FeatureBaseSchema], stored: pa.Schema, table: str
) -> None:
    """Check that the table has every column that a class declares, in a type that holds its values.

    Raises
    ------
    AtlasError
        A column is missing or has another type; the message names it.
    """
    for column in declared.to_arrow_schema():
        if column.name not in stored.names:
            raise AtlasError(
                f"{declared.__name__} declares column {column.name!r}, which table {table!r} of the atlas "
                f"lacks; its columns: {stored.names}. Remove it from the class, or open the atlas without one"
            )
        there = stored.field(column.name)
        if not fits(column.type, there.type):
            raise AtlasError(
                f"{declared.__name__} declares column {column.name!r} as {column.type}, table {table!r} "
                f"of the atlas holds {there.type}; correct the class, or open the atlas without one"
            )
        wanted, found = ((f.metadata or {}).get(FEATURE_SPACE_KEY) for f in (column, there))
        if wanted and found and wanted != found:
            raise AtlasError(
                f"{declared.__name__}.{column.name} points into {wanted.decode()!r}, in table {table!r} "
                f"of the atlas into {found.decode()!r}; correct the class, or open the atlas without one"
            )
