// Packed convolution over one to three axes, channels last, as a product that is never laid out (implicit GEMM): the kernel is that of matmul.cu,
// in gemm.cuh. Row m of the product is a position of the result, and its K inputs are the taps of the kernel, one after the other:
//
//     row m = (frame, z, y, x)            steps of the sum, 64 bytes each
//                                    part 0                                            part 1
//         q, channels last           tap 0         tap 1         ...  tap 8            tap 0 ...
//         . . . . . . .            +---------+--------+---------+     +-------+--------+  +-------+
//         . a b c . . .            | a 0..63 | a 64.. | b 0..63 | ... | i 0.. | i 64.. |  | a 0.. | ...
//         . d e f . . .            +---------+--------+---------+     +-------+--------+  +-------+
//         . g h i . . .
//                                  A thread copies 16 bytes of two rows a step. It finds their pixels anew only when the tap changes, from the
//                                  positions that the block wrote into shared memory at its start.
//
// Padding is exact whatever the zero points: a tap outside adds nothing. It copies zeros, so sum q w and sum q are those of the taps inside; sum w
// over the taps inside, which are always a box lo .. hi on each axis, was tabulated by qvsr_repack for every box (36 of a 3 x 3 kernel). So a
// position at a border costs one more read of a table, and the correction is the matmul's:
//
//     sum (q - z)(w - v)  =  sum q w  -  v sum q  -  z (boxes[box, n] - v inputs(box))
//
// sum q at a position is the sum of qvsr_prepare's totals over the taps inside: 9 reads a row and part, not a pass over the windows.
//
// The first layer (4 channels, 2 in each half) fills 2 of 32 bytes of each MMA; it is 0.01 % of the U-Net's operations.
//
// Floors as in matmul.cu, us on an H100, q counted once (the taps read it again, from the caches), float32 result:
//
//     M x N x K x taps            calls   operations   bytes W8 / W4
//     20480 x  320 x  320 x 9        7       19.1       10.1 /  9.9
//      5120 x  640 x  640 x 9        6       19.1        6.0 /  5.4
//      1280 x 1280 x 1280 x 9        7       19.1        6.8 /  4.6
//     20480 x  320 x  640 x 9        2       38.1       12.3 / 12.0
//      1280 x 1280 x 2560 x 9        2       38.1       11.7 /  7.3
//     20480 x  640 x  640 x 9        1       76.3       20.7 / 20.1
//       320 x 1280 x 1280 x 9       12        4.8        5.4 /  3.2     100 small tiles for 132 multiprocessors: sums are shared
//     20480 x  320 x  128 x 9       10        7.6        8.7 /  8.7     layers for the structure input
#include "gemm.cuh"

using namespace qvsr;

QVSR_API int qvsr_conv(const QvsrPart* parts, const QvsrLayer* layer, const QvsrWindow* window, cudaStream_t stream) {
    if (!window) return QVSR_NULL;
    constexpr int64_t LIMIT = 1 << 28;  // sums of two stay in 32 bits
    Window w;
    int64_t M = window->frames, pixels = window->frames, taps = 1;  // positions of the result, of q, and of the kernel
    if (M < 0 || M > INT32_MAX) return QVSR_SIZE;
    for (int axis = 0; axis < 3; ++axis) {
        const int64_t in = window->in[axis], out = window->out[axis], kernel = window->kernel[axis], stride = window->stride[axis];
        const int64_t padding = window->padding[axis], dilation = window->dilation[axis];
        if (in < 0 || out < 0 || in > LIMIT || out > LIMIT || (M && out && !in)) return QVSR_SIZE;
        if (kernel < 1 || kernel > QVSR_MAX_TAPS || stride < 1 || stride > LIMIT || dilation < 1 || dilation > LIMIT || padding < 0 || padding > LIMIT)
            return QVSR_WINDOW;
        const int64_t reach = dilation * (kernel - 1) + 1, room = in + 2 * padding - reach;
        if (reach > LIMIT || (out ? out != room / stride + 1 || room < 0 : room >= 0 && M)) return QVSR_WINDOW;
        if ((M && out > INT32_MAX / M) || (pixels && in > INT32_MAX / pixels)) return QVSR_SIZE;
        M *= out, pixels *= in, taps *= kernel;
        w.in[axis] = int(in), w.out[axis] = int(out), w.kernel[axis] = int(kernel), w.stride[axis] = int(stride);
        w.padding[axis] = int(padding), w.dilation[axis] = int(dilation);
    }
    if (taps > QVSR_MAX_TAPS) return QVSR_WINDOW;
    return start_gemm(parts, layer, w, M, stream);
}
