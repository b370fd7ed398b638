// How weights lie in memory for the product, and how they become bytes again in registers.
//
// A tile is 8 output channels x 64 bytes of the sum: for each lane of a warp the four registers of B that two steps of the MMA want (mma.cuh),
// so that a lane reads what it needs in one or two loads, lanes side by side, without conflicts of banks and without shuffles:
//
//     register r of lane (g, t), byte j  =  weight of channel g, byte 32 (r / 2) + 16 (r % 2) + 4t + j
//
//     form      a lane's share of a tile                                                                        bytes a tile
//     BYTES_8   r0 r1 r2 r3                                                                                     512
//     BYTES_6   r0 | r1 << 4, r2 | r3 << 4 of the low four bits; behind all lanes r0 | r1 << 2 | r2 << 4 | r3 << 6 of the high two   384
//     BYTES_4   r0 | r1 << 4, r2 | r3 << 4                                                                      256
//     NIBBLES   r0 r1 r2 r3, a byte holding two weights, the first in the low half                              512
//
// Tiles lie in the order tap, 64 bytes of the sum, 8 output channels: what a block copies for a step of its loop is one stretch of memory.
// Channels are filled up to 8 and each tap to 64 bytes, with zeros.
#pragma once

#include "api.h"

namespace qvsr {

constexpr int SUM_BYTES = 64;       // bytes of the sum in a tile, and in a step of the product's loop
constexpr int TILE_CHANNELS = 8;    // output channels in a tile

__host__ __device__ constexpr int tile_bytes(int form) { return TILE_CHANNELS * (form == QVSR_NIBBLES ? 8 : form) * SUM_BYTES / 8; }
__host__ __device__ constexpr bool is_form(int form) {
    return form == QVSR_NIBBLES || form == QVSR_BYTES_4 || form == QVSR_BYTES_6 || form == QVSR_BYTES_8;
}
__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes that K values take in a row of q, filled up to whole copies of 16 bytes.
__host__ __device__ constexpr int64_t padded_bytes(int64_t K, int form) { return ceil_div(form == QVSR_NIBBLES ? ceil_div(K, 2) : K, 16) * 16; }

// Numbers of the intervals lo .. hi of taps on an axis, and of the boxes that three of them make; the last box is the empty one. A box is what
// an output at a border sees of the kernel.
__host__ __device__ constexpr int64_t interval(int64_t lo, int64_t hi) { return hi * (hi + 1) / 2 + lo; }
__host__ __device__ constexpr int64_t intervals(int64_t kernel) { return kernel * (kernel + 1) / 2; }

// A lane's share of a tile in shared memory, as it lies there.
template <int FORM>
struct Share {
    static constexpr int WORDS = FORM == QVSR_BYTES_4 ? 2 : FORM == QVSR_BYTES_6 ? 3 : 4;
    uint32_t word[WORDS];

    __device__ __forceinline__ void load(const unsigned char* tile, int lane) {
        if constexpr (WORDS == 4) {
            const uint4 all = reinterpret_cast<const uint4*>(tile)[lane];
            word[0] = all.x, word[1] = all.y, word[2] = all.z, word[3] = all.w;
        } else {
            const uint2 low = reinterpret_cast<const uint2*>(tile)[lane];
            word[0] = low.x, word[1] = low.y;
            if constexpr (WORDS == 3) word[2] = reinterpret_cast<const uint32_t*>(tile + 32 * sizeof(uint2))[lane];
        }
    }

    // Register r, 0 to 3, of the tile.
    __device__ __forceinline__ uint32_t widened(int r) const {
        if constexpr (WORDS == 4) return word[r];
        const uint32_t low = word[r / 2] >> r % 2 * 4 & 0x0f0f0f0f;
        if constexpr (WORDS == 2) return low;
        return low | ((r < 2 ? word[WORDS - 1] << (4 - 2 * r) : word[WORDS - 1] >> (2 * r - 4)) & 0x30303030);
    }
};

// A lane's four registers of a tile in shared memory.
template <int FORM>
__device__ __forceinline__ void load_tile(uint32_t (&b)[4], const unsigned char* tile, int lane) {
    Share<FORM> share;
    share.load(tile, lane);
#pragma unroll
    for (int r = 0; r < 4; ++r) b[r] = share.widened(r);
}

}  // namespace qvsr
