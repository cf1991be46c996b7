// Ground floor of all kernels: integer types, launch spelling, records shared with the host, status bits,
// warp helpers. Three compilers read this text: NVRTC, nvcc and g++ behind a shim (HBX_EMUL).
//
// Rules: no headers of CUDA (only intrinsics), every collective with an explicit full mask in warp-uniform
// control flow, no waiting between blocks, 64-bit offsets wherever bytes or elements of a batch are counted.
#pragma once

#if defined(__CUDACC_RTC__)
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
#else
#include <stdint.h>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef long long i64;
#endif

#define HBX_KERNEL extern "C" __global__ void
#define HBX_DEVICE __device__ __forceinline__

// Dynamic shared memory of a launch, 16-byte aligned. The shim gives a heap block of exactly the launch's size.
#ifndef HBX_DYN_SMEM
#define HBX_DYN_SMEM(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define HBX_WARP 32u
#define HBX_FULL 0xffffffffu

// --- status ------------------------------------------------------------------------------------------
// One u32 per piece (rowpack, gather) or per chunk (bitpacking), 0 = fine; bits are OR-ed. The host turns them into
// CorruptChunkError (hbx_gpu/_engine/device/status.py holds the same numbers). `any` is one u32 per launch
// that is set beside it, so that the host looks at one word per batch.
#define HBX_BAD_RECORD 1u   // a piece's run, record or block lies outside what was staged
#define HBX_BAD_WIDTH 2u    // width above 8 * element size, or exceptions in a block of full width
#define HBX_TRUNCATED 4u    // payload or patches of a block end beyond what was staged
#define HBX_BAD_PATCH 8u    // positions of exceptions or resets do not ascend in their range
#define HBX_BAD_COLUMN 16u  // a column number outside the group's features
#define HBX_BAD_HEADER 32u  // bitpacking: transform, count or length
#define HBX_NOT_COUNTS 128u // a value that is to be normalized or logged is negative or no whole number
#define HBX_BAD_PLACE 64u   // the plan points outside an output (a bug of the host, never of a file)
#define HBX_BAD_STREAM 256u // a decompressor refused a stream, or found another number of bytes in it

HBX_DEVICE void hbx_fail(u32* status, u32* any, u32 bits) {
    atomicOr(status, bits);
    atomicOr(any, bits);
}

// --- records shared with the host (numpy dtypes in hbx_gpu/_engine/device/records.py) ------------------
// All offsets called "arena" count bytes from the start of the arena: the device memory that a batch's staged
// bytes were copied to, with room after them for decoded chunks.

// Consecutive directory records of one rowpack chunk with their payload and patches, as staged. A whole
// chunk is the run with first_record = payload_begin = patch_begin = 0.
struct HbxRun {
    u64 records;        // arena offset of record `first_record`; multiple of 8
    u64 payload;        // arena offset of payload unit `payload_begin`; multiple of 16
    u64 patches;        // arena offset of patch byte `patch_begin`
    u64 minimum;        // of the chunk's header
    u32 first_record;   // number of the first staged record within the chunk
    u32 n_records;      // staged records
    u32 payload_begin;  // in units of 16 bytes from payload_start
    u32 payload_units;  // staged units
    u32 patch_begin;    // in bytes from patch_start
    u32 patch_bytes;    // staged bytes
    u32 n;              // values of the chunk
    u8 element_size;    // 1, 2, 4, 8
    u8 transform;       // 0 none, 1 gaps
    u8 base_bytes;
    u8 unused;
};  // 64 bytes

// The part of one row that lies in one rowpack chunk of one array.
struct HbxPiece {
    u64 out;     // place of its first element in the role's flat output
    u32 run;     // its HbxRun
    u32 skip;    // first element inside the chunk
    u32 count;   // elements, at least 1
    u32 source;  // its HbxSource; only read for column indices
    u32 role;    // its HbxOutput: 0 = column indices, k + 1 = layer k
    u32 unused;
};  // 32 bytes

// The part of one row that lies in the arena decoded, or as it was stored plain.
struct HbxPlain {
    u64 data;    // arena offset of its first element; multiple of the element's size
    u64 out;     // place of its first element in the role's flat output
    u32 count;   // elements, at least 1
    u32 source;  // its HbxSource; only read for column indices
    u32 role;    // its HbxOutput
    u32 type;    // HBX_U8 ... of the stored elements
};  // 32 bytes

// A flat CSR output: column indices (role 0, int32, -1 where the remap drops) or the values of a layer.
struct HbxOutput {
    u64 address;   // in device memory
    u64 elements;  // what fits there
    u32 type;      // HBX_I32 for indices, else the type that values are converted to
    u32 unused;
};  // 24 bytes

// A homeobox.bitpacking chunk to decode.
struct HbxPacked {
    u64 data;       // arena offset of the chunk
    u64 out;        // arena offset of its word 0 once decoded; multiple of 8
    u32 nbytes;     // staged bytes
    u32 n_words;    // words that the metadata demand
    u32 first_word; // words [first_word, last_word) are wanted; others may stay unwritten
    u32 last_word;
};  // 32 bytes

// Local column -> output column of one Source.
struct HbxSource {
    u64 remap_start;   // first entry in the remap table
    u32 remap_length;  // features of the group
    u32 identity;      // 1: the remap changes nothing, do not look it up
};  // 16 bytes

// A stretch of one row whose indices and values lie at the same block positions of two rowpack chunks.
struct HbxSegment {
    u32 index_piece;  // HbxPiece of the indices; its status slot
    u32 value_piece;  // HbxPiece of the values; its status slot
    u32 index_skip;   // first element inside the index chunk
    u32 value_skip;   // first element inside the value chunk; equal to index_skip modulo 128
    u32 count;        // elements, at least 1
    u32 unused;
};  // 24 bytes

// A stretch of a decompressed chunk: stored bytes to copy, or a shuffled block to put back in order.
struct HbxBlock {
    u64 from;      // arena offset of its bytes
    u64 to;        // arena offset of where they go; the two do not overlap
    u32 nbytes;
    u32 typesize;  // bytes per element, at least 1
    u32 shuffle;   // 0 none, 1 bytes, 2 bits
    u32 unused;
};  // 32 bytes

// How an array is cut into chunks.
struct HbxArray {
    u64 first_chunk;  // number of its first chunk
    u32 elements;     // per chunk, at least 1
    u32 n_chunks;
};  // 16 bytes

// A metadata column of all rows.
struct HbxColumn {
    u64 data;  // address of its values; 0: row numbers
    u32 at;    // bytes per row of the columns before it in the output
    u32 size;  // bytes of a value: 1, 2, 4, 8
};  // 16 bytes

// Element types, by number (hbx_gpu/_engine/device/records.py).
#define HBX_U8 0
#define HBX_U16 1
#define HBX_U32 2
#define HBX_U64 3
#define HBX_I8 4
#define HBX_I16 5
#define HBX_I32 6
#define HBX_I64 7
#define HBX_F16 8
#define HBX_F32 9
#define HBX_F64 10
#define HBX_BF16 11

// --- warp helpers -------------------------------------------------------------------------------------

HBX_DEVICE u32 hbx_lane() { return threadIdx.x & 31u; }

// Inclusive sum over the lanes of a warp.
HBX_DEVICE u32 hbx_scan_sum(u32 x) {
#pragma unroll
    for (u32 d = 1; d < 32u; d <<= 1) {
        u32 y = __shfl_up_sync(HBX_FULL, x, d);
        if (hbx_lane() >= d) x += y;
    }
    return x;
}
