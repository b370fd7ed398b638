// The C interface of matmul.cu, hopper.cu, conv.cu and pack.cu. Plain pointers and sizes: a loader mirrors the structures with ctypes.
//
// Every function that starts kernels returns 0, a cudaError_t (> 0), or one of the codes below (< 0), which name an argument that is wrong and
// are found before the device is touched. All pointers are device pointers but for the structures themselves, which are read before the call
// returns. Kernels run on the given stream and never wait for it, but for the first product on a chip of 9.0: see QvsrWgmma.
//
// A layer is computed in these steps:
//
//     once a part   qvsr_repack     weight of packing.pack_weight  ->  tiles (order of the tensor cores), boxes (sums of weights)
//     each call     quantization    x  ->  q, one byte a value, scale, zero point
//                   qvsr_prepare    q  ->  sums of its rows, and where needed rows with a pitch of 16 bytes or two values a byte
//                   qvsr_matmul or qvsr_conv, all parts in one launch
#pragma once
#include "common.cuh"

enum QvsrLimits {
    QVSR_MAX_PARTS = 4,  // channel halves are 2
    QVSR_MAX_TAPS = 343, // 7 x 7 x 7
};

enum QvsrCode {            // code: what is wrong
    QVSR_OK = 0,           //
    QVSR_NULL = -1,        // a pointer that is needed is null
    QVSR_SIZE = -2,        // a size is negative, or beyond what a grid can count
    QVSR_ALIGNMENT = -3,   // q, tiles, copy, out or workspace are not aligned, or pitch is not a multiple of 16
    QVSR_PARTS = -4,       // no part, or more than QVSR_MAX_PARTS
    QVSR_BITS = -5,        // bits outside 2 to 8
    QVSR_FORM = -6,        // no such form of weights, one that does not hold these bits, or 4-bit MMA on a chip without it
    QVSR_DTYPE = -7,       // no such dtype of the result
    QVSR_SUM = -8,         // sums could exceed 32 bits: inputs x 255 x largest weight must stay below 2^32
    QVSR_WINDOW = -9,      // kernel, stride, padding or dilation cannot be, or the result's size does not follow from them
    QVSR_GROUP = -10,      // scales a pixel with a kernel of more than one tap, or a group that is not positive
    QVSR_BRANCH = -11,     // a rank without thin and up
    QVSR_ARCH = -12,       // compute capability below 7.5
    QVSR_TILE = -13,       // no such tile on this chip, or a negative number of splits
};

enum QvsrDtype { QVSR_FLOAT32 = 0, QVSR_FLOAT16 = 1, QVSR_BFLOAT16 = 2 };

// How weights lie in memory. The first three feed the 8-bit MMA; the number is the bits that a weight takes.
enum QvsrForm { QVSR_NIBBLES = 1, QVSR_BYTES_4 = 4, QVSR_BYTES_6 = 6, QVSR_BYTES_8 = 8 };

// A block's tile: 64 x 64, 128 x 128, and 256 rows x 128 channels by mma.sync; 128 rows x 128 and 256 channels by wgmma, on 9.0 only.
enum QvsrTile { QVSR_TILE_64 = 64, QVSR_TILE_128 = 128, QVSR_TILE_256 = 256, QVSR_WGMMA_128 = 1128, QVSR_WGMMA_256 = 1256 };

// What is known of wgmma on a device: it has to give the bytes of mma.sync once, on the device itself, before it is used.
enum QvsrWgmma {
    QVSR_WGMMA_UNKNOWN = 0,   // nothing has been computed there yet that could use it, or the chip has none
    QVSR_WGMMA_USED = 1,      //
    QVSR_WGMMA_DIFFERS = -15, // it gave other sums: mma.sync is used
    QVSR_WGMMA_FAILED = -16,  // it could not be started, or failed: mma.sync is used
};

// A part of the input channels, with integers and ranges of its own.
struct QvsrPart {
    const uint8_t *q;          // rows (matmul) or pixels (conv, channels last): K values, one a byte, or with QVSR_NIBBLES two a byte
    const int32_t *totals;     // sum of each row of q
    const float *scale;        // of the activations: entry row / group
    const float *zero_point;   // the same; whole numbers, also far outside 0..255
    const uint8_t *tiles;      // of qvsr_repack
    const int32_t *boxes;      // of qvsr_repack: (boxes, N)
    const float *w_scale;      // entry n * w_stride
    const float *w_zero_point; // entry n * w_stride
    int64_t group;             // rows of q that share a scale: all, those of a frame, or 1
    int64_t pitch;             // bytes from row to row of q, a multiple of 16; what lies behind the K values is zero
    int64_t w_stride;          // values from one output channel to the next: P for (N, P)
    int64_t K;                 // values a row
};

// What both operators need beside the parts.
struct QvsrLayer {
    int64_t N;               // output channels
    int32_t parts;           //
    int32_t weight_bits;     // 2 to 8: bounds the sums
    int32_t form;            // QvsrForm of all parts
    int32_t arch;            // 10 * major + minor of the device
    int32_t multiprocessors; // of the device, for the choice of tiles; 0: unknown
    int32_t dtype;           // QvsrDtype of out
    int32_t tile;            // 0: chosen by size; or QvsrTile; a smaller one where it does not fit
    int32_t splits;          // 0: chosen by size; how many blocks share the sum of a tile, as far as the workspace goes
    int64_t rank;            // 0: no low-rank branch
    void *out;               // (M, N), contiguous
    const float *bias;       // (N,) or null
    const float *thin;       // (M, rank)
    const float *up;         // (N, rank)
    void *workspace;         // zeros; one for each stream, left as zeros; null: K is never split
    int64_t workspace_bytes; //
};

// A convolution over three axes; fewer have size 1, kernel 1, stride 1, padding 0 and dilation 1 in front.
struct QvsrWindow {
    int64_t frames;      // B
    int64_t in[3];       // size of q
    int64_t out[3];      // size of the result
    int64_t kernel[3];   //
    int64_t stride[3];   //
    int64_t padding[3];  //
    int64_t dilation[3]; //
};

QVSR_API const char *qvsr_message(int code);

// The form of weights for a chip: 4-bit MMA where it exists (7.5 to 8.9) and both sides have at most 4 bits.
QVSR_API int qvsr_form(int arch, int weight_bits, int activation_bits);

// Bytes of tiles and number of int32 of boxes of one part; negative: a code.
QVSR_API int64_t qvsr_tiles_bytes(int64_t N, int64_t K, const int64_t kernel[3], int form);
QVSR_API int64_t qvsr_boxes_count(int64_t N, const int64_t kernel[3]);

// One part of a packed weight (rows of `row_bytes` bytes that hold `row_values` values, of which the part's begin at `offset`).
QVSR_API int qvsr_repack(const uint8_t *weight, int64_t row_bytes, int64_t row_values, int64_t offset, int bits, int64_t N, int64_t K,
                const int64_t kernel[3], int form, uint8_t *tiles, int32_t *boxes, cudaStream_t stream);

// Sums of the rows of q (rows, K), one byte a value, contiguous. With `copy` also rows of a pitch of qvsr_pitch bytes, zeros behind the values.
QVSR_API int64_t qvsr_pitch(int64_t K, int form);
QVSR_API int qvsr_prepare(const uint8_t *q, int64_t rows, int64_t K, int form, uint8_t *copy, int32_t *totals, cudaStream_t stream);

QVSR_API int64_t qvsr_workspace_bytes(int multiprocessors, int parts);
QVSR_API int qvsr_matmul(const QvsrPart *parts, const QvsrLayer *layer, int64_t M, cudaStream_t stream);
QVSR_API int qvsr_conv(const QvsrPart *parts, const QvsrLayer *layer, const QvsrWindow *window, cudaStream_t stream);

// QvsrWgmma of the current device. qvsr_message has words for those below zero, which are worth a warning.
QVSR_API int qvsr_wgmma();
