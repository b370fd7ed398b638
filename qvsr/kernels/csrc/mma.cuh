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

// The chip that is compiled for; in emulation -DQVSR_TARGET=750 takes the ways of compute capability 7.5.
#ifndef QVSR_EMULATE
#define QVSR_TARGET __CUDA_ARCH__
#elif !defined(QVSR_TARGET)
#define QVSR_TARGET 800
#endif

namespace qvsr {

#ifdef QVSR_EMULATE

// Times that lanes of one phase of ldmatrix met in a bank; a test reads it.
inline long long bank_conflicts = 0;

// What one thread has under way. A copy of cp.async arrives at the last moment that is allowed: when its thread waits for it. Until then its
// place holds 0xFF, so that a wait that is missing or too weak spoils the result. Products of wgmma (wgmma.cuh) read and write when their thread
// waits for them.
struct Underway {
    struct Copy {
        void* to;
        const void* from;  // null: zeros
    };
    struct Product {
        int* sums;
        const uint32_t* a;
        uint64_t b;
        int columns;
    };
    std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);  // the last is still open
    std::vector<void*> arrived;                                                  // since the last fence.proxy.async
    std::vector<std::vector<Product>> products = std::vector<std::vector<Product>>(1);
    std::vector<std::pair<int*, std::vector<int>>> sums;  // of the products under way, whose registers hold nonsense
    bool ordered = false;                                  // wgmma.fence since the last group
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

// The sum over four bytes of values of BITS bits.
template <int BITS>
inline uint32_t dot(uint32_t x, uint32_t y) {
    constexpr uint32_t top = (1u << BITS) - 1;
    uint32_t sum = 0;
    for (int shift = 0; shift < 32; shift += BITS) sum += (x >> shift & top) * (y >> shift & top);
    return sum;
}

// m16n8k32 (8 bits) and m16n8k64 (4 bits).
template <int BITS>
inline void multiply_whole(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        uint32_t a[4], b[2];
    };
    const auto all = emulate::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int g = emulate::lane() / 4, t = emulate::lane() % 4;
    for (int owner = 0; owner < 4; ++owner) {  // of bytes 4 owner .. 4 owner + 3 of both halves
        const Fragments rows = all[4 * g + owner];
        for (int column = 0; column < 2; ++column) {
            const Fragments columns = all[4 * (2 * t + column) + owner];
            for (int half = 0; half < 2; ++half)
                for (int row = 0; row < 2; ++row) {
                    int& sum = c[2 * row + column];
                    sum = int(uint32_t(sum) + dot<BITS>(rows.a[2 * half + row], columns.b[half]));
                }
        }
    }
}

// m8n8k16 (8 bits) and m8n8k32 (4 bits): a is row g and b column g, bytes 4t .. 4t+3; c is row g, columns 2t and 2t+1.
template <int BITS>
inline void multiply_quarter(int& c0, int& c1, uint32_t a, uint32_t b) {
    struct Fragments {
        uint32_t a, b;
    };
    const auto all = emulate::exchange(Fragments{a, b});
    const int g = emulate::lane() / 4, t = emulate::lane() % 4;
    for (int owner = 0; owner < 4; ++owner) {
        c0 = int(uint32_t(c0) + dot<BITS>(all[4 * g + owner].a, all[8 * t + owner].b));
        c1 = int(uint32_t(c1) + dot<BITS>(all[4 * g + owner].a, all[8 * t + 4 + owner].b));
    }
}

#elif QVSR_TARGET >= 800

template <int BITS>
__device__ __forceinline__ void multiply_whole(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define QVSR_MMA(type)                                                                                                                \
    asm volatile("mma.sync.aligned." type " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (BITS == 8) QVSR_MMA("m16n8k32.row.col.s32.u8.u8.s32");
    else QVSR_MMA("m16n8k64.row.col.s32.u4.u4.s32");
#undef QVSR_MMA
}

#else

template <int BITS>
__device__ __forceinline__ void multiply_quarter(int& c0, int& c1, uint32_t a, uint32_t b) {
#define QVSR_MMA(type) asm volatile("mma.sync.aligned." type " {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c0), "+r"(c1) : "r"(a), "r"(b))
    if constexpr (BITS == 8) QVSR_MMA("m8n8k16.row.col.s32.u8.u8.s32");
    else QVSR_MMA("m8n8k32.row.col.s32.u4.u4.s32");
#undef QVSR_MMA
}

#endif

// c += a b. Chips from 9.0 on have no unit for 4 bits: no kernel is made with it there.
template <int BITS>
__device__ __forceinline__ void multiply(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if QVSR_TARGET >= 800
    multiply_whole<BITS>(c, a, b0, b1);
#else
    multiply_quarter<BITS>(c[0], c[1], a[0], b0);
    multiply_quarter<BITS>(c[2], c[3], a[1], b0);
    multiply_quarter<BITS>(c[0], c[1], a[2], b1);
    multiply_quarter<BITS>(c[2], c[3], a[3], b1);
#endif
}

// 16 bytes from global to shared memory, without registers and without waiting; zeros where `inside` is false, and then `from` is not read.
__device__ __forceinline__ void copy_async(unsigned char* to, const void* from, bool inside) {
#if QVSR_TARGET < 800  // 7.5 has no such copy: through registers
    *reinterpret_cast<uint4*>(to) = inside ? __ldg(static_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
#elif defined(QVSR_EMULATE)
    if (reinterpret_cast<uintptr_t>(to) % 16 || (inside && reinterpret_cast<uintptr_t>(from) % 16)) emulate::fail("cp.async that is not aligned to 16 bytes");
    emulate::own<Underway>().groups.back().push_back({to, inside ? from : nullptr});
    memset(to, 0xFF, 16);
    memset(emulate::fenced(to), 0xFF, 16);
#else
    const auto address = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0) : "memory");
#endif
}

// The copies since the last call become a group.
__device__ __forceinline__ void close_group() {
#ifdef QVSR_EMULATE
    emulate::own<Underway>().groups.emplace_back();
#elif QVSR_TARGET >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most NEWEST groups of this thread are under way. What other threads copied is seen after a barrier.
template <int NEWEST>
__device__ __forceinline__ void wait_groups() {
#ifdef QVSR_EMULATE
    auto& own = emulate::own<Underway>();
    while (own.groups.size() > NEWEST + 1) {
        for (const auto& copy : own.groups.front()) {
            if (copy.from) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
            own.arrived.push_back(copy.to);
        }
        own.groups.erase(own.groups.begin());
    }
#elif QVSR_TARGET >= 800
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
