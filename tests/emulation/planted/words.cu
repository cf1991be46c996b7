// What intrinsics return, for comparison with NumPy: a warp of numbers in, a table of results out.
#include "hbx.cuh"

HBX_KERNEL shuffles(const u32* in, u32* out) {
    u32 lane = threadIdx.x, x = in[lane];
    out[lane] = __shfl_sync(HBX_FULL, x, (int)(lane * 7));
    out[32 + lane] = __shfl_up_sync(HBX_FULL, x, 3);
    out[64 + lane] = __shfl_down_sync(HBX_FULL, x, 5);
    out[96 + lane] = __shfl_xor_sync(HBX_FULL, x, 9);
    out[128 + lane] = __shfl_sync(HBX_FULL, x, 3, 8);
    out[160 + lane] = __shfl_up_sync(HBX_FULL, x, 2, 8);
    out[192 + lane] = __shfl_down_sync(HBX_FULL, x, 2, 8);
    out[224 + lane] = hbx_scan_sum(x);
}

HBX_KERNEL votes(const u32* in, u32* out) {
    u32 lane = threadIdx.x, x = in[lane];
    out[lane] = __ballot_sync(HBX_FULL, x & 1);
    out[32 + lane] = (u32)__any_sync(HBX_FULL, x == 3) | (u32)__all_sync(HBX_FULL, x < 1000) << 1;
    out[64 + lane] = __reduce_add_sync(HBX_FULL, x);
    out[96 + lane] = __reduce_min_sync(HBX_FULL, x);
    out[128 + lane] = __reduce_max_sync(HBX_FULL, x);
    out[160 + lane] = __reduce_or_sync(HBX_FULL, x);
    out[192 + lane] = __reduce_and_sync(HBX_FULL, x);
    out[224 + lane] = __match_any_sync(HBX_FULL, x % 5);
    out[256 + lane] = (u32)__reduce_min_sync(HBX_FULL, (int)x - 50);
}

// Halves of a warp with their own masks.
HBX_KERNEL halves(const u32* in, u32* out) {
    u32 lane = threadIdx.x, x = in[lane];
    if (lane < 16)
        out[lane] = __reduce_add_sync(0x0000ffffu, x);
    else
        out[lane] = __reduce_add_sync(0xffff0000u, x);
    __syncwarp();
    out[32 + lane] = __shfl_sync(HBX_FULL, out[lane], 31 - (int)lane);
}

HBX_KERNEL wide_shuffle(const u64* in, const double* real, u64* out, double* real_out) {
    out[threadIdx.x] = __shfl_xor_sync(HBX_FULL, in[threadIdx.x], 1);
    real_out[threadIdx.x] = __shfl_up_sync(HBX_FULL, real[threadIdx.x], 1u);
}

HBX_KERNEL bits(const u32* in, u32* out, u32 n) {
    u32 k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= n) return;
    u32 x = in[k], y = in[(k + 1) % n];
    out[k] = (u32)__popc(x);
    out[n + k] = (u32)__ffs((int)x);
    out[2 * n + k] = (u32)__clz((int)x);
    out[3 * n + k] = __brev(x);
    out[4 * n + k] = __funnelshift_r(x, y, k);
    out[5 * n + k] = __funnelshift_l(x, y, k);
    out[6 * n + k] = __byte_perm(x, y, 0x7531);
    out[7 * n + k] = __float_as_uint(__uint_as_float(x));
    out[8 * n + k] = __umulhi(x, y);
}

HBX_KERNEL atomics(u32* u, i32* i, u64* w, float* f, double* d) {
    u32 t = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(u, 1u);
    atomicOr(u + 1, 1u << (t & 31));
    atomicAnd(u + 2, ~(1u << (t & 15)));
    atomicMax(u + 3, t);
    atomicMin(u + 4, t);
    atomicCAS(u + 5, 11u, 100 + t);
    if (t == 7) u[6] = atomicExch(u + 7, 70u);
    atomicMin(i, -(i32)t);
    atomicAdd(i + 1, -1);
    atomicAdd(w, (u64)t << 32);
    atomicMax(w + 1, (u64)t << 33);
    atomicAdd(f, 0.5f);
    atomicAdd(d, 0.25);
}

HBX_KERNEL places(u32* out) {
    u32 block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    u32 thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    u32 size = blockDim.x * blockDim.y * blockDim.z;
    out[block * size + thread] = (blockIdx.z << 20) | (blockIdx.y << 16) | (blockIdx.x << 12) | (threadIdx.z << 8) |
                                 (threadIdx.y << 4) | threadIdx.x;
}

// Part of a last warp that does not exist, read from: a value that shows.
HBX_KERNEL partial_warp(u32* out) {
    out[threadIdx.x] = __shfl_down_sync(HBX_FULL, threadIdx.x, 1u);
    u32 votes = (u32)__syncthreads_count(threadIdx.x % 3 == 0);
    if (threadIdx.x == 0) out[blockDim.x] = votes;
}

HBX_KERNEL every_parameter(const u8* a, u64 b, i32* c, float d, double e, i64 f, u8 g, void* h) {
    c[0] = a ? a[0] : -1;
    c[1] = (i32)(b >> 40);
    c[2] = (i32)(d * 4) + (i32)(e * 100);
    c[3] = (i32)(f >> 40);
    c[4] = g;
    c[5] = h == nullptr;
}
