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

// A lane's four registers of a tile in shared memory.
template <int FORM>
__device__ __forceinline__ void load_tile(uint32_t (&b)[4], const unsigned char* tile, int lane) {
    if constexpr (FORM == QVSR_BYTES_8 || FORM == QVSR_NIBBLES) {
        const uint4 all = reinterpret_cast<const uint4*>(tile)[lane];
        b[0] = all.x, b[1] = all.y, b[2] = all.z, b[3] = all.w;
    } else {
        const uint2 low = reinterpret_cast<const uint2*>(tile)[lane];
        b[0] = low.x & 0x0f0f0f0f, b[1] = low.x >> 4 & 0x0f0f0f0f;
        b[2] = low.y & 0x0f0f0f0f, b[3] = low.y >> 4 & 0x0f0f0f0f;
        if constexpr (FORM == QVSR_BYTES_6) {
            const uint32_t high = reinterpret_cast<const uint32_t*>(tile + 32 * sizeof(uint2))[lane];
            b[0] |= high << 4 & 0x30303030, b[1] |= high << 2 & 0x30303030;
            b[2] |= high & 0x30303030, b[3] |= high >> 2 & 0x30303030;
        }
    }
}

}  // namespace qvsr
