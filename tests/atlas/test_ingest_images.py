"""Tiles, boxes and encoded pictures: stored as they are, pointed to cell by cell, checked beforehand."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.atlas import ImageInput, RaggedAtlas, create_or_open_atlas
from hbx_gpu.atlas._ingest.grids import grid_shapes, write_grid
from hbx_gpu.atlas._ingest.image_files import open_image
from hbx_gpu.errors import AlreadyIngestedError, InvalidDataError

tifffile = pytest.importorskip("tifffile")
pillow = pytest.importorskip("PIL.Image")


def rna(ids: str = "abcdef") -> anndata.AnnData:
    x = np.random.default_rng(0).integers(0, 9, (len(ids), 4)).astype(np.float32)
    return anndata.AnnData(x, obs=pd.DataFrame(index=list(ids)), var=pd.DataFrame(index=list("wxyz")))


def image(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random(shape, np.float32) if dtype == "float32" else rng.integers(0, 200, shape).astype(dtype)


def pointers(atlas: RaggedAtlas, field: str) -> dict[str, Any]:
    rows = atlas.catalog.obs("cells").to_arrow().to_pylist()
    return {row["obs_name"]: row[field] for row in rows if row[field] is not None}


def raw(atlas: RaggedAtlas, field: str) -> Any:
    (pointer, *_) = pointers(atlas, field).values()
    found = zarr.open_group(atlas.path / "zarr_store", mode="r")[f"{pointer['zarr_group']}/layers/raw"]
    assert isinstance(found, zarr.Array)
    return found


def save(kind: str, path: Path, array: np.ndarray) -> Path:
    """Write an array as one of the formats that are read."""
    if kind == "zarr2" or kind == "zarr3":
        zarr.create_array(
            path, data=array, zarr_format=2 if kind == "zarr2" else 3, chunks=(2, *array.shape[1:])
        )
    elif kind in ("ome4", "ome5"):
        group = zarr.open_group(path, mode="w", zarr_format=2 if kind == "ome4" else 3)
        axes = [{"name": name} for name in "tczyx"[-array.ndim :]]
        scales = [{"axes": axes, "datasets": [{"path": "s0"}, {"path": "s1"}]}]
        group.attrs.update({"multiscales": scales} if kind == "ome4" else {"ome": {"multiscales": scales}})
        group.create_array("s0", data=array)
        group.create_array("s1", data=array[..., ::2, ::2])
    elif kind == "npy":
        path = path.with_suffix(".npy")
        np.save(path, array)
    else:
        path = path.with_suffix(".tif")
        options: Any = {"deflate": {"compression": "zlib"}, "ometiff": {"ome": True}}.get(kind, {})
        tifffile.imwrite(path, array, photometric="minisblack", **options)
    return path


FORMATS = ["zarr2", "zarr3", "ome4", "ome5", "npy", "plain", "deflate", "ometiff"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiles_of_every_format(tmp_path: Path, kind: str, dtype: str) -> None:
    tiles = image((7, 3, 6, 5), dtype)
    path = save(kind, tmp_path / "t", tiles)
    pd.DataFrame({"cell_id": list("ceb"), "tile": [6, 0, 3]}).to_csv(tmp_path / "t.csv", index=False)
    atlas = create_or_open_atlas(tmp_path / "a")
    given = ImageInput(path, tmp_path / "t.csv")
    report = atlas.add_multimodal({"rna": rna(), "tiles": given}, chunk_shape=200)
    assert report.n_measured == {"gene_expression": 6, "image_tiles": 3}
    found = raw(atlas, "image_tiles")
    np.testing.assert_array_equal(found[:], tiles)
    assert (found.dtype, found.chunks) == (np.dtype(dtype), (2, 3, 6, 5))
    positions = {name: p["position"] for name, p in pointers(atlas, "image_tiles").items()}
    assert positions == {"c": 6, "e": 0, "b": 3}
    atlas.optimize()
    assert atlas.snapshot() == 0


def test_tiles_without_channels(tmp_path: Path) -> None:
    tiles = image((4, 6, 5), "uint8")
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_multimodal({"tiles": ImageInput(tiles, {"cell_id": list("ab"), "tile": [1, 3]})})
    np.testing.assert_array_equal(raw(atlas, "image_tiles")[:], tiles[:, None])
    assert list(pointers(atlas, "image_tiles")) == ["a", "b"]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_file_per_tile(tmp_path: Path, suffix: str, channels: int) -> None:
    tiles = image((3, 8, 5, channels), "uint8")
    for i, tile in enumerate(tiles):
        path = tmp_path / f"t{i}.{suffix}"
        tile = tile[..., 0] if channels == 1 else tile
        pillow.fromarray(tile).save(path) if suffix == "png" else tifffile.imwrite(path, tile)
    table = pd.DataFrame({"cell_id": list("acb"), "file": [f"t{i}.{suffix}" for i in (2, 0, 2)]})
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_multimodal({"rna": rna(), "tiles": ImageInput(tmp_path, table)})
    expected = np.moveaxis(tiles[[2, 0]], -1, 1)
    np.testing.assert_array_equal(raw(atlas, "image_tiles")[:], expected)
    assert [p["position"] for p in pointers(atlas, "image_tiles").values()] == [0, 0, 1]
    # The same files as a list, by number.
    files = [tmp_path / f"t{i}.{suffix}" for i in range(3)]
    np.testing.assert_array_equal(open_image(files).read(()), np.moveaxis(tiles, -1, 1))


# Boxes


@pytest.mark.parametrize("kind", ["zarr3", "ome5", "deflate", "npy"])
def test_boxes_of_a_large_image(tmp_path: Path, kind: str) -> None:
    whole = image((2, 700, 1100), "uint16")
    path = save(kind, tmp_path / "i", whole)
    table = pd.DataFrame(
        {
            "cell_id": list("cea"),
            "y0": [0, 5, 699],
            "y1": [700, 9, 700],
            "x0": [7, 0, 1099],
            "x1": [9, 1, 1100],
        }
    )
    table.to_parquet(tmp_path / "b.parquet")
    atlas = create_or_open_atlas(tmp_path / "a", codec="blosc")
    atlas.add_multimodal({"rna": rna(), "images": ImageInput(path, tmp_path / "b.parquet", axes="cyx")})
    found = raw(atlas, "discrete_image")
    np.testing.assert_array_equal(found[:], whole)
    assert (found.chunks, found.shards) == ((1, 512, 512), (1, 1024, 1536))
    for row in table.itertuples():
        pointer = pointers(atlas, "discrete_image")[row.cell_id]
        assert pointer["min_corner"] == [0, row.y0, row.x0]
        assert pointer["max_corner"] == [2, row.y1, row.x1]
    atlas.optimize()
    assert atlas.snapshot() == 0


def test_boxes_on_the_leading_axes_only(tmp_path: Path) -> None:
    """Color images, (Y, X, C): the box ends at x, channels follow in full, as in atlases of others."""
    picture = image((30, 40, 3), "uint8")
    tifffile.imwrite(tmp_path / "rgb.tif", picture, photometric="rgb")
    table = {"cell_id": ["a"], "y0": [1], "y1": [3], "x0": [4], "x1": [40]}
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_multimodal({"images": ImageInput(tmp_path / "rgb.tif", table)})
    pointer = pointers(atlas, "discrete_image")["a"]
    assert (pointer["min_corner"], pointer["max_corner"]) == ([1, 4], [3, 40])
    np.testing.assert_array_equal(raw(atlas, "discrete_image")[:], picture)


@settings(max_examples=15, deadline=None)
@given(
    leading=st.lists(st.integers(1, 2), max_size=3),
    plane=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    edges=st.sampled_from([(1, 2), (2, 4), (3, 6), (512, 2048)]),
    codec=st.sampled_from(["zstd", "none", "gzip", "hbx_gpu.rowpack"]),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
)
def test_any_grid(
    tmp_path_factory: pytest.TempPathFactory,
    leading: list[int],
    plane: tuple[int, int],
    edges: tuple[int, int],
    codec: str,
    dtype: str,
) -> None:
    path = tmp_path_factory.mktemp("grid") / "array"
    whole = image((*leading, *plane), dtype)
    done: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hbx_gpu.atlas._ingest.grids._CHUNK_EDGE", edges[0])
        patch.setattr("hbx_gpu.atlas._ingest.grids._SHARD_EDGE", edges[1])
        write_grid(path, open_image(whole), codec=codec, done=done.append)
        chunk, shard = grid_shapes(whole.shape)
    found = zarr.open_array(path, mode="r")
    np.testing.assert_array_equal(found[:], whole)
    assert (found.chunks, found.shards) == (chunk, shard)
    assert done[-1] == 1
    assert done == sorted(done)


# Encoded pictures


def test_encoded_pictures(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for i in range(3):
        pillow.fromarray(image((9, 9 + i, 3), "uint8", i)).save(tmp_path / "p" / f"{i}.jpg")
    table = {"cell_id": list("bca"), "file": ["2.jpg", "0.jpg", "2.jpg"]}
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_multimodal({"rna": rna(), "encoded": ImageInput(tmp_path / "p", table)}, chunk_shape=100)
    values: Any = raw(atlas, "encoded_images")[:]
    assert values.dtype == np.uint8
    for name, file in zip(*table.values(), strict=True):
        pointer = pointers(atlas, "encoded_images")[name]
        found = values[pointer["start"] : pointer["end"]].tobytes()
        assert found == (tmp_path / "p" / file).read_bytes()
    # A file that two cells share is stored once, one without a cell not at all.
    assert len(values) == sum((tmp_path / "p" / f"{i}.jpg").stat().st_size for i in (0, 2))
    atlas.optimize()
    assert atlas.snapshot() == 0


def test_inner_join_leaves_out_files(tmp_path: Path) -> None:
    for name in "xy":
        (tmp_path / name).write_bytes(name.encode() * 5)
    table = {"cell_id": list("aq"), "file": ["x", "y"]}
    atlas = create_or_open_atlas(tmp_path / "a")
    report = atlas.add_multimodal({"rna": rna(), "encoded": ImageInput(tmp_path, table)}, join="inner")
    assert (report.n_cells, report.n_left_out["encoded_images"]) == (1, 1)
    assert raw(atlas, "encoded_images")[:].tobytes() == b"xxxxx"


# What is refused


TILES = image((4, 1, 6, 6), "uint8")
BOX = {"y0": [0], "y1": [3], "x0": [0], "x1": [3]}


def tiles_of(image: Any = TILES, **table: Any) -> ImageInput:
    return ImageInput(image, {"cell_id": ["a"], **table})


def box_of(axes: str | None = None, **table: Any) -> ImageInput:
    return ImageInput(TILES[0], {"cell_id": ["a"], **BOX, **table}, axes=axes)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("tiles", tiles_of(tile=[4]), r"cell 'a' \(row 0\) names tile 4, .* 0 to 3"),
        ("tiles", tiles_of(tile=[-1]), "names tile -1"),
        ("tiles", tiles_of(tile=[1.5]), "holds '1.5' for cell 'a' .* whole number"),
        ("tiles", tiles_of(number=[1]), "neither a column 'tile' with tile numbers"),
        ("tiles", ImageInput(TILES, {"cell": ["a"], "tile": [1]}), "no column 'cell_id' with the cell ids"),
        ("tiles", tiles_of(cell_id=["a", None], tile=[1, 2]), r"1 row\(s\) have no cell id, first: row 1"),
        ("tiles", tiles_of(cell_id=["a", "a"], tile=[1, 2]), r"occur more than once, .*\['a'\]"),
        ("tiles", tiles_of(cell_id=["a", "q"], tile=[1, 2]), r"1 .* in no other modality.*\['q'\]"),
        ("tiles", tiles_of(cell_id=[], tile=[]), "has no rows"),
        ("tiles", tiles_of(TILES.astype("i4"), tile=[1]), "holds int32; .* stores"),
        ("tiles", tiles_of(TILES[0, 0], tile=[1]), r"tiles are an \(N, C, Y, X\)"),
        ("images", box_of(y1=[7]), "from 0 to 7 along axis 'y'.*0 to 6"),
        ("images", box_of(x0=[-1]), "from -1 to 3 along axis 'x'"),
        ("images", box_of(x0=[3]), "half-open, not empty"),
        ("images", box_of(z0=[0]), r"missing: \['z1'\]"),
        ("images", box_of(c0=[0], c1=[1]), r"columns \['c0', 'c1'\] bound axes .* its axes are 'zyx'"),
        (
            "images",
            ImageInput(TILES[0], {"cell_id": ["a"]}),
            r"boxes are given by columns \['z0', 'z1', 'y0'",
        ),
        ("images", box_of(axes="yx"), "axes='yx' must be as many"),
        ("encoded", tiles_of(None, tile=["x"]), "no column 'file' with file names"),
        ("encoded", tiles_of(None, file=[""]), "column 'file' is empty for cell 'a'"),
    ],
)
def test_refused(tmp_path: Path, name: str, given: ImageInput, message: str) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InvalidDataError, match=message):
        atlas.add_multimodal({"rna": rna(), name: given})
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "a" / ".hbx_gpu" / "lock"}
    assert not atlas.catalog.dataset_rows()


def test_refused_files(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")

    def add(name: str, given: ImageInput) -> None:
        atlas.add_multimodal({"rna": rna(), name: given})

    for i, width in enumerate((5, 5, 6)):
        pillow.fromarray(image((4, width), "uint8")).save(tmp_path / f"{i}.png")
    table = {"cell_id": list("abc"), "file": ["0.png", "1.png", "2.png"]}
    message = r"0\.png is \(1, 4, 5\) uint8, .*2\.png is \(1, 4, 6\) uint8; resize"
    with pytest.raises(InvalidDataError, match=message):
        add("tiles", ImageInput(tmp_path, table))
    gone = {"cell_id": ["a"], "file": ["7.png"]}
    for name in ("tiles", "encoded"):
        missing = r"1 image file\(s\) cannot be read, first: \['.*7\.png \(it is missing\)'\]"
        with pytest.raises(FileNotFoundError, match=missing):
            add(name, ImageInput(tmp_path, gone))
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidDataError, match=r"1 image file\(s\) are empty"):
        add("encoded", ImageInput(tmp_path, {"cell_id": ["a"], "file": ["empty"]}))
    with pytest.raises(FileNotFoundError, match=r"expected an image at .*nothing.zarr; it is missing"):
        add("tiles", tiles_of(tmp_path / "nothing.zarr", tile=[0]))
    with pytest.raises(FileNotFoundError, match=r"table of cells and images at .*t\.csv"):
        add("tiles", ImageInput(TILES, tmp_path / "t.csv"))
    zarr.open_group(tmp_path / "g.zarr", mode="w").create_array("inside", data=TILES)
    with pytest.raises(InvalidDataError, match=r"without OME-Zarr's multiscales; .* in it: \['inside'\]"):
        add("tiles", tiles_of(tmp_path / "g.zarr", tile=[0]))
    (tmp_path / "bad.tif").write_bytes(b"II*\0 and nothing")
    with pytest.raises(InvalidDataError, match=r"bad\.tif cannot be read as a TIFF file"):
        add("tiles", tiles_of(tmp_path / "bad.tif", tile=[0]))
    with pytest.raises(InvalidDataError, match=r"0\.png: expected a zarr array or OME-Zarr folder"):
        add("tiles", tiles_of(tmp_path / "0.png", tile=[0]))
    assert not atlas.catalog.dataset_rows()


@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="looks at the open files of this process in /proc"
)
def test_a_tiff_file_is_closed_with_its_image(tmp_path: Path) -> None:
    """Its store opens it again for every region that is read."""

    def is_open() -> bool:
        return any(os.path.realpath(link) == str(path) for link in Path("/proc/self/fd").iterdir())

    path = save("ometiff", tmp_path / "t", image((4, 2, 8, 8), "uint8")).resolve()
    opened = open_image(path)
    assert opened.read((slice(0, 1),)).any()
    assert is_open()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ResourceWarning)  # what Python says of a file that it has to close
        del opened
        gc.collect()
    assert not said
    assert not is_open()


def test_the_same_images_are_added_once(tmp_path: Path) -> None:
    path = save("zarr3", tmp_path / "t.zarr", TILES)
    atlas = create_or_open_atlas(tmp_path / "a")
    given = tiles_of(path, tile=[1])
    atlas.add_multimodal({"rna": rna(), "tiles": given})
    assert atlas.add_multimodal({"rna": rna(), "tiles": given}, exist_ok=True).n_cells == 0
    with pytest.raises(AlreadyIngestedError, match="tiles: it was added without this one"):
        atlas.add_multimodal({"rna": rna(), "tiles": tiles_of(path, tile=[2])})


def test_other_columns_of_the_table_are_labels(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "cell_id": list("abcd"),
            "tile": [3, 1, 0, 2],
            "donor": ["007", "007", "12", ""],
            "age": ["31", "", "8", "9"],
            "score": ["0.5", "1e-3", "2", "3"],
            "kept": ["True", "False", "True", "True"],
            "barcode": ["12345678901234567890"] * 4,
            "nothing": [""] * 4,
        }
    )
    table.to_csv(tmp_path / "t.csv")  # with its index, a column without a name
    atlas = create_or_open_atlas(tmp_path / "a", pointer_fields={"image_tiles": "image_tiles"})
    tiles = image((4, 2, 3, 3), "uint8")
    given = ImageInput(save("npy", tmp_path / "t", tiles), tmp_path / "t.csv")
    atlas.add_multimodal({"tiles": given})
    atlas.optimize()
    atlas.snapshot()
    query = RaggedAtlas.checkout_latest(tmp_path / "a").query()
    obs = query.to_pandas().set_index("obs_name")
    assert list(obs.columns)[-5:] == ["donor", "age", "score", "kept", "barcode"], "and none without values"
    assert obs.donor.tolist()[:3] == ["007", "007", "12"]
    assert obs.donor.isna().tolist() == [False, False, False, True]
    assert obs.age.isna().tolist() == [False, True, False, False]
    assert obs.age.sum() == 48
    assert obs.score.tolist() == [0.5, 0.001, 2.0, 3.0]
    assert obs.kept.tolist() == [True, False, True, True]
    assert obs.barcode.tolist() == ["12345678901234567890"] * 4
    batch: Any = query.to_cell_dataset("image_tiles", metadata_columns=["age", "kept"])[:]
    np.testing.assert_array_equal(batch.data, tiles[[3, 1, 0, 2]])
    assert batch.metadata["age"][[0, 2, 3]].tolist() == [31, 8, 9]
    assert query.where("kept AND age < 10").count() == 2
    # The labels are part of what makes the same data: with others, the table is not the same.
    changed = ImageInput(given.image, table.assign(donor="8"))
    with pytest.raises(AlreadyIngestedError, match="already"):
        atlas.add_multimodal({"tiles": changed}, exist_ok=True)
