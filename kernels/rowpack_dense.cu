// Dense rows out of hbx_gpu.rowpack chunks, nothing in between: decode, remap, normalize, log1p, round, store.
//
// A block of threads (whole warps, 256 threads at most) takes a row. Counts add up as u32 in a tile in dynamic shared
// memory, 4 * tile_features + HBX_TILE_SLACK bytes; with more features than that, the block walks along them in tiles
// and decodes again. Warps take the row's blocks of 128 in turn, indices and values of a block together. Then all
// threads write the tile and leave zeros behind: 16 bytes at a time, single elements up to the first 16-byte boundary
// and behind the last. Small counts, nearly all, find what they become in a table made once per row.
// The arena is 16-byte aligned, `out` is aligned to its elements and holds n_rows * n_features of them; all are
// written, also those of rows that failed. Element sizes 1, 2 and 4 only.
// Checked: row, segment, piece, run and source against their tables and runs against the arena (64 bits); every
// block against its run; every column against the group's features and the output. What fails sets the status word
// of its piece, or `any` alone where there is no such piece, and adds nothing for that block.
// Equals rowpack_dense of tests/kernels/rowpack_reference.py: sums of counts modulo 2^32, total of kept columns
// exact, x = (float)(count * (target_sum / total)), log1p within 2e-6, float16 and bfloat16 to nearest even.
#include "rowpack.cuh"

#define HBX_DENSE_WARPS 8u
#define HBX_SMALL 256u  // counts below it are looked up
#define HBX_DROPPED 0xffffffffu

struct HbxDense {
    const u8* arena;
    u64 arena_bytes;
    const HbxRun* runs;
    u32 n_runs;
    const HbxPiece* pieces;
    u32 n_pieces;
    const HbxSegment* segments;
    u32 n_segments;
    const HbxSource* sources;
    u32 n_sources;
    const i32* remap;
    u64 remap_entries;
    u32 n_features;
    u32* status;
    u32* any;
};

struct HbxTile {
    u32* counts;
    u32 begin;  // output column of counts[0]
    u32 n;
};

// What a count becomes.
struct HbxCount {
    float* table;   // of HBX_SMALL counts, in shared memory
    double* scale;  // likewise; of the row
    bool convert;  // false: scale is 1 and there is no log1p
    bool log1p;
    HBX_DEVICE float compute(u32 count) const {
        float x = (float)(count * *scale);
        return log1p ? hbx_log1p(x) : x;
    }
    HBX_DEVICE float operator()(u32 count) const {
        if (!convert) return (float)count;
        return count < HBX_SMALL ? table[count] : compute(count);
    }
};

HBX_DEVICE float hbx_as_it_is(u32 count) { return (float)count; }

// Reports by the lane that has bits to report.
HBX_DEVICE void hbx_dense_fail(const HbxDense& job, u32 piece, u32 bits) {
    if (bits == 0) return;
    if (piece < job.n_pieces) {
        hbx_fail(job.status + piece, job.any, bits);
    } else {
        atomicOr(job.any, bits);
    }
}

// The features of a Source.
struct HbxColumns {
    const i32* remap;  // null: the same numbers
    u32 length;
};

// Adds one block's counts to the tile; returns status bits of the indices, the same in all lanes.
HBX_DEVICE u32 hbx_add_counts(const HbxDense& job, const HbxTile& tile, const HbxColumns& source, const u32* ids,
                              const u32* counts, u32 first, u32 n, u64& total) {
    u32 columns[4];
    bool outside = false, misplaced = false;
#pragma unroll
    for (u32 c = 0; c < 4; c++) {  // all look-ups before the first addition
        bool mine = first + c < n;  // `first` wraps for what lies before the segment
        bool known = ids[c] < source.length;
        outside |= mine & !known;
        columns[c] = HBX_DROPPED;
        if (mine & known) columns[c] = source.remap ? (u32)source.remap[ids[c]] : ids[c];
    }
#pragma unroll
    for (u32 c = 0; c < 4; c++) {
        misplaced |= columns[c] + 1 > job.n_features;  // HBX_DROPPED + 1 = 0
        if (columns[c] < job.n_features) total += counts[c];
    }
#pragma unroll
    for (u32 c = 0; c < 4; c++) {
        u32 at = columns[c] - tile.begin;
        if (at < tile.n) atomicAdd(tile.counts + at, counts[c]);
    }
    if (!__any_sync(HBX_FULL, outside | misplaced)) return 0;
    return __reduce_or_sync(HBX_FULL, (outside ? HBX_BAD_COLUMN : 0) | (misplaced ? HBX_BAD_PLACE : 0));
}

// Adds this warp's blocks of one segment: turn, turn + n_warps, ... below n_blocks.
HBX_DEVICE void hbx_add_segment(const HbxDense& job, const HbxTile& tile, const HbxSegment& segment, u32 turn,
                                u32 n_blocks, HbxScratch<u32>* scratch, u64& total) {
    u32 n_warps = blockDim.x / HBX_WARP, lane = hbx_lane();
    // Lanes 0-7 and 16-23 care for the indices, the others for the values.
    bool of_values = (lane & 8u) != 0;
    u32 number = of_values ? segment.value_piece : segment.index_piece;
    u32 skip = of_values ? segment.value_skip : segment.index_skip;
    u32 run_number = number < job.n_pieces ? job.pieces[number].run : job.n_runs;
    const HbxRun* run = job.runs + run_number;
    bool good = run_number < job.n_runs && run->element_size <= 4u &&
                (segment.index_skip - segment.value_skip) % HBX_BLOCK == 0 &&
                hbx_run_holds(run, job.arena_bytes, skip, segment.count);
    bool reports = lane == 0 || lane == 8;
    if (__any_sync(HBX_FULL, !good)) {
        hbx_dense_fail(job, number, !good && reports ? HBX_BAD_RECORD : 0);
        return;
    }

    HbxSource source = {0, 0, 0};
    u32 source_number = job.pieces[segment.index_piece].source;
    bool known = source_number < job.n_sources;
    if (known) source = job.sources[source_number];
    if (!known || !(source.identity || hbx_fits(source.remap_start, source.remap_length, job.remap_entries))) {
        hbx_dense_fail(job, number, lane == 0 ? HBX_BAD_PLACE : 0);
        return;
    }
    HbxColumns columns = {source.identity ? nullptr : job.remap + source.remap_start, source.remap_length};
    while (turn < n_blocks) {
        u32 mine = turn + (lane >> 4) * n_warps;
        HbxEntry<u32> entry = hbx_look_up<u32>(job.arena, run, skip / HBX_BLOCK + mine, mine < n_blocks);
#pragma unroll 1
        for (u32 from = 0; from < HBX_WARP && turn < n_blocks; from += 16, turn += n_warps) {
            u32 ids[4], counts[4];
            HbxLoaded indices = hbx_load_block(job.arena, entry, from);
            HbxLoaded values = hbx_load_block(job.arena, entry, from + 8);
            u32 index_bits = hbx_decode_block(job.arena, entry, from, indices, scratch, ids);
            u32 value_bits = hbx_decode_block(job.arena, entry, from + 8, values, scratch, counts);
            if ((index_bits | value_bits) == 0) {
                u32 first = turn * HBX_BLOCK + 4 * lane - segment.index_skip % HBX_BLOCK;
                index_bits = hbx_add_counts(job, tile, columns, ids, counts, first, segment.count, total);
            }
            if (index_bits | value_bits) hbx_dense_fail(job, number, reports ? (lane ? value_bits : index_bits) : 0);
        }
    }
}

// Adds this warp's part of segments [first, last) to the tile; returns the lane's part of the total.
HBX_DEVICE u64 hbx_add_row(const HbxDense& job, const HbxTile& tile, u32 first, u32 last, HbxScratch<u32>* scratch) {
    u64 total = 0;
    u32 n_warps = blockDim.x / HBX_WARP;
    u32 turn = threadIdx.x / HBX_WARP;  // the warp's next block, counted from the first of the segment
    for (u32 s = first; s < last; s++) {
        HbxSegment segment = job.segments[s];
        u32 n_blocks = 0;
        if (segment.count) {
            n_blocks = (u32)(((u64)(segment.index_skip % HBX_BLOCK) + segment.count + HBX_BLOCK - 1) / HBX_BLOCK);
        }
        if (turn < n_blocks) {
            hbx_add_segment(job, tile, segment, turn, n_blocks, scratch, total);
            turn += (n_blocks - turn + n_warps - 1) / n_warps * n_warps;
        }
        turn -= n_blocks;
    }
    return total;
}

template <u32 n>
HBX_DEVICE bool hbx_all_small(const HbxVector<u32>* counts) {
    u32 all = 0;
#pragma unroll
    for (u32 k = 0; k < n; k++) all |= counts[k / 4].at[k % 4];
    return all < HBX_SMALL;  // a power of two
}

// Writes out[0, n) = value(tile[0, n)) and zeros to the tile, by all threads of a block. The tile begins
// hbx_tile_shift counts after a 16-byte boundary.
template <class Format>
HBX_DEVICE void hbx_flush_tile(typename Format::Element* out, u32* tile, u32 n, const HbxCount& value) {
    const u32 size = (u32)sizeof(typename Format::Element), step = 16u / size;
    u32 head = hbx_head(out);
    if (head > n) head = n;
    u32 vectors = (n - head) / step;
    for (u32 v = threadIdx.x; v < vectors; v += blockDim.x) {
        HbxVector<u32> counts[step / 4];
        u32* from = tile + head + v * step;
#pragma unroll
        for (u32 k = 0; k < step / 4; k++) {
            counts[k] = ((HbxVector<u32>*)from)[k];
            ((HbxVector<u32>*)from)[k] = HbxVector<u32>{};
        }
        HbxWords words;
        if (!value.convert) {
            words = Format::vector(counts[0].at, hbx_as_it_is);
        } else if (hbx_all_small<step>(counts)) {
            words = Format::vector(counts[0].at, [&](u32 count) { return value.table[count]; });
        } else {
            words = Format::vector(counts[0].at, [&](u32 count) { return value.compute(count); });
        }
        ((HbxWords*)(out + head))[v] = words;
    }
    for (u32 i = threadIdx.x; i < n - vectors * step; i += blockDim.x) {
        u32 at = i < head ? i : i + vectors * step;
        out[at] = Format::bits(value(tile[at]));
        tile[at] = 0;
    }
}

// What the row's total makes of counts: scale and table. All threads call it; `totals` holds a part per warp.
HBX_DEVICE void hbx_prepare_counts(const HbxCount& value, double target_sum, const u64* totals) {
    if (threadIdx.x == 0) {
        u64 total = 0;
        for (u32 w = 0; target_sum > 0 && w < blockDim.x / HBX_WARP; w++) total += totals[w];
        *value.scale = total ? target_sum / (double)total : 1.0;
    }
    __syncthreads();
    for (u32 count = threadIdx.x; count < HBX_SMALL; count += blockDim.x) value.table[count] = value.compute(count);
    __syncthreads();
}

template <class Format>
HBX_DEVICE void hbx_dense_rows(const HbxDense& job, const u32* row_ptr, u32 n_rows, typename Format::Element* out,
                               u32 tile_features, double target_sum, const HbxCount& value, u32* counts,
                               HbxScratch<u32>* scratch, u64* totals) {
    if (tile_features == 0 && job.n_features != 0) {
        if (threadIdx.x == 0) atomicOr(job.any, HBX_BAD_PLACE);
        return;
    }
    u32 warp = threadIdx.x / HBX_WARP;
    for (u32 i = threadIdx.x; i < tile_features + HBX_TILE_SLACK / 4u; i += blockDim.x) counts[i] = 0;
    for (u64 row = blockIdx.x; row < n_rows; row += gridDim.x) {
        u32 first = row_ptr[row], last = row_ptr[row + 1];
        if (first > last || last > job.n_segments) {
            if (threadIdx.x == 0) atomicOr(job.any, HBX_BAD_PLACE);
            first = last;
        }
        HbxTile tile = {counts, 0, 0};
        do {
            u32 left = job.n_features - tile.begin;
            tile.n = left < tile_features ? left : tile_features;
            typename Format::Element* line = out + (row * job.n_features + tile.begin);
            tile.counts = counts + hbx_tile_shift<u32>(line);
            __syncthreads();  // the tile is zero, and nobody reads totals or table
            u64 total = hbx_add_row(job, tile, first, last, scratch + warp);
            if (tile.begin == 0 && target_sum > 0) {
                total = hbx_scan_sum(total);
                if (hbx_lane() == 31u) totals[warp] = total;
            }
            __syncthreads();
            if (tile.begin == 0 && value.convert) hbx_prepare_counts(value, target_sum, totals);
            hbx_flush_tile<Format>(line, tile.counts, tile.n, value);
            tile.begin += tile.n;
        } while (tile.begin < job.n_features);
    }
}

#define HBX_ROWPACK_DENSE_PARAMETERS                                                                            \
    const u8 *__restrict__ arena, u64 arena_bytes, const HbxRun *__restrict__ runs, u32 n_runs,                 \
        const HbxPiece *__restrict__ pieces, u32 n_pieces, const HbxSegment *__restrict__ segments,             \
        u32 n_segments, const u32 *__restrict__ row_ptr, u32 n_rows, const HbxSource *__restrict__ sources,     \
        u32 n_sources, const i32 *__restrict__ remap, u64 remap_entries, void *__restrict__ out, u32 n_features, \
        u32 tile_features, double target_sum, u32 log1p, u32 *status, u32 *any
#define HBX_ROWPACK_DENSE_BODY(Format)                                                                          \
    HBX_DYN_SMEM(counts);                                                                                       \
    __shared__ HbxScratch<u32> scratch[HBX_DENSE_WARPS];                                                        \
    __shared__ u64 totals[HBX_DENSE_WARPS];                                                                     \
    __shared__ float table[HBX_SMALL];                                                                          \
    __shared__ double scale;                                                                                    \
    HbxDense job = {arena,      arena_bytes, runs,      n_runs, pieces,        n_pieces,   segments, n_segments, \
                    sources,    n_sources,   remap,     remap_entries,         n_features, status,   any};      \
    HbxCount value = {table, &scale, target_sum > 0 || log1p != 0, log1p != 0};                                 \
    hbx_dense_rows<Format>(job, row_ptr, n_rows, (Format::Element*)out, tile_features, target_sum, value,       \
                           (u32*)counts, scratch, totals)

HBX_KERNEL __launch_bounds__(256, 3) rowpack_dense_f32(HBX_ROWPACK_DENSE_PARAMETERS) {
    HBX_ROWPACK_DENSE_BODY(HbxFormatF32);
}
HBX_KERNEL __launch_bounds__(256, 3) rowpack_dense_f16(HBX_ROWPACK_DENSE_PARAMETERS) {
    HBX_ROWPACK_DENSE_BODY(HbxFormatF16);
}
HBX_KERNEL __launch_bounds__(256, 3) rowpack_dense_bf16(HBX_ROWPACK_DENSE_PARAMETERS) {
    HBX_ROWPACK_DENSE_BODY(HbxFormatBF16);
}
