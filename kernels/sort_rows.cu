// Sorts the rows of a flat CSR by column, and drops the elements whose column number is -1: what sparse tensors are
// made of. Equals HostEngine.canonical, but for rows in which a column repeats: those keep their order.
#include "convert.cuh"

#define HBX_DROPPED (-1)

// One bit per column of a tile, and per word of 32 columns the number of bits before it.
struct HbxColumnSet {
    u32* bits;
    u32* before;
    u32 n_words;
};

HBX_DEVICE void hbx_sort_clear(const HbxColumnSet& set) {
    for (u32 w = threadIdx.x; w < set.n_words; w += blockDim.x) set.bits[w] = 0;
    __syncthreads();
}

// Fills `before`; returns the number of bits, in every thread. `sums` has room for a word per warp.
HBX_DEVICE u32 hbx_sort_count(const HbxColumnSet& set, u32* sums) {
    u32 warp = threadIdx.x / 32u, n_warps = blockDim.x / 32u, carry = 0;
    for (u32 first = 0; first < set.n_words; first += blockDim.x) {
        u32 w = first + threadIdx.x, own = w < set.n_words ? (u32)__popc(set.bits[w]) : 0;
        u32 sum = hbx_scan_sum(own);
        if (hbx_lane() == 31u) sums[warp] = sum;
        __syncthreads();
        u32 lower = carry;
        for (u32 k = 0; k < n_warps; k++) {
            if (k < warp) lower += sums[k];
            carry += sums[k];
        }
        if (w < set.n_words) set.before[w] = lower + sum - own;
        __syncthreads();
    }
    return carry;
}

HBX_DEVICE void hbx_sort_move(void* to, u64 at, const void* from, u64 i, u32 itemsize) {
    if (itemsize == 1) ((u8*)to)[at] = ((const u8*)from)[i];
    if (itemsize == 2) ((u16*)to)[at] = ((const u16*)from)[i];
    if (itemsize == 4) ((u32*)to)[at] = ((const u32*)from)[i];
    if (itemsize == 8) ((u64*)to)[at] = ((const u64*)from)[i];
}

// Where elements come from and go to. Nothing is written beyond `limit`.
struct HbxSortRow {
    const i32* indices;
    const void* values;
    i64* indices_out;
    void* values_out;
    u32 itemsize;
    u64 begin, end, at, limit;

    HBX_DEVICE void move(u64 i, u64 place) const {
        if (place >= limit) return;
        if (indices_out) indices_out[place] = indices[i];
        hbx_sort_move(values_out, place, values, i, itemsize);
    }
};

// Sorts the columns [first, first + 32 * n_words) of a row to places from `at` on. Returns their number, in every
// thread. Where a column is met twice, in this tile or one before, it sets *repeats and moves nothing.
HBX_DEVICE u32 hbx_sort_tile(const HbxSortRow& row, const HbxColumnSet& set, u64 at, u32 first, u32 n_features,
                             u32* repeats, u32* sums) {
    hbx_sort_clear(set);
    u32 width = n_features - first < 32u * set.n_words ? n_features - first : 32u * set.n_words;
    for (u64 i = row.begin + threadIdx.x; i < row.end; i += blockDim.x) {
        u32 column = (u32)row.indices[i] - first;  // -1 is beyond every tile
        if ((u32)row.indices[i] < first || column >= width) continue;
        u32 bit = 1u << (column & 31u);
        if (atomicOr(set.bits + column / 32u, bit) & bit) atomicExch(repeats, 1u);
    }
    __syncthreads();
    u32 n = hbx_sort_count(set, sums);
    // A row in which a column repeats is copied in the end. Here two threads would write to one place.
    for (u64 i = row.begin + threadIdx.x; i < row.end && !*repeats; i += blockDim.x) {
        u32 column = (u32)row.indices[i] - first;
        if ((u32)row.indices[i] < first || column >= width) continue;
        u32 smaller = set.bits[column / 32u] & ((1u << (column & 31u)) - 1u);
        row.move(i, at + set.before[column / 32u] + (u32)__popc(smaller));
    }
    __syncthreads();
    return n;
}

// Moves what is kept of a row, in stored order. One warp.
HBX_DEVICE void hbx_sort_copy(const HbxSortRow& row) {
    u64 at = row.at;
    for (u64 first = row.begin; first < row.end; first += 32u) {
        u64 i = first + hbx_lane();
        bool there = i < row.end && row.indices[i] != HBX_DROPPED;
        u32 kept = __ballot_sync(HBX_FULL, there);
        if (there) row.move(i, at + (u64)__popc(kept & ((1u << hbx_lane()) - 1u)));
        at += (u64)__popc(kept);
    }
}

// A block of any multiple of 32 threads takes one row at a time, grid-stride. Dynamic shared memory holds 8 bytes for
// each of tile_words (at least 1) words of 32 columns; wider matrices are sorted tile by tile. offsets_out counts
// the kept elements; where nothing is dropped it may be `offsets`. Launched once per layer; indices_out may be null.
// *unsorted becomes 1 if a column repeats within a row. Checked: offsets against n_elements and `capacity`. Columns
// were checked when they were decoded: others than -1 lie in [0, n_features). `itemsize` is 1, 2, 4 or 8.
HBX_KERNEL sort_rows(const i32* indices, const i64* offsets, u32 n_rows, u64 n_elements, const i64* offsets_out,
                     i64* indices_out, const void* values, void* values_out, u32 itemsize, u64 capacity,
                     u32 n_features, u32 tile_words, u32* unsorted) {
    HBX_DYN_SMEM(shared);
    __shared__ u32 sums[32];
    __shared__ u32 repeats;
    for (u64 r = blockIdx.x; r < n_rows; r += gridDim.x) {
        i64 begin = offsets[r], end = offsets[r + 1], at = offsets_out[r], limit = offsets_out[r + 1];
        bool inside = begin >= 0 && begin <= end && (u64)end <= n_elements && at >= 0 && at <= limit;
        if (!inside) continue;  // the same for all threads
        if ((u64)limit > capacity) limit = (i64)capacity;
        HbxSortRow row = {indices,     values,     indices_out, values_out, itemsize,
                          (u64)begin, (u64)end, (u64)at,     (u64)limit};
        if (threadIdx.x == 0) repeats = 0;
        u64 place = row.at, first = 0;
        do {  // once at least, also without features: the barriers in it show `repeats` to every thread
            u64 words = (n_features - first + 31u) / 32u;
            u32 n_words = words < tile_words ? (u32)words : tile_words;
            HbxColumnSet set = {(u32*)shared, (u32*)shared + tile_words, n_words};
            place += hbx_sort_tile(row, set, place, (u32)first, n_features, &repeats, sums);
            first += 32ull * n_words;
        } while (first < n_features);
        if (repeats) {
            if (threadIdx.x < 32u) hbx_sort_copy(row);
            if (threadIdx.x == 0) atomicOr(unsorted, 1u);
        }
        __syncthreads();
    }
}
