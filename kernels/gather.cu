// Gathers stretches of rows that lie decoded (or stored plain) in the arena into flat CSR outputs: column numbers
// through the remap, values converted. Equals, per piece, `remap[ids]` and `values.astype(type)` of NumPy.
#include "convert.cuh"

// Elements in flight per lane, so that the memory's latency is paid once for several.
#define HBX_GATHER_DEPTH 4u

// Equal bytes; 16 at a time where source and target are equally aligned. One warp.
template <class T>
HBX_DEVICE void hbx_gather_copy(T* to, const T* from, u32 count) {
    const u32 step = 16u / (u32)sizeof(T);
    u32 head = (u32)((0u - (u64)to) & 15u) / (u32)sizeof(T);
    if ((((u64)to ^ (u64)from) & 15u) != 0 || head > count) head = count;
    u32 vectors = (count - head) / step, tail = head + vectors * step;
    for (u32 first = hbx_lane(); first < head; first += 32u * HBX_GATHER_DEPTH) {
        T held[HBX_GATHER_DEPTH];
#pragma unroll
        for (u32 k = 0; k < HBX_GATHER_DEPTH; k++) {
            u32 i = first + 32u * k;
            if (i < head) held[k] = from[i];
        }
#pragma unroll
        for (u32 k = 0; k < HBX_GATHER_DEPTH; k++) {
            u32 i = first + 32u * k;
            if (i < head) to[i] = held[k];
        }
    }
    for (u32 v = hbx_lane(); v < vectors; v += 32u) {
        ((HbxWords*)(to + head))[v] = ((const HbxWords*)(from + head))[v];
    }
    for (u32 i = tail + hbx_lane(); i < count; i += 32u) to[i] = from[i];
}

HBX_DEVICE void hbx_gather_same(void* to, const void* from, u32 size, u32 count) {
    if (size == 1) hbx_gather_copy((u8*)to, (const u8*)from, count);
    if (size == 2) hbx_gather_copy((u16*)to, (const u16*)from, count);
    if (size == 4) hbx_gather_copy((u32*)to, (const u32*)from, count);
    if (size == 8) hbx_gather_copy((u64*)to, (const u64*)from, count);
}

// Types that values are never asked to become (no result type of NumPy needs them): bfloat16, float to integer,
// float64 to float16.
HBX_DEVICE bool hbx_gather_converts(u32 from, u32 to) {
    if (from == to) return true;
    if (from == HBX_BF16 || to == HBX_BF16) return false;
    if (hbx_is_integer(to)) return hbx_is_integer(from);
    return !(from == HBX_F64 && to == HBX_F16);
}

// One element of another type. Integers wrap; a float is rounded once (float16 by way of float32, as NumPy does).
HBX_DEVICE void hbx_gather_convert(void* to, u32 to_type, const void* from, u32 from_type, u64 i) {
    switch (to_type) {
        case HBX_F16: ((u16*)to)[i] = hbx_f16_bits(hbx_load_number<float>(from, from_type, i)); return;
        case HBX_F32: ((float*)to)[i] = hbx_load_number<float>(from, from_type, i); return;
        case HBX_F64: ((double*)to)[i] = hbx_load_number<double>(from, from_type, i); return;
    }
    u64 x = hbx_load_integer(from, from_type, i);
    u32 size = hbx_size_of(to_type);
    if (size == 1) ((u8*)to)[i] = (u8)x;
    if (size == 2) ((u16*)to)[i] = (u16)x;
    if (size == 4) ((u32*)to)[i] = (u32)x;
    if (size == 8) ((u64*)to)[i] = x;
}

// Status bits of a piece that can be seen before its elements are read. The same for all lanes.
HBX_DEVICE u32 hbx_gather_check(const u8* arena, u64 arena_bytes, const HbxPlain& piece, const HbxSource* sources,
                                u32 n_sources, u64 remap_entries, const HbxOutput* outputs, u32 n_outputs) {
    u32 size = hbx_size_of(piece.type);
    if (size == 0 || !hbx_fits(piece.data, (u64)piece.count * size, arena_bytes)) return HBX_BAD_RECORD;
    if (piece.count > 0x7fffffffu) return HBX_BAD_RECORD;  // 32-bit loops below
    if ((u64)(arena + piece.data) % size != 0) return HBX_BAD_RECORD;
    if (piece.role >= n_outputs) return HBX_BAD_PLACE;
    HbxOutput output = outputs[piece.role];
    u32 out_size = hbx_size_of(output.type);
    if (!hbx_fits(piece.out, piece.count, output.elements)) return HBX_BAD_PLACE;
    if (out_size == 0 || output.address % out_size != 0) return HBX_BAD_PLACE;
    if (piece.role != 0) return hbx_gather_converts(piece.type, output.type) ? 0 : HBX_BAD_RECORD;
    if (!hbx_is_integer(piece.type) || piece.source >= n_sources) return HBX_BAD_RECORD;
    HbxSource source = sources[piece.source];
    bool mapped = source.identity || hbx_fits(source.remap_start, source.remap_length, remap_entries);
    return mapped && output.type == HBX_I32 ? 0 : HBX_BAD_PLACE;
}

// Column numbers of a group to those of the output. A lane meets each of its elements once. Returns status bits.
HBX_DEVICE u32 hbx_gather_columns(i32* to, const void* from, u32 type, u32 count, const HbxSource& source,
                                  const i32* remap) {
    u32 bits = 0;
    for (u32 first = hbx_lane(); first < count; first += 32u * HBX_GATHER_DEPTH) {
        u64 id[HBX_GATHER_DEPTH];
#pragma unroll
        for (u32 k = 0; k < HBX_GATHER_DEPTH; k++) {
            u32 i = first + 32u * k;
            id[k] = i < count ? hbx_load_integer(from, type, i) : 0;
        }
        i32 column[HBX_GATHER_DEPTH];
#pragma unroll
        for (u32 k = 0; k < HBX_GATHER_DEPTH; k++) {
            bool known = id[k] < source.remap_length;  // a negative one is huge here
            column[k] = (i32)id[k];
            if (known && !source.identity) column[k] = remap[source.remap_start + id[k]];
            if (!known) column[k] = -1;
            if (!known && first + 32u * k < count) bits = HBX_BAD_COLUMN;
        }
#pragma unroll
        for (u32 k = 0; k < HBX_GATHER_DEPTH; k++) {
            u32 i = first + 32u * k;
            if (i < count) to[i] = column[k];
        }
    }
    return bits;
}

// A warp takes one piece at a time, grid-stride; its lanes take neighboring elements. Any number of warps per
// block, no shared memory. Pieces are aligned to their elements, outputs to theirs. Checked: record, source, output,
// alignment, types, every column number; a column that is none is written as -1 beside its status bit.
HBX_KERNEL gather_pieces(const u8* arena, u64 arena_bytes, const HbxPlain* pieces, u32 n_pieces,
                         const HbxSource* sources, u32 n_sources, const i32* remap, u64 remap_entries,
                         const HbxOutput* outputs, u32 n_outputs, u32* status, u32* any) {
    u64 warp = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32u, n_warps = (u64)gridDim.x * blockDim.x / 32u;
    for (u64 p = warp; p < n_pieces; p += n_warps) {
        HbxPlain piece = pieces[p];
        u32 bits =
            hbx_gather_check(arena, arena_bytes, piece, sources, n_sources, remap_entries, outputs, n_outputs);
        if (bits != 0) {
            if (hbx_lane() == 0) hbx_fail(status + p, any, bits);
            continue;
        }
        HbxOutput output = outputs[piece.role];
        const void* from = arena + piece.data;
        u32 size = hbx_size_of(output.type);
        u8* to = (u8*)output.address + piece.out * size;
        if (piece.role == 0) {
            HbxSource source = sources[piece.source];
            bits = hbx_gather_columns((i32*)to, from, piece.type, piece.count, source, remap);
            if (bits != 0) hbx_fail(status + p, any, bits);
        } else if (piece.type == output.type) {
            hbx_gather_same(to, from, size, piece.count);
        } else {
            for (u32 i = hbx_lane(); i < piece.count; i += 32u) {
                hbx_gather_convert(to, output.type, from, piece.type, i);
            }
        }
    }
}
