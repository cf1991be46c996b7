// Drops the elements whose column number is -1 from flat CSR arrays, in three launches: count per row, scan, move.
// Equals NumPy's `keep = indices != -1; indices[keep], values[keep]`, offsets from the kept per row.
// Beside them: whether each row's columns ascend.
#include "convert.cuh"

#define HBX_DROPPED (-1)

// A row's elements, or none where its offsets leave [0, n_elements].
struct HbxCompactRow {
    u64 begin, end;
};

HBX_DEVICE HbxCompactRow hbx_compact_row(const i64* offsets, u64 r, u64 n_elements) {
    i64 begin = offsets[r], end = offsets[r + 1];
    HbxCompactRow row = {0, 0};
    if (begin >= 0 && begin <= end && (u64)end <= n_elements) {
        row.begin = (u64)begin;
        row.end = (u64)end;
    }
    return row;
}

HBX_DEVICE u64 hbx_compact_warp() { return ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32u; }
HBX_DEVICE u64 hbx_compact_warps() { return (u64)gridDim.x * blockDim.x / 32u; }

// kept[r] = elements of row r that are not dropped. A warp per row, grid-stride.
HBX_KERNEL count_kept(const i32* indices, u64 n_elements, const i64* offsets, u32 n_rows, i64* kept) {
    for (u64 r = hbx_compact_warp(); r < n_rows; r += hbx_compact_warps()) {
        HbxCompactRow row = hbx_compact_row(offsets, r, n_elements);
        u64 own = 0;
        for (u64 i = row.begin + hbx_lane(); i < row.end; i += 32u) own += indices[i] != HBX_DROPPED;
        u64 sum = hbx_scan_sum(own);
        if (hbx_lane() == 31u) kept[r] = (i64)sum;
    }
}

// offsets_out[r] = sum of kept before row r; offsets_out[n_rows] = the total. One block of up to 1,024 threads.
HBX_KERNEL scan_kept(const i64* kept, u32 n_rows, i64* offsets_out) {
    __shared__ u64 sums[32];
    u32 warp = threadIdx.x / 32u, n_warps = blockDim.x / 32u;
    u64 carry = 0;
    for (u64 first = 0; first < n_rows; first += blockDim.x) {
        u64 r = first + threadIdx.x, own = r < n_rows ? (u64)kept[r] : 0;
        u64 sum = hbx_scan_sum(own);
        if (hbx_lane() == 31u) sums[warp] = sum;
        __syncthreads();
        u64 before = carry;
        for (u32 k = 0; k < n_warps; k++) {
            if (k < warp) before += sums[k];
            carry += sums[k];
        }
        if (r < n_rows) offsets_out[r] = (i64)(before + sum - own);
        __syncthreads();
    }
    if (threadIdx.x == 0) offsets_out[n_rows] = (i64)carry;
}

HBX_DEVICE void hbx_compact_move(void* to, u64 at, const void* from, u64 i, u32 itemsize) {
    if (itemsize == 1) ((u8*)to)[at] = ((const u8*)from)[i];
    if (itemsize == 2) ((u16*)to)[at] = ((const u16*)from)[i];
    if (itemsize == 4) ((u32*)to)[at] = ((const u32*)from)[i];
    if (itemsize == 8) ((u64*)to)[at] = ((const u64*)from)[i];
}

// Moves what is kept, in order: a warp per row, 32 elements at a time. Launched once per layer; indices_out may be
// null. Nothing is written after offsets_out[r + 1] or `capacity`. `itemsize` is 1, 2, 4 or 8.
HBX_KERNEL compact_rows(const i32* indices, const i64* offsets, u32 n_rows, u64 n_elements, const i64* offsets_out,
                        i32* indices_out, const void* values, void* values_out, u32 itemsize, u64 capacity) {
    for (u64 r = hbx_compact_warp(); r < n_rows; r += hbx_compact_warps()) {
        HbxCompactRow row = hbx_compact_row(offsets, r, n_elements);
        u64 at = (u64)offsets_out[r], limit = (u64)offsets_out[r + 1];
        if (limit > capacity) limit = capacity;
        for (u64 first = row.begin; first < row.end; first += 32u) {
            u64 i = first + hbx_lane();
            i32 column = i < row.end ? indices[i] : HBX_DROPPED;
            u32 kept = __ballot_sync(HBX_FULL, column != HBX_DROPPED);
            u64 place = at + (u64)__popc(kept & ((1u << hbx_lane()) - 1u));
            if (column != HBX_DROPPED && place < limit) {
                if (indices_out) indices_out[place] = column;
                hbx_compact_move(values_out, place, values, i, itemsize);
            }
            at += (u64)__popc(kept);
        }
    }
}

// *unsorted becomes 1 if the columns of any row do not ascend strictly. A warp per row, grid-stride.
HBX_KERNEL csr_ascending(const i32* indices, const i64* offsets, u32 n_rows, u64 n_elements, u32* unsorted) {
    for (u64 r = hbx_compact_warp(); r < n_rows; r += hbx_compact_warps()) {
        HbxCompactRow row = hbx_compact_row(offsets, r, n_elements);
        bool found = false;
        for (u64 i = row.begin + 1 + hbx_lane(); i < row.end; i += 32u) found |= indices[i - 1] >= indices[i];
        if (found) atomicOr(unsorted, 1u);
    }
}
