// The C interface of quantize.cu: one part of a layer's input becomes integers. A loader mirrors the structures with ctypes.
//
// Pointers are device pointers but for the structure itself, which is read before the call returns. Kernels run on the given stream; the call
// never waits. It returns 0, a cudaError_t (> 0), or a code below (< 0), found before the device is touched.
#pragma once
#include "common.cuh"

enum QvsrQuantizeCode {
    QVSR_QUANTIZE_NULL = -101,         // a pointer that is needed is null
    QVSR_QUANTIZE_SIZE = -102,         // a size is negative or zero, or the channels are not among those of x
    QVSR_QUANTIZE_ALIGNMENT = -103,    // x or another array does not begin at a multiple of its values
    QVSR_QUANTIZE_BITS = -104,         // bits outside 2 to 8
    QVSR_QUANTIZE_GRANULARITY = -105,  // no such granularity
    QVSR_QUANTIZE_FACTORS = -106,      // the sizes of the factors do not multiply to the channels, or a factor cannot be
    QVSR_QUANTIZE_CHANNELS = -107,     // too many channels to rotate in the shared memory of a block: rotate before, and call without factors
};

enum QvsrGranularity { QVSR_TENSOR = 0, QVSR_FRAME = 1, QVSR_TOKEN = 2 };

enum { QVSR_MAX_FACTORS = 12 };

// A factor M of a rotation F1 (x) F2 (x) ...: y[i] = sum over j of x[j] M[j * pitch + i], float32. The pitch is a multiple of 4, what lies
// behind `size` values of a row is not used. Null: Sylvester's matrix of this size, a power of two, which takes additions only.
struct QvsrFactor {
    const float *matrix;
    int32_t size;
    int32_t pitch;
};

struct QvsrActivation {
    const float *x;              // (frames, channels, tokens) with channels_first, else (frames, tokens, channels); contiguous
    int64_t frames;              //
    int64_t tokens;              // of a frame
    int64_t channels;            //
    int64_t start;               // the part is the channels start ... start + K
    int64_t K;                   //
    QvsrFactor factor[QVSR_MAX_FACTORS];
    const float *signs;          // (K,) or null
    const float *clip;           // () or null: narrows the range
    const float *fixed_scale;    // () or null: the range is that of x
    const float *fixed_zero;     // ()
    uint8_t *q;                  // (frames, tokens, K)
    float *scale;                // (1,), (frames,) or (frames, tokens) by granularity; NaN where x has NaN
    float *zero_point;           // the same
    int32_t *totals;             // (frames, tokens) or null: sums of the rows of q
    uint32_t *keys;              // 2 values a range: workspace for granularity tensor and frame without a fixed scale
    int64_t shared_limit;        // bytes of shared memory that a block of this device can have; 0: 48 KB
    int32_t channels_first;      //
    int32_t factors;             // 0: not rotated
    int32_t signs_last;          // signs after the product (R @ c) instead of before it (x @ R)
    float norm;                  // multiplies the product: 1 / sqrt(K) where the factors are +-1
    int32_t bits;                // 2 to 8
    int32_t granularity;         // QvsrGranularity; a fixed range is one of the tensor
    int32_t symmetric;           //
    float floor;                 // smallest scale
};

QVSR_API const char *qvsr_quantize_message(int code);
QVSR_API int qvsr_quantize(const QvsrActivation *activation, cudaStream_t stream);
