// CUDA C++ as our kernels spell it, for g++: force-included before a kernel file, which then compiles unchanged
// and runs on the CPU. Owns the vocabulary (keywords, built-in variables, intrinsics); fibers.h runs threads.
//
// One running thread and sequential consistency: races show as results that depend on the order of threads,
// never as torn or late writes.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "fibers.h"
#ifdef __SANITIZE_THREAD__
#include <stdlib.h>
#endif

#define HBX_EMUL 1

// --- keywords ------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static HBX_EMUL_SECTION
#define HBX_DYN_SMEM(name) unsigned char* const name = ::hbx_emul::dynamic_shared

#define threadIdx (::hbx_emul::self->thread)
static constexpr int warpSize = 32;

#define HBX_EMUL_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define HBX_EMUL_HERE (::hbx_emul::Site{file_, line_})

// --- vector types --------------------------------------------------------------------------------------
#define HBX_EMUL_VECTOR(T, name, align)                                                                      \
    struct alignas(2 * align) name##2 { T x, y; };                                                           \
    struct alignas(4 * align > 16 ? 16 : 4 * align) name##4 { T x, y, z, w; };                               \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                               \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HBX_EMUL_VECTOR(unsigned char, uchar, 1)
HBX_EMUL_VECTOR(unsigned short, ushort, 2)
HBX_EMUL_VECTOR(short, short, 2)
HBX_EMUL_VECTOR(int, int, 4)
HBX_EMUL_VECTOR(unsigned, uint, 4)
HBX_EMUL_VECTOR(float, float, 4)
HBX_EMUL_VECTOR(double, double, 8)
HBX_EMUL_VECTOR(long long, longlong, 8)
HBX_EMUL_VECTOR(unsigned long long, ulonglong, 8)

// --- collectives ---------------------------------------------------------------------------------------
namespace hbx_emul {
template <class T>
inline uint64_t to_bits(T value) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "32 or 64 bits");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
inline T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "equal sizes");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
template <class T>
inline T shuffle(uint32_t mask, T value, uint32_t source, Site site) {
    return from_bits<T>(collective(SHFL, mask, to_bits(value), source, site));
}
template <class T>
struct same { typedef T type; };
template <class T, class... Allowed>
constexpr bool one_of() { return (std::is_same<T, Allowed>::value || ...); }
// Whether a barrier of a kernel is left out, to see that its absence is noticed: HBX_EMULATED_WITHOUT names it
// as "densify.cu:24". Builds for ThreadSanitizer alone ask.
inline bool left_out(const char *file, int line) {
#ifdef __SANITIZE_THREAD__
    static const char *const name = getenv("HBX_EMULATED_WITHOUT");
    if (name == nullptr) return false;
    const char *const slash = strrchr(file, '/'), *const base = slash ? slash + 1 : file;
    const size_t length = strlen(base);
    return strncmp(name, base, length) == 0 && name[length] == ':' && atoi(name + length + 1) == line;
#else
    (void)file, (void)line;
    return false;
#endif
}
}  // namespace hbx_emul

inline void __syncthreads(HBX_EMUL_SITE) {
    if (hbx_emul::left_out(file_, line_)) return;
    hbx_emul::barrier(hbx_emul::SYNCTHREADS, 0, HBX_EMUL_HERE);
}
inline int __syncthreads_count(int x, HBX_EMUL_SITE) {
    return static_cast<int>(hbx_emul::barrier(hbx_emul::SYNCTHREADS_COUNT, x != 0, HBX_EMUL_HERE));
}
inline int __syncthreads_or(int x, HBX_EMUL_SITE) { return __syncthreads_count(x, file_, line_) != 0; }
inline int __syncthreads_and(int x, HBX_EMUL_SITE) { return __syncthreads_count(!x, file_, line_) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, HBX_EMUL_SITE) {
    if (hbx_emul::left_out(file_, line_)) return;
    hbx_emul::collective(hbx_emul::SYNCWARP, mask, 0, 0, HBX_EMUL_HERE);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, HBX_EMUL_SITE) {
    unsigned lane = hbx_emul::self->lane, w = static_cast<unsigned>(width);
    return hbx_emul::shuffle(mask, value, (lane & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1)), HBX_EMUL_HERE);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, HBX_EMUL_SITE) {
    unsigned lane = hbx_emul::self->lane, in_segment = lane & (static_cast<unsigned>(width) - 1);
    return hbx_emul::shuffle(mask, value, in_segment >= delta ? lane - delta : lane, HBX_EMUL_HERE);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, HBX_EMUL_SITE) {
    unsigned lane = hbx_emul::self->lane, w = static_cast<unsigned>(width), in_segment = lane & (w - 1);
    return hbx_emul::shuffle(mask, value, delta < w - in_segment ? lane + delta : lane, HBX_EMUL_HERE);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, HBX_EMUL_SITE) {
    unsigned lane = hbx_emul::self->lane, w = static_cast<unsigned>(width);
    unsigned other = lane ^ static_cast<unsigned>(bits);
    // Lower segments may be read, higher ones may not.
    return hbx_emul::shuffle(mask, value, other < (lane & ~(w - 1)) + w && other < 32 ? other : lane, HBX_EMUL_HERE);
}

#define HBX_EMUL_VOTE(name, op, R)                                                                           \
    inline R name(unsigned mask, int predicate, HBX_EMUL_SITE) {                                             \
        return static_cast<R>(hbx_emul::collective(hbx_emul::op, mask, predicate != 0, 0, HBX_EMUL_HERE));   \
    }
HBX_EMUL_VOTE(__ballot_sync, BALLOT, unsigned)
HBX_EMUL_VOTE(__any_sync, ANY, int)
HBX_EMUL_VOTE(__all_sync, ALL, int)

#define HBX_EMUL_REDUCE(name, op, T)                                                                         \
    inline T name(unsigned mask, T value, HBX_EMUL_SITE) {                                                   \
        return hbx_emul::from_bits<T>(                                                                       \
            hbx_emul::collective(hbx_emul::op, mask, hbx_emul::to_bits(value), 0, HBX_EMUL_HERE));           \
    }
HBX_EMUL_REDUCE(__reduce_add_sync, REDUCE_ADD, unsigned)
HBX_EMUL_REDUCE(__reduce_add_sync, REDUCE_ADD, int)
HBX_EMUL_REDUCE(__reduce_min_sync, REDUCE_MIN_U, unsigned)
HBX_EMUL_REDUCE(__reduce_min_sync, REDUCE_MIN_I, int)
HBX_EMUL_REDUCE(__reduce_max_sync, REDUCE_MAX_U, unsigned)
HBX_EMUL_REDUCE(__reduce_max_sync, REDUCE_MAX_I, int)
HBX_EMUL_REDUCE(__reduce_and_sync, REDUCE_AND, unsigned)
HBX_EMUL_REDUCE(__reduce_or_sync, REDUCE_OR, unsigned)
HBX_EMUL_REDUCE(__reduce_xor_sync, REDUCE_XOR, unsigned)

template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, HBX_EMUL_SITE) {
    return static_cast<unsigned>(
        hbx_emul::collective(hbx_emul::MATCH_ANY, mask, hbx_emul::to_bits(value), 0, HBX_EMUL_HERE));
}

inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap(HBX_EMUL_SITE) {
    hbx_emul::say("thread %u at %s:%d: ", hbx_emul::self->number, file_, line_);
    hbx_emul::divergent("__trap");
}

// --- atomics -------------------------------------------------------------------------------------------
// The types that CUDA has, no others: what compiles here compiles there.
#define HBX_EMUL_ATOMIC(name, expression, ...)                                                               \
    template <class T>                                                                                       \
    inline T name(T* place, typename hbx_emul::same<T>::type value) {                                        \
        static_assert(hbx_emul::one_of<T, __VA_ARGS__>(), #name " has no version for this type");            \
        T old, made;                                                                                         \
        __atomic_load(place, &old, __ATOMIC_RELAXED);                                                        \
        made = expression;                                                                                   \
        __atomic_store(place, &made, __ATOMIC_RELAXED);                                                      \
        return old;                                                                                          \
    }
// Sums wrap around as on the device, where signed overflow is defined.
namespace hbx_emul {
template <class T>
inline T wrap_add(T a, T b) {
    if constexpr (std::is_integral<T>::value) {
        typedef typename std::make_unsigned<T>::type U;
        return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
    } else {
        return a + b;
    }
}
}  // namespace hbx_emul
HBX_EMUL_ATOMIC(atomicAdd, hbx_emul::wrap_add(old, value), int, unsigned, unsigned long long, float, double)
HBX_EMUL_ATOMIC(atomicSub, hbx_emul::wrap_add(old, static_cast<T>(0 - value)), unsigned)
HBX_EMUL_ATOMIC(atomicMin, (value < old ? value : old), int, unsigned, long long, unsigned long long)
HBX_EMUL_ATOMIC(atomicMax, (value > old ? value : old), int, unsigned, long long, unsigned long long)
HBX_EMUL_ATOMIC(atomicAnd, (old & value), int, unsigned, unsigned long long)
HBX_EMUL_ATOMIC(atomicOr, (old | value), int, unsigned, unsigned long long)
HBX_EMUL_ATOMIC(atomicXor, (old ^ value), int, unsigned, unsigned long long)
HBX_EMUL_ATOMIC(atomicExch, value, int, unsigned, unsigned long long, float)
template <class T>
inline T atomicCAS(T* place, typename hbx_emul::same<T>::type expected, typename hbx_emul::same<T>::type value) {
    static_assert(hbx_emul::one_of<T, int, unsigned, unsigned long long, unsigned short>(), "no atomicCAS for this");
    T old = expected, wanted = value;
    __atomic_compare_exchange(place, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return old;
}

// --- bits ----------------------------------------------------------------------------------------------
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int k = 0; k < 32; ++k) y |= (x >> k & 1u) << (31 - k);
    return y;
}
inline unsigned long long __brevll(unsigned long long x) {
    return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 | __brev(static_cast<unsigned>(x >> 32));
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31u));
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) << (shift & 31u) >> 32);
}
inline unsigned __funnelshift_rc(unsigned lo, unsigned hi, unsigned shift) {
    return shift >= 32 ? hi : __funnelshift_r(lo, hi, shift);
}
inline unsigned __funnelshift_lc(unsigned lo, unsigned hi, unsigned shift) {
    return shift >= 32 ? lo : __funnelshift_l(lo, hi, shift);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int k = 0; k < 4; ++k) {
        unsigned pick = selector >> (4 * k) & 15u;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7u))) & 255u;
        if (pick & 8u) byte = byte & 128u ? 255u : 0u;
        result |= byte << (8 * k);
    }
    return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// --- reinterpretations, conversions, arithmetic ----------------------------------------------------------
#define HBX_EMUL_CAST(name, To, From)                                                                        \
    inline To name(From x) { return hbx_emul::bit_cast<To>(x); }
HBX_EMUL_CAST(__float_as_uint, unsigned, float)
HBX_EMUL_CAST(__float_as_int, int, float)
HBX_EMUL_CAST(__uint_as_float, float, unsigned)
HBX_EMUL_CAST(__int_as_float, float, int)
HBX_EMUL_CAST(__double_as_longlong, long long, double)
HBX_EMUL_CAST(__longlong_as_double, double, long long)

// Rounding to nearest even is what the CPU does, towards zero what a cast does.
#define HBX_EMUL_CONVERT(name, To, From)                                                                     \
    inline To name(From x) { return static_cast<To>(x); }
HBX_EMUL_CONVERT(__double2float_rn, float, double)
HBX_EMUL_CONVERT(__int2float_rn, float, int)
HBX_EMUL_CONVERT(__uint2float_rn, float, unsigned)
HBX_EMUL_CONVERT(__ll2float_rn, float, long long)
HBX_EMUL_CONVERT(__ull2float_rn, float, unsigned long long)
HBX_EMUL_CONVERT(__int2double_rn, double, int)
HBX_EMUL_CONVERT(__uint2double_rn, double, unsigned)
HBX_EMUL_CONVERT(__ll2double_rn, double, long long)
HBX_EMUL_CONVERT(__ull2double_rn, double, unsigned long long)

#define HBX_EMUL_ARITHMETIC(name, T, operation)                                                              \
    inline T name(T a, T b) { return a operation b; }
HBX_EMUL_ARITHMETIC(__fadd_rn, float, +)
HBX_EMUL_ARITHMETIC(__fsub_rn, float, -)
HBX_EMUL_ARITHMETIC(__fmul_rn, float, *)
HBX_EMUL_ARITHMETIC(__fdiv_rn, float, /)
HBX_EMUL_ARITHMETIC(__fdividef, float, /)
HBX_EMUL_ARITHMETIC(__dadd_rn, double, +)
HBX_EMUL_ARITHMETIC(__dsub_rn, double, -)
HBX_EMUL_ARITHMETIC(__dmul_rn, double, *)
HBX_EMUL_ARITHMETIC(__ddiv_rn, double, /)
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __expf(float x) { return expf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

// CUDA's overloads: the same calls are exact here and there, and the same ones are ambiguous.
#define HBX_EMUL_MIN_MAX(R, A, B)                                                                            \
    inline R min(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); } \
    inline R max(A a, B b) { return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }
HBX_EMUL_MIN_MAX(int, int, int)
HBX_EMUL_MIN_MAX(unsigned, unsigned, unsigned)
HBX_EMUL_MIN_MAX(unsigned, int, unsigned)
HBX_EMUL_MIN_MAX(unsigned, unsigned, int)
HBX_EMUL_MIN_MAX(long, long, long)
HBX_EMUL_MIN_MAX(unsigned long, unsigned long, unsigned long)
HBX_EMUL_MIN_MAX(long long, long long, long long)
HBX_EMUL_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
HBX_EMUL_MIN_MAX(unsigned long long, long long, unsigned long long)
HBX_EMUL_MIN_MAX(unsigned long long, unsigned long long, long long)
HBX_EMUL_MIN_MAX(float, float, float)
HBX_EMUL_MIN_MAX(double, double, double)
HBX_EMUL_MIN_MAX(double, float, double)
HBX_EMUL_MIN_MAX(double, double, float)

// --- memory --------------------------------------------------------------------------------------------
#define HBX_EMUL_LOAD(name)                                                                                  \
    template <class T>                                                                                       \
    inline T name(const T* place) { return *place; }
HBX_EMUL_LOAD(__ldg)
HBX_EMUL_LOAD(__ldcs)
HBX_EMUL_LOAD(__ldcg)
HBX_EMUL_LOAD(__ldca)
HBX_EMUL_LOAD(__ldlu)
#define HBX_EMUL_STORE(name)                                                                                 \
    template <class T>                                                                                       \
    inline void name(T* place, typename hbx_emul::same<T>::type value) { *place = value; }
HBX_EMUL_STORE(__stcs)
HBX_EMUL_STORE(__stcg)
HBX_EMUL_STORE(__stwb)
HBX_EMUL_STORE(__stwt)

// --- launching -----------------------------------------------------------------------------------------
namespace hbx_emul {

// A parameter's letter and size: p (to const) or P with the size of what it points to (0: void), u, i or f.
template <class T>
constexpr char letter() {
    if constexpr (std::is_pointer<T>::value)
        return std::is_const<typename std::remove_pointer<T>::type>::value ? 'p' : 'P';
    else if constexpr (std::is_floating_point<T>::value)
        return 'f';
    else if constexpr (std::is_integral<T>::value)
        return std::is_signed<T>::value ? 'i' : 'u';
    else
        static_assert(std::is_pointer<T>::value, "kernels take pointers, integers and floats");
    return '?';
}
template <class T>
constexpr unsigned size() {
    if constexpr (std::is_pointer<T>::value) {
        typedef typename std::remove_pointer<T>::type Target;
        if constexpr (std::is_void<Target>::value)
            return 0;
        else
            return sizeof(Target);
    }
    return sizeof(T);
}

template <class... A>
struct Caller {
    template <void (*kernel)(A...), size_t... K>
    static void call(void** arguments, std::index_sequence<K...>) {
        kernel(*static_cast<A*>(arguments[K])...);
    }
    template <void (*kernel)(A...)>
    static void entry(void** arguments) {
        call<kernel>(arguments, std::index_sequence_for<A...>());
    }
    static unsigned signature(char* letters, unsigned* sizes) {
        const char all[] = {letter<A>()..., 0};
        const unsigned each[] = {size<A>()..., 0};
        memcpy(letters, all, sizeof...(A));
        memcpy(sizes, each, sizeof...(A) * sizeof(unsigned));
        return sizeof...(A);
    }
};
template <class... A>
Caller<A...> caller(void (*)(A...));

}  // namespace hbx_emul

// Two functions per kernel: its parameters, and a launch.
#define EMUL_EXPORT(kernel)                                                                                  \
    extern "C" __attribute__((visibility("default"))) unsigned hbx_signature_##kernel(char* letters,         \
                                                                                      unsigned* sizes) {     \
        return decltype(hbx_emul::caller(&kernel))::signature(letters, sizes);                               \
    }                                                                                                        \
    extern "C" __attribute__((visibility("default"))) int hbx_launch_##kernel(hbx_emul::Launch* launch,      \
                                                                              void** arguments) {            \
        return hbx_emul::run(launch, &decltype(hbx_emul::caller(&kernel))::entry<&kernel>, arguments);       \
    }
