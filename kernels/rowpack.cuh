// hbx_gpu.rowpack on the device: a warp decodes blocks of 128 values, each alone, from what a HbxRun staged.
//
// Eight lanes look one block up in the directory, so a warp looks up four at once; then all 32 lanes decode one
// block after the other. Lane t owns values 4 t .. 4 t + 3, which are row t of the packed layout. Nothing is read
// outside the areas that the run names, and those are checked to lie in the arena. Equals decode_rowpack_reference
// of hbx_gpu/_codecs/rowpack.py block by block, and refuses what it refuses of a block; docs/format.md has the bytes.
#pragma once
#include "convert.cuh"

#define HBX_BLOCK 128u
#define HBX_BLOCK_RECORD 8u  // blocks per directory record

// Of a warp, in shared memory: room to hand high parts and resets to the lanes that own their values.
template <class Word>
struct alignas(16) HbxScratch {
    Word high[HBX_BLOCK];
    u32 resets[HBX_BLOCK / 4];  // a byte per value
};

// What directory and run say of a block. The eight lanes that looked it up hold it.
template <class Word>
struct HbxEntry {
    u64 patches;  // arena offset
    u32 payload;  // arena offset / 16
    u32 fields;   // see HBX_FIELD_...
    Word base;    // the value before the first, or the minimum
};

// Where things stand in `fields`. With status bits set, the rest means nothing.
#define HBX_FIELD_WIDTH(fields) ((fields) & 127u)
#define HBX_FIELD_EXCEPTIONS(fields) ((fields) >> 7 & 31u)
#define HBX_FIELD_CODE(fields) ((fields) >> 12 & 7u)
#define HBX_FIELD_RESETS(fields) ((fields) >> 15 & 255u)
#define HBX_FIELD_GAPS(fields) ((fields) >> 23 & 1u)
#define HBX_FIELD_SPARE(fields) ((fields) >> 24 & 63u)  // bits of a Word above those of a value
#define HBX_FIELD_STATUS(fields) ((fields) >> 30 << 1)
#define HBX_FIELD_PATCHED (31u << 7 | 255u << 15)
static_assert((HBX_BAD_WIDTH | HBX_TRUNCATED) == 6u, "status bits of a look-up");

// What a lane loads of a block before anything depends on it: two rows of words (of the low plane), and patches.
struct HbxLoaded {
    HbxWords row[2];
    u32 fields;     // as above
    u32 exception;  // position of exception `lane`
    u32 reset;      // position of reset `lane`
    u32 high[2];    // first two bytes, or the only one, that hold the high part of exception `lane`
};

HBX_DEVICE bool hbx_is_element_size(u32 size) { return size <= 8u && (0x116u >> size & 1u) != 0; }

HBX_DEVICE u32 hbx_record_bytes(const HbxRun* run) {
    return run->transform ? 32u + HBX_BLOCK_RECORD * run->base_bytes : 24u;
}

// Bits per high part, by code: 1, 2, 3, 4, 6, 8, 16, 32.
HBX_DEVICE u32 hbx_high_bits(u32 code) { return (code & 4u ? 0x20100806u : 0x04030201u) >> 8u * (code & 3u) & 63u; }

// hbx_fits without branches.
HBX_DEVICE bool hbx_lies_in(u64 start, u64 length, u64 room) { return (start <= room) & (length <= room - start); }

// Whether values [skip, skip + count) of a run can be looked up at all; count is at least 1. Any lane, any run. An
// arena has less than 64 GiB.
HBX_DEVICE bool hbx_run_holds(const HbxRun* pointer, u64 arena_bytes, u64 skip, u64 count) {
    const HbxRun run = *pointer;
    // No short cuts: loads that wait for one another would cost more than all of this.
    u32 size = run.element_size, base = run.base_bytes;
    bool gaps = run.transform == 1u;
    bool known = hbx_is_element_size(size) & ((run.transform == 0) | gaps);
    known = known & (gaps ? hbx_is_element_size(base) & (base <= size) : base == 0);
    u64 record_bytes = gaps ? 32u + HBX_BLOCK_RECORD * base : 24u;
    bool inside = (arena_bytes >> 36 == 0) & (run.records % 8u == 0) & (run.payload % 16u == 0) &
                  hbx_lies_in(run.records, run.n_records * record_bytes, arena_bytes) &
                  hbx_lies_in(run.payload, 16ull * run.payload_units, arena_bytes) &
                  hbx_lies_in(run.patches, run.patch_bytes, arena_bytes);
    u64 first = skip / (HBX_BLOCK * HBX_BLOCK_RECORD), last = (skip + count - 1) / (HBX_BLOCK * HBX_BLOCK_RECORD);
    bool staged = (skip + count <= run.n) & (first >= run.first_record) &
                  (last < (u64)run.first_record + run.n_records);
    return known & inside & staged;
}

// Looks up one block per eight lanes: `run` and `block` are theirs; where `wanted` is false nothing is read.
// A warp calls it together. The run holds the block.
template <class Word>
HBX_DEVICE HbxEntry<Word> hbx_look_up(const u8* arena, const HbxRun* run, u32 block, bool wanted) {
    u32 place = block % HBX_BLOCK_RECORD, k = hbx_lane() % HBX_BLOCK_RECORD;
    u32 width = 0, info = 0, resets = 0;
    u64 begin = 0;
    HbxEntry<Word> entry = {0, 0, 0, 0};
    if (wanted) {
        const u8* record = arena + run->records;
        record += (u64)(block / HBX_BLOCK_RECORD - run->first_record) * hbx_record_bytes(run);
        begin = *(const u64*)record;
        width = record[8 + k];
        info = record[16 + k];
        entry.base = (Word)run->minimum;
        if (run->transform) {
            resets = record[24 + k];
            // All of the eight bytes that hold the base belong to bases.
            u32 at = place * run->base_bytes;
            u64 base = *(const u64*)(record + 32 + (at & ~7u)) >> 8u * (at & 7u);
            entry.base = (Word)(base & ~0ull >> (64u - 8u * run->base_bytes));
        }
    }
    u32 x = info & 31u;
    u32 patches = x + resets + ((x * hbx_high_bits(info >> 5) + 7u) >> 3);
    u32 before = k < place ? width | patches << 16 : 0;
#pragma unroll
    for (u32 d = 1; d < HBX_BLOCK_RECORD; d <<= 1) before += __shfl_xor_sync(HBX_FULL, before, d);
    u32 from = (hbx_lane() & 24u) | place;
    u32 own = __shfl_sync(HBX_FULL, width | info << 8 | resets << 16, from);
    patches = __shfl_sync(HBX_FULL, patches, from);
    if (wanted) {
        width = own & 255u;
        u64 payload = (begin & 0xffffffffu) + (before & 0xffffu), patch = (begin >> 32) + (before >> 16);
        bool inside = payload >= run->payload_begin && patch >= run->patch_begin;
        payload -= run->payload_begin;
        patch -= run->patch_begin;
        inside = inside && payload + width <= run->payload_units && patch + patches <= run->patch_bytes;
        u32 size = run->element_size;
        // A width that leaves room for exceptions is below the element's.
        bool narrow = width + ((own & 31u << 8) != 0) <= 8u * size;
        entry.payload = (u32)((run->payload >> 4) + payload);
        entry.patches = run->patches + patch;
        entry.fields = (own & 127u) | own >> 8 << 7 | (u32)(run->transform != 0) << 23;
        entry.fields |= 8u * ((u32)sizeof(Word) - size) << 24;
        entry.fields |= ((inside ? 0 : HBX_TRUNCATED) | (narrow ? 0 : HBX_BAD_WIDTH)) >> 1 << 30;
    }
    return entry;
}

// Loads what holds the lane's four numbers of `width` <= 32 bits: their row of words and the next, if they straddle.
HBX_DEVICE void hbx_load_row(const u8* arena, const u8* payload, u32 width, HbxWords* row) {
    u32 bit = hbx_lane() * width;
    // Without words the arena's first ones are loaded, and masked later; without a straddle a row twice.
    const HbxWords* at = (const HbxWords*)(width ? payload : arena) + (bit >> 5);
    row[0] = at[0];
    row[1] = at[(bit & 31u) + width > 32u];
}

HBX_DEVICE void hbx_unpack_row(const HbxWords* row, u32 width, u32* numbers) {
    u32 shift = hbx_lane() * width & 31u, mask = width ? 0xffffffffu >> (32u - width) : 0;
#pragma unroll
    for (u32 c = 0; c < 4; c++) {
        numbers[c] = (u32)(((u64)row[1].word[c] << 32 | row[0].word[c]) >> shift) & mask;
    }
}

// Loads the block that lane `from` looked up. A warp calls it together; a block with status bits loads nothing.
template <class Word>
HBX_DEVICE HbxLoaded hbx_load_block(const u8* arena, const HbxEntry<Word>& entry, u32 from) {
    HbxLoaded loaded = {};
    u32 lane = hbx_lane();
    loaded.fields = __shfl_sync(HBX_FULL, entry.fields, from);
    const u8* payload = arena + 16ull * __shfl_sync(HBX_FULL, entry.payload, from);
    const u8* patches = arena + hbx_shfl(entry.patches, from);
    if (HBX_FIELD_STATUS(loaded.fields)) return loaded;

    u32 width = HBX_FIELD_WIDTH(loaded.fields);
    hbx_load_row(arena, payload, width < 32u ? width : 32u, loaded.row);

    u32 x = HBX_FIELD_EXCEPTIONS(loaded.fields), resets = HBX_FIELD_RESETS(loaded.fields);
    // Bytes as they come: what combined them here would wait for them.
    if (lane < resets) loaded.reset = patches[x + lane];
    if (lane < x) {
        loaded.exception = patches[lane];
        u32 bits = hbx_high_bits(HBX_FIELD_CODE(loaded.fields));
        const u8* area = patches + x + resets;
        u32 first = lane * bits >> 3, last = (lane * bits + bits - 1u) >> 3;
        loaded.high[0] = area[first];
        if (last > first) loaded.high[1] = area[first + 1];
    }
    return loaded;
}

// The lane's four values, low `width` bits each.
template <class Word>
HBX_DEVICE void hbx_unpack(const u8* arena, const HbxEntry<Word>& entry, u32 from, const HbxLoaded& loaded,
                           Word* values) {
    u32 width = HBX_FIELD_WIDTH(loaded.fields), numbers[4];
    hbx_unpack_row(loaded.row, width < 32u ? width : 32u, numbers);
#pragma unroll
    for (u32 c = 0; c < 4; c++) values[c] = numbers[c];
    if (sizeof(Word) == 4 || width <= 32u) return;
    // Rare enough to wait for: the plane of the upper bits.
    HbxWords row[2];
    const u8* payload = arena + 16ull * __shfl_sync(HBX_FULL, entry.payload, from);
    hbx_load_row(arena, payload + 512, width - 32u, row);
    hbx_unpack_row(row, width - 32u, numbers);
#pragma unroll
    for (u32 c = 0; c < 4; c++) values[c] |= (Word)((u64)numbers[c] << 32);
}

// Adds the high parts of exceptions and marks resets; `patches` points at the block's. Returns the resets among the
// lane's values, a byte each, 0 or 1; false in `good` where positions do not ascend.
template <class Word>
HBX_DEVICE u32 hbx_patch(const HbxLoaded& loaded, const u8* patches, HbxScratch<Word>* scratch, Word* values,
                         bool& good) {
    u32 lane = hbx_lane(), x = HBX_FIELD_EXCEPTIONS(loaded.fields), resets = HBX_FIELD_RESETS(loaded.fields);
    u32 position = loaded.exception, before = __shfl_up_sync(HBX_FULL, position, 1);
    bool wrong = lane < x && (position >= HBX_BLOCK || (lane && position <= before));
    u32 bits = hbx_high_bits(HBX_FIELD_CODE(loaded.fields)), high = loaded.high[0] | loaded.high[1] << 8;
    if (bits > 16u && lane < x) {
        const u8* area = patches + x + resets + 4 * lane;
        high |= (u32)area[2] << 16 | (u32)area[3] << 24;
    }
    high = high >> (lane * bits & 7u) & 0xffffffffu >> (32u - bits);
    __syncwarp(HBX_FULL);  // the block before has been read
#pragma unroll
    for (u32 c = 0; c < 4; c++) scratch->high[4 * lane + c] = 0;
    if (resets) scratch->resets[lane] = 0;
    __syncwarp(HBX_FULL);
    if (lane < x && !wrong) {
        scratch->high[position] = (Word)high << HBX_FIELD_WIDTH(loaded.fields);
    }
    u32 last = 0;  // in front of all resets: the first one stands at 1 or later
    position = loaded.reset;
#pragma unroll 1
    for (u32 done = 0; done < resets; done += HBX_WARP) {
        bool mine = done + lane < resets;
        if (done && mine) position = patches[x + done + lane];
        before = __shfl_up_sync(HBX_FULL, position, 1);
        if (lane == 0) before = last;
        bool bad = mine && (position >= HBX_BLOCK || position <= before);
        if (mine && !bad) ((u8*)scratch->resets)[position] = 1;
        wrong = wrong || bad;
        last = __shfl_sync(HBX_FULL, position, 31);
    }
    good = !__any_sync(HBX_FULL, wrong);
    __syncwarp(HBX_FULL);
#pragma unroll
    for (u32 c = 0; c < 4; c++) values[c] += scratch->high[4 * lane + c];
    return resets ? scratch->resets[lane] : 0;
}

HBX_DEVICE u32 hbx_shfl_up_word(u32 x, u32 by) { return __shfl_up_sync(HBX_FULL, x, by); }
HBX_DEVICE u64 hbx_shfl_up_word(u64 x, u32 by) { return hbx_shfl_up(x, by); }
HBX_DEVICE u32 hbx_shfl_word(u32 x, u32 lane) { return __shfl_sync(HBX_FULL, x, lane); }
HBX_DEVICE u64 hbx_shfl_word(u64 x, u32 lane) { return hbx_shfl(x, lane); }

// x plus that of the lane `by` below, in lanes that have one.
HBX_DEVICE u32 hbx_add_up(u32 x, u32 by) {
#ifdef HBX_EMUL
    u32 below = __shfl_up_sync(HBX_FULL, x, by);
    return hbx_lane() >= by ? x + below : x;
#else
    u32 sum;  // the shuffle says in a predicate whether there is such a lane; else it gives x
    asm volatile(
        "{ .reg .pred p; shfl.sync.up.b32 %0|p, %1, %2, 0, 0xffffffff; @p add.u32 %0, %0, %1; }"
        : "=&r"(sum) : "r"(x), "r"(by));
    return sum;
#endif
}

HBX_DEVICE u64 hbx_add_up(u64 x, u32 by) {
    u64 below = hbx_shfl_up(x, by);
    return hbx_lane() >= by ? x + below : x;
}

// Running sums of all 128 values, starting from `base`.
template <class Word>
HBX_DEVICE void hbx_sum_gaps(Word* values, Word base) {
    if (hbx_lane() == 0) values[0] += base;
#pragma unroll
    for (u32 c = 1; c < 4; c++) values[c] += values[c - 1];
    Word sum = values[3];
#pragma unroll
    for (u32 d = 1; d < HBX_WARP; d <<= 1) sum = hbx_add_up(sum, d);
    sum -= values[3];
#pragma unroll
    for (u32 c = 0; c < 4; c++) values[c] += sum;
}

// The same, begun anew at every reset.
template <class Word>
HBX_DEVICE void hbx_sum_gaps_with_resets(Word* values, Word base, u32 resets) {
    u32 lane = hbx_lane();
    if (lane == 0) values[0] += base;  // no reset stands there
    Word sum = values[0];
#pragma unroll
    for (u32 c = 1; c < 4; c++) sum = (resets >> 8 * c & 1u) ? values[c] : sum + values[c];
    // Sums of lanes reach back to the last lane with a reset, which holds its sum from the reset on.
    u32 with_resets = __ballot_sync(HBX_FULL, resets != 0) & 0xffffffffu >> (31u - lane);
    u32 reach = with_resets ? lane - (31u - __clz(with_resets)) : lane;
#pragma unroll
    for (u32 d = 1; d < HBX_WARP; d <<= 1) {
        Word other = hbx_shfl_up_word(sum, d);
        if (reach >= d) sum += other;
    }
    Word before = hbx_shfl_up_word(sum, 1);
    if (lane == 0) before = 0;
#pragma unroll
    for (u32 c = 0; c < 4; c++) {
        if (!(resets >> 8 * c & 1u)) values[c] += before;
        before = values[c];
    }
}

// Decodes a block that was loaded: values 4 lane .. 4 lane + 3. `from` is the lane that looked it up. A warp calls
// it together; returns status bits, the same in all lanes.
template <class Word>
HBX_DEVICE u32 hbx_decode_block(const u8* arena, const HbxEntry<Word>& entry, u32 from, const HbxLoaded& loaded,
                                HbxScratch<Word>* scratch, Word* values) {
    if (HBX_FIELD_STATUS(loaded.fields)) return HBX_FIELD_STATUS(loaded.fields);
    hbx_unpack(arena, entry, from, loaded, values);
    u32 resets = 0;
    if (loaded.fields & HBX_FIELD_PATCHED) {
        bool good;
        const u8* patches = arena + hbx_shfl(entry.patches, from);
        resets = hbx_patch(loaded, patches, scratch, values, good);
        if (!good) return HBX_BAD_PATCH;
    }
    Word base = hbx_shfl_word(entry.base, from);
    if (HBX_FIELD_GAPS(loaded.fields)) {
        if (HBX_FIELD_RESETS(loaded.fields)) {
            hbx_sum_gaps_with_resets(values, base, resets);
        } else {
            hbx_sum_gaps(values, base);
        }
    } else {
#pragma unroll
        for (u32 c = 0; c < 4; c++) values[c] += base;
    }
    Word mask = ~(Word)0 >> HBX_FIELD_SPARE(loaded.fields);
#pragma unroll
    for (u32 c = 0; c < 4; c++) values[c] &= mask;
    return 0;
}
