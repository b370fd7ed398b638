// The instructions that the product is made of, each a small function with two bodies: PTX for GPUs, and C++ from the PTX manual's tables of
// fragments for emulation (emulate.h), where lanes meet in exchange(). What a warp holds, g = lane / 4 and t = lane % 4:
//
//     A, 16 rows x 32 bytes                     B, 32 bytes x 8 columns        C, 16 rows x 8 columns, 32 bits each
//     a[0] row g,     bytes 4t .. 4t+3          b[0] bytes 4t .. 4t+3          c[0], c[1] row g,     columns 2t, 2t+1
//     a[1] row g + 8, bytes 4t .. 4t+3          b[1] bytes 16+4t .. 16+4t+3    c[2], c[3] row g + 8, columns 2t, 2t+1
//     a[2] row g,     bytes 16+4t .. 16+4t+3    of column g
//     a[3] row g + 8, bytes 16+4t .. 16+4t+3
//
// A byte is one value of 8 bits (m16n8k32) or two of 4 bits, the first in the low half (m16n8k64): the tables are the same in bytes. Chips of
// compute capability 7.5 multiply quarters of this (m8n8k16, m8n8k32), whose registers are those above one by one: a step is four of them.
// All integers are unsigned; sums are exact modulo 2^32.
#pragma once

#include "common.cuh"

namespace qvsr {

#ifdef QVSR_EMULATE

// Times that lanes of one phase of ldmatrix met in a bank; a test reads it.
inline long long bank_conflicts = 0;

// What cp.async of one thread has under way. A copy arrives at the last moment that is allowed: when its thread waits for it. Until then its
// place holds 0xFF, so that a wait that is missing or too weak spoils the result.
struct Copies {
    struct Copy {
        void* to;
        const void* from;  // null: zeros
    };
    std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);
};

#endif

// Four matrices of 8 rows x 16 bytes from shared memory: lane i names row i % 8 of matrix i / 8 and receives bytes 4t .. 4t+3 of row g of each.
// Eight rows are read at a time, without conflict where they lie in eight different sixteenths of 128 bytes: see place() in gemm.cuh.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const unsigned char* row) {
#ifdef QVSR_EMULATE
    if (reinterpret_cast<uintptr_t>(row) % 16) emulate::fail("ldmatrix of a row that is not aligned to 16 bytes");
    const auto rows = emulate::exchange(row);
    const int lane = emulate::lane();
    for (int j = 0; j < 4; ++j) memcpy(&r[j], rows[8 * j + lane / 4] + lane % 4 * 4, 4);
    for (int i = lane / 8 * 8; i < lane; ++i) {
        const auto here = reinterpret_cast<uintptr_t>(row), there = reinterpret_cast<uintptr_t>(rows[i]);
        bank_conflicts += here != there && here / 16 % 8 == there / 16 % 8;
    }
#else
    const auto address = uint32_t(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

#ifdef QVSR_EMULATE
template <int BITS>
inline void multiply_emulated(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        uint32_t a[4], b[2];
    };
    Fragments mine;
    memcpy(mine.a, a, sizeof mine.a);
    mine.b[0] = b0, mine.b[1] = b1;
    const auto all = emulate::exchange(mine);
    const int g = emulate::lane() / 4, t = emulate::lane() % 4;
    for (int half = 0; half < 2; ++half)  // 16 bytes each
        for (int owner = 0; owner < 4; ++owner) {
            const auto rows = all[4 * g + owner];
            for (int column = 0; column < 2; ++column) {
                const uint32_t b = all[4 * (2 * t + column) + owner].b[half];
                for (int row = 0; row < 2; ++row)
                    for (int shift = 0; shift < 32; shift += BITS) {
                        const uint32_t x = rows.a[2 * half + row] >> shift, y = b >> shift, top = (1u << BITS) - 1;
                        c[2 * row + column] = int(uint32_t(c[2 * row + column]) + (x & top) * (y & top));
                    }
            }
        }
}
#elif __CUDA_ARCH__ < 800
#define QVSR_QUARTER(shape, type, c0, c1, a, b)                                                                              \
    asm volatile("mma.sync.aligned." shape ".row.col.s32." type "." type ".s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c0), "+r"(c1) : "r"(a), "r"(b))
#endif

// c += a b, of bytes.
__device__ __forceinline__ void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef QVSR_EMULATE
    multiply_emulated<8>(c, a, b0, b1);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    QVSR_QUARTER("m8n8k16", "u8", c[0], c[1], a[0], b0);
    QVSR_QUARTER("m8n8k16", "u8", c[2], c[3], a[1], b0);
    QVSR_QUARTER("m8n8k16", "u8", c[0], c[1], a[2], b1);
    QVSR_QUARTER("m8n8k16", "u8", c[2], c[3], a[3], b1);
#endif
}

// c += a b, of halves of bytes. Chips from 9.0 on have no such unit: no kernel is made of it there.
__device__ __forceinline__ void multiply_nibbles(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef QVSR_EMULATE
    multiply_emulated<4>(c, a, b0, b1);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.u4.u4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    QVSR_QUARTER("m8n8k32", "u4", c[0], c[1], a[0], b0);
    QVSR_QUARTER("m8n8k32", "u4", c[2], c[3], a[1], b0);
    QVSR_QUARTER("m8n8k32", "u4", c[0], c[1], a[2], b1);
    QVSR_QUARTER("m8n8k32", "u4", c[2], c[3], a[3], b1);
#endif
}

// 16 bytes from global to shared memory, without registers and without waiting; zeros where `inside` is false, and then `from` is not read.
__device__ __forceinline__ void copy_async(unsigned char* to, const void* from, bool inside) {
#ifdef QVSR_EMULATE
    if (reinterpret_cast<uintptr_t>(to) % 16 || (inside && reinterpret_cast<uintptr_t>(from) % 16)) emulate::fail("cp.async that is not aligned to 16 bytes");
    emulate::own<Copies>().groups.back().push_back({to, inside ? from : nullptr});
    memset(to, 0xFF, 16);
#elif __CUDA_ARCH__ >= 800
    const auto address = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0) : "memory");
#else  // 7.5 has no such copy: through registers
    *reinterpret_cast<uint4*>(to) = inside ? __ldg(static_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
#endif
}

// The copies since the last call become a group.
__device__ __forceinline__ void close_group() {
#ifdef QVSR_EMULATE
    emulate::own<Copies>().groups.emplace_back();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most NEWEST groups of this thread are under way. What other threads copied is seen after a barrier.
template <int NEWEST>
__device__ __forceinline__ void wait_groups() {
#ifdef QVSR_EMULATE
    auto& groups = emulate::own<Copies>().groups;  // the last is still open
    while (groups.size() > NEWEST + 1) {
        for (const auto& copy : groups.front())
            if (copy.from) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
        groups.erase(groups.begin());
    }
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
#endif
}

// The thread's number, asked for where it is used: what follows from it is computed there and not kept in registers through the main loop.
__device__ __forceinline__ int thread_again() {
#ifdef QVSR_EMULATE
    return int(threadIdx.x);
#else
    int number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number;
#endif
}

// A number that other blocks have changed, past the cache that does not know it.
__device__ __forceinline__ int load_shared_by_blocks(const int* from) {
#ifdef QVSR_EMULATE
    return *from;
#else
    return __ldcg(from);
#endif
}

}  // namespace qvsr
