"""Schema classes: what they refuse, and that their tables are those of a real atlas."""

from __future__ import annotations

import datetime
import enum
import hashlib
from pathlib import Path

import lancedb
import pyarrow as pa
import pytest

from hbx_gpu.atlas._model.schema import (
    AtlasVersion,
    Cell,
    DatasetRecord,
    DatasetSchema,
    DenseZarrPointer,
    DiscreteSpatialPointer,
    FeatureBaseSchema,
    FeatureLayout,
    Gene,
    HoxBaseSchema,
    PointerField,
    SparseZarrPointer,
    StableUIDField,
    check_schema,
    layout_uid,
    make_stable_uid,
    make_uid,
    registry_table_name,
)
from hbx_gpu.errors import AtlasError, UnknownNameError


def stored_schema(root: Path, table: str) -> pa.Schema:
    return lancedb.connect(str(root / "lance_db")).open_table(table).schema


def assert_same_fields(mine: pa.Schema, real: pa.Schema) -> None:
    """Names, types, nullability and field metadata agree for all columns that `mine` has."""
    for field in mine:
        there = real.field(field.name)
        assert (field.type, field.nullable) == (there.type, there.nullable), field.name
        assert (field.metadata or {}) == (there.metadata or {}), field.name


class Quality(enum.Enum):
    LOW = "low"
    HIGH = "high"


class FullCell(HoxBaseSchema):
    gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")
    cell_type: str | None = None
    donor: str
    batch: int
    age: int | None = None
    n_counts: float | None = None
    is_doublet: bool | None = None
    quality: Quality | None = None
    tags: list[str] | None = None
    collected: datetime.datetime | None = None
    split: str


class GeneWithName(FeatureBaseSchema):
    gene_name: str
    chrom: str | None = None


def test_tables_are_those_of_a_real_atlas(homeobox_fixtures: Path) -> None:
    root = homeobox_fixtures / "ragged_rna" / "atlas"
    for mine, table in (
        (FullCell, "cells"),
        (GeneWithName, "gene_registry"),
        (DatasetSchema, "datasets"),
        (FeatureLayout, "_feature_layouts"),
        (AtlasVersion, "atlas_versions"),
    ):
        assert_same_fields(mine.to_arrow_schema(), stored_schema(root, table))
    for exact, table in (
        (FullCell, "cells"),
        (FeatureLayout, "_feature_layouts"),
        (AtlasVersion, "atlas_versions"),
    ):
        assert exact.to_arrow_schema().names == stored_schema(root, table).names


def test_pointer_structs_are_those_of_a_real_atlas(homeobox_fixtures: Path) -> None:
    class Everything(HoxBaseSchema):
        rna: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")
        adt: DenseZarrPointer | None = PointerField.declare(feature_space="protein_abundance")
        tiles_a: DenseZarrPointer | None = PointerField.declare(feature_space="image_tiles")
        tiles_b: DenseZarrPointer | None = PointerField.declare(feature_space="image_tiles")
        crop: DiscreteSpatialPointer | None = PointerField.declare(feature_space="discrete_image")

    assert_same_fields(
        Everything.to_arrow_schema(), stored_schema(homeobox_fixtures / "all_spaces" / "atlas", "cells")
    )
    assert Everything.pointer_fields()["tiles_b"] == PointerField("tiles_b", "image_tiles")


def test_layout_uid_is_the_stored_one(homeobox_fixtures: Path) -> None:
    rows = lancedb.connect(str(homeobox_fixtures / "ragged_rna" / "atlas" / "lance_db")).open_table(
        "_feature_layouts"
    )
    table = rows.to_arrow().sort_by([("layout_uid", "ascending"), ("local_index", "ascending")])
    lists: dict[str, list[str]] = {}
    for row in table.to_pylist():
        lists.setdefault(row["layout_uid"], []).append(row["feature_uid"])
    assert len(lists) == 3
    for uid, features in lists.items():
        assert layout_uid(features) == uid
    assert layout_uid(["b", "a"]) != layout_uid(["a", "b"])
    assert layout_uid(["ä"]) == hashlib.sha256("ä".encode() + b"\0").hexdigest()[:16]


def test_uids() -> None:
    assert len(make_uid()) == 16
    assert make_uid() != make_uid()
    int(make_uid(), 16)
    cell = Cell(dataset_uid="d")
    assert len(cell.uid) == 16
    assert cell.gene_expression is None


def test_stable_uid_follows_from_the_identity() -> None:
    class Protein(FeatureBaseSchema):
        accession: str = StableUIDField.declare()

    # What homeobox 0.2.9 gives for the same identity.
    assert make_stable_uid("x") == "6e42bee75db65ffe"
    assert Protein(accession="x").uid == "6e42bee75db65ffe"
    with pytest.raises(ValueError, match="leave uid out"):
        Protein(accession="x", uid="other")


def test_global_index_is_not_the_users() -> None:
    with pytest.raises(ValueError, match="optimize"):
        Gene(uid="a", global_index=3)


def test_dataset_record_ignores_counts_of_earlier_releases() -> None:
    record = DatasetRecord(zarr_group="a/rna", feature_space="gene_expression", n_cells=5, n_rows=5)  # type: ignore[call-arg]
    assert record.layout_uid == ""
    assert datetime.datetime.fromisoformat(record.created_at).tzinfo is not None


def test_pointer_must_be_declared() -> None:
    with pytest.raises(TypeError, match=r"PointerField\.declare\(feature_space="):

        class NoSpace(HoxBaseSchema):
            gene_expression: SparseZarrPointer | None = None


def test_space_must_be_known() -> None:
    with pytest.raises(UnknownNameError, match=r"gene_expresion.*gene_expression"):

        class Typo(HoxBaseSchema):
            rna: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expresion")


def test_pointer_kind_must_match_the_space() -> None:
    with pytest.raises(TypeError, match="DenseZarrPointer, not by SparseZarrPointer"):

        class Wrong(HoxBaseSchema):
            tiles: SparseZarrPointer | None = PointerField.declare(feature_space="image_tiles")


def test_obs_class_needs_a_pointer() -> None:
    with pytest.raises(TypeError, match="declares no pointer column"):

        class Nothing(HoxBaseSchema):
            cell_type: str


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("Gene", "gene_registry"),
        ("GeneFeature", "gene_feature_registry"),
        ("ATACPeak", "atac_peak_registry"),
        ("RNASeqFeature", "rna_seq_feature_registry"),
        ("Protein_Schema", "protein_schema_registry"),
    ],
)
def test_registry_table_name(name: str, table: str) -> None:
    assert registry_table_name(type(name, (FeatureBaseSchema,), {})) == table


def test_check_schema_names_what_disagrees() -> None:
    stored = FullCell.to_arrow_schema()
    check_schema(FullCell, stored, "cells")
    check_schema(Cell, stored, "cells")  # fewer columns are fine

    class More(FullCell):
        tissue: str | None = None

    with pytest.raises(AtlasError, match=r"'tissue', which table 'cells' of the atlas lacks"):
        check_schema(More, stored, "cells")

    class Other(HoxBaseSchema):
        gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")
        donor: int

    with pytest.raises(AtlasError, match=r"'donor' as int64.*holds string"):
        check_schema(Other, stored, "cells")

    class Elsewhere(HoxBaseSchema):
        gene_expression: SparseZarrPointer | None = PointerField.declare(
            feature_space="chromatin_accessibility"
        )

    with pytest.raises(AtlasError, match=r"'chromatin_accessibility'.*'gene_expression'"):
        check_schema(Elsewhere, stored, "cells")


def test_check_schema_takes_pointers_of_earlier_generations() -> None:
    numbers = [(name, pa.int64()) for name in ("start", "end", "zarr_row")]
    old = pa.struct([("feature_space", pa.string()), ("zarr_group", pa.string()), *numbers])
    stored = Cell.to_arrow_schema()
    stored = stored.set(2, pa.field("gene_expression", old))
    check_schema(Cell, stored, "cells")
