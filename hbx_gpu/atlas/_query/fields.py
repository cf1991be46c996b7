"""Finds the pointer fields that a query means: by name, by feature space, or as the only one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hbx_gpu._advice import option, spelled
from hbx_gpu.atlas._model.spaces import get_space, known_spaces
from hbx_gpu.errors import UnknownNameError

if TYPE_CHECKING:
    from hbx_gpu.atlas._catalog.snapshot import PointerColumn


@dataclass(frozen=True, slots=True)
class Fields:
    """The pointer fields of a table.

    Attributes
    ----------
    table
        Name of the table, used in error messages.
    pointers
        Pointer fields of the table by name.
    spaces, fields
        Feature spaces and fields to which the query is restricted; None means all.
    panels
        Feature spaces for which features were asked for.
    """

    table: str
    pointers: Mapping[str, PointerColumn]
    spaces: Sequence[str] | None = None
    fields: Sequence[str] | None = None
    panels: Sequence[str] = ()

    def space_named(self, name: str) -> str:
        """The feature space that a name means: a space itself, or that of a pointer field.

        Raises
        ------
        UnknownNameError
            Neither of the two.
        """
        spaces = {pointer.feature_space for pointer in self.pointers.values()}
        if name in spaces:
            return name
        if name in self.pointers:
            return self.pointers[name].feature_space
        raise UnknownNameError(
            f"no feature space {name!r} in table {self.table!r}; available: {sorted(spaces)}"
        )

    def active(self) -> list[PointerColumn]:
        """Pointer fields that the query considers."""
        return [
            pointer
            for pointer in self.pointers.values()
            if (self.spaces is None or pointer.feature_space in self.spaces)
            and (self.fields is None or pointer.name in self.fields)
        ]

    def in_memory(self) -> list[PointerColumn]:
        """Pointer fields for results in memory: those of the panels, unless spaces or fields were chosen."""
        chosen = bool(self.panels) and self.spaces is None and self.fields is None
        return [p for p in self.active() if not chosen or p.feature_space in self.panels]

    def one(self, feature_space: str | None, field_name: str | None) -> PointerColumn:
        """The pointer field that a dataset of one modality reads.

        Parameters
        ----------
        feature_space, field_name
            Space or field that the user names; None for the only field, the only sparse one where others
            are dense.

        Raises
        ------
        UnknownNameError
            No such space or field.
        ValueError
            The field is of another space, or several fields are left.
        """
        if field_name is not None:
            if field_name not in self.pointers:
                raise UnknownNameError(
                    f"no pointer field {field_name!r} in table {self.table!r}; available: {self._described()}"
                )
            pointer = self.pointers[field_name]
            if feature_space not in (None, pointer.feature_space, pointer.name):
                raise ValueError(
                    f"field {field_name!r} holds {pointer.feature_space!r}, not {feature_space!r}"
                )
            return pointer
        if feature_space is None:
            active = self.in_memory()
            sparse = [pointer for pointer in active if pointer.kind == "sparse"]
            return self._only(sparse or active, "the table")
        matches = [p for p in self.active() if p.feature_space == feature_space]
        matches = matches or [p for p in self.pointers.values() if p.feature_space == feature_space]
        if matches:
            return self._only(matches, f"feature space {feature_space!r}")
        if feature_space in self.pointers:
            return self.pointers[feature_space]
        raise UnknownNameError(
            f"no feature space or field {feature_space!r} in table {self.table!r}; "
            f"available: {self._described()}"
        )

    def _only(self, pointers: list[PointerColumn], what: str) -> PointerColumn:
        if len(pointers) == 1:
            return pointers[0]
        if not pointers:
            raise ValueError(f"{what} has no data to read; available: {self._described()}")
        names = [pointer.name for pointer in pointers]
        raise ValueError(
            f"{what} has several pointer fields: {names}; choose one with {option('field_name')}"
        )

    def matrix(self) -> PointerColumn:
        """The pointer field that becomes AnnData.

        Raises
        ------
        TypeError
            There are images or fragments only.
        ValueError
            No field or several are left, or features of another space were asked for.
        """
        active = self.in_memory()
        matrices = [pointer for pointer in active if is_matrix(pointer.feature_space)]
        if active and not matrices:
            raise TypeError(
                f"{[p.name for p in active]} hold images or fragments, not rows of a matrix; "
                f"read them with {spelled('to_cell_dataset(field_name=...)', 'Python')}"
            )
        if len(matrices) > 1:
            raise ValueError(
                f"to_anndata() needs exactly one AnnData-capable pointer field, table {self.table!r} has "
                f"{[p.name for p in matrices]}; choose one with feature_spaces(...) or select_fields(...)"
            )
        pointer = self._only(matrices, "the table")
        if self.panels and pointer.feature_space not in self.panels:
            raise ValueError(
                f"features() was given for {sorted(self.panels)}, but {pointer.feature_space!r} is read; "
                "choose the space of these features with feature_spaces(...), or leave features() out"
            )
        return pointer

    def _described(self) -> dict[str, str]:
        return {pointer.name: pointer.feature_space for pointer in self.pointers.values()}

    def several(
        self, feature_spaces: Sequence[str] | None, field_names: Sequence[str] | None
    ) -> dict[str, PointerColumn]:
        """The fields of a multimodal dataset, by their names in batches."""
        if feature_spaces is not None and field_names is not None:
            raise ValueError("feature_spaces and field_names both say what to read; give one of them")
        for what, names in (("feature_spaces", feature_spaces), ("field_names", field_names)):
            if isinstance(names, str):
                raise ValueError(f"{what} must be a list, got {names!r}")
        if field_names is not None:
            pointers = {name: self.one(None, name) for name in field_names}
        elif feature_spaces is not None:
            pointers = {name: self.one(name, None) for name in feature_spaces}
        else:
            pointers = {pointer.name: pointer for pointer in self.active()}
        asked = field_names if field_names is not None else feature_spaces
        if asked is not None and len(asked) > len(pointers):
            raise ValueError(f"every modality may be asked for once, got {list(asked)}")
        if not pointers:
            raise ValueError(f"choose at least one modality; available: {self._described()}")
        return pointers


def is_matrix(feature_space: str) -> bool:
    if feature_space not in known_spaces():
        return True
    space = get_space(feature_space)
    return space.has_features and not space.repeats
