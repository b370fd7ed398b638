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

template <class T, int FORM>
__device__ __forceinline__ void compute_by_wgmma(const Gemm& g) {
    constexpr int MT = T::M_TILES, STAGE = T::template stage_bytes<FORM>(), TILE = tile_bytes(FORM), AHEAD = T::AHEAD;
    QVSR_SHARED(whole);
    unsigned char* const memory = whole + (T::PATTERN - shared_address(whole) % T::PATTERN) % T::PATTERN;
    auto& facts = *reinterpret_cast<Facts<T>*>(memory + T::STAGES * STAGE);
    int& ticket = *reinterpret_cast<int*>(memory + T::STAGES * STAGE + sizeof(Facts<T>));
    float* kept = reinterpret_cast<float*>(memory + T::STAGES * STAGE + sizeof(Facts<T>) + 16) + threadIdx.x;  // of this thread, THREADS apart

    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int warp_channel = warp / 4 * MT * WGMMA_ROWS + warp % 4 * 16;  // in the block's tile: 16 channels, and 64 further 16 more
    const int tiles_n = int(ceil_div(g.N, T::COLUMNS)), tile = int(blockIdx.x), splits = int(gridDim.y);
    const int first_row = tile / tiles_n * T::ROWS, first_channel = tile % tiles_n * T::COLUMNS;

    // Steps of the sum that are this block's, over all parts.
    const int begin = g.steps * int(blockIdx.y) / splits, end = g.steps * (int(blockIdx.y) + 1) / splits;
    if (threadIdx.x < T::ROWS) facts.position[threadIdx.x].set(g.window, first_row + int(threadIdx.x), g.M);
    __syncthreads();
    Feed<T, FORM> feed(g, facts.position, first_channel);
    feed.start(begin);
#pragma unroll 1
    for (int i = 0; i < AHEAD; ++i) {
        if (begin + i < end) feed.copy(memory + i * STAGE), feed.next();
        close_group();
    }

    int sums[MT][WGMMA_SUMS];            // [channels of 64][4 i + 2 c + r]: channel 8 c + lane / 4, row 8 i + lane % 4 * 2 + r
    float result[MT][WGMMA_SUMS];        // of the parts, scaled
    uint32_t first[MT][4], second[MT][4];  // weights of the first and second 32 bytes of a step
    Share<FORM> share[MT][2];

    int step = begin, part_begin = 0;
    const bool split = T::SPLITS && splits > 1;
    for (int round = 0; round < (split ? 2 * g.parts : g.parts); ++round) {
        const int number = round < g.parts ? round : round - g.parts;
        const Part& p = g.part[number];
#pragma unroll
        for (int i = 0; i < T::SUMS; ++i) sums[i / WGMMA_SUMS][i % WGMMA_SUMS] = 0;
        int* partial = g.partial + (int64_t(tile) * g.parts + number) * T::SUMS * T::THREADS + threadIdx.x;

        if (round < g.parts) {
            const int part_end = part_begin + g.taps * p.tap_steps, stop = min(end, part_end);
            const bool mine = step < stop;
            for (; step < stop; ++step) {
                wait_groups<AHEAD - 1>();  // this step's copies have come,
                fence_for_wgmma();         // wgmma sees them, and
                __syncthreads();           // those of all threads; nobody multiplies the stage before the last any more
                const unsigned char *rows = memory + (step - begin) % T::STAGES * STAGE, *weights = rows + T::ROWS * SUM_BYTES;
                const uint64_t b = descriptor_of(rows);
#pragma unroll
                for (int i = 0; i < MT * 2; ++i) share[i / 2][i % 2].load(weights + (warp_channel / 8 + i / 2 * 8 + i % 2) * TILE, lane);
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
                for (int i = 0; i < MT * 4; ++i) second[i / 4][i % 4] = copied(share[i / 4][i % 2].widened(2 + i % 4 / 2));
                wgmma_order();
#pragma unroll
                for (int m = 0; m < MT; ++m) wgmma_multiply(sums[m], second[m], b + WGMMA_BYTES / 16);
                wgmma_close();
                wgmma_wait<1>();  // `first` is free
            }
            wgmma_wait<0>();
#pragma unroll
            for (int m = 0; m < MT; ++m) changed(sums[m]);
            part_begin = part_end;

            if (split) {  // add to what other blocks have; integers come to the same in any order
                if (mine) {
#pragma unroll
                    for (int i = 0; i < T::SUMS; ++i) atomicAdd(partial + i * T::THREADS, sums[i / WGMMA_SUMS][i % WGMMA_SUMS]);
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
                sums[i / WGMMA_SUMS][i % WGMMA_SUMS] = load_shared_by_blocks(partial + i * T::THREADS);
                partial[i * T::THREADS] = 0;  // as the next launch wants it
            }
        }

        // result += scale weight_scale (sum of (q - zero) (w - weight_zero))
        __syncthreads();  // the facts of the part before have been read
        facts.gather(g, p);
        __syncthreads();
        float step_size[MT * 2], weight_zero[MT * 2], largest = 0.0f;
        uint32_t centre[MT * 2];  // sum of w - weight_zero over all taps
        int channel[MT * 2];
#pragma unroll
        for (int c = 0; c < MT * 2; ++c) {
            channel[c] = first_channel + warp_channel + c / 2 * WGMMA_ROWS + c % 2 * 8 + thread_again() % 32 / 4;
            const bool inside = channel[c] < g.N;
            step_size[c] = inside ? __ldg(p.w_scale + channel[c] * p.stride) : 0.0f;
            weight_zero[c] = inside ? __ldg(p.w_zero_point + channel[c] * p.stride) : 0.0f;
            largest = fmaxf(largest, fmaxf(fabsf(weight_zero[c]), fabsf(g.weight_top - weight_zero[c])));
            const int weights = inside ? __ldg(p.boxes + int64_t(g.full_box) * g.N + channel[c]) : 0;
            centre[c] = uint32_t(weights) - uint32_t(int(weight_zero[c])) * uint32_t(p.inputs);
        }
#pragma unroll
        for (int i = 0; i < T::ROWS / 4; ++i) {
            const Row row = facts.row[i / 2 * 8 + thread_again() % 4 * 2 + i % 2];
            const bool border = row.box != g.full_box;
            const bool narrow = row.reach * largest < 2.14e9f;  // 32 bits hold the sum, and what wraps around on the way is right
            int weights[MT * 2] = {};
            if (border || !narrow) {
#pragma unroll
                for (int c = 0; c < MT * 2; ++c) weights[c] = channel[c] < g.N ? __ldg(p.boxes + int64_t(row.box) * g.N + channel[c]) : 0;
            }
#pragma unroll
            for (int c = 0; c < MT * 2; ++c) {
                const int at = i / 2 * 4 + c % 2 * 2 + i % 2;
                const float value = corrected(uint32_t(sums[c / 2][at]), row, weight_zero[c], centre[c], weights[c], border, narrow);
                float* const place = kept + (c / 2 * WGMMA_SUMS + at) * T::THREADS;
                float& to = result[c / 2][at];
                to = fmaf(value * step_size[c], row.scale, number == 0 ? 0.0f : *place);
                if (number + 1 < g.parts) *place = to;
            }
        }
    }

    // result += thin up^T, RANKS of the rank at a time
    wait_groups<0>();
    float* thin = reinterpret_cast<float*>(memory);  // RANKS rows, a few values longer than the tile: then writing has no conflicts of banks
    float* up = thin + T::RANKS * (T::ROWS + 4);
    for (int64_t rank = 0; rank < g.rank; rank += T::RANKS) {
        load_branch<T>(g, thin, up, rank, first_row, first_channel);
#pragma unroll 1
        for (int r = 0; r < T::RANKS; ++r) {
            float x[MT * 2];
#pragma unroll
            for (int c = 0; c < MT * 2; ++c) x[c] = up[r * (T::COLUMNS + 4) + warp_channel + c / 2 * WGMMA_ROWS + c % 2 * 8 + lane / 4];
#pragma unroll
            for (int i = 0; i < T::ROWS / 8; ++i) {
                const float2 y = *reinterpret_cast<const float2*>(thin + r * (T::ROWS + 4) + i * 8 + lane % 4 * 2);
#pragma unroll
                for (int c = 0; c < MT * 2; ++c) {
                    float* const to = result[c / 2] + i * 4 + c % 2 * 2;
                    to[0] = fmaf(y.x, x[c], to[0]), to[1] = fmaf(y.y, x[c], to[1]);
                }
            }
        }
    }

    // + bias, and out. A thread has two rows of a channel; neighbours in g change one for one, so that each has two channels of a row to store.
    const bool odd = lane / 4 % 2;
#pragma unroll
    for (int c = 0; c < MT * 2; ++c) {
        const int channel = first_channel + warp_channel + c / 2 * WGMMA_ROWS + c % 2 * 8 + lane / 4;
        const float bias = g.bias && channel < g.N ? __ldg(g.bias + channel) : 0.0f;
#pragma unroll
        for (int i = 0; i < T::ROWS / 8; ++i) {
            const float upper = result[c / 2][i * 4 + c % 2 * 2] + bias, lower = result[c / 2][i * 4 + c % 2 * 2 + 1] + bias;
            const float other = __shfl_xor_sync(0xffffffffu, odd ? upper : lower, 4);
            store(g, first_row + i * 8 + lane % 4 * 2 + odd, channel - odd, odd ? other : upper, odd ? lower : other);
        }
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
