// CSR rows to dense rows: repeated columns summed, optionally scaled to a total and put through log1p, rounded to
// the output's type. Equals `densify` of hbx_gpu/_engine/host/dense.py up to the rounding of float sums and log1p.
#include "convert.cuh"

// The stored elements [begin, end) of a row.
struct HbxDensifyRow {
    const i32* indices;
    const void* values;
    u32 type;
    u64 begin, end;
    u32 n_features;
    bool counts;  // values must be counts: whole numbers, not negative
};

// The sum of a row over a block, the same on every run and in every thread. `parts` has 32 doubles; before they are
// written again the caller's tiles bring a barrier.
HBX_DEVICE double hbx_densify_sum(double own, double* parts) {
#pragma unroll
    for (u32 d = 1; d < 32u; d <<= 1) {
        double other = hbx_double(hbx_shfl_up(hbx_bits64(own), d));
        if (hbx_lane() >= d) own += other;
    }
    if (hbx_lane() == 31u) parts[threadIdx.x / 32u] = own;
    __syncthreads();
    double total = 0;
    for (u32 k = 0; k < blockDim.x / 32u; k++) total += parts[k];
    return total;
}

// What a row's values are multiplied by: target_sum over the sum of kept values, 1 without a target or a sum.
HBX_DEVICE double hbx_densify_scale(const HbxDensifyRow& row, double target_sum, double* parts) {
    if (!(target_sum > 0) || row.n_features == 0) return 1.0;
    double own = 0;
    for (u64 i = row.begin + threadIdx.x; i < row.end; i += blockDim.x) {
        if ((u32)row.indices[i] < row.n_features) own += hbx_load_number<double>(row.values, row.type, i);
    }
    double total = hbx_densify_sum(own, parts);
    return total > 0 ? target_sum / total : 1.0;
}

// Adds the row's values whose columns lie in [first, first + n) to the tile. Returns status bits.
template <class Number>
HBX_DEVICE u32 hbx_densify_add(const HbxDensifyRow& row, double scale, Number* tile, u32 first, u32 n) {
    u32 bits = 0;
    for (u64 i = row.begin + threadIdx.x; i < row.end; i += blockDim.x) {
        u32 column = (u32)row.indices[i];  // -1, dropped, is the largest
        if (column >= row.n_features && column != 0xffffffffu) bits |= HBX_BAD_COLUMN;
        if (column < first || column - first >= n || column >= row.n_features) continue;
        if (row.counts) {
            double x = hbx_load_number<double>(row.values, row.type, i);
            if (!(x >= 0 && x - floor(x) == 0)) bits |= HBX_NOT_COUNTS;  // nor NaN nor infinity
        }
        Number x = scale == 1.0 ? hbx_load_number<Number>(row.values, row.type, i)
                                : (Number)(hbx_load_number<double>(row.values, row.type, i) * scale);
        atomicAdd(tile + (column - first), x);
    }
    return bits;
}

template <class Number>
HBX_DEVICE void hbx_densify_zero(Number* tile, u32 n) {
    const u32 step = 16u / (u32)sizeof(Number);
    HbxWords zeros = {{0, 0, 0, 0}};
    for (u32 v = threadIdx.x; v < n / step; v += blockDim.x) ((HbxWords*)tile)[v] = zeros;
    for (u32 i = n / step * step + threadIdx.x; i < n; i += blockDim.x) tile[i] = 0;
}

HBX_DEVICE float hbx_densify_log(float x) { return hbx_log1p(x); }
HBX_DEVICE double hbx_densify_log(double x) { return log1p(x); }

// What is done to a finished sum; most are 0, whose log1p is known.
template <class Number>
struct HbxDensifyFinish {
    bool log;
    HBX_DEVICE Number operator()(Number x) const { return log && x != 0 ? hbx_densify_log(x) : x; }
};

// A block takes one row at a time, grid-stride: the sums of `tile_features` columns at a time stand in dynamic
// shared memory (tile_features numbers: 8 bytes for float64, else 4; and HBX_TILE_SLACK bytes), then go out with
// 16-byte stores. A row whose offsets are wrong is written as zeros.
template <class Format>
HBX_DEVICE void hbx_densify(const i32* indices, const void* values, u32 value_type, u64 n_elements, const i64* offsets,
                            u32 n_rows, void* out, u32 n_features, u32 tile_features, double target_sum, u32 log,
                            u32* status, u32* any, u8* shared, double* parts) {
    typedef typename Format::Number Number;
    HbxDensifyFinish<Number> finish = {log != 0};
    bool typed = hbx_size_of(value_type) != 0 && value_type != HBX_BF16;
    // Unsigned values are what they should be.
    bool counts = (target_sum > 0 || log != 0) && value_type > HBX_U64;
    for (u64 r = blockIdx.x; r < n_rows; r += gridDim.x) {
        i64 begin = offsets[r], end = offsets[r + 1];
        bool ordered = typed && begin >= 0 && begin <= end && (u64)end <= n_elements && tile_features != 0;
        if (!ordered) {
            begin = end = 0;
            if (threadIdx.x == 0) hbx_fail(status + r, any, HBX_BAD_PLACE);
        }
        if (tile_features == 0) continue;
        HbxDensifyRow row = {indices, values, value_type, (u64)begin, (u64)end, n_features, counts};
        double scale = hbx_densify_scale(row, target_sum, parts);
        typename Format::Element* line = (typename Format::Element*)out + r * n_features;
        for (u64 first = 0; first < n_features; first += tile_features) {
            u32 n = n_features - (u32)first < tile_features ? n_features - (u32)first : tile_features;
            u32 shift = hbx_tile_shift<Number>(line + first);
            Number* tile = (Number*)shared + shift;
            hbx_densify_zero((Number*)shared, shift + n);
            __syncthreads();
            u32 bits = hbx_densify_add(row, scale, tile, (u32)first, n);
            if (bits != 0) hbx_fail(status + r, any, bits);
            __syncthreads();
            hbx_store_row<Format>(line + first, tile, n, finish);
            __syncthreads();
        }
    }
}

// Blocks of any multiple of 32 threads. Checked: offsets against n_elements, every column against n_features (-1 is a
// dropped one and skipped), the type of the values, and that they are counts where they are scaled or logged. `out` has n_rows * n_features elements; every one is written.
// Subnormal float32 may become 0, as the compiler's option -ftz=true has it.
#define HBX_DENSIFY_PARAMETERS                                                                                      \
    const i32 *indices, const void *values, u32 value_type, u64 n_elements, const i64 *offsets, u32 n_rows, void *out, \
        u32 n_features, u32 tile_features, double target_sum, u32 log, u32 *status, u32 *any
#define HBX_DENSIFY_BODY(Format)                                                                                    \
    HBX_DYN_SMEM(shared);                                                                                           \
    __shared__ double parts[32];                                                                                    \
    hbx_densify<Format>(indices, values, value_type, n_elements, offsets, n_rows, out, n_features, tile_features,   \
                        target_sum, log, status, any, shared, parts)

HBX_KERNEL densify_f32(HBX_DENSIFY_PARAMETERS) { HBX_DENSIFY_BODY(HbxFormatF32); }
HBX_KERNEL densify_f16(HBX_DENSIFY_PARAMETERS) { HBX_DENSIFY_BODY(HbxFormatF16); }
HBX_KERNEL densify_bf16(HBX_DENSIFY_PARAMETERS) { HBX_DENSIFY_BODY(HbxFormatBF16); }
HBX_KERNEL densify_f64(HBX_DENSIFY_PARAMETERS) { HBX_DENSIFY_BODY(HbxFormatF64); }
