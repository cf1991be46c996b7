// Sound kernels in every habit ours have; their wrong twins are in the other files of this folder.
#include "hbx.cuh"

// A block per 256 numbers: reverses them through shared memory.
HBX_KERNEL reverse_block(const u32* in, u32* out, u32 n) {
    __shared__ u32 tile[256];
    u32 k = blockIdx.x * 256 + threadIdx.x;
    tile[threadIdx.x] = k < n ? in[k] : 0;
    __syncthreads();
    if (k < n) out[k] = tile[255 - threadIdx.x];
}

// The same with dynamic shared memory of `size` numbers, a warp operation between store and barrier.
HBX_KERNEL reverse_dynamic(const u32* in, u32* out, u32 size) {
    HBX_DYN_SMEM(raw);
    u32* tile = (u32*)raw;
    for (u32 k = threadIdx.x; k < size; k += blockDim.x) tile[k] = in[k];
    __syncwarp();
    __syncthreads();
    for (u32 k = threadIdx.x; k < size; k += blockDim.x) out[k] = tile[size - 1 - k];
}

// Shared arrays of templates and of functions called from several kernels.
template <class T>
HBX_DEVICE T block_sum(T x) {
    __shared__ T parts[32];
    for (u32 d = 16; d; d >>= 1) x += __shfl_down_sync(HBX_FULL, x, d);
    if (hbx_lane() == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = 0;
    for (u32 w = 0; w < (blockDim.x + 31) / 32; ++w) sum += parts[w];
    __syncthreads();
    return sum;
}

HBX_KERNEL sum_both(const u32* whole, const double* real, u32 n, u64* whole_sum, double* real_sum) {
    u64 a = 0;
    double b = 0;
    for (u32 k = blockIdx.x * blockDim.x + threadIdx.x; k < n; k += gridDim.x * blockDim.x) {
        a += whole[k];
        b += real[k];
    }
    a = block_sum(a);
    b = block_sum(b);
    if (threadIdx.x == 0) {
        atomicAdd(whole_sum, a);
        atomicAdd(real_sum, b);
    }
}

// A thread per number: `rounds` shuffles, for measuring.
HBX_KERNEL spin(u32* out, u32 rounds) {
    u32 x = threadIdx.x;
    for (u32 k = 0; k < rounds; ++k) x = __shfl_xor_sync(HBX_FULL, x, 1) + 1;
    out[blockIdx.x * blockDim.x + threadIdx.x] = x;
}
