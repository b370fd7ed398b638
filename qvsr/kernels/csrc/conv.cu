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
