// CSR out of hbx_gpu.rowpack chunks: column indices through the remap, values of layers.
//
// A warp takes a piece: it looks its blocks of 128 up, four at once, decodes one after the other, turns each round
// in shared memory so that neighboring lanes hold neighboring elements, and writes those that belong to the piece.
// Blocks of threads are 256 wide, the grid is any; no dynamic shared memory. The arena is 16-byte aligned.
// Checked: piece, run, source and output against their tables and the run against the arena (64 bits); every block
// against the run; every column against the group's features. A piece that fails sets its status word and writes
// nothing from the failing block on. Equals rowpack_csr of tests/kernels/rowpack_reference.py, which uses
// decode_rowpack_reference; values are converted as NumPy's astype does.
#include "rowpack.cuh"

#define HBX_CSR_WARPS 8u

union HbxAnyScratch {
    HbxScratch<u32> narrow;
    HbxScratch<u64> wide;
};

HBX_DEVICE HbxScratch<u32>* hbx_scratch(HbxAnyScratch* scratch, u32) { return &scratch->narrow; }
HBX_DEVICE HbxScratch<u64>* hbx_scratch(HbxAnyScratch* scratch, u64) { return &scratch->wide; }

// The part of a block that belongs to a piece: element `begin` of the chunk is the block's first.
struct HbxPart {
    u32 begin;
    u32 skip;
    u32 count;
};

// Writes the piece's elements among 128 in shared memory to out[0, count).
template <class To, class Word, class Convert>
HBX_DEVICE void hbx_write_part(To* out, const Word* block, const HbxPart& part, Convert convert) {
#pragma unroll
    for (u32 i = hbx_lane(); i < HBX_BLOCK; i += HBX_WARP) {
        u32 at = part.begin + i - part.skip;
        if (at < part.count) out[at] = convert(block[i]);
    }
}

template <class Word>
HBX_DEVICE void hbx_write_values(u64 out, u32 type, const Word* block, const HbxPart& part) {
    switch (type) {
        case HBX_U8:
        case HBX_I8: hbx_write_part((u8*)out, block, part, [](Word x) { return (u8)x; }); break;
        case HBX_U16:
        case HBX_I16: hbx_write_part((u16*)out, block, part, [](Word x) { return (u16)x; }); break;
        case HBX_U32:
        case HBX_I32: hbx_write_part((u32*)out, block, part, [](Word x) { return (u32)x; }); break;
        case HBX_F16: hbx_write_part((u16*)out, block, part, [](Word x) { return hbx_f16_bits((float)x); }); break;
        case HBX_F32: hbx_write_part((float*)out, block, part, [](Word x) { return (float)x; }); break;
        case HBX_F64: hbx_write_part((double*)out, block, part, [](Word x) { return (double)x; }); break;
        default: hbx_write_part((u64*)out, block, part, [](Word x) { return (u64)x; });
    }
}

// The features of a Source.
struct HbxColumns {
    const i32* remap;  // null: the same numbers
    u32 length;
};

// Writes output columns; returns HBX_BAD_COLUMN, and writes nothing, where a column is outside the group's features.
template <class Word>
HBX_DEVICE u32 hbx_write_columns(u64 out, const HbxColumns& source, const Word* block, const HbxPart& part) {
    i32 columns[HBX_BLOCK / HBX_WARP];
    bool outside = false;
#pragma unroll
    for (u32 c = 0; c < HBX_BLOCK / HBX_WARP; c++) {
        u32 i = hbx_lane() + HBX_WARP * c;
        if (part.begin + i - part.skip >= part.count) continue;
        Word id = block[i];
        if (id >= source.length) {
            outside = true;
        } else {
            columns[c] = source.remap ? source.remap[id] : (i32)id;
        }
    }
    if (__any_sync(HBX_FULL, outside)) return HBX_BAD_COLUMN;
#pragma unroll
    for (u32 c = 0; c < HBX_BLOCK / HBX_WARP; c++) {
        u32 at = part.begin + hbx_lane() + HBX_WARP * c - part.skip;
        if (at < part.count) ((i32*)out)[at] = columns[c];
    }
    return 0;
}

// Decodes and writes one piece whose records are in order; returns status bits.
template <class Word>
HBX_DEVICE u32 hbx_csr_piece(const u8* arena, const HbxRun* run, const HbxPiece& piece, const HbxColumns& source,
                             u64 out, u32 type, HbxScratch<Word>* scratch) {
    u32 block = piece.skip / HBX_BLOCK, last = (u32)(((u64)piece.skip + piece.count - 1) / HBX_BLOCK);
    while (block <= last) {
        u32 mine = block + hbx_lane() / HBX_BLOCK_RECORD;
        HbxEntry<Word> entry = hbx_look_up<Word>(arena, run, mine, mine <= last);
        for (u32 from = 0; from < HBX_WARP && block <= last; from += HBX_BLOCK_RECORD, block++) {
            Word values[4];
            HbxLoaded loaded = hbx_load_block(arena, entry, from);
            u32 bits = hbx_decode_block(arena, entry, from, loaded, scratch, values);
            if (bits) return bits;
            __syncwarp(HBX_FULL);  // the block before has been written out
#pragma unroll
            for (u32 c = 0; c < 4; c++) scratch->high[4 * hbx_lane() + c] = values[c];
            __syncwarp(HBX_FULL);
            HbxPart part = {block * HBX_BLOCK, piece.skip, piece.count};
            if (piece.role) {
                hbx_write_values(out, type, scratch->high, part);
            } else {
                bits = hbx_write_columns(out, source, scratch->high, part);
                if (bits) return bits;
            }
        }
    }
    return 0;
}

HBX_KERNEL __launch_bounds__(256, 3) rowpack_csr(const u8* __restrict__ arena, u64 arena_bytes,
                                              const HbxRun* __restrict__ runs, u32 n_runs,
                                              const HbxPiece* __restrict__ pieces, u32 n_pieces,
                                              const HbxSource* __restrict__ sources, u32 n_sources,
                                              const i32* __restrict__ remap, u64 remap_entries,
                                              const HbxOutput* __restrict__ outputs, u32 n_outputs, u32* status,
                                              u32* any) {
    __shared__ HbxAnyScratch scratch[HBX_CSR_WARPS];
    u32 warp = threadIdx.x / HBX_WARP, n_warps = blockDim.x / HBX_WARP;
    for (u64 p = (u64)blockIdx.x * n_warps + warp; p < n_pieces; p += (u64)gridDim.x * n_warps) {
        HbxPiece piece = pieces[p];
        if (piece.count == 0) continue;
        HbxColumns columns = {nullptr, 0};
        u64 out = 0;
        u32 type = 0, bits = 0;
        if (piece.role < n_outputs) {
            HbxOutput output = outputs[piece.role];
            type = output.type;
            u32 size = hbx_size_of(type);
            out = output.address + piece.out * size;
            bool known = piece.role ? size != 0 && type != HBX_BF16 : type == HBX_I32;
            if (!known || !hbx_fits(piece.out, piece.count, output.elements)) bits = HBX_BAD_PLACE;
        } else {
            bits = HBX_BAD_PLACE;
        }
        if (!bits && piece.role == 0) {
            HbxSource source = {0, 0, 0};
            bool inside = piece.source < n_sources;
            if (inside) source = sources[piece.source];
            if (!source.identity) {
                inside = inside && hbx_fits(source.remap_start, source.remap_length, remap_entries);
                columns.remap = remap + source.remap_start;
            }
            columns.length = source.remap_length;
            if (!inside) bits = HBX_BAD_PLACE;
        }
        const HbxRun* run = runs + piece.run;
        if (!bits && (piece.run >= n_runs || !hbx_run_holds(run, arena_bytes, piece.skip, piece.count))) {
            bits = HBX_BAD_RECORD;
        }
        if (!bits) {
            HbxAnyScratch* mine = scratch + warp;
            bits = run->element_size == 8
                       ? hbx_csr_piece(arena, run, piece, columns, out, type, hbx_scratch(mine, 0ull))
                       : hbx_csr_piece(arena, run, piece, columns, out, type, hbx_scratch(mine, 0u));
        }
        if (bits && hbx_lane() == 0) hbx_fail(status + p, any, bits);
    }
}
