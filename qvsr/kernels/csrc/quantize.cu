// Activations to integers: rotation, range and rounding in one kernel, launched once or twice.
//
//     x (frames, channels, tokens) or (frames, tokens, channels)
//          |  a block takes T tokens of a frame, all K channels of the part, into shared memory as tile[k][t]
//          v
//     [ rotate ]   factor after factor of F1 (x) F2 (x) ..., in place
//          |
//          +--> [ range ]   lowest and highest: of a token in the block, of a frame or the tensor by one atomic a block
//          |
//          +--> [ round ]   q[t][k] = clamp(round(v / scale), -zero, top - zero) + zero, four channels a store
//
// Launches. A token's range is known in its block: one launch. So is a fixed range. The range of a frame or the tensor needs all blocks first: one
// launch that ends behind [ range ], and a second that loads and rotates again and goes on to [ round ]. Bytes a value, where the second launch
// could instead read what the first had rotated:
//
//                        first launch       second launch      sum
//     rotate again       read 4             read 4, write 1      9
//     keep in float32    read 4, write 4    read 4, write 1     13
//
// A map of 5 x 320 x 64 x 64 has 6.6 million values: 59 MB against 85 MB. At the 3.35 TB/s of an H100 that is 18 us against 25 us, and a second
// read that hits its second-level cache (50 MB) costs less still. Rotating once takes, for 320 = 20 x 16, 20 multiply-adds and 4 additions a
// value, 0.16 G in all: 5 us at the 33 T a second of an H100, 9 us if half of that is reached. So each launch computes about as long as it
// reads and writes, and does both at a time if several blocks share a multiprocessor: then rotating again costs less than what it saves. This is
// arithmetic, not measured.
//
// Rotation. A matrix of K channels would take K multiply-adds a value; its factors take the sum of their sizes. Step by step, with s the product
// of the sizes behind a factor of size f, the channels k = (o f + j) s + i are replaced by their product over j, for each o and i:
//
//     Sylvester's factors   log2(f) additions a value: a thread holds up to 16 of the f values in registers (a butterfly).
//     any other factor      f multiply-adds a value: a thread computes 4 outputs of 4 tokens, so that two vectors of 4 are read for 16
//                           multiply-adds; results wait in registers until all threads have read, and go back into the same place.
//
// Shared memory holds tile[k][t] with the groups of four tokens exchanged by k / 4 (`place`): a warp that reads 4 tokens x 8 groups of 4 channels
// touches 32 different banks, and so does one that reads 32 tokens of a channel.
//
// Floating point. Rotated values differ from a library's product in the order of additions. Everything else is done in the order of
// qvsr.kernels.reference, with true divisions: values that are not rotated give the same integers, scales and zero points to the last bit.
// NaN in x makes its scale NaN, and so the layer's result, without waiting for the device to find out.

#include "quantize.h"

#include <utility>

namespace {

constexpr int THREADS = 256;
constexpr int LARGE_TILE = 12288;   // values of a block's tile: 48 KB, so that a multiprocessor holds several blocks, which wait in turn
constexpr int LARGEST_TILE = 24576; // 96 KB: where a rotation over more channels needs it
constexpr int ITEMS_OF_LARGE = LARGE_TILE / 16 / THREADS, ITEMS_OF_LARGEST = LARGEST_TILE / 16 / THREADS;
constexpr int PLAIN_CHANNELS = 128; // at a time, where nothing is rotated

enum Phase { RANGE, ROUND, BOTH };  // BOTH: a range within the block

struct Plan {
    QvsrActivation a;
    int log_tokens;     // of a tile: 2, 3, 4 or 5
    int chunk;          // channels of a tile: K where it is rotated
    int64_t tiles;      // of a frame
    Phase phase;
    bool rows_of_four;  // loads and stores of four values are aligned
    bool q_of_four;
    float top;          // largest integer
    float widening;     // of a symmetric range below 0
};

__device__ __forceinline__ int thread() { return int(threadIdx.x); }

// Order-preserving: larger floats have larger keys, NaN the largest; 0 is below all, so that memory of zeros is the empty range.
__device__ __forceinline__ uint32_t key_of(float value) {
    if (value != value) return 0xffffffffu;
    const uint32_t bits = __float_as_uint(value);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float value_of(uint32_t key) { return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

// Where tile[k][t] lies.
__device__ __forceinline__ int place(int k, int t, int log_tokens) {
    const int groups = (1 << (log_tokens - 2)) - 1;
    return (k << log_tokens) + ((((t >> 2) ^ (k >> 2)) & groups) << 2) + (t & 3);
}

template <int R>
__device__ __forceinline__ void butterfly(float *tile, int K, int stride, int log_tokens) {
    const int tokens = 1 << log_tokens, items = K / R << log_tokens;
    for (int item = thread(); item < items; item += THREADS) {
        const int t = item & (tokens - 1), rest = item >> log_tokens;
        const int first = rest / stride * stride * R + rest % stride;
        float v[R];
#pragma unroll
        for (int r = 0; r < R; ++r) v[r] = tile[place(first + r * stride, t, log_tokens)];
#pragma unroll
        for (int half = 1; half < R; half *= 2)
#pragma unroll
            for (int r = 0; r < R; ++r)
                if (!(r & half)) {
                    const float low = v[r], high = v[r + half];
                    v[r] = low + high;
                    v[r + half] = low - high;
                }
#pragma unroll
        for (int r = 0; r < R; ++r) tile[place(first + r * stride, t, log_tokens)] = v[r];
    }
    __syncthreads();
}

// Blocks of 4 outputs x 4 tokens, ITEMS a thread at most.
template <int ITEMS>
__device__ __forceinline__ void multiply(float *tile, const QvsrFactor factor, int K, int stride, int log_tokens) {
    const int f = factor.size, fours = (f + 3) / 4, groups = 1 << (log_tokens - 2);
    const int items = K / f * fours * groups;
    float sum[ITEMS][4][4];
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int t = 0; t < 4; ++t) sum[n][i][t] = 0.0f;
        const int item = thread() + n * THREADS;
        if (item >= items) continue;
        const int group = item & (groups - 1), rest = item >> (log_tokens - 2);
        const int inner = rest % stride, row = rest / stride % fours, outer = rest / stride / fours;
        const int first = outer * f * stride + inner;
        const float *column = factor.matrix + row * 4;
        for (int j = 0; j < f; ++j) {
            const float4 x = *reinterpret_cast<const float4 *>(tile + place(first + j * stride, group * 4, log_tokens));
            const float4 m = __ldg(reinterpret_cast<const float4 *>(column + j * factor.pitch));
            const float xs[4] = {x.x, x.y, x.z, x.w}, ms[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int t = 0; t < 4; ++t) sum[n][i][t] = fmaf(ms[i], xs[t], sum[n][i][t]);
        }
    }
    __syncthreads();  // all have read what is now replaced
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        const int item = thread() + n * THREADS;
        if (item >= items) continue;
        const int group = item & (groups - 1), rest = item >> (log_tokens - 2);
        const int inner = rest % stride, row = rest / stride % fours, outer = rest / stride / fours;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (row * 4 + i >= f) break;
            const int k = (outer * f + row * 4 + i) * stride + inner;
            *reinterpret_cast<float4 *>(tile + place(k, group * 4, log_tokens)) = make_float4(sum[n][i][0], sum[n][i][1], sum[n][i][2], sum[n][i][3]);
        }
    }
    __syncthreads();
}

template <int ITEMS>
__device__ __forceinline__ void rotate(float *tile, const QvsrActivation &a, int log_tokens) {
    const int K = int(a.K);
    int stride = 1;
    for (int index = a.factors - 1; index >= 0; --index) {
        const QvsrFactor factor = a.factor[index];
        if (factor.matrix) {
            multiply<ITEMS>(tile, factor, K, stride, log_tokens);
            stride *= factor.size;
            continue;
        }
        for (int left = factor.size; left > 1;) {  // Sylvester's matrix is a product of smaller ones, cut anywhere
            const int radix = left < 16 ? left : 16;
            if (radix == 16) butterfly<16>(tile, K, stride, log_tokens);
            else if (radix == 8) butterfly<8>(tile, K, stride, log_tokens);
            else if (radix == 4) butterfly<4>(tile, K, stride, log_tokens);
            else butterfly<2>(tile, K, stride, log_tokens);
            stride *= radix;
            left /= radix;
        }
    }
}

// Channels first ... first + count of the part and the tokens of this block; zeros for tokens behind the last.
__device__ __forceinline__ void load(float *tile, const Plan &p, int64_t frame, int64_t token, int first, int count) {
    const QvsrActivation &a = p.a;
    const int tokens = 1 << p.log_tokens, groups = tokens / 4;
    const int here = int(a.tokens - token < tokens ? a.tokens - token : tokens);
    const bool signs = a.signs && !a.signs_last;
    if (a.channels_first) {  // four tokens of a channel lie together
        const float *x = a.x + (frame * a.channels + a.start + first) * a.tokens + token;
        for (int item = thread(); item < count * groups; item += THREADS) {
            const int group = item & (groups - 1), k = item >> (p.log_tokens - 2);
            const float *from = x + k * a.tokens + group * 4;
            float4 v;
            if (p.rows_of_four && group * 4 + 4 <= here) {
                v = __ldg(reinterpret_cast<const float4 *>(from));
            } else {
                v.x = group * 4 < here ? from[0] : 0.0f;
                v.y = group * 4 + 1 < here ? from[1] : 0.0f;
                v.z = group * 4 + 2 < here ? from[2] : 0.0f;
                v.w = group * 4 + 3 < here ? from[3] : 0.0f;
            }
            if (signs) {
                const float sign = a.signs[first + k];
                v = make_float4(v.x * sign, v.y * sign, v.z * sign, v.w * sign);
            }
            *reinterpret_cast<float4 *>(tile + place(k, group * 4, p.log_tokens)) = v;
        }
    } else {  // four channels of a token lie together; a warp takes 8 x 4 channels of 4 tokens
        const float *x = a.x + (frame * a.tokens + token) * a.channels + a.start + first;
        const int fours = (count + 3) / 4, wide = (fours + 7) / 8 * 8;
        for (int item = thread(); item < wide * tokens; item += THREADS) {
            const int part = item & 31, block = item >> 5;
            const int t = block % groups * 4 + (part >> 3), k = (block / groups * 8 + (part & 7)) * 4;
            if (k >= count) continue;
            const float *from = x + t * a.channels + k;
            float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (t < here && p.rows_of_four && k + 4 <= count) {
                const float4 four = __ldg(reinterpret_cast<const float4 *>(from));
                v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
            } else if (t < here) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (k + i < count) v[i] = from[i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (k + i < count) tile[place(k + i, t, p.log_tokens)] = signs ? v[i] * a.signs[first + k + i] : v[i];
        }
    }
    __syncthreads();
}

// A rotated value as it leaves: the product's length and, for R @ c, its sign.
__device__ __forceinline__ float finished(const float *tile, const QvsrActivation &a, int k, int t, int channel, int log_tokens) {
    float v = tile[place(k, t, log_tokens)];
    if (a.factors) v *= a.norm;
    return a.signs && a.signs_last ? v * a.signs[channel] : v;
}

// Scale and zero point of a range, operation by operation as in qvsr.kernels.reference.
__device__ __forceinline__ void grid_of(const Plan &p, float low, float high, float &scale, float &zero) {
    const QvsrActivation &a = p.a;
    if (a.clip) {
        low = __fmul_rn(low, *a.clip);
        high = __fmul_rn(high, *a.clip);
    }
    if (a.symmetric) {
        const float bound = high != high || low != low ? __fadd_rn(high, low) : fmaxf(high, -low);
        low = __fmul_rn(-bound, p.widening);
        high = bound;
    }
    scale = __fdiv_rn(__fsub_rn(high, low), p.top);
    if (scale < a.floor) scale = a.floor;  // NaN stays
    zero = rintf(__fdiv_rn(-low, scale));
}

// Integers of the tile's values to memory, and their sums to `totals`; whether one was NaN.
__device__ __forceinline__ bool round_tile(const float *tile, const Plan &p, const float *scales, const float *zeros, int *totals, int64_t frame,
                                           int64_t token, int first, int count, int here) {
    const QvsrActivation &a = p.a;
    const int log_tokens = p.log_tokens, tokens = 1 << log_tokens;
    bool nan = false;
    const int groups = tokens / 4, fours = (count + 3) / 4, wide = (fours + 7) / 8 * 8;
    uint8_t *q = a.q + (frame * a.tokens + token) * a.K + first;
    for (int item = thread(); item < wide * tokens; item += THREADS) {
        const int part = item & 31, block = item >> 5;
        const int t = block % groups * 4 + (part >> 3), k = (block / groups * 8 + (part & 7)) * 4;
        int total = 0;
        if (t < here && k < count) {
            const float scale = scales[t], zero = zeros[t];
            unsigned four[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (k + i >= count) break;
                const float v = finished(tile, a, k + i, t, first + k + i, log_tokens);
                nan |= v != v;
                const float rounded = fminf(fmaxf(rintf(__fdiv_rn(v, scale)), -zero), __fsub_rn(p.top, zero));
                four[i] = unsigned(__float2int_rn(__fadd_rn(rounded, zero))) & 255u;
                total += int(four[i]);
            }
            uint8_t *to = q + t * a.K + k;
            if (p.q_of_four && k + 4 <= count) {
                *reinterpret_cast<uint32_t *>(to) = four[0] | four[1] << 8 | four[2] << 16 | four[3] << 24;
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (k + i < count) to[i] = uint8_t(four[i]);
            }
        }
        if (a.totals) {  // the loop's bound is a multiple of a warp: all lanes are here
            for (int lane = 4; lane; lane /= 2) total += __shfl_xor_sync(0xffffffffu, total, lane);
            if ((part & 7) == 0 && t < here) atomicAdd(totals + t, total);
        }
    }
    return nan;
}

// Blocks of 4 x 4 results that a thread computes of a factor: 0 where nothing is rotated. Several blocks are to fit on a multiprocessor, so that
// one computes while another loads.
constexpr int blocks_for(int items) { return items == 0 ? 4 : items <= ITEMS_OF_LARGE ? 2 : 1; }

template <int ITEMS>
__global__ void __launch_bounds__(THREADS, blocks_for(ITEMS)) quantize(const Plan p) {
    QVSR_SHARED(raw);
    const QvsrActivation &a = p.a;
    const int log_tokens = p.log_tokens, tokens = 1 << log_tokens;
    float *tile = reinterpret_cast<float *>(raw);
    uint32_t *low_keys = reinterpret_cast<uint32_t *>(tile + (p.chunk << log_tokens));  // of -x, so that both are maxima
    uint32_t *high_keys = low_keys + tokens;
    float *scales = reinterpret_cast<float *>(high_keys + tokens), *zeros = scales + tokens;
    int *totals = reinterpret_cast<int *>(zeros + tokens);

    const int64_t frame = blockIdx.x / p.tiles, token = blockIdx.x % p.tiles * tokens;
    const int here = int(a.tokens - token < tokens ? a.tokens - token : tokens);
    const int64_t range = a.granularity == QVSR_FRAME ? frame : 0;
    const int t_own = thread() & (tokens - 1);

    if (thread() < tokens) {
        low_keys[thread()] = high_keys[thread()] = 0;
        totals[thread()] = 0;
        if (a.fixed_scale) {
            scales[thread()] = *a.fixed_scale;
            zeros[thread()] = *a.fixed_zero;
        } else if (p.phase == ROUND) {
            grid_of(p, -value_of(a.keys[2 * range]), value_of(a.keys[2 * range + 1]), scales[thread()], zeros[thread()]);
        }
    }
    __syncthreads();

    float low = INFINITY, high = -INFINITY;
    bool nan = false;
#pragma unroll 1
    for (int stage = p.phase == ROUND ? 1 : 0; stage <= (p.phase == RANGE ? 0 : 1); ++stage) {
        for (int first = 0; first < a.K; first += p.chunk) {
            const int count = int(a.K - first < p.chunk ? a.K - first : p.chunk);
            if (stage == 0 || p.phase == ROUND || a.K > p.chunk) {  // else the tile is still here
                if (first) __syncthreads();
                load(tile, p, frame, token, first, count);
                if constexpr (ITEMS > 0) rotate<ITEMS>(tile, a, log_tokens);
            }
            if (stage == 1) {
                nan |= round_tile(tile, p, scales, zeros, totals, frame, token, first, count, here);
            } else if (t_own < here) {
                for (int k = thread() >> log_tokens; k < count; k += THREADS >> log_tokens) {
                    const float v = finished(tile, a, k, t_own, first + k, log_tokens);
                    low = fminf(low, v);
                    high = fmaxf(high, v);
                    nan |= v != v;
                }
            }
        }
        if (stage == 1) break;
        if (nan) low = high = NAN;
        if (nan || low <= high) {
            atomicMax(low_keys + t_own, key_of(-low));
            atomicMax(high_keys + t_own, key_of(high));
        }
        __syncthreads();
        if (p.phase == BOTH) {
            if (thread() < here) grid_of(p, -value_of(low_keys[thread()]), value_of(high_keys[thread()]), scales[thread()], zeros[thread()]);
            __syncthreads();
        } else if (thread() < 32) {
            uint32_t lowest = 0, highest = 0;
            if (thread() < here) lowest = low_keys[thread()], highest = high_keys[thread()];
            for (int lane = 16; lane; lane /= 2) {
                const uint32_t other_low = __shfl_xor_sync(0xffffffffu, lowest, lane), other_high = __shfl_xor_sync(0xffffffffu, highest, lane);
                lowest = lowest > other_low ? lowest : other_low;
                highest = highest > other_high ? highest : other_high;
            }
            if (thread() == 0) {
                atomicMax(a.keys + 2 * range, lowest);
                atomicMax(a.keys + 2 * range + 1, highest);
            }
        }
    }
    if (p.phase == RANGE) return;

    if (nan && a.fixed_scale) *a.scale = NAN;  // over the copy that was made before this launch
    if (p.phase == BOTH) {
        if (thread() < here) {
            a.scale[frame * a.tokens + token + thread()] = scales[thread()];
            a.zero_point[frame * a.tokens + token + thread()] = zeros[thread()];
        }
    } else if (!a.fixed_scale && thread() == 0 && token == 0 && (frame == 0 || a.granularity == QVSR_FRAME)) {
        a.scale[range] = scales[0];
        a.zero_point[range] = zeros[0];
    }
    if (a.totals) {
        __syncthreads();
        if (thread() < here) a.totals[frame * a.tokens + token + thread()] = totals[thread()];
    }
}

bool aligned(const void *pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int check(const QvsrActivation &a) {
    const bool ranging = !a.fixed_scale;
    if (!a.x || !a.q || !a.scale || !a.zero_point) return QVSR_QUANTIZE_NULL;
    if (!ranging && !a.fixed_zero) return QVSR_QUANTIZE_NULL;
    if (ranging && a.granularity != QVSR_TOKEN && !a.keys) return QVSR_QUANTIZE_NULL;
    if (a.frames <= 0 || a.tokens <= 0 || a.K <= 0 || a.start < 0 || a.start + a.K > a.channels || a.K > INT32_MAX / 32) return QVSR_QUANTIZE_SIZE;
    for (const void *pointer : {(const void *)a.x, (const void *)a.signs, (const void *)a.clip, (const void *)a.fixed_scale, (const void *)a.fixed_zero,
                                (const void *)a.scale, (const void *)a.zero_point, (const void *)a.totals, (const void *)a.keys})
        if (!aligned(pointer, 4)) return QVSR_QUANTIZE_ALIGNMENT;
    if (a.bits < 2 || a.bits > 8) return QVSR_QUANTIZE_BITS;
    if (a.granularity < QVSR_TENSOR || a.granularity > QVSR_TOKEN) return QVSR_QUANTIZE_GRANULARITY;
    if (a.factors < 0 || a.factors > QVSR_MAX_FACTORS) return QVSR_QUANTIZE_FACTORS;
    int64_t product = 1;
    for (int i = 0; i < a.factors; ++i) {
        const QvsrFactor &factor = a.factor[i];
        if (factor.size < 1 || product > a.K) return QVSR_QUANTIZE_FACTORS;
        if (!factor.matrix && (factor.size & (factor.size - 1))) return QVSR_QUANTIZE_FACTORS;
        if (factor.matrix && (factor.pitch < factor.size || factor.pitch % 4)) return QVSR_QUANTIZE_FACTORS;
        if (!aligned(factor.matrix, 16)) return QVSR_QUANTIZE_ALIGNMENT;
        product *= factor.size;
    }
    if (a.factors && product != a.K) return QVSR_QUANTIZE_FACTORS;
    return 0;
}

size_t bytes_of(const Plan &p) { return (size_t(p.chunk) + 5) * 4 << p.log_tokens; }

// Blocks of 4 outputs x 4 tokens that a thread computes of the widest factor; 0: none but Sylvester's.
int items_of(const QvsrActivation &a, int log_tokens) {
    int64_t most = 0;
    for (int i = 0; i < a.factors; ++i)
        if (a.factor[i].matrix) {
            const int64_t items = a.K / a.factor[i].size * ((a.factor[i].size + 3) / 4) << (log_tokens - 2);
            most = items > most ? items : most;
        }
    return int((most + THREADS - 1) / THREADS);
}

}  // namespace

const char *qvsr_quantize_message(int code) {
    switch (code) {
        case 0: return "no error";
        case QVSR_QUANTIZE_NULL: return "a pointer that is needed is null";
        case QVSR_QUANTIZE_SIZE: return "a size is not positive, or the channels are not among those of x";
        case QVSR_QUANTIZE_ALIGNMENT: return "an array does not begin at a multiple of 4 bytes, or a factor of a rotation at one of 16";
        case QVSR_QUANTIZE_BITS: return "bits are not 2 to 8";
        case QVSR_QUANTIZE_GRANULARITY: return "no such granularity";
        case QVSR_QUANTIZE_FACTORS: return "the factors of the rotation do not multiply to the channels, or one cannot be";
        case QVSR_QUANTIZE_CHANNELS: return "too many channels to rotate in the shared memory of a block";
        default: return code > 0 ? cudaGetErrorString(cudaError_t(code)) : "no such code";
    }
}

int qvsr_quantize(const QvsrActivation *activation, cudaStream_t stream) {
    if (!activation) return QVSR_QUANTIZE_NULL;
    Plan p{};
    p.a = *activation;
    QvsrActivation &a = p.a;
    if (const int code = check(a)) return code;
    const bool ranging = !a.fixed_scale;
    const bool across = ranging && a.granularity != QVSR_TOKEN;  // a range of many blocks
    if (!a.channels_first && a.granularity != QVSR_FRAME) a.tokens *= a.frames, a.frames = 1;  // frames lie one behind another

    const int64_t limit = a.shared_limit > 0 ? a.shared_limit : 48 << 10;
    for (p.log_tokens = 5;; --p.log_tokens) {
        p.chunk = int(a.factors || a.K < PLAIN_CHANNELS ? a.K : PLAIN_CHANNELS);
        const bool smallest = p.log_tokens == 2;
        const int64_t values = int64_t(p.chunk) << p.log_tokens;
        if (values <= (smallest ? LARGEST_TILE : LARGE_TILE) && int64_t(bytes_of(p)) <= limit &&
            items_of(a, p.log_tokens) <= (smallest ? ITEMS_OF_LARGEST : ITEMS_OF_LARGE))
            break;
        if (smallest) return QVSR_QUANTIZE_CHANNELS;
    }
    const double half = double(1 << (a.bits - 1));
    p.top = float((1 << a.bits) - 1), p.widening = float(half / (half - 1.0));
    const int tokens = 1 << p.log_tokens;
    p.tiles = (a.tokens + tokens - 1) / tokens;
    if (p.tiles * a.frames > INT32_MAX) return QVSR_QUANTIZE_SIZE;
    if (a.channels_first) p.rows_of_four = a.tokens % 4 == 0 && aligned(a.x, 16);
    else p.rows_of_four = a.channels % 4 == 0 && a.start % 4 == 0 && p.chunk % 4 == 0 && aligned(a.x, 16);
    p.q_of_four = a.K % 4 == 0 && p.chunk % 4 == 0 && aligned(a.q, 4);

    const int items = items_of(a, p.log_tokens);
    auto *kernel = !a.factors ? quantize<0> : items <= 1 ? quantize<1> : items <= ITEMS_OF_LARGE ? quantize<ITEMS_OF_LARGE> : quantize<ITEMS_OF_LARGEST>;
    const dim3 blocks(unsigned(p.tiles * a.frames));
    if (!ranging) {
        for (const auto &[to, from] : {std::pair<float *, const float *>{a.scale, a.fixed_scale}, {a.zero_point, a.fixed_zero}})
            if (const cudaError_t code = cudaMemcpyAsync(to, from, 4, cudaMemcpyDeviceToDevice, stream)) return code;
    }
    if (across) {
        const size_t ranges = a.granularity == QVSR_FRAME ? size_t(a.frames) : 1;
        if (const cudaError_t code = cudaMemsetAsync(a.keys, 0, ranges * 2 * sizeof(uint32_t), stream)) return code;
        p.phase = RANGE;
        if (const cudaError_t code = QVSR_LAUNCH(kernel, blocks, THREADS, bytes_of(p), stream, p)) return code;
    }
    p.phase = ranging && !across ? BOTH : ROUND;
    return QVSR_LAUNCH(kernel, blocks, THREADS, bytes_of(p), stream, p);
}
