// Numbers in and out: float16 and bfloat16 by their bits, log1p, loads by type number, and the coalesced
// write of one row from shared memory. Equal, bit for bit, to float16_bits and bfloat16_bits of
// hbx_gpu/_engine/host/dense_kernels.py; log1p to a relative error below 2e-6.
#pragma once
#include "hbx.cuh"

#ifdef HBX_EMUL
#include <math.h>
#endif

// --- bits ---------------------------------------------------------------------------------------------

HBX_DEVICE u32 hbx_bits(float x) {
    union {
        float number;
        u32 bits;
    } both;
    both.number = x;
    return both.bits;
}

HBX_DEVICE float hbx_float(u32 bits) {
    union {
        u32 bits;
        float number;
    } both;
    both.bits = bits;
    return both.number;
}

HBX_DEVICE u64 hbx_bits64(double x) {
    union {
        double number;
        u64 bits;
    } both;
    both.number = x;
    return both.bits;
}

HBX_DEVICE double hbx_double(u64 bits) {
    union {
        u64 bits;
        double number;
    } both;
    both.bits = bits;
    return both.number;
}

// --- 16-bit floats: to nearest, ties to even ------------------------------------------------------------

// Two float16, the first in the low half. NaN becomes the quiet NaN with its sign and no payload.
HBX_DEVICE u16 hbx_f16_bits(float x) {
    u32 bits = hbx_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return (u16)(sign | 0x7e00u);
#ifdef HBX_EMUL
    if (size >= 0x47800000u) return (u16)(sign | 0x7c00u);
    if (size < 0x38800000u) {  // subnormal: adding 0.5 puts the last bit where float16 has it
        return (u16)(sign | (hbx_bits(hbx_float(size) + 0.5f) - 0x3f000000u));
    }
    size += 0xc8000fffu + (size >> 13 & 1u);  // exponent bias 127 -> 15, and round
    return (u16)(sign | size >> 13);
#else
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#endif
}

HBX_DEVICE u16 hbx_bf16_bits(float x) {
    u32 bits = hbx_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Two numbers in one word, the first in the low half.
HBX_DEVICE u32 hbx_f16_pair(float low, float high) {
#ifndef HBX_EMUL
    if (low == low && high == high) {
        u32 pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
#endif
    return (u32)hbx_f16_bits(low) | (u32)hbx_f16_bits(high) << 16;
}

HBX_DEVICE u32 hbx_bf16_pair(float low, float high) {
#ifndef HBX_EMUL
    if (low == low && high == high) {
        u32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
#endif
    return (u32)hbx_bf16_bits(low) | (u32)hbx_bf16_bits(high) << 16;
}

// The float that 16 bits of float16 stand for: always exact.
HBX_DEVICE float hbx_f16_float(u16 half) {
    u32 sign = (u32)(half & 0x8000u) << 16, size = half & 0x7fffu;
    if (size >= 0x7c00u) return hbx_float(sign | 0x7f800000u | size << 13);
    if (size >= 0x0400u) return hbx_float(sign | ((size << 13) + 0x38000000u));
    // Subnormal: a whole number of 2^-24, which float32 holds as a normal number.
    return hbx_float(sign | hbx_bits((float)size * hbx_float(0x33800000u)));
}

// --- log1p ----------------------------------------------------------------------------------------------

// Base-2 logarithm, relative error 2^-22 outside (0.5, 2), absolute 2^-22 inside.
HBX_DEVICE float hbx_log2(float x) {
#ifdef HBX_EMUL
    return log2f(x);
#else
    return __log2f(x);
#endif
}

HBX_DEVICE float hbx_quotient(float a, float b) {
#ifdef HBX_EMUL
    return a / b;
#else
    return __fdividef(a, b);
#endif
}

// log(1 + x). Near 0, where 1 + x rounds x away, 2 atanh(x / (2 + x)) by its series; elsewhere the
// hardware's logarithm. Relative error below 2e-6; NaN below -1, -inf at -1, inf at inf. No branches.
HBX_DEVICE float hbx_log1p(float x) {
    float far = hbx_log2(1.0f + x) * 0.693147182f;
    float z = hbx_quotient(x, 2.0f + x), w = z * z;
    float near = 2.0f * z * (1.0f + w * (1.0f / 3.0f + w * (0.2f + w * (1.0f / 7.0f))));
    return x > -0.3f && x < 0.5f ? near : far;
}

// --- rows from shared memory ----------------------------------------------------------------------------

struct alignas(16) HbxWords {
    u32 word[4];
};

template <class T>
struct alignas(16) HbxVector {
    T at[16 / sizeof(T)];
};

// Formats of an output element. `Element` holds its bits, `Number` is what it is computed in, `vector` makes
// 16 bytes from 16 / sizeof(Element) neighbors in a 16-byte aligned tile.
struct HbxFormatF32 {
    typedef u32 Element;
    typedef float Number;
    static HBX_DEVICE Element bits(float x) { return hbx_bits(x); }
    template <class T, class Value>
    static HBX_DEVICE HbxWords vector(const T* tile, Value value) {
        HbxVector<T> a = *(const HbxVector<T>*)tile;
        HbxWords out;
#pragma unroll
        for (u32 k = 0; k < 4; k++) out.word[k] = hbx_bits(value(a.at[k]));
        return out;
    }
};

template <bool kBfloat>
struct HbxFormat16 {
    typedef u16 Element;
    typedef float Number;
    static HBX_DEVICE Element bits(float x) { return kBfloat ? hbx_bf16_bits(x) : hbx_f16_bits(x); }
    template <class T, class Value>
    static HBX_DEVICE HbxWords vector(const T* tile, Value value) {
        HbxVector<T> a = *(const HbxVector<T>*)tile, b = *(const HbxVector<T>*)(tile + 4);
        HbxWords out;
#pragma unroll
        for (u32 k = 0; k < 2; k++) {
            float p = value(a.at[2 * k]), q = value(a.at[2 * k + 1]);
            float r = value(b.at[2 * k]), s = value(b.at[2 * k + 1]);
            out.word[k] = kBfloat ? hbx_bf16_pair(p, q) : hbx_f16_pair(p, q);
            out.word[2 + k] = kBfloat ? hbx_bf16_pair(r, s) : hbx_f16_pair(r, s);
        }
        return out;
    }
};
typedef HbxFormat16<false> HbxFormatF16;
typedef HbxFormat16<true> HbxFormatBF16;

struct HbxFormatF64 {
    typedef u64 Element;
    typedef double Number;
    static HBX_DEVICE Element bits(double x) { return hbx_bits64(x); }
    template <class T, class Value>
    static HBX_DEVICE HbxWords vector(const T* tile, Value value) {
        HbxVector<T> a = *(const HbxVector<T>*)tile;
        HbxWords out;
#pragma unroll
        for (u32 k = 0; k < 2; k++) {
            u64 bits = hbx_bits64(value(a.at[k]));
            out.word[2 * k] = (u32)bits;
            out.word[2 * k + 1] = (u32)(bits >> 32);
        }
        return out;
    }
};

// Elements of a row before its first 16-byte boundary.
template <class Element>
HBX_DEVICE u32 hbx_head(const Element* out) {
    return ((16u - ((u32)(u64)out & 15u)) & 15u) / (u32)sizeof(Element);
}

#define HBX_TILE_SLACK 16u  // bytes of a tile that hbx_tile_shift may leave out

// Numbers to leave out at the front of a 16-byte aligned tile, so that the element of `out` at its first 16-byte
// boundary stands at one in the tile too: rows of any width then go out in vectors.
template <class Number, class Element>
HBX_DEVICE u32 hbx_tile_shift(const Element* out) {
    const u32 step = 16u / (u32)sizeof(Number);
    return (step - hbx_head(out) % step) % step;
}

// Writes out[0, n) = value(tile[0, n)), by all threads of a block: 16 bytes at a time, single elements up to the first
// 16-byte boundary of `out` and after the last. `tile` is in shared memory, hbx_tile_shift numbers after a 16-byte
// boundary, of 4-byte numbers (8-byte for float64); `value` maps one of them to the format's Number. The caller puts
// a barrier before and after.
template <class Format, class T, class Value>
HBX_DEVICE void hbx_store_row(typename Format::Element* out, const T* tile, u32 n, Value value) {
    const u32 step = 16u / (u32)sizeof(typename Format::Element);
    u32 head = hbx_head(out);
    if (head > n) head = n;
    u32 vectors = (n - head) / step;
    for (u32 v = threadIdx.x; v < vectors; v += blockDim.x) {
        ((HbxWords*)(out + head))[v] = Format::vector(tile + head + v * step, value);
    }
    for (u32 i = threadIdx.x; i < n - vectors * step; i += blockDim.x) {
        u32 at = i < head ? i : i + vectors * step;
        out[at] = Format::bits(value(tile[at]));
    }
}

// --- numbers by type number ------------------------------------------------------------------------------

// Bytes of an element; 0 for a number that is not a type.
HBX_DEVICE u32 hbx_size_of(u32 type) {
    if (type == HBX_U8 || type == HBX_I8) return 1;
    if (type == HBX_U16 || type == HBX_I16 || type == HBX_F16 || type == HBX_BF16) return 2;
    if (type == HBX_U32 || type == HBX_I32 || type == HBX_F32) return 4;
    return type == HBX_U64 || type == HBX_I64 || type == HBX_F64 ? 8 : 0;
}

HBX_DEVICE bool hbx_is_signed(u32 type) { return type >= HBX_I8 && type <= HBX_I64; }

HBX_DEVICE bool hbx_is_integer(u32 type) { return type <= HBX_I64; }

// Element i of integers of any type, modulo 2^64: signed ones with their sign spread.
HBX_DEVICE u64 hbx_load_integer(const void* data, u32 type, u64 i) {
    switch (type) {
        case HBX_U8: return ((const u8*)data)[i];
        case HBX_U16: return ((const u16*)data)[i];
        case HBX_U32: return ((const u32*)data)[i];
        case HBX_I8: return (u64)(i64)((const i8*)data)[i];
        case HBX_I16: return (u64)(i64)((const i16*)data)[i];
        case HBX_I32: return (u64)(i64)((const i32*)data)[i];
        default: return ((const u64*)data)[i];
    }
}

// Between the two floats, subnormal ones too: -ftz=true, which cupy compiles with, does not reach into PTX.
HBX_DEVICE void hbx_to_float(double x, float* out) {
#ifdef HBX_EMUL
    *out = (float)x;
#else
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(*out) : "d"(x));
#endif
}

HBX_DEVICE void hbx_to_float(float x, double* out) {
#ifdef HBX_EMUL
    *out = (double)x;
#else
    asm("cvt.f64.f32 %0, %1;" : "=d"(*out) : "f"(x));
#endif
}

HBX_DEVICE void hbx_to_float(float x, float* out) { *out = x; }
HBX_DEVICE void hbx_to_float(double x, double* out) { *out = x; }

// Element i as Number (float or double), rounded once as NumPy's astype does. Any type but bfloat16.
template <class Number>
HBX_DEVICE Number hbx_load_number(const void* data, u32 type, u64 i) {
    Number number;
    switch (type) {
        case HBX_F16: return (Number)hbx_f16_float(((const u16*)data)[i]);
        case HBX_F32: hbx_to_float(((const float*)data)[i], &number); return number;
        case HBX_F64: hbx_to_float(((const double*)data)[i], &number); return number;
    }
    u64 x = hbx_load_integer(data, type, i);
    return hbx_is_signed(type) ? (Number)(i64)x : (Number)x;
}

// --- bounds, shuffles and scans of 64 bits ---------------------------------------------------------------

// Whether [start, start + length) lies in [0, room), without overflow.
HBX_DEVICE bool hbx_fits(u64 start, u64 length, u64 room) { return start <= room && length <= room - start; }

HBX_DEVICE u64 hbx_shfl_up(u64 x, u32 by) {
    u32 low = __shfl_up_sync(HBX_FULL, (u32)x, by), high = __shfl_up_sync(HBX_FULL, (u32)(x >> 32), by);
    return (u64)high << 32 | low;
}

HBX_DEVICE u64 hbx_shfl(u64 x, u32 lane) {
    u32 low = __shfl_sync(HBX_FULL, (u32)x, lane), high = __shfl_sync(HBX_FULL, (u32)(x >> 32), lane);
    return (u64)high << 32 | low;
}

// Inclusive sum over the lanes of a warp, modulo 2^64.
HBX_DEVICE u64 hbx_scan_sum(u64 x) {
#pragma unroll
    for (u32 d = 1; d < 32u; d <<= 1) {
        u64 y = hbx_shfl_up(x, d);
        if (hbx_lane() >= d) x += y;
    }
    return x;
}
