// The matrix instruction of compute capability 9.0, wgmma: the four warps of a warpgroup multiply 64 rows of A, from registers, by B in shared
// memory, which they name by a descriptor. As in mma.cuh each instruction is a function with two bodies, PTX and C++ from the PTX manual.
//
//     A, 64 rows x 32 bytes: warp w holds rows 16 w .. 16 w + 15, as A of m16n8k32 (mma.cuh)
//     D, 64 rows x 128 columns of 32 bits: d[4 j] .. d[4 j + 3] are C of m16n8k32 for rows 16 w .. and columns 8 j .. 8 j + 7
//     B, 32 bytes x 128 columns, each column's bytes side by side ("K-major", the only order of 8-bit integers), as the descriptor says:
//
//     bits      field                              here
//     0-13      address in shared memory / 16      of the first column; 32 bytes further for the next 32 bytes of the sum
//     16-29     distance of chunks in K / 16       not read where there is a swizzle; 1
//     32-45     distance of 8 columns / 16         8 x 64 bytes
//     49-51     offset of the swizzle's pattern    0: stages begin at a multiple of 512 bytes
//     62-63     swizzle: 0 none, 1 of 128 bytes,   2: columns are 64 bytes, and bits 4 and 5 of an address are changed by its bits 7 and 8 (XOR).
//               2 of 64 bytes, 3 of 32 bytes       This is place() of gemm.cuh
//
// Why 64 and not 128 bytes: the layers have 320 x 2^i inputs, five steps of 64 bytes and two and a half of 128; place() already has that order, so the
// copies are those of mma.sync; and eight columns of 16 bytes still lie in all 32 banks.
//
// The instruction is asynchronous: from wgmma_multiply until wgmma_wait neither `d` nor `a` may be touched, and B must stay. It reads shared memory by
// another way than threads write it (the asynchronous proxy): who copied says so by fence_for_wgmma, before the barrier.
//
// The assembler (ptxas of CUDA 13.0) keeps `d` safe and warns where it cannot, but not `a`: it took a copy for the value itself and let a load write
// to registers that a product under way still had to read. What is written to `a` must be computed from something else behind the wait, and
// tests/qvsr/kernels/test_wgmma.py looks for it in the machine code.
#pragma once

#include "mma.cuh"

// Whether the code that is compiled has the instruction: the architecture sm_90a, which only chips of 9.0 run.
#if defined(QVSR_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QVSR_WGMMA_CODE true
#else
#define QVSR_WGMMA_CODE false
#endif

namespace qvsr {

constexpr int WGMMA_ROWS = 64, WGMMA_COLUMNS = 128, WGMMA_BYTES = 32, WGMMA_SUMS = WGMMA_COLUMNS / 2;  // sums of a thread

#ifdef QVSR_EMULATE
inline bool wgmma_broken = false;     // tests: as if the swizzle had been misread
constexpr uint32_t SHARED_AT = 1024;  // where dynamic shared memory begins on a GPU
#endif

__device__ __forceinline__ uint32_t shared_address(const void* at) {
#ifdef QVSR_EMULATE
    return SHARED_AT + uint32_t(static_cast<const unsigned char*>(at) - emulate::shared());
#else
    return uint32_t(__cvta_generic_to_shared(at));
#endif
}

// Names columns of 64 bytes, one after the other in the order of place(), from `at` on.
__device__ __forceinline__ uint64_t descriptor_of(const unsigned char* at) {
    constexpr uint64_t unused = 1, eight_columns = 8 * 64 / 16, swizzle_of_64 = 2;
    return uint64_t((shared_address(at) & 0x3ffff) >> 4) | unused << 16 | eight_columns << 32 | swizzle_of_64 << 62;
}

#ifdef QVSR_EMULATE

// Chunk of 16 bytes of a column of B, by the fields of a descriptor.
inline const unsigned char* chunk_of(uint64_t descriptor, int column, int chunk) {
    const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
    const int mode = wgmma_broken ? 3 : int(descriptor >> 62);
    if (descriptor >> 49 & 7) emulate::fail("wgmma: a swizzle with an offset is not emulated");
    const uint32_t width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
    uint32_t at = field(0) + column / 8 * field(32) + column % 8 * width + chunk * (mode ? 16 : field(16));
    at ^= at >> 3 & (width - 16);
    if (at < SHARED_AT || at + 16 > SHARED_AT + emulate::machine.shared_bytes) emulate::fail("wgmma reads outside shared memory");
    return emulate::machine.fenced + (at - SHARED_AT);
}

// One product of this lane's 16 rows: `a` of all lanes of the warp.
inline void multiply_now(std::vector<int>& d, const uint32_t* const (&a)[32], uint64_t b, int columns) {
    const int g = emulate::lane() / 4, t = emulate::lane() % 4;
    unsigned char rows[2][WGMMA_BYTES];
    for (int owner = 0; owner < 4; ++owner)
        for (int i = 0; i < 4; ++i) memcpy(rows[i % 2] + i / 2 * 16 + owner * 4, a[4 * g + owner] + i, 4);
    for (int i = 0; i < columns / 4; ++i) {  // two of every eight columns
        const int column = i / 2 * 8 + 2 * t + i % 2;
        const unsigned char *first = chunk_of(b, column, 0), *second = chunk_of(b, column, 1);
        for (int row = 0; row < 2; ++row) {
            uint32_t sum = 0;
            for (int k = 0; k < 16; ++k) sum += uint32_t(rows[row][k]) * first[k] + uint32_t(rows[row][16 + k]) * second[k];
            int& to = d[i / 2 * 4 + row * 2 + i % 2];
            to = int(uint32_t(to) + sum);
        }
    }
}

#endif

// Registers that threads wrote are seen by the products that follow; before each group of them.
__device__ __forceinline__ void wgmma_order() {
#ifdef QVSR_EMULATE
    emulate::own<Underway>().ordered = true;
#elif QVSR_WGMMA_CODE
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// d += a b for 64 x 128 sums, of unsigned bytes, modulo 2^32; done when wgmma_wait says so.
__device__ __forceinline__ void wgmma_multiply(int (&d)[WGMMA_SUMS], const uint32_t (&a)[4], uint64_t b) {
#ifdef QVSR_EMULATE
    auto& own = emulate::own<Underway>();
    if (!own.ordered) emulate::fail("wgmma.mma_async without wgmma.fence in its group");
    const auto all = emulate::exchange(b);
    for (int i = 0; i < 32; ++i)
        if (all[i] != b) emulate::fail("lanes name different matrices to wgmma.mma_async");
    own.products.back().push_back({d, a, b, WGMMA_COLUMNS});
    const auto same = [&](const auto& one) { return one.first == d; };
    if (std::any_of(own.sums.begin(), own.sums.end(), same)) return;
    own.sums.push_back({d, std::vector<int>(d, d + WGMMA_SUMS)});
    std::fill(d, d + WGMMA_SUMS, -123456789);
#elif QVSR_WGMMA_CODE
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.u8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, add;\n}"
                 :
                   "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
                   "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
                   "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
                   "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]),
                   "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]),
                   "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]),
                   "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
                   "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
#endif
}

// The products since the last call become a group.
__device__ __forceinline__ void wgmma_close() {
#ifdef QVSR_EMULATE
    auto& own = emulate::own<Underway>();
    own.products.emplace_back(), own.ordered = false;
#elif QVSR_WGMMA_CODE
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most NEWEST groups of this warp are under way.
template <int NEWEST>
__device__ __forceinline__ void wgmma_wait() {
#ifdef QVSR_EMULATE
    auto& own = emulate::own<Underway>();
    const auto lanes = emulate::exchange(&own);
    size_t done = 0;
    for (; own.products.size() - done > NEWEST + 1; ++done)
        for (size_t i = 0; i < own.products[done].size(); ++i) {
            const auto product = own.products[done][i];
            const uint32_t* a[32];
            for (int lane = 0; lane < 32; ++lane) a[lane] = lanes[lane]->products[done][i].a;
            const auto sums = std::find_if(own.sums.begin(), own.sums.end(), [&](const auto& one) { return one.first == product.sums; });
            multiply_now(sums->second, a, product.b, product.columns);
        }
    emulate::exchange(0);  // all lanes have read what they need of each other
    own.products.erase(own.products.begin(), own.products.begin() + done);
    for (size_t i = own.sums.size(); i-- > 0;) {
        auto& [to, values] = own.sums[i];
        bool used = false;
        for (const auto& group : own.products)
            for (const auto& product : group) used = used || product.sums == to;
        if (used) continue;
        std::copy(values.begin(), values.end(), to);
        own.sums.erase(own.sums.begin() + i);
    }
#elif QVSR_WGMMA_CODE
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NEWEST) : "memory");
#endif
}

// What this thread has copied and waited for is seen by wgmma, of whoever meets this thread at a barrier afterwards.
__device__ __forceinline__ void fence_for_wgmma() {
#ifdef QVSR_EMULATE
    auto& arrived = emulate::own<Underway>().arrived;
    for (const void* at : arrived) memcpy(emulate::fenced(at), at, 16);
    arrived.clear();
#elif QVSR_WGMMA_CODE
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The compiler takes it that these registers change here: what is computed from them stays behind this line.
template <class T, int COUNT>
__device__ __forceinline__ void changed(T (&values)[COUNT]) {
#ifndef QVSR_EMULATE
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(values[i])::"memory");
#endif
}

}  // namespace qvsr
