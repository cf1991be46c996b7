// Random numbers by key and exact arithmetic of tokens: Philox4x32-10 as hbx_gpu/tokens/_draws.py counts it, and the
// floating-point steps of hbx_gpu/tokens/_arithmetic.py. Every step is one IEEE operation: nothing is contracted.
#pragma once
#include "convert.cuh"

// What a draw is for (hbx_gpu/tokens/_draws.py).
#define HBX_PICK 16u
#define HBX_ZEROS 17u
#define HBX_BIN 18u
#define HBX_MASK 19u
#define HBX_KIND 20u
#define HBX_WEIGHTED 21u
#define HBX_CHROM 22u
#define HBX_THIN 23u
#define HBX_RATIO 24u
#define HBX_TIES 25u
#define HBX_MAX_INDEX 0x1000000u  // special tokens count down from here

struct HbxWords4 {
    u32 w[4];
    HBX_DEVICE u64 key() const { return (u64)w[0] << 32 | w[1]; }
};

// All that one cell draws in one epoch.
struct HbxDraws {
    u64 seed, cell;
    u32 epoch;

    HBX_DEVICE HbxWords4 words(u32 step, u32 index, u32 block = 0) const {
        u32 a = (u32)cell, b = (u32)(cell >> 32) | block << 8, c = epoch, d = step | index << 8;
        u32 u = (u32)seed, v = (u32)(seed >> 32);
#pragma unroll
        for (u32 k = 0; k < 10u; k++) {
            u32 left = __umulhi(0xD2511F53u, a), right = __umulhi(0xCD9E8D57u, c);
            u32 low = 0xD2511F53u * a;
            b ^= right ^ u;
            d ^= left ^ v;
            a = b;
            b = 0xCD9E8D57u * c;
            c = d;
            d = low;
            u += 0x9E3779B9u;
            v += 0xBB67AE85u;
        }
        HbxWords4 all = {{a, b, c, d}};
        return all;
    }
    HBX_DEVICE u64 key(u32 step, u32 index, u32 block = 0) const { return words(step, index, block).key(); }
};

// The 53 bits that make a key's number in [0, 1).
HBX_DEVICE u64 hbx_unit_bits(u64 key) { return key >> 37 << 26 | (key & 0xffffffffu) >> 6; }

// A 32-bit word as a number of 0 .. span - 1.
HBX_DEVICE u32 hbx_scaled(u32 word, u64 span) { return (u32)((u64)word * span >> 32); }

// How many of the 2^53 numbers of [0, 1) lie below a share.
HBX_DEVICE u64 hbx_below(double share) { return (u64)ceil(__dmul_rn(share, 9007199254740992.0)); }

// --- arithmetic -------------------------------------------------------------------------------------------

// The nearest float32, subnormal ones too.
HBX_DEVICE float hbx_f32(double x) {
    float number;
    hbx_to_float(x, &number);
    return number;
}

#define HBX_ADD __dadd_rn
#define HBX_SUB __dsub_rn
#define HBX_MUL __dmul_rn
#define HBX_DIV __ddiv_rn

// log(1 + x) of x >= 0, step by step as the reference.
HBX_DEVICE double hbx_exact_log1p(double x) {
    double k = 0, f = x, c = 0;
    if (!(x < 0.41421356237309503)) {
        double u = HBX_ADD(1.0, x);
        u64 bits = hbx_bits64(u);
        i32 e = (i32)(bits >> 52 & 0x7ffu) - 1022;
        double m = hbx_double((bits & 0xfffffffffffffull) | 0x3fe0000000000000ull);  // [0.5, 1)
        if (m < 0.7071067811865476) {
            m = HBX_MUL(m, 2.0);
            e -= 1;
        }
        k = (double)e;
        f = HBX_SUB(m, 1.0);
        c = HBX_DIV(k >= 1.0 ? HBX_SUB(1.0, HBX_SUB(u, x)) : HBX_SUB(x, HBX_SUB(u, 1.0)), u);
    }
    double half = HBX_MUL(HBX_MUL(0.5, f), f);
    double s = HBX_DIV(f, HBX_ADD(2.0, f));
    double z = HBX_MUL(s, s), w = HBX_MUL(z, z);
    double even = HBX_MUL(w, 1.531383769920937332e-01);
    even = HBX_MUL(w, HBX_ADD(3.999999999940941908e-01, HBX_MUL(w, HBX_ADD(2.222219843214978396e-01, even))));
    double odd = HBX_MUL(w, 1.479819860511658591e-01);
    odd = HBX_MUL(w, HBX_ADD(2.857142874366239149e-01, HBX_MUL(w, HBX_ADD(1.818357216161805012e-01, odd))));
    odd = HBX_MUL(z, HBX_ADD(6.666666666666735130e-01, odd));
    double sum = HBX_MUL(s, HBX_ADD(half, HBX_ADD(odd, even)));
    sum = HBX_ADD(sum, HBX_ADD(HBX_MUL(k, 1.90821492927058770002e-10), c));
    return HBX_ADD(HBX_ADD(HBX_SUB(sum, half), f), HBX_MUL(k, 6.93147180369123816490e-01));
}

// How a count becomes a value, and what is done to it (Norm and Curve of hbx_gpu/tokens/_program.py).
#define HBX_NORM_COUNT 0
#define HBX_NORM_F64_DIV 1
#define HBX_NORM_F64_RECIP 2
#define HBX_NORM_F32_RECIP 3
#define HBX_NORM_F32_DIV 4
#define HBX_NORM_F32_EPS 5
#define HBX_NORM_F32_FACTOR 6
#define HBX_NORM_F64_KNOWN 7
#define HBX_NORM_F32_KNOWN_EPS 8
#define HBX_NORM_F32_KEPT 9
#define HBX_CURVE_LOG1P 1
#define HBX_CURVE_LOG2P1 2

struct HbxTotals {
    double all, known, kept;
};

HBX_DEVICE double hbx_normalize(u32 norm, double x, const HbxTotals& totals, double target) {
    if (x == 0) return 0;
    if (norm == HBX_NORM_F64_DIV) return HBX_MUL(HBX_DIV(x, totals.all), target);
    if (norm == HBX_NORM_F64_RECIP) return HBX_MUL(HBX_MUL(x, HBX_DIV(1.0, totals.all)), target);
    if (norm == HBX_NORM_F64_KNOWN) return HBX_MUL(HBX_DIV(x, totals.known), target);
    float y = hbx_f32(x), n = hbx_f32(target), t = hbx_f32(totals.all), v = hbx_f32(totals.known);
    switch (norm) {
        case HBX_NORM_COUNT: return y;
        case HBX_NORM_F32_RECIP: return __fmul_rn(__fmul_rn(y, __fdiv_rn(1.0f, t)), n);
        case HBX_NORM_F32_DIV: return __fmul_rn(__fdiv_rn(y, v), n);
        case HBX_NORM_F32_EPS: return __fdiv_rn(__fmul_rn(n, y), __fadd_rn(t, 1e-6f));
        case HBX_NORM_F32_FACTOR: return __fmul_rn(y, __fdiv_rn(n, t));
        case HBX_NORM_F32_KNOWN_EPS: return __fmul_rn(__fdiv_rn(y, __fadd_rn(v, 1e-9f)), n);
        case HBX_NORM_F32_KEPT: return __fmul_rn(__fdiv_rn(y, hbx_f32(totals.kept)), n);
        default: return __fdiv_rn(__fmul_rn(y, n), t);
    }
}

// A value by the scale of its gene.
HBX_DEVICE double hbx_rank_value(u32 norm, double value, double scale) {
    if (norm == HBX_NORM_F64_RECIP || norm == HBX_NORM_F32_RECIP) return HBX_MUL(value, scale);
    if (norm == HBX_NORM_F32_EPS) return __fdiv_rn(hbx_f32(value), hbx_f32(scale));
    return HBX_DIV(value, scale);
}

HBX_DEVICE float hbx_bend(u32 curve, double value, float clip) {
    if (curve == HBX_CURVE_LOG1P) value = hbx_exact_log1p(value);
    if (curve == HBX_CURVE_LOG2P1) {
        float y = __fadd_rn(1.0f, hbx_f32(value));
        value = HBX_MUL(hbx_exact_log1p(HBX_SUB((double)y, 1.0)), 1.4426950408889634);
    }
    float result = hbx_f32(value);
    return result < clip ? result : clip;
}
