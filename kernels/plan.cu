// Plans rows on the device: from the row numbers of a batch to the pieces and segments that the rowpack kernels take,
// and the batch's metadata, where the row index and all chunks lie in device memory.
//
// Every row has the same number of slots for pieces, `slots` per array of its Source, and 2 * slots - 1 for segments, so
// that no row has to wait for another one's number: slots that a row does not need have count 0, which the rowpack
// kernels pass over. Grids are any; threads take rows, or one value of one column, grid-stride.
// Checked: row, source, array and chunk against their tables. A row that is refused has no elements, and sets
// HBX_BAD_PLACE in `any`: the host then plans the batch anew, which says what is wrong.
// Equals `plan_rows` and `cut_segments` of the host, apart from the empty slots; NumPy's `column[rows]`.
#include "convert.cuh"

// Where a row lies in each array of its Source; count 0 where it has no elements or is refused.
struct HbxSpan {
    u32 source;
    u64 start;
    u32 count;
};

HBX_DEVICE HbxSpan hbx_span(i64 row, const i32* source, const i64* start, const i32* length, u64 n_index,
                            u32 n_sources, u32* any) {
    HbxSpan span = {0, 0, 0};
    if (row < 0 || (u64)row >= n_index) {
        atomicOr(any, HBX_BAD_PLACE);
        return span;
    }
    i32 s = source[row], n = length[row];
    if (s < 0) return span;  // the row lacks this modality
    i64 first = start ? start[row] : 0;
    if ((u32)s >= n_sources || n < 0 || first < 0) {
        atomicOr(any, HBX_BAD_PLACE);
        return span;
    }
    span.source = (u32)s;
    span.start = (u64)first;
    span.count = (u32)n;
    return span;
}

// lengths[r] = elements of row r of the batch.
HBX_KERNEL plan_lengths(const i64* rows, u32 n_rows, const i32* source, const i32* length, u64 n_index, u32 n_sources,
                        i64* lengths, u32* any) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 r = (u64)blockIdx.x * blockDim.x + threadIdx.x; r < n_rows; r += step) {
        lengths[r] = hbx_span(rows[r], source, 0, length, n_index, n_sources, any).count;
    }
}

// Writes the pieces of one row in one array, and zeros their status; returns whether there are slots for all.
HBX_DEVICE bool hbx_cut_row(const HbxSpan& span, const HbxArray& array, u32 role, const u32* run_of, u64 n_chunks,
                            u64 out, u32 slots, HbxPiece* pieces, u32* status) {
    u32 taken = 0;
    bool known = true;
    for (u32 k = 0; k < slots; k++) {
        HbxPiece piece = {0, 0, 0, 0, 0, 0, 0};
        if (taken < span.count && array.elements != 0) {
            u64 at = span.start + taken, chunk = at / array.elements;
            u32 skip = (u32)(at - chunk * array.elements), left = array.elements - skip;
            known = known && chunk < array.n_chunks && hbx_fits(array.first_chunk, array.n_chunks, n_chunks);
            if (known) {
                piece.out = out + taken;
                piece.run = run_of[array.first_chunk + chunk];
                piece.skip = skip;
                piece.count = left < span.count - taken ? left : span.count - taken;
                piece.source = span.source;
                piece.role = role;
                taken += piece.count;
            }
        }
        pieces[k] = piece;
        status[k] = 0;
    }
    return known && taken == span.count;
}

// Pairs the pieces of column indices with those of a layer; returns whether they have their blocks at the same places.
HBX_DEVICE bool hbx_pair_row(const HbxPiece* pieces, u32 first, u32 layer, u32 slots, HbxSegment* segments) {
    u32 i = 0, v = 0, i_used = 0, v_used = 0;
    bool aligned = true;
    for (u32 k = 0; k < 2 * slots - 1; k++) {
        HbxSegment segment = {0, 0, 0, 0, 0, 0};
        if (i < slots && v < slots) {
            const HbxPiece index = pieces[first + i], value = pieces[layer + v];
            u32 i_left = index.count - i_used, v_left = value.count - v_used;
            segment.index_piece = first + i;
            segment.value_piece = layer + v;
            segment.index_skip = index.skip + i_used;
            segment.value_skip = value.skip + v_used;
            segment.count = i_left < v_left ? i_left : v_left;
            if (segment.count) aligned = aligned && (segment.index_skip - segment.value_skip) % 128u == 0;
            i_used += segment.count;
            v_used += segment.count;
            if (i_used == index.count) {
                i++;
                i_used = 0;
            }
            if (v_used == value.count) {
                v++;
                v_used = 0;
            }
        }
        segments[k] = segment;
    }
    return aligned;
}

// Writes pieces[r * n_roles * slots + role * slots + k], role 0 being column indices, and with a `layer` > 0, the role
// whose values become dense rows, segments and row_ptr. `arrays` has n_roles entries per Source, `run_of` the number of
// the HbxRun of every chunk. `offsets` may be null, and then every row's output begins at 0. Zeros a status word per
// piece, and one per row.
HBX_KERNEL plan_rows(const i64* rows, u32 n_rows, const i32* source, const i64* start, const i32* length, u64 n_index,
                     const HbxArray* arrays, u32 n_sources, u32 n_roles, const u32* run_of, u64 n_chunks,
                     const i64* offsets, u32 slots, HbxPiece* pieces, u32* status, u32* row_status, u32 layer,
                     HbxSegment* segments, u32* row_ptr, u32* any) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 r = (u64)blockIdx.x * blockDim.x + threadIdx.x; r < n_rows; r += step) {
        HbxSpan span = hbx_span(rows[r], source, start, length, n_index, n_sources, any);
        u64 out = offsets ? (u64)offsets[r] : 0;
        u32 first = (u32)r * n_roles * slots;
        bool good = true;
        for (u32 role = 0; role < n_roles; role++) {
            HbxArray array = {0, 0, 0};
            if (span.count) array = arrays[(u64)span.source * n_roles + role];
            u32 at = first + role * slots;
            good = hbx_cut_row(span, array, role, run_of, n_chunks, out, slots, pieces + at, status + at) && good;
        }
        row_status[r] = 0;
        if (layer > 0 && layer < n_roles) {
            u32 n = 2 * slots - 1;
            good = hbx_pair_row(pieces, first, first + layer * slots, slots, segments + r * n) && good;
            row_ptr[r] = (u32)r * n;
            if (r + 1 == n_rows) row_ptr[n_rows] = n_rows * n;
        }
        if (!good) atomicOr(any, HBX_BAD_PLACE);
    }
}

// Writes what metadata columns hold for the rows: n_rows values of `size` bytes (1, 2, 4, 8) at out + at * n_rows of
// each column, which has n_index of them. A column without data is the row numbers themselves. Rows that there are not
// get nothing; `plan_rows` reports them.
HBX_KERNEL gather_columns(const i64* rows, u32 n_rows, u64 n_index, const HbxColumn* columns, u32 n_columns, u8* out) {
    u64 step = (u64)gridDim.x * blockDim.x, n = (u64)n_rows * n_columns;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        HbxColumn column = columns[i / n_rows];
        u64 r = i % n_rows;
        i64 row = rows[r];
        if (row < 0 || (u64)row >= n_index) continue;
        u8* to = out + column.at * n_rows;
        if (column.data == 0) {
            ((i64*)to)[r] = row;
        } else if (column.size == 1) {
            to[r] = ((const u8*)column.data)[row];
        } else if (column.size == 2) {
            ((u16*)to)[r] = ((const u16*)column.data)[row];
        } else if (column.size == 4) {
            ((u32*)to)[r] = ((const u32*)column.data)[row];
        } else {
            ((u64*)to)[r] = ((const u64*)column.data)[row];
        }
    }
}
