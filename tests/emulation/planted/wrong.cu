// Twins of kernels in correct.cu, each with one planted bug that the tests of the shim must catch.
#include "hbx.cuh"

// No barrier between writing shared memory and reading what other threads wrote.
HBX_KERNEL missing_barrier(const u32* in, u32* out, u32 n) {
    __shared__ u32 tile[256];
    u32 k = blockIdx.x * 256 + threadIdx.x;
    tile[threadIdx.x] = k < n ? in[k] : 0;
    if (k < n) out[k] = tile[255 - threadIdx.x];
}

// A warp that passes its barrier writes the next round's numbers before other warps read this round's.
HBX_KERNEL missing_second_barrier(const u32* in, u32* out, u32 n) {
    __shared__ u32 tile[256];
    for (u32 base = 0; base < n; base += 256) {
        tile[threadIdx.x] = in[base + threadIdx.x];
        __syncthreads();
        out[base + threadIdx.x] = tile[255 - threadIdx.x];
    }
}

// Threads without a number leave before the barrier.
HBX_KERNEL left_before_barrier(const u32* in, u32* out, u32 n) {
    __shared__ u32 tile[256];
    u32 k = blockIdx.x * 256 + threadIdx.x;
    if (k >= n) return;
    tile[threadIdx.x] = in[k];
    __syncthreads();
    out[k] = tile[threadIdx.x ^ 1];
}

// The first warp waits at one barrier, the others at another.
HBX_KERNEL two_barriers(u32* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

// Half a warp shuffles with a full mask, the other half goes to the barrier.
HBX_KERNEL divergent_shuffle(u32* out) {
    u32 x = threadIdx.x;
    if (hbx_lane() < 16) x = __shfl_sync(HBX_FULL, x, 0);
    __syncthreads();
    out[threadIdx.x] = x;
}

// Lanes of one warp meet in different operations.
HBX_KERNEL mixed_operations(u32* out) {
    u32 x;
    if (hbx_lane() < 16)
        x = __ballot_sync(HBX_FULL, 1);
    else
        x = __any_sync(HBX_FULL, 1);
    out[threadIdx.x] = x;
}

// Upper lanes name a mask without themselves.
HBX_KERNEL foreign_mask(u32* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, threadIdx.x, 0); }

// Only the first `n` numbers are written, all are read.
HBX_KERNEL uninitialized_shared(const u32* in, u32* out, u32 n) {
    __shared__ u32 tile[256];
    if (threadIdx.x < n) tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[255 - threadIdx.x];
}

HBX_KERNEL uninitialized_dynamic(u32* out) {
    HBX_DYN_SMEM(raw);
    out[threadIdx.x] = ((u32*)raw)[threadIdx.x];
}

// One number too far, in global memory and in both kinds of shared memory.
HBX_KERNEL global_overrun(const u32* in, u32* out, u32 n) {
    u32 k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k <= n) out[0] += in[k];
}

HBX_KERNEL global_write_overrun(u32* out, u32 n) {
    u32 k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k <= n) out[k] = k;
}

HBX_KERNEL shared_overrun(u32* out, u32 reach) {
    __shared__ u32 tile[40];
    __shared__ u32 other[40];
    u32* volatile hidden = tile;  // compilers no longer see which array it is
    u32* place = hidden;
    for (u32 k = threadIdx.x; k < reach; k += blockDim.x) {
        place[k] = k;
        other[k % 40] = k;
    }
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x % 40] + other[threadIdx.x % 40];
}

HBX_KERNEL dynamic_overrun(u32* out, u32 reach) {
    HBX_DYN_SMEM(raw);
    u32* tile = (u32*)raw;
    for (u32 k = threadIdx.x; k < reach; k += blockDim.x) tile[k] = k;
    __syncthreads();
    out[threadIdx.x] = tile[0];
}

// Undefined in C++: a shift by the width of its type.
HBX_KERNEL wide_shift(u32* out, u32 width) { out[threadIdx.x] = threadIdx.x << width; }

// A vector load from an address that is not a multiple of 16.
HBX_KERNEL misaligned_vector(const u32* in, u32* out, u32 skip) {
    out[threadIdx.x] = ((const uint4*)(in + skip))->x;
}

HBX_KERNEL trapped(u32* out) {
    if (threadIdx.x == 5) __trap();
    out[threadIdx.x] = 1;
}
