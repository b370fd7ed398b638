// What is done to weights once and to inputs before each product; nothing here is limited by anything but memory.
//
//     repack    one thread writes one lane's share of a tile: it finds the 16 values (NIBBLES: 32) in the rows of packing.pack_rows
//     boxes     one block an output channel: the sum of each tap by a warp, then every box of taps from these sums
//     prepare   one warp a row of q: 16 bytes a lane, their sum, and where asked the same bytes at a pitch of 16 or two values a byte
//
// prepare reads q once more than needed: rows x K bytes, 2 us for 20480 x 320 at 3.35 TB/s, less where q is still in the cache. The kernel
// that writes q can write its sums as well, and then prepare is needed only for a K that is no multiple of 16, or for NIBBLES.
#include <algorithm>

#include "pack.cuh"

namespace qvsr {
namespace {

constexpr int THREADS = 128;
constexpr int64_t MAX_BLOCKS = 1 << 20;  // beyond it, threads take several turns

// Value i of a row of pack_rows: eight stretches of values, the i-th of each in one group of `bits` bytes, byte j of a group in stretch j.
__device__ __forceinline__ unsigned stored(const uint8_t* row, int64_t i, int64_t row_values, int bits) {
    if (bits == 8) return row[i];
    const int64_t stretch = ceil_div(row_values, 8), at = i % stretch;
    const int bit = int(i / stretch) * bits, byte = bit / 8, shift = bit % 8;
    unsigned value = row[byte * stretch + at] >> shift;
    if (shift + bits > 8) value |= unsigned(row[(byte + 1) * stretch + at]) << (8 - shift);
    return value & ((1u << bits) - 1);
}

struct Source {
    const uint8_t* weight;
    int64_t row_bytes, row_values, offset, N, K;
    int bits;

    // Weight k of a tap; zero outside.
    __device__ unsigned at(int64_t n, int64_t tap, int64_t k) const {
        return n < N && k < K ? stored(weight + n * row_bytes, offset + tap * K + k, row_values, bits) : 0;
    }
};

__global__ void __launch_bounds__(THREADS) repack(Source source, int64_t taps, int form, uint8_t* tiles) {
    const int64_t columns = ceil_div(source.N, TILE_CHANNELS), steps = ceil_div(padded_bytes(source.K, form), SUM_BYTES);
    const int64_t count = taps * steps * columns * 32;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < count; i += int64_t(gridDim.x) * THREADS) {
        const int lane = int(i % 32);
        const int64_t tile = i / 32, n = tile % columns * TILE_CHANNELS + lane / 4, step = tile / columns % steps, tap = tile / columns / steps;
        uint32_t r[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int64_t byte = step * SUM_BYTES + j / 4 * 16 + lane % 4 * 4 + j % 4;
            const unsigned value = form == QVSR_NIBBLES ? source.at(n, tap, 2 * byte) | source.at(n, tap, 2 * byte + 1) << 4 : source.at(n, tap, byte);
            r[j / 4] |= value << j % 4 * 8;
        }
        uint8_t* to = tiles + tile * tile_bytes(form);
        if (form == QVSR_BYTES_8 || form == QVSR_NIBBLES) {
            reinterpret_cast<uint4*>(to)[lane] = make_uint4(r[0], r[1], r[2], r[3]);
            continue;
        }
        constexpr uint32_t low = 0x0f0f0f0f, high = 0x03030303;
        reinterpret_cast<uint2*>(to)[lane] = make_uint2((r[0] & low) | (r[1] & low) << 4, (r[2] & low) | (r[3] & low) << 4);
        if (form == QVSR_BYTES_6) {
#pragma unroll
            for (int j = 0; j < 4; ++j) r[j] = (r[j] >> 4 & high) << 2 * j;
            reinterpret_cast<uint32_t*>(to + 32 * sizeof(uint2))[lane] = r[0] | r[1] | r[2] | r[3];
        }
    }
}

__device__ __forceinline__ int warp_sum(int value) {
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

struct Kernel {
    int size[3];
};

__global__ void __launch_bounds__(THREADS) box_sums(Source source, Kernel kernel, int32_t* boxes) {
    QVSR_SHARED(memory);
    int* sums = reinterpret_cast<int*>(memory);  // of each tap
    const int taps = kernel.size[0] * kernel.size[1] * kernel.size[2], lane = int(threadIdx.x % 32);
    const int64_t n = blockIdx.x;
    for (int tap = int(threadIdx.x) / 32; tap < taps; tap += THREADS / 32) {
        int sum = 0;
        for (int64_t k = lane; k < source.K; k += 32) sum += int(source.at(n, tap, k));
        sum = warp_sum(sum);
        if (lane == 0) sums[tap] = sum;
    }
    __syncthreads();
    int count[3];
    for (int axis = 0; axis < 3; ++axis) count[axis] = int(intervals(kernel.size[axis]));
    const int full = count[0] * count[1] * count[2];
    for (int box = int(threadIdx.x); box <= full; box += THREADS) {
        int at[3] = {box / count[2] / count[1], box / count[2] % count[1], box % count[2]}, lo[3], hi[3];
        for (int axis = 0; axis < 3; ++axis) {
            for (hi[axis] = 0; intervals(hi[axis] + 1) <= at[axis]; ++hi[axis]) {}
            lo[axis] = at[axis] - int(intervals(hi[axis]));
        }
        int sum = 0;
        for (int i = lo[0]; box < full && i <= hi[0]; ++i)
            for (int j = lo[1]; j <= hi[1]; ++j)
                for (int k = lo[2]; k <= hi[2]; ++k) sum += sums[(i * kernel.size[1] + j) * kernel.size[2] + k];
        boxes[box * source.N + n] = sum;
    }
}

// Values 16 c .. 16 c + 15 of a row of K; zeros behind its end.
__device__ __forceinline__ uint4 sixteen(const uint8_t* row, int64_t c, int64_t K, bool aligned) {
    if (aligned) return c * 16 < K ? reinterpret_cast<const uint4*>(row)[c] : make_uint4(0, 0, 0, 0);
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 16; ++j)
        if (c * 16 + j < K) words[j / 4] |= uint32_t(row[c * 16 + j]) << j % 4 * 8;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint32_t sum_of(uint4 v) {
    constexpr uint32_t ones = 0x01010101;
    return __dp4a(v.x, ones, __dp4a(v.y, ones, __dp4a(v.z, ones, __dp4a(v.w, ones, 0u))));
}

// Eight values of at most 4 bits, a byte each, in four bytes.
__device__ __forceinline__ uint32_t nibbles(uint32_t first, uint32_t second) {
    first = (first | first >> 4) & 0x00ff00ff, second = (second | second >> 4) & 0x00ff00ff;
    return ((first | first >> 8) & 0xffff) | (second | second >> 8) << 16;
}

__global__ void __launch_bounds__(THREADS) prepare(const uint8_t* q, int64_t rows, int64_t K, int form, uint8_t* copy, int32_t* totals) {
    const int lane = int(threadIdx.x % 32);
    const int64_t pitch = padded_bytes(K, form), step = int64_t(gridDim.x) * (THREADS / 32);
    const bool aligned = K % 16 == 0;
    for (int64_t row = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32; row < rows; row += step) {
        const uint8_t* values = q + row * K;
        uint32_t sum = 0;
        for (int64_t c = lane; c < pitch / 16; c += 32) {
            uint4 bytes = sixteen(values, form == QVSR_NIBBLES ? 2 * c : c, K, aligned);
            sum += sum_of(bytes);
            if (form == QVSR_NIBBLES) {
                const uint4 more = sixteen(values, 2 * c + 1, K, aligned);
                sum += sum_of(more);
                bytes = make_uint4(nibbles(bytes.x, bytes.y), nibbles(bytes.z, bytes.w), nibbles(more.x, more.y), nibbles(more.z, more.w));
            }
            if (copy) reinterpret_cast<uint4*>(copy + row * pitch)[c] = bytes;
        }
        const int total = warp_sum(int(sum));
        if (lane == 0) totals[row] = total;
    }
}

dim3 blocks_of(int64_t threads) { return dim3(unsigned(std::min(ceil_div(threads, THREADS), MAX_BLOCKS))); }
bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int check_kernel(int64_t N, const int64_t kernel[3]) {
    if (!kernel) return QVSR_NULL;
    int64_t taps = 1;
    for (int axis = 0; axis < 3; ++axis) {
        if (kernel[axis] < 1 || kernel[axis] > QVSR_MAX_TAPS) return QVSR_WINDOW;
        taps *= kernel[axis];
    }
    if (taps > QVSR_MAX_TAPS) return QVSR_WINDOW;
    return N < 0 || N > INT32_MAX ? QVSR_SIZE : QVSR_OK;
}

}  // namespace
}  // namespace qvsr

using namespace qvsr;

QVSR_API const char* qvsr_message(int code) {
    if (code > 0) return cudaGetErrorString(cudaError_t(code));
    switch (code) {
        case QVSR_OK: return "no error";
        case QVSR_NULL: return "a pointer that is needed is null";
        case QVSR_SIZE: return "a size is negative or beyond 2^31";
        case QVSR_ALIGNMENT: return "q, tiles, copy or workspace are not aligned to 16 bytes, out not to its values, or a pitch is no multiple of 16";
        case QVSR_PARTS: return "there must be 1 to 4 parts";
        case QVSR_BITS: return "weights must have 2 to 8 bits";
        case QVSR_FORM: return "this form of weights does not exist, does not hold these bits, or needs 4-bit tensor cores (7.5 to 8.9)";
        case QVSR_DTYPE: return "the result can be float32 (0), float16 (1) or bfloat16 (2)";
        case QVSR_SUM: return "integer sums could exceed 32 bits: inputs x 255 x largest weight must stay below 2^32";
        case QVSR_WINDOW: return "kernel, stride, padding, dilation and sizes do not fit each other";
        case QVSR_GROUP: return "rows that share a scale must be at least 1, and of a kernel with several taps whole frames";
        case QVSR_BRANCH: return "a low-rank branch needs thin and up";
        case QVSR_ARCH: return "compute capability 7.5 or later is needed";
        case QVSR_TILE: return "tile must be 0, 64, 128 or 256, on 9.0 also 1128 or 1256, and splits not negative";
        case QVSR_WGMMA_DIFFERS: return "wgmma gave other sums than mma.sync on this device, so mma.sync is used, which is slower";
        case QVSR_WGMMA_FAILED: return "wgmma could not be tried on this device, so mma.sync is used, which is slower";
        default: return "unknown code";
    }
}

QVSR_API int qvsr_form(int arch, int weight_bits, int activation_bits) {
    if (weight_bits < 2 || weight_bits > 8) return QVSR_BITS;
    if (weight_bits <= 4 && activation_bits <= 4 && arch >= 75 && arch < 90) return QVSR_NIBBLES;
    return weight_bits <= 4 ? QVSR_BYTES_4 : weight_bits <= 6 ? QVSR_BYTES_6 : QVSR_BYTES_8;
}

QVSR_API int64_t qvsr_tiles_bytes(int64_t N, int64_t K, const int64_t kernel[3], int form) {
    if (const int code = check_kernel(N, kernel)) return code;
    if (K < 1 || K > INT32_MAX) return QVSR_SIZE;
    if (!is_form(form)) return QVSR_FORM;
    return kernel[0] * kernel[1] * kernel[2] * ceil_div(padded_bytes(K, form), SUM_BYTES) * ceil_div(N, TILE_CHANNELS) * tile_bytes(form);
}

QVSR_API int64_t qvsr_boxes_count(int64_t N, const int64_t kernel[3]) {
    if (const int code = check_kernel(N, kernel)) return code;
    return (intervals(kernel[0]) * intervals(kernel[1]) * intervals(kernel[2]) + 1) * N;
}

QVSR_API int qvsr_repack(const uint8_t* weight, int64_t row_bytes, int64_t row_values, int64_t offset, int bits, int64_t N, int64_t K,
                         const int64_t kernel[3], int form, uint8_t* tiles, int32_t* boxes, cudaStream_t stream) {
    if (const int code = check_kernel(N, kernel)) return code;
    if (bits < 2 || bits > 8) return QVSR_BITS;
    if (!is_form(form) || bits > (form == QVSR_NIBBLES ? 4 : form)) return QVSR_FORM;
    const int64_t taps = kernel[0] * kernel[1] * kernel[2];
    if (K < 1 || K > INT32_MAX || offset < 0 || row_values - offset < taps * K) return QVSR_SIZE;
    if (row_bytes < (bits == 8 ? row_values : ceil_div(row_values, 8) * bits)) return QVSR_SIZE;
    if (N == 0) return QVSR_OK;
    if (!weight || !tiles || !boxes) return QVSR_NULL;
    if (!aligned(tiles, 16)) return QVSR_ALIGNMENT;
    const Source source{weight, row_bytes, row_values, offset, N, K, bits};
    const int64_t lanes = qvsr_tiles_bytes(N, K, kernel, form) / tile_bytes(form) * 32;
    if (const int code = QVSR_LAUNCH(repack, blocks_of(lanes), dim3(THREADS), 0, stream, source, taps, form, tiles)) return code;
    const Kernel size{{int(kernel[0]), int(kernel[1]), int(kernel[2])}};
    return QVSR_LAUNCH(box_sums, dim3(unsigned(N)), dim3(THREADS), size_t(taps) * sizeof(int), stream, source, size, boxes);
}

QVSR_API int64_t qvsr_pitch(int64_t K, int form) { return !is_form(form) ? QVSR_FORM : K < 1 ? QVSR_SIZE : padded_bytes(K, form); }

QVSR_API int qvsr_prepare(const uint8_t* q, int64_t rows, int64_t K, int form, uint8_t* copy, int32_t* totals, cudaStream_t stream) {
    if (!is_form(form)) return QVSR_FORM;
    if (K < 1 || K > INT32_MAX / 255 || rows < 0) return QVSR_SIZE;
    if (rows == 0) return QVSR_OK;
    if (!q || !totals) return QVSR_NULL;
    if ((K % 16 == 0 && !aligned(q, 16)) || !aligned(copy, 16)) return QVSR_ALIGNMENT;
    return QVSR_LAUNCH(prepare, blocks_of(rows * 32), dim3(THREADS), 0, stream, q, rows, K, form, copy, totals);
}
