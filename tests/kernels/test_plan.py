"""plan_rows, plan_lengths, gather_columns: what the host's plan and NumPy's indexing say, slot by slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hbx_gpu._engine.device.records import ARRAY, COLUMN, PIECE, SEGMENT
from hbx_gpu._plan.rows import SourceTable, element_base, plan_rows
from hbx_gpu._source import RowIndex

BAD_PLACE = 64
CANARY = 0xA7


@dataclass
class Case:
    """A dataset of several Sources, and the number of slots that its rows need."""

    table: SourceTable
    rows: RowIndex
    run_of: np.ndarray
    slots: int


def case(rng: np.random.Generator, sizes: list[list[int]], n: int = 60, longest: int = 400) -> Case:
    """Rows in arrays whose chunks have `sizes[source][role]` elements; some are empty or without a Source."""
    n_roles, elements = len(sizes[0]), [size for source in sizes for size in source]
    total = 4000
    chunks = [-(-total // size) for size in elements]
    table = SourceTable(
        n_roles=n_roles,
        chunk_base=np.concatenate([[0], np.cumsum(chunks)]).astype(np.int64),
        chunk_elements=np.array(elements, np.int64),
        element_base=element_base(chunks, elements),
        remap=np.empty(0, np.int32),
        remap_start=np.zeros(len(sizes), np.int64),
        remap_length=np.zeros(len(sizes), np.int64),
        n_features=1,
        drops=False,
        repeats=np.zeros(len(sizes), bool),
        identity=np.ones(len(sizes), bool),
        in_parts=np.ones(len(elements), bool),
    )
    length = rng.integers(0, longest, n) * (rng.random(n) > 0.1)
    rows = RowIndex(
        rng.integers(-1, len(sizes), n).astype(np.int32),
        rng.integers(0, total - longest, n),
        length.astype(np.int32),
    )
    slots = max((longest + size - 2) // size + 1 for size in elements)
    return Case(table, rows, rng.permutation(int(table.chunk_base[-1])).astype(np.uint32), slots)


def filled(shape: int, dtype: Any) -> np.ndarray:
    """Memory with an entry more than the kernel may write."""
    return np.full((shape + 1) * np.dtype(dtype).itemsize, CANARY, np.uint8).view(dtype)


def check_canary(*arrays: np.ndarray) -> None:
    """The entry after each array is as it was."""
    for array in arrays:
        assert (array[-1:].view(np.uint8) == CANARY).all()


def run(
    launcher: Any, made: Case, selection: np.ndarray, layer: int = 0, slots: int | None = None
) -> dict[str, np.ndarray]:
    """What the kernels write for the rows `selection`: offsets, pieces, segments, row_ptr, any."""
    table, rows, n = made.table, made.rows, len(selection)
    slots = made.slots if slots is None else slots
    n_sources, flag = np.uint32(len(table.remap_start)), np.zeros(1, np.uint32)
    numbers = (np.asarray(selection, np.int64), np.uint32(n))
    lengths, offsets = filled(n, np.int64), filled(n + 1, np.int64)
    n_index = np.uint64(len(rows))
    args: list[Any] = [*numbers, rows.source, rows.length, n_index, n_sources, lengths, flag]
    launcher.run("plan_lengths", 2, 64, args)
    launcher.run("scan_kept", 1, 64, [lengths, np.uint32(n), offsets])
    arrays = np.zeros(len(table.chunk_elements), ARRAY)
    arrays["first_chunk"], arrays["elements"] = table.chunk_base[:-1], table.chunk_elements
    arrays["n_chunks"] = np.diff(table.chunk_base)
    pieces, segments = filled(n * table.n_roles * slots, PIECE), filled(n * (2 * slots - 1), SEGMENT)
    status, row_status = filled(n * table.n_roles * slots, np.uint32), filled(n, np.uint32)
    row_ptr = filled(n + 1, np.uint32)
    args = [*numbers, rows.source, rows.start, rows.length, n_index, arrays, n_sources]
    args += [np.uint32(table.n_roles), made.run_of, np.uint64(len(made.run_of)), offsets, np.uint32(slots)]
    args += [pieces, status, row_status, np.uint32(layer), segments, row_ptr, flag]
    launcher.run("plan_rows", 2, 64, args)
    check_canary(lengths, offsets, pieces, segments, status, row_status, row_ptr)
    assert not status[:-1].any()
    assert not row_status[:-1].any()
    written = {"offsets": offsets, "pieces": pieces, "segments": segments, "row_ptr": row_ptr}
    return {**{name: array[:-1] for name, array in written.items()}, "any": flag}


def expected_pieces(made: Case, selection: np.ndarray) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    """(row, role) -> (run, skip, count, out, source) of its pieces in order, by the host's plan."""
    plan = plan_rows(made.table, made.rows, selection)
    found: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for c, (chunk, array) in enumerate(zip(plan.chunks, plan.chunk_array, strict=True)):
        source, role = divmod(int(array), made.table.n_roles)
        for p in range(plan.piece_ptr[c], plan.piece_ptr[c + 1]):
            piece = (made.run_of[chunk], plan.piece_skip[p], plan.piece_count[p], plan.piece_out[p], source)
            found.setdefault((int(plan.piece_row[p]), role), []).append(tuple(map(int, piece)))
    return {key: sorted(pieces, key=lambda piece: piece[3]) for key, pieces in found.items()}


SIZES = [
    [[128, 128], [256, 256]],
    [[128, 256], [256, 128]],
    [[100, 100, 100]],
    [[512, 128, 128], [256, 256, 512], [128, 128, 128]],
]


@pytest.mark.parametrize("sizes", SIZES)
def test_pieces_and_offsets_are_those_of_the_hosts_plan(launcher: Any, sizes: list[list[int]]) -> None:
    rng = np.random.default_rng(5)
    made = case(rng, sizes)
    selection = rng.integers(0, len(made.rows), 70)
    found = run(launcher, made, selection)
    plan = plan_rows(made.table, made.rows, selection)
    np.testing.assert_array_equal(found["offsets"], plan.offsets)
    assert not found["any"].any()
    expected = expected_pieces(made, selection)
    assert max(map(len, expected.values())) > 1
    slots = found["pieces"].reshape(len(selection), made.table.n_roles, made.slots)
    for row in range(len(selection)):
        for role in range(made.table.n_roles):
            pieces = slots[row, role]
            taken = [
                tuple(int(piece[name]) for name in ("run", "skip", "count", "out", "source"))
                for piece in pieces
                if piece["count"]
            ]
            assert taken == expected.get((row, role), [])
            assert (pieces["role"][pieces["count"] > 0] == role).all()


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("sizes", [[[128, 128, 256]], [[512, 128, 384], [256, 256, 512]]])
def test_segments_cover_each_row_once(launcher: Any, layer: int, sizes: list[list[int]]) -> None:
    """Element after element, the indices and the values of a row lie where the pieces say."""
    rng = np.random.default_rng(layer)
    made = case(rng, sizes)
    selection = rng.integers(0, len(made.rows), 40)
    found = run(launcher, made, selection, layer)
    assert not found["any"].any()
    n = 2 * made.slots - 1
    np.testing.assert_array_equal(found["row_ptr"], np.arange(len(selection) + 1) * n)
    pieces = found["pieces"]
    expected = expected_pieces(made, selection)
    for row in range(len(selection)):
        for which, role in (("index", 0), ("value", layer)):
            places = [
                (int(pieces[segment[f"{which}_piece"]]["run"]), int(segment[f"{which}_skip"]) + k)
                for segment in found["segments"][row * n : (row + 1) * n]
                for k in range(segment["count"])
            ]
            wanted = [
                (number, skip + k)
                for number, skip, count, *_ in expected.get((row, role), [])
                for k in range(count)
            ]
            assert places == wanted


def test_arrays_with_blocks_at_other_places_are_reported(launcher: Any) -> None:
    """Dense rows cannot be made of them at once; whoever asks for it made a mistake."""
    rng = np.random.default_rng(1)
    made = case(rng, [[100, 128]])
    selection = np.arange(len(made.rows))
    assert run(launcher, made, selection)["any"][0] == 0
    assert run(launcher, made, selection, 1)["any"][0] == BAD_PLACE


@pytest.mark.parametrize("wrong", ["row", "negative", "source", "length", "start", "chunk", "slots"])
def test_what_points_outside_is_refused(launcher: Any, wrong: str) -> None:
    """The row has no elements, and the rows beside it are what they are."""
    rng = np.random.default_rng(2)
    made = case(rng, [[128, 128], [256, 256]])
    rows, bad = made.rows, 3
    rows.source[:6], rows.start[:6], rows.length[:6] = 1, 300, 100
    selection = np.arange(6)
    if wrong in ("row", "negative"):
        selection[bad] = len(rows) if wrong == "row" else -1
    elif wrong == "source":
        rows.source[bad] = 2
    elif wrong == "length":
        rows.length[bad] = -1
    elif wrong == "start":
        rows.start[bad] = -1
    elif wrong == "chunk":
        rows.start[bad] = 5000
    else:
        rows.length[bad] = 2000
    found = run(launcher, made, selection, 1)
    assert found["any"][0] == BAD_PLACE
    counts = found["pieces"]["count"].reshape(6, 2, made.slots).sum(axis=2)
    assert (counts[[0, 1, 2, 4, 5]] == 100).all()
    assert (counts[bad] < 2000).all() if wrong == "slots" else not counts[bad].any()


@pytest.mark.parametrize("n_rows", [1, 33, 300])
def test_columns_are_gathered(launcher: Any, n_rows: int) -> None:
    rng = np.random.default_rng(n_rows)
    columns = [rng.integers(0, 100, 50).astype(dtype) for dtype in (np.int64, np.float32, np.uint16, np.int8)]
    records = np.zeros(5, COLUMN)
    records["size"] = [8, 8, 4, 2, 1]
    records["at"] = [0, 8, 16, 20, 22]
    records["data"][1:] = [launcher.address(column) for column in columns]
    rows = rng.integers(0, 50, n_rows)
    out = filled(23 * n_rows, np.uint8)
    args = [rows, np.uint32(n_rows), np.uint64(50), records, np.uint32(5), out]
    launcher.run("gather_columns", 3, 64, args)
    check_canary(out)
    for at, column in zip(records["at"].tolist(), [np.arange(50), *columns], strict=True):
        part = out[at * n_rows :][: n_rows * column.itemsize].view(column.dtype)
        np.testing.assert_array_equal(part, column[rows])


def test_columns_of_rows_that_there_are_not_are_left(launcher: Any) -> None:
    records, out = np.zeros(1, COLUMN), filled(24, np.uint8)
    records["size"] = 8
    launcher.run(
        "gather_columns",
        1,
        32,
        [np.array([4, 5, -1]), np.uint32(3), np.uint64(5), records, np.uint32(1), out],
    )
    assert out[:8].view(np.int64)[0] == 4
    assert (out[8:24] == CANARY).all()
