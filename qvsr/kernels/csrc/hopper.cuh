// The kernel of gemm.cuh for compute capability 9.0, by wgmma.
#pragma once

#include "gemm.cuh"
#include "wgmma.cuh"

namespace qvsr {

// A block's tile: two warpgroups, each with 64 MT output channels of the same 128 rows. Members as in Tile.
template <int MT, int STAGES_, int BLOCKS_>
struct Warpgroups {
    static constexpr int ROWS = WGMMA_COLUMNS, COLUMNS = 2 * MT * WGMMA_ROWS, THREADS = 256;
    static constexpr int M_TILES = MT, STAGES = STAGES_, BLOCKS = BLOCKS_;
    static constexpr bool SPLITS = BLOCKS > 1, KEPT = false;
    static constexpr int SUMS = MT * WGMMA_SUMS, RANKS = 8;
    static constexpr int AHEAD = STAGES - 2;  // steps that are copied before they are multiplied
    static constexpr int PATTERN = 512;       // bytes after which the swizzle repeats: stages begin at a multiple

    template <int FORM>
    __host__ __device__ static constexpr int stage_bytes() {
        constexpr int bytes = ROWS * SUM_BYTES + COLUMNS / TILE_CHANNELS * tile_bytes(FORM);
        static_assert(bytes % PATTERN == 0, "every stage begins with the swizzle's pattern");
        return bytes;
    }
};
using Wide9 = Warpgroups<2, 4, 1>;   // 256 channels x 128 rows
using Large9 = Warpgroups<1, 6, 2>;  // 128 channels x 128 rows

// First of a warp's channels in the block's tile: 16, and every 64 further 16 more.
template <int MT>
__device__ __forceinline__ int channel_of_warp(unsigned warp) { return int(warp / 4 * MT * WGMMA_ROWS + warp % 4 * 16); }

// The first of this thread's channels in the block's tile (the others are 8 and 64 further), and the first of its rows, of which every 8 are two more.
// From the thread's number each time: registers that kept them through the loops would be spilled.
template <int MT>
__device__ __forceinline__ int channel_of_thread() {
    const unsigned thread = unsigned(thread_again());
    return channel_of_warp<MT>(thread / 32) + int(thread % 32 / 4);
}
__device__ __forceinline__ int row_of_thread() { return int(unsigned(thread_again()) % 4 * 2); }

template <class T, int FORM>
__device__ __forceinline__ void compute_by_wgmma(const Gemm& g) {
    constexpr int MT = T::M_TILES, STAGE = T::template stage_bytes<FORM>(), TILE = tile_bytes(FORM), AHEAD = T::AHEAD;
    QVSR_SHARED(whole);
    unsigned char* const memory = whole + (T::PATTERN - shared_address(whole) % T::PATTERN) % T::PATTERN;
    auto& facts = *reinterpret_cast<Facts<T>*>(memory + T::STAGES * STAGE);
    struct Place {
        int ticket, row, channel;  // row, channel: the first of the block's tile
    };
    auto& at = *reinterpret_cast<Place*>(memory + T::STAGES * STAGE + sizeof(Facts<T>));

    const int tiles_n = int(ceil_div(g.N, T::COLUMNS)), splits = int(gridDim.y);
    const int first_row = int(blockIdx.x) / tiles_n * T::ROWS, first_channel = int(blockIdx.x) % tiles_n * T::COLUMNS;
    const int share_of_warp = channel_of_warp<MT>(threadIdx.x / 32) / TILE_CHANNELS * TILE;

    // Steps of the sum that are this block's, over all parts.
    const int begin = g.steps * int(blockIdx.y) / splits, end = g.steps * (int(blockIdx.y) + 1) / splits;
    if (threadIdx.x == 0) at.row = first_row, at.channel = first_channel;
    if (threadIdx.x < T::ROWS) facts.position[threadIdx.x].set(g.window, first_row + int(threadIdx.x), g.M);
    __syncthreads();
    Feed<T, FORM> feed(g, facts.position, first_channel);
    feed.start(begin);
#pragma unroll 1
    for (int i = 0; i < AHEAD; ++i) {
        if (begin + i < end) feed.copy(memory + i * STAGE), feed.next();
        close_group();
    }

    int sums[MT][WGMMA_SUMS];              // [channels of 64][4 i + 2 c + r]: channel 8 c + lane / 4, row 8 i + lane % 4 * 2 + r
    uint32_t first[MT][4], second[MT][4];  // weights of the first and second 32 bytes of a step
    Share<FORM> share[MT][2];

    // All bits, which the assembler cannot know: so that `second` is computed where it is written, and no copy (wgmma.cuh).
    const uint32_t ones = ~uint32_t(g.parts >> 8);

    int step = begin;
    const bool split = T::SPLITS && splits > 1;
    for (int round = 0; round < (split ? 2 * g.parts : g.parts); ++round) {
        const int number = round < g.parts ? round : round - g.parts;
        const Part& p = g.part[number];
#pragma unroll
        for (int i = 0; i < T::SUMS; ++i) sums[i / WGMMA_SUMS][i % WGMMA_SUMS] = 0;

        const auto partial = [&] { return g.partial + (int64_t(blockIdx.x) * g.parts + number) * T::SUMS * T::THREADS + thread_again(); };

        if (round < g.parts) {
            if (round > 0) feed.start(min(step + AHEAD, g.steps - 1));  // found again, so that no register keeps it meanwhile
            int part_end = 0;
            for (int i = 0; i <= number; ++i) part_end += g.taps * g.part[i].tap_steps;
            const int stop = min(end, part_end);
            const bool mine = step < stop;
            for (; step < stop; ++step) {
                wait_groups<AHEAD - 1>();  // this step's copies have come,
                fence_for_wgmma();         // wgmma sees them, and
                __syncthreads();           // those of all threads; nobody multiplies the stage before the last any more
                const unsigned char *rows = memory + (step - begin) % T::STAGES * STAGE, *weights = rows + T::ROWS * SUM_BYTES;
                const uint64_t b = descriptor_of(rows);
#pragma unroll
                for (int i = 0; i < MT * 2; ++i) share[i / 2][i % 2].load(weights + share_of_warp + (i / 2 * 8 + i % 2) * TILE, int(threadIdx.x) % 32);
#pragma unroll
                for (int i = 0; i < MT * 4; ++i) first[i / 4][i % 4] = share[i / 4][i % 2].widened(i % 4 / 2);
                wgmma_order();
#pragma unroll
                for (int m = 0; m < MT; ++m) wgmma_multiply(sums[m], first[m], b);
                wgmma_close();

                if (step + AHEAD < end) feed.copy(memory + (step - begin + AHEAD) % T::STAGES * STAGE), feed.next();
                close_group();

                wgmma_wait<1>();  // the products of the step before: `second` is free, and its stage
#pragma unroll
                for (int i = 0; i < MT * 2; ++i) changed(share[i / 2][i % 2].word);
#pragma unroll
                for (int i = 0; i < MT * 4; ++i) second[i / 4][i % 4] = share[i / 4][i % 2].widened(2 + i % 4 / 2) & ones;
                wgmma_order();
#pragma unroll
                for (int m = 0; m < MT; ++m) wgmma_multiply(sums[m], second[m], b + WGMMA_BYTES / 16);
                wgmma_close();
                wgmma_wait<1>();  // `first` is free
            }
            wgmma_wait<0>();
#pragma unroll
            for (int m = 0; m < MT; ++m) changed(sums[m]);

            if (split) {  // add to what other blocks have; integers come to the same in any order
                if (mine) {
                    int* const to = partial();
#pragma unroll
                    for (int i = 0; i < T::SUMS; ++i) atomicAdd(to + i * T::THREADS, sums[i / WGMMA_SUMS][i % WGMMA_SUMS]);
                }
                if (round < g.parts - 1) continue;
                __threadfence();
                __syncthreads();
                if (thread_again() == 0) at.ticket = atomicAdd(g.tickets + blockIdx.x, 1);
                __syncthreads();
                if (at.ticket != splits - 1) return;  // the last block goes on
                __threadfence();
                if (thread_again() == 0) g.tickets[blockIdx.x] = 0;
                continue;
            }
        } else if constexpr (T::SPLITS) {
            int* const from = partial();
#pragma unroll
            for (int i = 0; i < T::SUMS; ++i) {
                sums[i / WGMMA_SUMS][i % WGMMA_SUMS] = load_shared_by_blocks(from + i * T::THREADS);
                from[i * T::THREADS] = 0;  // as the next launch wants it
            }
        }

        // result += scale weight_scale (sum of (q - zero) (w - weight_zero))
        __syncthreads();  // the facts of the part before have been read
        facts.gather(g, p);
        __syncthreads();
        float* const kept = reinterpret_cast<float*>(memory + T::STAGES * STAGE + sizeof(Facts<T>) + 16) + thread_again();  // THREADS apart
        const Row* const rows = facts.row + row_of_thread();
        const int of_thread = at.channel + channel_of_thread<MT>();
        float result[MT][WGMMA_SUMS];
#pragma unroll
        for (int c = 0; c < MT * 2; ++c) {
            const int channel = of_thread + c / 2 * WGMMA_ROWS + c % 2 * 8;
            const bool inside = channel < g.N;
            const float step_size = inside ? __ldg(p.w_scale + channel * p.stride) : 0.0f;
            const float weight_zero = inside ? __ldg(p.w_zero_point + channel * p.stride) : 0.0f;
            const float largest = fmaxf(fabsf(weight_zero), fabsf(g.weight_top - weight_zero));
            const int* const boxes = p.boxes + (inside ? channel : 0);
            const uint32_t centre = uint32_t(__ldg(boxes + int64_t(g.full_box) * g.N)) - uint32_t(int(weight_zero)) * uint32_t(p.inputs);
#pragma unroll
            for (int i = 0; i < T::ROWS / 4; ++i) {
                const Row row = rows[i / 2 * 8 + i % 2];
                const bool border = row.box != g.full_box;
                const bool narrow = row.reach * largest < 2.14e9f;  // 32 bits hold the sum, and what wraps around on the way is right
                const int index = i / 2 * 4 + c % 2 * 2 + i % 2, weights = border || !narrow ? __ldg(boxes + int64_t(row.box) * g.N) : 0;
                const float value = corrected(uint32_t(sums[c / 2][index]), row, weight_zero, centre, weights, border, narrow);
                float* const place = kept + (c / 2 * WGMMA_SUMS + index) * T::THREADS;
                float& to = result[c / 2][index];
                to = fmaf(value * step_size, row.scale, number == 0 ? 0.0f : *place);
                if (number + 1 < g.parts) *place = to;
            }
        }
        if (number + 1 < g.parts) continue;

        // result += thin up^T, RANKS of the rank at a time
        wait_groups<0>();
        float* thin = reinterpret_cast<float*>(memory);  // RANKS rows, a few values longer than the tile: then writing has no conflicts of banks
        float* up = thin + T::RANKS * (T::ROWS + 4);
        for (int64_t rank = 0; rank < g.rank; rank += T::RANKS) {
            load_branch<T>(g, thin, up, rank, at.row, at.channel);
            const float *const up_of_thread = up + channel_of_thread<MT>(), *const thin_of_thread = thin + row_of_thread();
#pragma unroll 1
            for (int r = 0; r < T::RANKS; ++r) {
                float x[MT * 2];
#pragma unroll
                for (int c = 0; c < MT * 2; ++c) x[c] = up_of_thread[r * (T::COLUMNS + 4) + c / 2 * WGMMA_ROWS + c % 2 * 8];
#pragma unroll
                for (int i = 0; i < T::ROWS / 8; ++i) {
                    const float2 y = *reinterpret_cast<const float2*>(thin_of_thread + r * (T::ROWS + 4) + i * 8);
#pragma unroll
                    for (int c = 0; c < MT * 2; ++c) {
                        float* const to = result[c / 2] + i * 4 + c % 2 * 2;
                        to[0] = fmaf(y.x, x[c], to[0]), to[1] = fmaf(y.y, x[c], to[1]);
                    }
                }
            }
        }

        // + bias, and out. A thread has two rows of a channel; neighbours in g change one for one, so that each has two channels of a row to store.
        const int odd = int(unsigned(thread_again()) / 4 % 2), first_of_thread = at.channel + channel_of_thread<MT>(), row = at.row + row_of_thread() + odd;
#pragma unroll
        for (int c = 0; c < MT * 2; ++c) {
            const int to = first_of_thread + c / 2 * WGMMA_ROWS + c % 2 * 8;
            const float bias = g.bias && to < g.N ? __ldg(g.bias + to) : 0.0f;
#pragma unroll
            for (int i = 0; i < T::ROWS / 8; ++i) {
                const float upper = result[c / 2][i * 4 + c % 2 * 2] + bias, lower = result[c / 2][i * 4 + c % 2 * 2 + 1] + bias;
                const float other = __shfl_xor_sync(0xffffffffu, odd ? upper : lower, 4);
                store(g, row + i * 8, to - odd, odd ? other : upper, odd ? lower : other);
            }
        }
        return;
    }
}

// Bytes of shared memory, which may have to begin with a few that are not used.
template <class T, int FORM>
constexpr int bytes_by_wgmma(int parts) {
    return shared_bytes<T, FORM>(parts) + T::PATTERN - 128;
}

template <class T, int FORM>
__global__ void __launch_bounds__(T::THREADS, T::BLOCKS) gemm_by_wgmma(const __grid_constant__ Gemm g) {
    if constexpr (QVSR_WGMMA_CODE) compute_by_wgmma<T, FORM>(g);
}

}  // namespace qvsr
