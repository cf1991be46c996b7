// Puts the columns of dense rows in their places: what `out[row, remap[c]] = row[c]` of NumPy does to zeros.
#include "convert.cuh"

#define HBX_PLACE_DEPTH 4u  // elements in flight per lane

// One row by one warp, its lanes on neighboring columns of the output. `columns` holds for each of them the row's
// column, or a negative number; null: the same one. Returns status bits.
template <class T>
HBX_DEVICE u32 hbx_place_row(T* out, const T* from, u64 length, u32 n_features, const i32* columns) {
    u32 bits = 0;
    for (u64 first = hbx_lane(); first < n_features; first += 32u * HBX_PLACE_DEPTH) {
        T held[HBX_PLACE_DEPTH];
#pragma unroll
        for (u32 k = 0; k < HBX_PLACE_DEPTH; k++) {
            u64 j = first + 32u * k;
            held[k] = 0;
            if (j >= n_features || length == 0) continue;
            i64 c = columns == 0 ? (i64)j : columns[j];
            if (c >= (i64)length) bits = HBX_BAD_PLACE;
            if (c >= 0 && c < (i64)length) held[k] = from[c];
        }
#pragma unroll
        for (u32 k = 0; k < HBX_PLACE_DEPTH; k++) {
            u64 j = first + 32u * k;
            if (j < n_features) out[j] = held[k];
        }
    }
    return bits;
}

// A warp takes one row at a time, grid-stride. Row r holds the elements [offsets[r], offsets[r + 1]) of `from`, all of
// `size` bytes (1, 2, 4, 8); without elements it becomes zeros, whatever its source says. The remap of its HbxSource
// goes the other way than elsewhere: output column -> column of the row, -1 where it has none, n_features entries;
// with `identity` they are the same. `out` has n_rows * n_features elements, every one of which is written; a row that
// is refused is written as zeros. Checked: offsets, source, remap and every column, against what there is, and `size`.
HBX_KERNEL place_columns(const void* from, u64 n_elements, const i64* offsets, const i32* row_sources, u32 n_rows,
                         const HbxSource* sources, u32 n_sources, const i32* remap, u64 remap_entries, void* out,
                         u32 n_features, u32 size, u32* status, u32* any) {
    u64 warp = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32u, n_warps = (u64)gridDim.x * blockDim.x / 32u;
    bool known = size == 1 || size == 2 || size == 4 || size == 8;
    for (u64 r = warp; r < n_rows; r += n_warps) {
        i64 begin = offsets[r], end = offsets[r + 1];
        bool good = begin >= 0 && begin <= end && (u64)end <= n_elements;
        u64 length = good ? (u64)(end - begin) : 0;
        const i32* columns = 0;
        if (length != 0) {
            i32 s = row_sources[r];
            good = s >= 0 && (u32)s < n_sources;
            HbxSource source = {0, 0, 0};
            if (good) source = sources[s];
            good = good && source.remap_length == n_features;
            good = good && (source.identity || hbx_fits(source.remap_start, n_features, remap_entries));
            if (!source.identity) columns = remap + source.remap_start;
            if (!good) length = 0;
        }
        u32 bits = good && known ? 0 : HBX_BAD_PLACE;
        u64 at = length != 0 ? (u64)begin : 0, to = r * n_features;
        if (size == 1) bits |= hbx_place_row((u8*)out + to, (const u8*)from + at, length, n_features, columns);
        if (size == 2) bits |= hbx_place_row((u16*)out + to, (const u16*)from + at, length, n_features, columns);
        if (size == 4) bits |= hbx_place_row((u32*)out + to, (const u32*)from + at, length, n_features, columns);
        if (size == 8) bits |= hbx_place_row((u64*)out + to, (const u64*)from + at, length, n_features, columns);
        if (bits != 0) hbx_fail(status + r, any, bits);
    }
}
