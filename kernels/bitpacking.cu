// Decodes whole chunks of homeobox.bitpacking.
//
// The stream: a transform byte, the number of words (u32), then for every 128 words a width byte w and 16 w
// bytes: value i in lane i % 4, row i / 4, at bits (i / 4) w of that lane. Words of 8 bytes: all low halves, then
// all high halves. `delta` and `delta_zigzag` run over the whole chunk, modulo 2^32 (2^64).
// Equals decode_bitpacking_reference of hbx_gpu/_codecs/bitpacking.py, and refuses what it refuses.
#include "convert.cuh"

#define HBX_PACKED_HEADER 5u
#define HBX_PACKED_BLOCK 128u

// Bytes of a chunk, in shared memory or in the arena. `by_words`: aligned words that overlap the chunk may be
// loaded whole.
struct HbxPackedBytes {
    const u8* bytes;
    u32 nbytes;
    bool by_words;
};

HBX_DEVICE u32 hbx_packed_blocks(u32 n_words) { return n_words / HBX_PACKED_BLOCK + (n_words % HBX_PACKED_BLOCK != 0); }

HBX_DEVICE u32 hbx_packed_word(const u8* p) {
    return (u32)p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24;
}

// Numbers 4 r .. 4 r + 3 of the block whose width byte is at `at`, for lane r. Payload words are not aligned:
// each comes from two aligned ones. Only words that overlap the block are loaded.
HBX_DEVICE void hbx_packed_row(const HbxPackedBytes& from, u32 at, u32* out) {
    u32 width = from.bytes[at], bit = hbx_lane() * width, shift = bit & 31u;
    bool straddles = shift + width > 32u;
    const u8* p = from.bytes + at + 1 + 16u * (bit >> 5);
    u32 low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
    if (width != 0 && from.by_words) {
        u32 skip = (u32)((u64)p & 3u), turn = 8u * skip;
        const u32* words = (const u32*)(p - skip);
        u32 a[9];
#pragma unroll
        for (u32 k = 0; k < 9; k++) {
            bool needed = k < 4 || (straddles && k < 8) || (skip != 0 && k == (straddles ? 8u : 4u));
            a[k] = needed ? words[k] : 0;
        }
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            low[k] = (u32)(((u64)a[k + 1] << 32 | a[k]) >> turn);
            high[k] = (u32)(((u64)a[k + 5] << 32 | a[k + 4]) >> turn);
        }
    } else if (width != 0) {
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            low[k] = hbx_packed_word(p + 4 * k);
            if (straddles) high[k] = hbx_packed_word(p + 16 + 4 * k);
        }
    }
    u32 mask = width == 32u ? 0xffffffffu : (1u << width) - 1u;
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
        // Without a straddle, what stands in `high` lies above the mask.
        out[k] = (u32)(((u64)high[k] << 32 | low[k]) >> shift) & mask;
    }
}

// The stored words 4 r .. 4 r + 3 of block b for lane r; differences with their sign folded back. `offsets` holds
// where the width bytes are.
template <class Word>
HBX_DEVICE void hbx_packed_words(const HbxPackedBytes& from, const u32* offsets, u32 n_blocks, u32 b, u32 transform,
                                 Word* out) {
    u32 half[4];
    hbx_packed_row(from, offsets[b], half);
#pragma unroll
    for (u32 k = 0; k < 4; k++) out[k] = half[k];
    if (sizeof(Word) == 8) {
        hbx_packed_row(from, offsets[n_blocks + b], half);
#pragma unroll
        for (u32 k = 0; k < 4; k++) out[k] |= (Word)((u64)half[k] << 32);
    }
    if (transform == 2u) {
#pragma unroll
        for (u32 k = 0; k < 4; k++) out[k] = (out[k] >> 1) ^ ((Word)0 - (out[k] & 1u));
    }
}

// Status bits of a job that can be seen before a byte is read.
HBX_DEVICE u32 hbx_packed_check(const HbxPacked& job, u32 element_size, u64 arena_bytes, u32 max_blocks) {
    if (!hbx_fits(job.data, job.nbytes, arena_bytes)) return HBX_BAD_RECORD;
    if (job.nbytes < HBX_PACKED_HEADER) return HBX_BAD_HEADER;
    bool ordered = job.first_word <= job.last_word && job.last_word <= job.n_words;
    bool placed = job.out % 8u == 0 && hbx_fits(job.out, (u64)job.last_word * element_size, arena_bytes);
    bool room = (u64)hbx_packed_blocks(job.n_words) * (element_size / 4u) <= max_blocks;
    return ordered && placed && room ? 0 : HBX_BAD_PLACE;
}

// The chunk in shared memory at the alignment it has in the arena, or where it lies if that is too small.
HBX_DEVICE HbxPackedBytes hbx_packed_stage(const u8* arena, u64 arena_bytes, const HbxPacked& job, u8* stage, u32 room) {
    const u8* bytes = arena + job.data;
    u32 pad = (u32)((u64)bytes & 15u);
    HbxPackedBytes from;
    from.nbytes = job.nbytes;
    if ((u64)job.nbytes + pad <= room) {
        u32 head = pad == 0 ? 0 : 16u - pad;
        if (head > job.nbytes) head = job.nbytes;
        u32 vectors = (job.nbytes - head) / 16u, tail = head + 16u * vectors;
        u8* to = stage + pad;
        for (u32 v = threadIdx.x; v < vectors; v += blockDim.x) {
            ((HbxWords*)(to + head))[v] = ((const HbxWords*)(bytes + head))[v];
        }
        for (u32 i = threadIdx.x; i < head; i += blockDim.x) to[i] = bytes[i];
        for (u32 i = tail + threadIdx.x; i < job.nbytes; i += blockDim.x) to[i] = bytes[i];
        from.bytes = to;
        from.by_words = true;
        return from;
    }
    u64 before = (u64)bytes & 3u, behind = (0u - ((u64)bytes + job.nbytes)) & 3u;
    from.bytes = bytes;
    from.by_words = before <= job.data && job.data + job.nbytes + behind <= arena_bytes;
    return from;
}

// One thread: checks the header and follows the chain of widths. Returns status bits.
HBX_DEVICE u32 hbx_packed_walk(const HbxPackedBytes& from, u32 n_words, u32 n_packed, u32* offsets) {
    if (from.bytes[0] > 2u || hbx_packed_word(from.bytes + 1) != n_words) return HBX_BAD_HEADER;
    u32 at = HBX_PACKED_HEADER;
    for (u32 b = 0; b < n_packed; b++) {
        if (at >= from.nbytes) return HBX_TRUNCATED;
        u32 width = from.bytes[at];
        if (width > 32u) return HBX_BAD_WIDTH;
        if (1u + 16u * width > from.nbytes - at) return HBX_TRUNCATED;
        offsets[b] = at;
        at += 1u + 16u * width;
    }
    return 0;
}

// totals[b] = sum of the words of all blocks before b, for b < n_blocks, given the sum of each block but the last.
// One warp.
template <class Word>
HBX_DEVICE void hbx_packed_scan(Word* totals, u32 n_blocks) {
    Word carry = 0;
    for (u32 first = 0; first < n_blocks; first += 32u) {
        u32 b = first + hbx_lane();
        Word own = b + 1 < n_blocks ? totals[b] : 0, sum = hbx_scan_sum(own);
        if (b < n_blocks) totals[b] = carry + sum - own;
        carry += (Word)hbx_shfl(sum, 31u);
    }
}

// Writes those of four neighboring words, from `first` on, that are wanted.
template <class Word>
HBX_DEVICE void hbx_packed_store(Word* out, u32 first, const Word* words, u32 wanted_from, u32 wanted_to) {
    if (first >= wanted_from && first < wanted_to && wanted_to - first >= 4u && ((u64)(out + first) & 15u) == 0) {
        const u32 n = 16u / (u32)sizeof(Word);
#pragma unroll
        for (u32 k = 0; k < 4; k += n) {
            HbxVector<Word> vector;
#pragma unroll
            for (u32 j = 0; j < n; j++) vector.at[j] = words[k + j];
            *(HbxVector<Word>*)(out + first + k) = vector;
        }
        return;
    }
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
        if (first + k >= wanted_from && first + k < wanted_to) out[first + k] = words[k];
    }
}

// Blocks of 128, a warp each. Pass 1 sums every block before the last wanted one, pass 2 writes; both unpack, since
// words in between would not fit beside the chunk.
template <class Word>
HBX_DEVICE void hbx_packed_decode(const HbxPackedBytes& from, const HbxPacked& job, const u32* offsets, Word* totals,
                                  Word* out) {
    u32 transform = from.bytes[0], warp = threadIdx.x / 32u, n_warps = blockDim.x / 32u;
    u32 n_blocks = hbx_packed_blocks(job.n_words), last = hbx_packed_blocks(job.last_word);
    Word words[4];
    if (transform != 0) {
        for (u32 b = warp; b + 1 < last; b += n_warps) {
            hbx_packed_words(from, offsets, n_blocks, b, transform, words);
            Word sum = hbx_scan_sum((Word)(words[0] + words[1] + words[2] + words[3]));
            if (hbx_lane() == 31u) totals[b] = sum;
        }
        __syncthreads();
        if (warp == 0) hbx_packed_scan(totals, last);
        __syncthreads();
    }
    for (u32 b = job.first_word / HBX_PACKED_BLOCK + warp; b < last; b += n_warps) {
        hbx_packed_words(from, offsets, n_blocks, b, transform, words);
        if (transform != 0) {
            words[1] += words[0];
            words[2] += words[1];
            words[3] += words[2];
            Word base = totals[b] + hbx_scan_sum(words[3]) - words[3];
#pragma unroll
            for (u32 k = 0; k < 4; k++) words[k] += base;
        }
        hbx_packed_store(out, b * HBX_PACKED_BLOCK + 4u * hbx_lane(), words, job.first_word, job.last_word);
    }
}

// A block takes one chunk at a time, grid-stride. Dynamic shared memory, max_blocks * 8 + stage_bytes: the chunk
// (stage_bytes rounded down to 16), sums of blocks (4 * max_blocks), offsets of width bytes (4 * max_blocks).
// max_blocks counts packed blocks: ceil(n / 128), twice that for 8-byte words. `fault` is one shared word.
template <class Word>
HBX_DEVICE void hbx_packed_jobs(u8* arena, u64 arena_bytes, const HbxPacked* jobs, u32 n_jobs, u32 max_blocks,
                                u32 stage_bytes, u32* status, u32* any, u8* shared, u32* fault) {
    u32 room = stage_bytes & ~15u;
    Word* totals = (Word*)(shared + room);
    u32* offsets = (u32*)(shared + room + (u64)max_blocks * 4u);
    for (u64 j = blockIdx.x; j < n_jobs; j += gridDim.x) {
        HbxPacked job = jobs[j];
        u32 bits = hbx_packed_check(job, sizeof(Word), arena_bytes, max_blocks);
        if (bits == 0) {
            HbxPackedBytes from = hbx_packed_stage(arena, arena_bytes, job, shared, room);
            u32 n_packed = hbx_packed_blocks(job.n_words) * (u32)(sizeof(Word) / 4);
            __syncthreads();
            if (threadIdx.x == 0) *fault = hbx_packed_walk(from, job.n_words, n_packed, offsets);
            __syncthreads();
            bits = *fault;
            if (bits == 0) hbx_packed_decode(from, job, offsets, totals, (Word*)(arena + job.out));
            __syncthreads();
        }
        if (bits != 0 && threadIdx.x == 0) hbx_fail(status + j, any, bits);
    }
}

// Words of 4 bytes. Blocks of 256 threads (any multiple of 32). Checked: chunk and output inside the arena, header,
// every width and every block inside the chunk, room in shared memory.
HBX_KERNEL bitpacking_decode_u32(u8* arena, u64 arena_bytes, const HbxPacked* jobs, u32 n_jobs, u32 max_blocks,
                                 u32 stage_bytes, u32* status, u32* any) {
    HBX_DYN_SMEM(shared);
    __shared__ u32 fault;
    hbx_packed_jobs<u32>(arena, arena_bytes, jobs, n_jobs, max_blocks, stage_bytes, status, any, shared, &fault);
}

// The same for words of 8 bytes.
HBX_KERNEL bitpacking_decode_u64(u8* arena, u64 arena_bytes, const HbxPacked* jobs, u32 n_jobs, u32 max_blocks,
                                 u32 stage_bytes, u32* status, u32* any) {
    HBX_DYN_SMEM(shared);
    __shared__ u32 fault;
    hbx_packed_jobs<u64>(arena, arena_bytes, jobs, n_jobs, max_blocks, stage_bytes, status, any, shared, &fault);
}
