// The kernel of matmul.cu and conv.cu: sums of products of integers on tensor cores, and what makes numbers of them.
#pragma once

#include <algorithm>

#include "mma.cuh"
#include "pack.cuh"

#ifdef QVSR_EMULATE
#define __grid_constant__
#endif

namespace qvsr {

// Where a row of the result looks in q: along three axes, at in = out * stride - padding + tap * dilation.
struct Window {
    int in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
};

// A part as the kernel wants it.
struct Part : QvsrPart {
    int width;         // bytes of a row of q that hold values, filled up to 16
    int tap_steps;     // steps of 64 bytes of a tap
    int rows_a_scale;  // group, in 32 bits
    int stride;        // w_stride, in 32 bits
    int inputs;        // of all taps
};

// All that the kernel is told.
struct Gemm {
    Part part[QVSR_MAX_PARTS];
    Window window;
    int64_t rank;
    void* out;
    const float *bias, *thin, *up;
    int *partial, *tickets;  // of the workspace: sums of the tiles, and how many blocks have added to each
    float weight_top;        // largest weight
    int M, N, parts, taps, full_box, empty_box, steps, dtype;
    int columns;  // of tiles of weights
    bool pairs;   // two neighbours of the result can be stored at once
};

// A block's tile of the result: WARPS_M x WARPS_N warps, each with 16 MT rows and 8 NT columns.
template <int WARPS_M, int WARPS_N, int MT, int NT, int STAGES_, int BLOCKS_, bool KEPT_>
struct Tile {
    static constexpr int ROWS = WARPS_M * MT * 16, COLUMNS = WARPS_N * NT * 8, THREADS = WARPS_M * WARPS_N * 32;
    static constexpr int M_TILES = MT, N_TILES = NT, STAGES = STAGES_, WARPS_IN_ROW = WARPS_N;
    static constexpr int BLOCKS = BLOCKS_;      // that registers are to suffice for on a multiprocessor
    static constexpr bool SPLITS = BLOCKS > 1;  // several blocks may share a sum
    static constexpr bool KEPT = KEPT_;         // the sum of the parts is kept in registers, else in shared memory
    static constexpr int SUMS = MT * NT * 4;    // of a thread
    static constexpr int RANKS = 8;             // of the low-rank branch at a time

    template <int FORM>
    __host__ __device__ static constexpr int stage_bytes() {
        return ROWS * SUM_BYTES + COLUMNS / TILE_CHANNELS * tile_bytes(FORM);
    }
    static_assert(ROWS <= THREADS, "a thread a row gathers facts");
};
using Wide = Tile<4, 2, 4, 8, 3, 1, false>;  // 256 x 128
using Large = Tile<2, 4, 4, 4, 4, 1, true>;  // 128 x 128
using Small = Tile<2, 2, 2, 4, 4, 3, true>;  // 64 x 64

// Where 16 bytes of a row of q lie in shared memory: rows are 64 bytes, and their quarters change places so that the same quarter of eight
// rows, which ldmatrix reads at once, lies in eight different sixteenths of 128 bytes, that is in all 32 banks.
__device__ __forceinline__ int place(int row, int quarter) { return row * SUM_BYTES + (quarter ^ (row >> 1 & 3)) * 16; }

// A row of the result: its frame, and where its window begins in q. No row: begins so far outside that no tap is inside.
struct alignas(16) Position {
    int frame, at[3];

    __device__ __forceinline__ void set(const Window& w, int m, int M) {
        constexpr int OUTSIDE = -(1 << 30);
        uint32_t rest = uint32_t(m < M ? m : 0);
#pragma unroll
        for (int axis = 2; axis >= 0; --axis) {
            at[axis] = int(rest % uint32_t(w.out[axis])) * w.stride[axis] - w.padding[axis];
            rest /= uint32_t(w.out[axis]);
        }
        frame = int(rest);
        if (m >= M) at[0] = OUTSIDE;
    }

    // The pixel of q under a tap; -1 outside.
    __device__ __forceinline__ int pixel(const Window& w, int i, int j, int k) const {
        const int z = at[0] + i * w.dilation[0], y = at[1] + j * w.dilation[1], x = at[2] + k * w.dilation[2];
        if (unsigned(z) >= unsigned(w.in[0]) || unsigned(y) >= unsigned(w.in[1]) || unsigned(x) >= unsigned(w.in[2])) return -1;
        return ((frame * w.in[0] + z) * w.in[1] + y) * w.in[2] + x;
    }
};

// What a block copies, step by step: 64 bytes of its rows of q under a tap of a part, and the tiles of weights that belong to them. Each thread
// copies a quarter of two rows (Wide: four), and every THREADS-th 16 bytes of the tiles.
template <class T, int FORM>
struct Feed {
    static constexpr int TILE = tile_bytes(FORM), WEIGHTS = T::COLUMNS / TILE_CHANNELS * TILE, APART = T::THREADS / 4, COPIES = T::ROWS / APART;
    static_assert(T::ROWS % APART == 0 && APART % 8 == 0, "the rows of a thread have the same place in a row");
    const Gemm& g;
    const Position* positions;  // of all rows of the block, in shared memory
    const int first_column;     // of tiles of weights
    const int place_of_row, present;  // present: bytes of a step's tiles from this thread's first on
    const uint8_t *row[COPIES], *tiles;
    int limit[COPIES];  // bytes of the row from this thread's quarter on; none outside
    int part, tap[3], byte, width;

    __device__ __forceinline__ Feed(const Gemm& g, const Position* positions, int first_channel)
        : g(g),
          positions(positions),
          first_column(first_channel / TILE_CHANNELS),
          place_of_row(place(int(threadIdx.x) / 4, int(threadIdx.x) % 4)),
          present(min(g.columns - first_column, T::COLUMNS / TILE_CHANNELS) * TILE - int(threadIdx.x) * 16) {}

    // Go to a step, counted over all parts.
    __device__ __forceinline__ void start(int step) {
        for (part = 0; step >= g.taps * g.part[part].tap_steps; ++part) step -= g.taps * g.part[part].tap_steps;
        int rest = step / g.part[part].tap_steps;
        byte = step % g.part[part].tap_steps * SUM_BYTES;
        tap[2] = rest % g.window.kernel[2], rest /= g.window.kernel[2];
        tap[1] = rest % g.window.kernel[1], tap[0] = rest / g.window.kernel[1];
        enter(step);
        aim();
    }

    // Go to a step of the part.
    __device__ __forceinline__ void enter(int step) {
        tiles = g.part[part].tiles + (int64_t(step) * g.columns + first_column) * TILE + threadIdx.x * 16;
        width = g.part[part].width;
    }

    // Find the rows of q under the tap.
    __device__ __forceinline__ void aim() {
        const Part& p = g.part[part];
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int pixel = positions[int(threadIdx.x) / 4 + i * APART].pixel(g.window, tap[0], tap[1], tap[2]), quarter = int(threadIdx.x) % 4 * 16;
            row[i] = p.q + int64_t(pixel) * p.pitch + quarter;
            limit[i] = pixel < 0 ? 0 : width - quarter;
        }
    }

    __device__ __forceinline__ void copy(unsigned char* stage) const {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) copy_async(stage + place_of_row + i * APART * SUM_BYTES, row[i] + byte, byte < limit[i]);
        stage += T::ROWS * SUM_BYTES + threadIdx.x * 16;
#pragma unroll
        for (int at = 0; at < WEIGHTS; at += T::THREADS * 16)
            if (at + T::THREADS * 16 <= WEIGHTS || at + int(threadIdx.x) * 16 < WEIGHTS) copy_async(stage + at, tiles + at, at < present);
    }

    __device__ __forceinline__ void next() {
        tiles += int64_t(g.columns) * TILE;
        byte += SUM_BYTES;
        if (byte < width) return;
        byte = 0;
        if (++tap[2] == g.window.kernel[2]) {
            tap[2] = 0;
            if (++tap[1] == g.window.kernel[1]) {
                tap[1] = 0;
                if (++tap[0] == g.window.kernel[0]) {
                    tap[0] = 0;
                    if (++part == g.parts) return;  // the end
                    enter(0);
                }
            }
        }
        aim();
    }
};

// What scales and corrects the sums of a row, for one part.
struct alignas(16) Row {
    float scale, zero;
    int total, box, inputs;  // of the taps inside: sum of q, number of the box, how many inputs
    float reach;             // inputs times the largest |q - zero|
};

// What a block knows of its rows.
template <class T>
struct Facts {
    Position position[T::ROWS];
    Row row[T::ROWS];

    __device__ __forceinline__ void gather(const Gemm& g, const Part& p) {
        const int i = int(threadIdx.x);
        if (i >= T::ROWS) return;
        const Window& w = g.window;
        const Position at = position[i];
        int lo[3], hi[3], taps = 1, number = 0;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            const int before = at.at[axis] < 0 ? (w.dilation[axis] - 1 - at.at[axis]) / w.dilation[axis] : 0;
            lo[axis] = min(before, w.kernel[axis]);
            const int room = w.in[axis] - 1 - at.at[axis];
            hi[axis] = min(room < 0 ? -1 : room / w.dilation[axis], w.kernel[axis] - 1);
            taps *= max(0, hi[axis] - lo[axis] + 1);
            number = number * int(intervals(w.kernel[axis])) + int(interval(lo[axis], hi[axis]));
        }
        int sum = 0;
        int pixel = at.frame * w.in[0] * w.in[1] * w.in[2];
        if (taps)
#pragma unroll 1
            for (int a = lo[0]; a <= hi[0]; ++a)
#pragma unroll 1
                for (int b = lo[1]; b <= hi[1]; ++b)
#pragma unroll 1
                    for (int c = lo[2]; c <= hi[2]; ++c) {
                        const int inside = at.pixel(w, a, b, c);
                        sum += __ldg(p.totals + inside);
                        if (g.taps == 1) pixel = inside;
                    }
        const float zero = __ldg(p.zero_point + pixel / p.rows_a_scale), inputs = float(taps * int(p.K));
        row[i] = {__ldg(p.scale + pixel / p.rows_a_scale), zero, sum, taps ? number : g.empty_box, taps * int(p.K), 0.0f};
        row[i].reach = inputs * fmaxf(fabsf(zero), fabsf(255.0f - zero));
    }
};

// The sum of (q - z) (w - v) over `inputs` values from the sums of q w, q and w, where 32 bits do not hold it. Zero points are whole numbers
// in float32 and can be huge: where 64 bits do not hold a product either, it is one of float32, of numbers each of which is nearly exact.
__device__ __forceinline__ float wide_sum(uint32_t products, int total, float z, int weights, float v, int inputs) {
    constexpr float INT = 2147483648.0f, LONG = 4e18f;
    if (!(fabsf(v) < INT)) return fmaf(-v, fmaf(-z, float(inputs), float(total)), fmaf(-z, float(weights), float(products)));
    const long long first = (long long)products - (long long)v * total, second = weights - (long long)v * inputs;
    if (fabsf(z) < INT * INT && fabsf(z) * fabsf(float(second)) < LONG) return float(first - (long long)z * second);
    return fmaf(-z, float(second), float(first));
}

// The sum of (q - z) (w - v) of a row and an output channel. `centre` is the sum of w - v over all taps; `weights` the sum of w over the row's, which
// is read where the row is at a border, or 32 bits are not enough.
__device__ __forceinline__ float corrected(uint32_t products, const Row& row, float v, uint32_t centre, int weights, bool border, bool narrow) {
    const uint32_t low = uint32_t(int(v)), middle = border ? uint32_t(weights) - low * uint32_t(row.inputs) : centre;
    if (!narrow) return wide_sum(products, row.total, row.zero, weights, v, row.inputs);
    return float(int(products - low * uint32_t(row.total) - uint32_t(int(row.zero)) * middle));
}

__device__ __forceinline__ void store(const Gemm& g, int m, int n, float first, float second) {
    if (m >= g.M || n >= g.N) return;
    const int64_t at = int64_t(m) * g.N + n;
    const bool both = n + 1 < g.N;
    if (g.dtype == QVSR_FLOAT32) {
        float* out = static_cast<float*>(g.out) + at;
        if (g.pairs) return void(*reinterpret_cast<float2*>(out) = make_float2(first, second));
        out[0] = first;
        if (both) out[1] = second;
        return;
    }
    uint32_t low, high;
    if (g.dtype == QVSR_FLOAT16) {
        const __half x = __float2half_rn(first), y = __float2half_rn(second);
        low = reinterpret_cast<const uint16_t&>(x), high = reinterpret_cast<const uint16_t&>(y);
    } else {
        const __nv_bfloat16 x = __float2bfloat16_rn(first), y = __float2bfloat16_rn(second);
        low = reinterpret_cast<const uint16_t&>(x), high = reinterpret_cast<const uint16_t&>(y);
    }
    uint16_t* out = static_cast<uint16_t*>(g.out) + at;
    if (g.pairs) return void(*reinterpret_cast<uint32_t*>(out) = low | high << 16);
    out[0] = uint16_t(low);
    if (both) out[1] = uint16_t(high);
}

// RANKS of the low-rank branch of a block's rows and channels, from `first` on, into shared memory; zeros beyond.
template <class T>
__device__ __forceinline__ void load_branch(const Gemm& g, float* thin, float* up, int64_t first, int first_row, int first_channel) {
    __syncthreads();
    for (int i = int(threadIdx.x); i < T::RANKS * (T::ROWS + T::COLUMNS); i += T::THREADS) {
        const int r = i % T::RANKS, place = i / T::RANKS;
        const bool of_thin = place < T::ROWS;
        const int line = of_thin ? first_row + place : first_channel + place - T::ROWS;
        const bool inside = first + r < g.rank && line < (of_thin ? g.M : g.N);
        const float value = inside ? __ldg((of_thin ? g.thin : g.up) + line * g.rank + first + r) : 0.0f;
        (of_thin ? thin + r * (T::ROWS + 4) + place : up + r * (T::COLUMNS + 4) + place - T::ROWS)[0] = value;
    }
    __syncthreads();
}

// Bytes of shared memory: the stages, whose place the low-rank branch takes over at the end, the facts, and the sum of the parts where there are
// several and registers do not keep it.
template <class T, int FORM>
constexpr int shared_bytes(int parts) {
    static_assert(T::RANKS * (T::ROWS + T::COLUMNS + 8) * 4 <= T::STAGES * T::template stage_bytes<FORM>(), "the branch fits where the stages were");
    return T::STAGES * T::template stage_bytes<FORM>() + int(sizeof(Facts<T>)) + 16 + (T::KEPT || parts == 1 ? 0 : T::SUMS * T::THREADS * 4);
}

// Whether the chip that is compiled for has the instructions, and the shared memory.
template <class T, int FORM>
__host__ __device__ constexpr bool possible() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return FORM != QVSR_NIBBLES;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    return T::ROWS == Small::ROWS;
#else
    return true;
#endif
}

template <class T, int FORM>
__device__ __forceinline__ void compute(const Gemm& g) {
    constexpr int MT = T::M_TILES, NT = T::N_TILES, STAGE = T::template stage_bytes<FORM>(), TILE = tile_bytes(FORM);
    QVSR_SHARED(memory);
    auto& facts = *reinterpret_cast<Facts<T>*>(memory + T::STAGES * STAGE);
    int& ticket = *reinterpret_cast<int*>(memory + T::STAGES * STAGE + sizeof(Facts<T>));
    float* kept = reinterpret_cast<float*>(memory + T::STAGES * STAGE + sizeof(Facts<T>) + 16) + threadIdx.x;  // of this thread, THREADS apart

    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int warp_row = warp / T::WARPS_IN_ROW * MT * 16, warp_column = warp % T::WARPS_IN_ROW * NT * 8;  // in the block's tile
    const int tiles_n = int(ceil_div(g.N, T::COLUMNS)), tile = int(blockIdx.x), splits = int(gridDim.y);
    const int first_row = tile / tiles_n * T::ROWS;
    const int first_channel = tile % tiles_n * T::COLUMNS;

    // Steps of the sum that are this block's, over all parts.
    const int begin = g.steps * int(blockIdx.y) / splits, end = g.steps * (int(blockIdx.y) + 1) / splits;
    if (threadIdx.x < T::ROWS) facts.position[threadIdx.x].set(g.window, first_row + int(threadIdx.x), g.M);
    __syncthreads();
    Feed<T, FORM> feed(g, facts.position, first_channel);
    feed.start(begin);
#pragma unroll 1
    for (int i = 0; i < T::STAGES - 1; ++i) {
        if (begin + i < end) feed.copy(memory + i * STAGE), feed.next();
        close_group();
    }

    int sums[MT][NT][4];      // of products of integers, modulo 2^32
    float result[MT][NT][4];  // of the parts, scaled
#pragma unroll
    for (int i = 0; T::KEPT && i < MT * NT * 4; ++i) result[i / 4 / NT][i / 4 % NT][i % 4] = 0.0f;

    int step = begin, part_begin = 0;
    const bool split = T::SPLITS && splits > 1;
    for (int round = 0; round < (split ? 2 * g.parts : g.parts); ++round) {
        const Part& p = g.part[round < g.parts ? round : round - g.parts];
#pragma unroll
        for (int i = 0; i < MT * NT * 4; ++i) sums[i / 4 / NT][i / 4 % NT][i % 4] = 0;
        int* partial = g.partial + ((int64_t(tile) * g.parts + round % g.parts) * T::SUMS) * T::THREADS + threadIdx.x;

        if (round < g.parts) {
            const int part_end = part_begin + g.taps * p.tap_steps, stop = min(end, part_end);
            const bool mine = step < stop;
            int byte = step < stop ? (step - part_begin) % p.tap_steps * SUM_BYTES : 0;
            for (; step < stop; ++step) {
                wait_groups<T::STAGES - 2>();  // this step's copies have come, and
                __syncthreads();               // those of all threads; all have read the stage that is written next
                if (step + T::STAGES - 1 < end) feed.copy(memory + (step - begin + T::STAGES - 1) % T::STAGES * STAGE), feed.next();
                close_group();

                const unsigned char *rows = memory + (step - begin) % T::STAGES * STAGE, *weights = rows + T::ROWS * SUM_BYTES;
                uint32_t b[NT][4];
#pragma unroll
                for (int n = 0; n < NT; ++n) load_tile<FORM>(b[n], weights + (warp_column / 8 + n) * TILE, lane);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (byte + half * 32 >= p.width) break;  // only zeros
                    uint32_t a[MT][4];
#pragma unroll
                    for (int m = 0; m < MT; ++m) load_matrices(a[m], rows + place(warp_row + m * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
                    for (int m = 0; m < MT; ++m)
#pragma unroll
                        for (int n = 0; n < NT; ++n) multiply<FORM == QVSR_NIBBLES ? 4 : 8>(sums[m][n], a[m], b[n][half * 2], b[n][half * 2 + 1]);
                }
                byte += SUM_BYTES;
                if (byte >= p.width) byte = 0;
            }
            part_begin = part_end;

            if (split) {  // add to what other blocks have; integers come to the same in any order
                if (mine) {
#pragma unroll
                    for (int i = 0; i < T::SUMS; ++i) atomicAdd(partial + i * T::THREADS, sums[i / 4 / NT][i / 4 % NT][i % 4]);
                }
                if (round < g.parts - 1) continue;
                __threadfence();
                __syncthreads();
                if (threadIdx.x == 0) ticket = atomicAdd(g.tickets + tile, 1);
                __syncthreads();
                if (ticket != splits - 1) return;  // the last block goes on
                __threadfence();
                if (threadIdx.x == 0) g.tickets[tile] = 0;
                continue;
            }
        } else if constexpr (T::SPLITS) {
#pragma unroll
            for (int i = 0; i < T::SUMS; ++i) {
                sums[i / 4 / NT][i / 4 % NT][i % 4] = load_shared_by_blocks(partial + i * T::THREADS);
                partial[i * T::THREADS] = 0;  // as the next launch wants it
            }
        }

        // result += scale weight_scale (sum of (q - zero) (w - weight_zero))
        __syncthreads();  // the facts of the part before have been read
        facts.gather(g, p);
        __syncthreads();
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int channel = first_channel + warp_column + n * 8 + thread_again() % 4 * 2;  // and the next one
            float step_size[2], weight_zero[2], largest = 0.0f;
            uint32_t centre[2];  // sum of w - weight_zero over all taps
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const bool inside = channel + c < g.N;
                step_size[c] = inside ? __ldg(p.w_scale + (channel + c) * p.stride) : 0.0f;
                weight_zero[c] = inside ? __ldg(p.w_zero_point + (channel + c) * p.stride) : 0.0f;
                largest = fmaxf(largest, fmaxf(fabsf(weight_zero[c]), fabsf(g.weight_top - weight_zero[c])));
                const int weights = inside ? __ldg(p.boxes + int64_t(g.full_box) * g.N + channel + c) : 0;
                centre[c] = uint32_t(weights) - uint32_t(int(weight_zero[c])) * uint32_t(p.inputs);
            }
#pragma unroll
            for (int i = 0; i < MT * 2; ++i) {
                const Row row = facts.row[warp_row + i * 8 + thread_again() % 32 / 4];
                const bool border = row.box != g.full_box;
                const bool narrow = row.reach * largest < 2.14e9f;  // 32 bits hold the sum, and what wraps around on the way is right
                int weights[2] = {0, 0};
                if (border || !narrow) {
#pragma unroll
                    for (int c = 0; c < 2; ++c) weights[c] = channel + c < g.N ? __ldg(p.boxes + int64_t(row.box) * g.N + channel + c) : 0;
                }
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float value = corrected(uint32_t(sums[i / 2][n][i % 2 * 2 + c]), row, weight_zero[c], centre[c], weights[c], border, narrow);
                    float& to = result[i / 2][n][i % 2 * 2 + c];
                    float* const place = kept + ((i / 2 * NT + n) * 4 + i % 2 * 2 + c) * T::THREADS;
                    if (!T::KEPT) to = round == 0 ? 0.0f : *place;
                    to = fmaf(value * step_size[c], row.scale, to);
                    if (!T::KEPT && round + 1 < g.parts) *place = to;
                }
            }
        }
    }

    // result += thin up^T, RANKS of the rank at a time
    wait_groups<0>();
    float* thin = reinterpret_cast<float*>(memory);  // RANKS rows, a few values longer than the tile: then writing has no conflicts of banks
    float* up = thin + T::RANKS * (T::ROWS + 4);
    for (int64_t first = 0; first < g.rank; first += T::RANKS) {
        load_branch<T>(g, thin, up, first, first_row, first_channel);
#pragma unroll 2
        for (int r = 0; r < T::RANKS; ++r) {
            float x[NT][2];
#pragma unroll
            for (int n = 0; n < NT * 2; ++n) x[n / 2][n % 2] = up[r * (T::COLUMNS + 4) + warp_column + n / 2 * 8 + lane % 4 * 2 + n % 2];
#pragma unroll
            for (int m = 0; m < MT * 2; ++m) {
                const float y = thin[r * (T::ROWS + 4) + warp_row + m / 2 * 16 + m % 2 * 8 + lane / 4];
#pragma unroll
                for (int n = 0; n < NT * 2; ++n) {
                    float& to = result[m / 2][n / 2][m % 2 * 2 + n % 2];
                    to = fmaf(y, x[n / 2][n % 2], to);
                }
            }
        }
    }

    // + bias, and out
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const int channel = first_channel + warp_column + n * 8 + lane % 4 * 2;
        const float first = g.bias && channel < g.N ? __ldg(g.bias + channel) : 0.0f, second = g.bias && channel + 1 < g.N ? __ldg(g.bias + channel + 1) : 0.0f;
#pragma unroll
        for (int m = 0; m < MT * 2; ++m) {
            const float* r = result[m / 2][n] + m % 2 * 2;
            store(g, first_row + warp_row + m / 2 * 16 + m % 2 * 8 + lane / 4, channel, r[0] + first, r[1] + second);
        }
    }
}

template <class T, int FORM>
__global__ void __launch_bounds__(T::THREADS, T::BLOCKS) gemm(const __grid_constant__ Gemm g) {
    if constexpr (possible<T, FORM>()) compute<T, FORM>(g);
}

// Rows one after the other, as a convolution of one tap.
inline Window window_of_rows(int64_t M) {
    const int rows = int(std::min<int64_t>(M, INT32_MAX));
    return {{1, 1, rows}, {1, 1, rows}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
}

// Checks what is the same for both operators, chooses tiles and splits, and starts the kernel; in matmul.cu.
int start_gemm(const QvsrPart* parts, const QvsrLayer* layer, const Window& window, int64_t M, cudaStream_t stream);

}  // namespace qvsr
