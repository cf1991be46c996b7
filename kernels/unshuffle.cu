// What is left to do after decompressors: stored streams are copied to their places, shuffled blocks are put back in
// order, and what a decompressor says of its streams is compared with what was expected.
#include "convert.cuh"

#define HBX_NO_SHUFFLE 0u
#define HBX_BYTE_SHUFFLE 1u
#define HBX_BIT_SHUFFLE 2u

// Bytes [begin, end) of a stretch, by all threads of a block; 16 at a time where both sides are aligned.
HBX_DEVICE void hbx_block_copy(u8* to, const u8* from, u64 begin, u64 end) {
    u64 vectors = 0;
    if ((((u64)to | (u64)from | begin) & 15u) == 0) vectors = (end - begin) / 16u;
    for (u64 v = threadIdx.x; v < vectors; v += blockDim.x) {
        ((HbxWords*)(to + begin))[v] = ((const HbxWords*)(from + begin))[v];
    }
    for (u64 i = begin + vectors * 16u + threadIdx.x; i < end; i += blockDim.x) to[i] = from[i];
}

// Elements [begin, end) of n, byte b of all of them lying together at from + b * n. `begin` is a multiple of 8.
template <class T>
HBX_DEVICE void hbx_unshuffle_elements(T* to, const u8* from, u32 n, u32 begin, u32 end) {
    u32 quads = 0;
    if ((((u64)from | n) & 3u) == 0) quads = (end - begin) / 4u;
    for (u32 q = threadIdx.x; q < quads; q += blockDim.x) {
        u32 i = begin + 4u * q, plane[sizeof(T)];
#pragma unroll
        for (u32 b = 0; b < sizeof(T); b++) plane[b] = *(const u32*)(from + (u64)b * n + i);
#pragma unroll
        for (u32 e = 0; e < 4u; e++) {
            T x = 0;
#pragma unroll
            for (u32 b = 0; b < sizeof(T); b++) x |= (T)((T)((plane[b] >> (8u * e)) & 255u) << (8u * b));
            to[i + e] = x;
        }
    }
    for (u32 i = begin + 4u * quads + threadIdx.x; i < end; i += blockDim.x) {
        T x = 0;
#pragma unroll
        for (u32 b = 0; b < sizeof(T); b++) x |= (T)((T)from[(u64)b * n + i] << (8u * b));
        to[i] = x;
    }
}

HBX_DEVICE void hbx_unshuffle_bytes(u8* to, const u8* from, u32 size, u32 n, u32 begin, u32 end) {
    bool aligned = (u64)to % size == 0;
    if (size == 2 && aligned) return hbx_unshuffle_elements((u16*)to, from, n, begin, end);
    if (size == 4 && aligned) return hbx_unshuffle_elements((u32*)to, from, n, begin, end);
    if (size == 8 && aligned) return hbx_unshuffle_elements((u64*)to, from, n, begin, end);
    for (u64 p = (u64)begin * size + threadIdx.x; p < (u64)end * size; p += blockDim.x) {
        to[p] = from[(p % size) * n + p / size];
    }
}

// Row k and column j of eight bytes change places: bit j of byte k becomes bit k of byte j.
HBX_DEVICE u64 hbx_transpose_bits(u64 x) {
    u64 t = (x ^ (x >> 7)) & 0x00aa00aa00aa00aaull;
    x ^= t ^ (t << 7);
    t = (x ^ (x >> 14)) & 0x0000cccc0000ccccull;
    x ^= t ^ (t << 14);
    t = (x ^ (x >> 28)) & 0x00000000f0f0f0f0ull;
    return x ^ t ^ (t << 28);
}

// Groups of eight elements [begin, end) of n / 8; bit k of byte b of all elements lies at from + (8 * b + k) * n / 8.
HBX_DEVICE void hbx_unshuffle_bits(u8* to, const u8* from, u32 size, u32 n, u32 begin, u32 end) {
    u32 groups = end - begin;
    u64 row = n / 8u;
    for (u64 t = threadIdx.x; t < (u64)groups * size; t += blockDim.x) {
        u32 b = (u32)(t / groups), g = begin + (u32)(t % groups);
        u64 x = 0;
#pragma unroll
        for (u32 k = 0; k < 8u; k++) x |= (u64)from[(8u * b + k) * row + g] << (8u * k);
        x = hbx_transpose_bits(x);
#pragma unroll
        for (u32 j = 0; j < 8u; j++) to[(8ull * g + j) * size + b] = (u8)(x >> (8u * j));
    }
}

HBX_DEVICE u32 hbx_block_check(u64 arena_bytes, const HbxBlock& block) {
    if (!hbx_fits(block.from, block.nbytes, arena_bytes)) return HBX_BAD_PLACE;
    if (!hbx_fits(block.to, block.nbytes, arena_bytes)) return HBX_BAD_PLACE;
    bool apart = block.from + block.nbytes <= block.to || block.to + block.nbytes <= block.from;
    if (!apart || block.typesize == 0 || block.shuffle > HBX_BIT_SHUFFLE) return HBX_BAD_PLACE;
    return 0;
}

// Equals what c-blosc 1 does to a block after its decompressor: elements of `typesize` bytes whose bytes, or bits, lie
// together; bytes after the last whole element are copied, and so is a block of bits whose elements are no multiple
// of eight. A block of threads takes one of `slices` parts of one HbxBlock at a time, grid-stride. No shared memory.
// Checked: both stretches lie in the arena and apart.
HBX_KERNEL unshuffle_blocks(u8* arena, u64 arena_bytes, const HbxBlock* blocks, u32 n_blocks, u32 slices, u32* status,
                            u32* any) {
    for (u64 w = blockIdx.x; w < (u64)n_blocks * slices; w += gridDim.x) {
        HbxBlock block = blocks[w / slices];
        u32 slice = (u32)(w % slices), bits = hbx_block_check(arena_bytes, block);
        if (bits != 0) {
            if (threadIdx.x == 0) hbx_fail(status + w / slices, any, bits);
            continue;
        }
        const u8* from = arena + block.from;
        u8* to = arena + block.to;
        u32 n = block.nbytes / block.typesize, shuffle = block.shuffle;
        if (shuffle == HBX_BIT_SHUFFLE && n % 8u != 0) shuffle = HBX_NO_SHUFFLE;
        u32 unit = shuffle == HBX_NO_SHUFFLE ? 16u : 8u;
        u64 whole = shuffle == HBX_NO_SHUFFLE ? block.nbytes : n;
        u64 units = (whole + unit - 1u) / unit;
        u64 begin = units * slice / slices, end = units * (slice + 1u) / slices;
        u64 first = begin * unit, last = end * unit < whole ? end * unit : whole;
        if (shuffle == HBX_NO_SHUFFLE) hbx_block_copy(to, from, first, last);
        if (shuffle == HBX_BYTE_SHUFFLE) hbx_unshuffle_bytes(to, from, block.typesize, n, (u32)first, (u32)last);
        if (shuffle == HBX_BIT_SHUFFLE) hbx_unshuffle_bits(to, from, block.typesize, n, (u32)begin, (u32)end);
        if (shuffle != HBX_NO_SHUFFLE && slice == 0) {
            hbx_block_copy(to, from, (u64)n * block.typesize, block.nbytes);
        }
    }
}

// status[i] gets HBX_BAD_STREAM where a decompressor reports an error (any state but 0), or another number of bytes
// than expected. A thread per stream, grid-stride.
HBX_KERNEL check_streams(const i32* states, const u64* actual, const u64* expected, u32 n_streams, u32* status,
                         u32* any) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n_streams; i += (u64)gridDim.x * blockDim.x) {
        if (states[i] != 0 || actual[i] != expected[i]) hbx_fail(status + i, any, HBX_BAD_STREAM);
    }
}
