// The smallest 64-bit keys of a row in order, by the threads of a block: selected before they are sorted. And the
// scans that this and the kernels of tokens need. Blocks have a multiple of 32 threads, at most HBX_SORT_THREADS.
#pragma once
#include "convert.cuh"

#define HBX_SORT_THREADS 256u
#define HBX_DIGITS 256u
#define HBX_SORT_COUNTS (HBX_SORT_THREADS / 32u * HBX_DIGITS)

// A function that is compiled once, not into each of its callers.
#ifdef HBX_EMUL
#define HBX_CALLED static __attribute__((noinline))
#else
#define HBX_CALLED static __device__ __noinline__
#endif

// Shared memory of a block for scans and digits. `wide` and `narrow` carry a few numbers to all threads.
struct HbxTeam {
    u32 sums[32];
    u64 wide_sums[32];
    u64 wide[2];
    u32 narrow[3];
    u32 counts[HBX_SORT_COUNTS];
};

// Sum of a number over the threads before this one; *total becomes that over all.
HBX_DEVICE u32 hbx_block_before(u32 own, HbxTeam* team, u32* total) {
    u32 warp = threadIdx.x / 32u, n_warps = blockDim.x / 32u;
    u32 sum = hbx_scan_sum(own), before = sum - own, all = 0;
    if (hbx_lane() == 31u) team->sums[warp] = sum;
    __syncthreads();
    for (u32 w = 0; w < n_warps; w++) {
        if (w < warp) before += team->sums[w];
        all += team->sums[w];
    }
    __syncthreads();
    *total = all;
    return before;
}

HBX_DEVICE u64 hbx_block_before(u64 own, HbxTeam* team, u64* total) {
    u32 warp = threadIdx.x / 32u, n_warps = blockDim.x / 32u;
    u64 sum = hbx_scan_sum(own), before = sum - own, all = 0;
    if (hbx_lane() == 31u) team->wide_sums[warp] = sum;
    __syncthreads();
    for (u32 w = 0; w < n_warps; w++) {
        if (w < warp) before += team->wide_sums[w];
        all += team->wide_sums[w];
    }
    __syncthreads();
    *total = all;
    return before;
}

HBX_DEVICE u64 hbx_block_sum(u64 own, HbxTeam* team) {
    u64 total;
    hbx_block_before(own, team, &total);
    return total;
}

HBX_DEVICE u64 hbx_min64(u64 a, u64 b) { return a < b ? a : b; }
HBX_DEVICE u64 hbx_max64(u64 a, u64 b) { return a > b ? a : b; }

// Keys of a row as sorting sees them: their distance from the smallest, moved so that the largest begins with a 1.
struct HbxScaled {
    const u64* key;
    u64 low;
    u32 shift;
    HBX_DEVICE u64 operator()(u32 i) const { return (key[i] - low) << shift; }
};

// One stable pass over 8 bits of the upper half. Each warp takes a stretch of its own.
HBX_DEVICE void hbx_radix_pass(const u64* from, u64* to, u32 n, u32 shift, HbxTeam* team) {
    u32 warp = threadIdx.x / 32u, n_warps = blockDim.x / 32u;
    u32 each = (n + 32u * n_warps - 1u) / (32u * n_warps) * 32u;
    u32 begin = warp * each < n ? warp * each : n, end = begin + each < n ? begin + each : n;
    u32* own = team->counts + warp * HBX_DIGITS;
    for (u32 k = hbx_lane(); k < HBX_DIGITS; k += 32u) own[k] = 0;
    __syncwarp();
    for (u32 k = begin + hbx_lane(); k < end; k += 32u) atomicAdd(own + (u32)(from[k] >> shift & 255u), 1u);
    __syncthreads();
    u32 carry = 0;
    for (u32 first = 0; first < HBX_DIGITS; first += blockDim.x) {
        u32 digit = first + threadIdx.x, sum = 0, total;
        for (u32 w = 0; w < n_warps && digit < HBX_DIGITS; w++) sum += team->counts[w * HBX_DIGITS + digit];
        u32 at = carry + hbx_block_before(sum, team, &total);
        for (u32 w = 0; w < n_warps && digit < HBX_DIGITS; w++) {
            u32 count = team->counts[w * HBX_DIGITS + digit];
            team->counts[w * HBX_DIGITS + digit] = at;
            at += count;
        }
        carry += total;
    }
    __syncthreads();
    for (u32 first = begin; first < end; first += 32u) {
        u32 k = first + hbx_lane();
        bool there = k < end;
        u64 x = there ? from[k] : 0;
        u32 digit = there ? (u32)(x >> shift & 255u) : HBX_DIGITS;
        u32 peers = __match_any_sync(HBX_FULL, digit), rank = (u32)__popc(peers & ((1u << hbx_lane()) - 1u));
        u32 place = there ? own[digit] + rank : 0;
        __syncwarp();
        if (there && rank == 0) own[digit] += (u32)__popc(peers);
        __syncwarp();
        if (there) to[place] = x;
    }
    __syncthreads();
}

// Pairs of 32 bits to sort by, above a position: `a` sorted, `b` as large.
HBX_DEVICE void hbx_radix_sort(u64* a, u64* b, u32 n, HbxTeam* team) {
    for (u32 shift = 32; shift < 64u; shift += 16u) {
        hbx_radix_pass(a, b, n, shift, team);
        hbx_radix_pass(b, a, n, shift + 8u, team);
    }
}

// How far the digits of keys must be looked at to leave few more than `keep`: those whose leading bits, `bits` of
// them, are at most `prefix`; there are `found`.
struct HbxCut {
    u64 prefix;
    u32 bits, found;
    HBX_DEVICE bool operator()(u64 x) const { return bits == 0 || x >> (64u - bits) <= prefix; }
};

HBX_DEVICE HbxCut hbx_select(const HbxScaled& scaled, u32 n, u32 keep, HbxTeam* team) {
    HbxCut cut = {0, 0, n};
    u32 below = 0, enough = keep + keep / 4u + 64u;
    while (cut.found > enough && cut.bits < 64u) {
        for (u32 k = threadIdx.x; k < HBX_DIGITS; k += blockDim.x) team->counts[k] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
            u64 x = scaled(i);
            if (cut.bits != 0 && x >> (64u - cut.bits) != cut.prefix) continue;
            atomicAdd(team->counts + (u32)(x >> (56u - cut.bits) & 255u), 1u);
        }
        __syncthreads();
        if (threadIdx.x < 32u) {  // eight digits each
            u32 own = 0;
            for (u32 k = 0; k < 8u; k++) own += team->counts[8u * hbx_lane() + k];
            u32 before = below + hbx_scan_sum(own) - own;
            if (before < keep && keep <= before + own) {
                u32 digit = 8u * hbx_lane();
                while (before + team->counts[digit] < keep) before += team->counts[digit++];
                team->narrow[0] = digit;
                team->narrow[1] = before;
                team->narrow[2] = team->counts[digit];
            }
        }
        __syncthreads();
        cut.prefix = cut.prefix << 8 | team->narrow[0];
        cut.bits += 8u;
        below = team->narrow[1];
        cut.found = below + team->narrow[2];
    }
    return cut;
}

// Where keys are sorted: in shared memory, room for `n_shared` of them, or elsewhere.
struct HbxSpace {
    u64* shared_a;
    u64* shared_b;
    u32 n_shared;
    u64* a;
    u64* b;
};

// item[0, keep) = positions of the `keep` smallest of key[0, n), in ascending (key, position). The caller need not put
// a barrier before or after. keep <= n; `space` outside has room for n.
HBX_CALLED void hbx_smallest(const u64* key, u32 n, u32 keep, const HbxSpace* space, u32* item, HbxTeam* team) {
    if (keep == 0) return;
    if (threadIdx.x == 0) {
        team->wide[0] = ~0ull;
        team->wide[1] = 0;
    }
    __syncthreads();
    u64 low = ~0ull, high = 0;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        low = hbx_min64(low, key[i]);
        high = hbx_max64(high, key[i]);
    }
    atomicMin(&team->wide[0], low);
    atomicMax(&team->wide[1], high);
    __syncthreads();
    low = team->wide[0];
    high = team->wide[1];
    HbxScaled scaled = {key, low, high > low ? (u32)__clzll((i64)(high - low)) : 0u};
    HbxCut cut = {0, 0, n};
    if (keep < n) cut = hbx_select(scaled, n, keep, team);
    u64* a = cut.found <= space->n_shared ? space->shared_a : space->a;
    u64* b = cut.found <= space->n_shared ? space->shared_b : space->b;
    // By the upper half of the bits; where that does not tell, by both halves, the lower one first.
    for (u32 whole = 0; whole < 2u; whole++) {
        u32 found = 0;
        for (u32 first = 0; first < n; first += blockDim.x) {
            u32 i = first + threadIdx.x, total;
            u64 x = i < n ? scaled(i) : 0;
            bool keeps = i < n && cut(x);
            u32 place = found + hbx_block_before((u32)keeps, team, &total);
            if (keeps) a[place] = (whole ? x << 32 : x & 0xffffffff00000000ull) | i;
            found += total;
        }
        __syncthreads();
        hbx_radix_sort(a, b, found, team);
        if (whole) {
            for (u32 k = threadIdx.x; k < found; k += blockDim.x) {
                u32 i = (u32)a[k];
                a[k] = (scaled(i) & 0xffffffff00000000ull) | i;
            }
            __syncthreads();
            hbx_radix_sort(a, b, found, team);
        }
        int wrong = 0;
        for (u32 k = threadIdx.x + 1u; k < found; k += blockDim.x) wrong |= scaled((u32)a[k - 1u]) > scaled((u32)a[k]);
        if (!__syncthreads_or(wrong)) break;
    }
    for (u32 k = threadIdx.x; k < keep; k += blockDim.x) item[k] = (u32)a[k];
    __syncthreads();
}
