// CUDA on a CPU: with this header a C++ compiler builds the very source of the kernels, and they run without a GPU.
//
//     g++ -x c++ -std=c++17 -O2 -ffp-contract=off -fno-gnu-unique -DQVSR_EMULATE -shared -fPIC quantize.cu -o emulated.so
//
// Every thread of a block is a fiber with a stack of its own. A fiber runs until it meets a barrier or a collective of its warp and waits
// there for the others; blocks run one after another. So a run is deterministic, and one operating system thread does all of it.
//
// What it finds, and reports as cudaErrorLaunchFailure with a sentence in qvsr_emulate_error():
// - threads of a block that wait at different barriers, or leave the kernel while others wait (a hang or undefined on a GPU);
// - a write behind or before dynamic shared memory (canaries; with -fsanitize=address a read, too, where it happens).
// What makes a result wrong, so that a comparison finds it:
// - shared memory that is read before it is written: each block finds it full of 0xFF, which are NaN in every floating type;
// - copies that wgmma reads without fence.proxy.async, and what is touched while it is under way (wgmma.cuh);
// - a missing barrier: qvsr_emulate_seed(n) shuffles the order of threads and blocks, another order for each n; 0 is the natural one.
// What it does not find: races inside one statement, conflicts of memory banks, misaligned vectors (-fsanitize=alignment finds these),
// blocks that wait for one another (they would wait for ever), masks of warps other than all lanes (refused).
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#if !defined(__x86_64__) && !defined(QVSR_EMULATE_UCONTEXT)
#define QVSR_EMULATE_UCONTEXT
#endif
#ifdef QVSR_EMULATE_UCONTEXT
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---------------------------------------------------------------- words and types of CUDA

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static thread_local  // a block at a time: what one block leaves, the next would find. Use QVSR_SHARED for arrays
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define QVSR_VECTORS(type, name, size)                                               \
    struct alignas(2 * size) name##2 { type x, y; };                                 \
    struct alignas(4 * size) name##4 { type x, y, z, w; };                           \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                 \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
QVSR_VECTORS(float, float, 4)
QVSR_VECTORS(int, int, 4)
QVSR_VECTORS(unsigned, uint, 4)
QVSR_VECTORS(short, short, 2)
QVSR_VECTORS(unsigned short, ushort, 2)
QVSR_VECTORS(signed char, char, 1)
QVSR_VECTORS(unsigned char, uchar, 1)
#undef QVSR_VECTORS

typedef int cudaError_t;
typedef void* cudaStream_t;
enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
};

// ---------------------------------------------------------------- fibers

namespace emulate {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;
constexpr size_t CANARY = 256;      // bytes on both sides of dynamic shared memory
constexpr size_t SHARED = 232448;   // bytes of shared memory that the largest chip gives to a block
constexpr size_t SLOT = 256;        // bytes of a value in exchange()
constexpr unsigned char POISON = 0xFF, GUARD = 0xA5;

struct Warp {
    int lanes = 0, waiting = 0;
    alignas(16) unsigned char slots[2][WARP][SLOT];
};

struct Thread {
    enum State { READY, AT_BLOCK, AT_WARP, DONE };
    uint3 index{};
    int lane = 0;
    Warp* warp = nullptr;
    State state = READY;
    const char* file = "";  // of the barrier where it waits
    int line = 0;
    unsigned exchanges = 0;
    std::shared_ptr<void> own;  // of own()
    const char* stack = nullptr;
    size_t stack_bytes = 0;
#ifdef QVSR_EMULATE_UCONTEXT
    ucontext_t context{};
#else
    void* top = nullptr;  // stack pointer while another fiber runs
#endif
    void* fake = nullptr;  // of the address sanitizer
};

struct Machine {
    dim3 grid, block;
    uint3 block_index{};
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<char*> stacks;
    Thread scheduler;
    std::function<void()> body;
    unsigned char* shared = nullptr;
    unsigned char* fenced = nullptr;  // shared memory as wgmma sees it: what a thread copied is here after its fence.proxy.async
    size_t shared_bytes = 0;
    unsigned waiting = 0;  // at the block's barrier
    bool failed = false;
    std::string error;
    uint32_t seed = 0, random = 0;
    std::vector<int> order;
};

inline thread_local Machine machine;
inline thread_local Thread* current = nullptr;

#ifndef QVSR_EMULATE_UCONTEXT
// Saves what a function must keep (System V), changes stacks and returns there: a few nanoseconds, where swapcontext makes a system call.
__attribute__((naked, noinline)) static void swap_stacks(void** /* rdi */, void* /* rsi */) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline void go(Thread& from, Thread& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from.state == Thread::DONE ? nullptr : &from.fake, to.stack, to.stack_bytes);
#endif
    current = &to;
#ifdef QVSR_EMULATE_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    swap_stacks(&from.top, to.top);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

inline void yield() { go(*current, machine.scheduler); }

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;  // of the caller's stack, on which the scheduler runs
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    machine.scheduler.stack = static_cast<const char*>(bottom), machine.scheduler.stack_bytes = bytes;
#endif
    machine.body();
    current->state = Thread::DONE;
    yield();
    abort();  // nobody runs it again
}

inline void prepare(Thread& thread) {
    char* stack = const_cast<char*>(thread.stack);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack + STACK - 4096, 4096);  // entry() of the last block did not return
#endif
#ifdef QVSR_EMULATE_UCONTEXT
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack;
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
#else
    void** top = reinterpret_cast<void**>(stack + STACK - 64);  // after `ret` the stack is 8 off 16, as behind a call
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    thread.top = top;
#endif
}

inline uint32_t draw() {  // xorshift32
    uint32_t& r = machine.random;
    r ^= r << 13, r ^= r >> 17, r ^= r << 5;
    return r;
}

inline void shuffle(std::vector<int>& order) {
    if (!machine.seed) return;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
}

inline std::string place(const Thread& t) { return std::string(t.file) + ":" + std::to_string(t.line); }

[[noreturn]] inline void fail(const std::string& what) {
    const uint3 b = machine.block_index;
    machine.failed = true;
    machine.error = "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + "): " + what;
    yield();
    abort();
}

// Lets `thread` and the others of `first ... last` go on, who all wait, if they wait at one place.
inline void release(Thread* first, Thread* last) {
    for (Thread* t = first; t != last; ++t)
        if (t->line != current->line || strcmp(t->file, current->file)) fail("threads wait at different barriers: " + place(*t) + " and " + place(*current));
    for (Thread* t = first; t != last; ++t) t->state = Thread::READY;
}

inline void block_barrier(const char* file, int line) {
    Thread& self = *current;
    self.state = Thread::AT_BLOCK, self.file = file, self.line = line;
    if (++machine.waiting < machine.threads.size()) return yield();
    machine.waiting = 0;
    release(machine.threads.data(), machine.threads.data() + machine.threads.size());
}

inline void warp_barrier(const char* file, int line) {
    Thread& self = *current;
    Warp& warp = *self.warp;
    self.state = Thread::AT_WARP, self.file = file, self.line = line;
    if (++warp.waiting < warp.lanes) return yield();
    warp.waiting = 0;
    release(&self - self.lane, &self - self.lane + warp.lanes);
}

// What the 32 lanes brought, each by its number. It holds until the reader's own next collective. Lanes that the block lacks are 0xFF.
template <class T>
struct Lanes {
    const unsigned char* slots;
    T operator[](int lane) const {
        T value;
        memcpy(&value, slots + lane * SLOT, sizeof(T));
        return value;
    }
};

// Every lane of the warp gives a value and sees those of all: what shuffles, ldmatrix and mma are built on.
template <class T>
inline Lanes<T> exchange(const T& value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= SLOT, "exchange() carries plain values of at most SLOT bytes");
    Thread& self = *current;
    auto& slots = self.warp->slots[self.exchanges++ & 1];  // two in turn: a lane may be one collective ahead of another, never two
    memcpy(slots[self.lane], &value, sizeof(T));
    warp_barrier(file, line);
    return {slots[0]};
}

// State that belongs to one thread of one block, made at its first use: T{}. One type only.
template <class T>
inline T& own() {
    if (!current->own) current->own = std::make_shared<T>();
    return *static_cast<T*>(current->own.get());
}

inline int lane() { return current->lane; }
inline unsigned char* shared() { return machine.shared; }
inline unsigned char* fenced(const void* at) { return machine.fenced + (static_cast<const unsigned char*>(at) - machine.shared); }

inline std::string waiting_text() {
    std::vector<std::pair<std::string, int>> groups;
    for (const Thread& t : machine.threads) {
        const std::string where = t.state == Thread::DONE ? "have left the kernel"
                                                          : std::string("wait at the ") + (t.state == Thread::AT_WARP ? "warp's" : "block's") + " barrier " + place(t);
        auto found = std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == where; });
        if (found == groups.end()) groups.push_back({where, 1});
        else ++found->second;
    }
    std::string text = "no thread can go on:";
    for (const auto& group : groups) text += (&group == &groups[0] ? " " : ", ") + std::to_string(group.second) + " " + group.first;
    return text;
}

inline void run_block() {
    Machine& m = machine;
    const size_t count = m.threads.size();
    for (size_t i = 0; i < count; ++i) {
        Thread& t = m.threads[i];
        t.state = Thread::READY, t.exchanges = 0, t.own.reset(), t.fake = nullptr;
        prepare(t);
    }
    for (Warp& warp : m.warps) warp.waiting = 0, memset(warp.slots, POISON, sizeof warp.slots);
    m.waiting = 0;
    for (bool going = true; going && !m.failed;) {
        shuffle(m.order);
        going = false;
        for (int i : m.order) {
            if (m.threads[i].state != Thread::READY) continue;
            going = true;
            go(m.scheduler, m.threads[i]);
            if (m.failed) return;
        }
    }
    if (!std::all_of(m.threads.begin(), m.threads.end(), [](const Thread& t) { return t.state == Thread::DONE; })) {
        m.failed = true;
        const uint3 b = m.block_index;
        m.error = "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + "): " + waiting_text();
    }
}

inline cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
    Machine& m = machine;
    const size_t count = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
    m.failed = false;
    m.error.clear();
    if (!count || count > 1024 || block.z > 64 || !blocks || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        m.error = "no GPU takes a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) + ") blocks of " +
                  std::to_string(count) + " threads";
        return cudaErrorInvalidConfiguration;
    }
    if (shared_bytes > SHARED) {
        m.error = std::to_string(shared_bytes) + " bytes of shared memory are more than the " + std::to_string(SHARED) + " that a block can have";
        return cudaErrorInvalidValue;
    }
    while (m.stacks.size() < count) {
        void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE)) abort();  // the lowest page stops what grows too deep
        m.stacks.push_back(static_cast<char*>(stack));
    }
    m.grid = grid, m.block = block, m.body = std::move(body), m.shared_bytes = shared_bytes;
    m.threads.clear();
    m.threads.resize(count);
    m.warps.assign((count + WARP - 1) / WARP, Warp{});
    m.order.resize(count);
    for (size_t i = 0; i < count; ++i) {
        Thread& t = m.threads[i];
        t.index = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)};
        t.lane = int(i % WARP), t.warp = &m.warps[i / WARP], t.stack = m.stacks[i], t.stack_bytes = STACK;
        ++t.warp->lanes;
        m.order[i] = int(i);
    }
    m.random = m.seed * 2654435761u | 1;
    std::unique_ptr<unsigned char, decltype(&free)> memory(static_cast<unsigned char*>(aligned_alloc(CANARY, (shared_bytes + 3 * CANARY - 1) / CANARY * CANARY)), free);
    m.shared = memory.get() + CANARY;
    std::vector<unsigned char> fenced(shared_bytes);
    m.fenced = fenced.data();
    std::vector<int> places(blocks);
    for (size_t i = 0; i < blocks; ++i) places[i] = int(i);
    shuffle(places);
    for (int b : places) {
        m.block_index = {unsigned(b) % grid.x, unsigned(b) / grid.x % grid.y, unsigned(b) / grid.x / grid.y};
        memset(memory.get(), GUARD, CANARY);
        memset(m.shared, POISON, shared_bytes);
        memset(m.shared + shared_bytes, GUARD, CANARY);
        memset(m.fenced, POISON, shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
        ASAN_POISON_MEMORY_REGION(memory.get(), CANARY);
        ASAN_POISON_MEMORY_REGION(m.shared + shared_bytes, CANARY);
#endif
        run_block();
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(memory.get(), CANARY);
        ASAN_UNPOISON_MEMORY_REGION(m.shared + shared_bytes, CANARY);
        if (m.failed) for (char* stack : m.stacks) ASAN_UNPOISON_MEMORY_REGION(stack + 4096, STACK - 4096);
#endif
        for (size_t i = 0; i < CANARY && !m.failed; ++i) {
            const bool before = memory.get()[i] != GUARD;
            if (!before && m.shared[shared_bytes + i] == GUARD) continue;
            m.failed = true;
            m.error = "block (" + std::to_string(m.block_index.x) + ", " + std::to_string(m.block_index.y) + ", " + std::to_string(m.block_index.z) +
                      "): byte " + (before ? "-" + std::to_string(CANARY - i) : std::to_string(shared_bytes + i)) + " of " +
                      std::to_string(shared_bytes) + " bytes of shared memory was written";
        }
        if (m.failed) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

}  // namespace emulate

extern "C" {
// The last failed launch of this operating system thread in one sentence; empty after one that went well.
__attribute__((used, visibility("default"))) inline const char* qvsr_emulate_error() { return emulate::machine.error.c_str(); }
// The order of threads and blocks from here on: 0 is the natural one.
__attribute__((used, visibility("default"))) inline void qvsr_emulate_seed(unsigned seed) { emulate::machine.seed = seed; }
}

// ---------------------------------------------------------------- what kernels use

#define threadIdx (emulate::current->index)
#define blockIdx (emulate::machine.block_index)
#define blockDim (emulate::machine.block)
#define gridDim (emulate::machine.grid)
#define warpSize 32
#define QVSR_SHARED(name) unsigned char* name = emulate::shared()

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { emulate::block_barrier(file, line); }

namespace emulate {
inline void all_lanes(unsigned mask, const char* file, int line) {
    if (mask != 0xffffffffu) fail("a warp's mask other than all lanes is not emulated, at " + std::string(file) + ":" + std::to_string(line));
}
}  // namespace emulate

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulate::all_lanes(mask, file, line);
    emulate::warp_barrier(file, line);
}

// A lane whose partner is out of its group of `width` lanes keeps its own value, as on a GPU.
#define QVSR_SHUFFLE(name, argument, partner, outside)                                                                        \
    template <class T>                                                                                                        \
    inline T name(unsigned mask, T value, argument, int width = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { \
        emulate::all_lanes(mask, file, line);                                                                                 \
        const auto values = emulate::exchange(value, file, line);                                                             \
        const int self = emulate::lane(), group = self / width * width, from = (partner);                                     \
        (void)group;                                                                                                          \
        return (outside) || from >= emulate::current->warp->lanes ? value : values[from];                                     \
    }
QVSR_SHUFFLE(__shfl_sync, int source, group + (source & (width - 1)), false)
QVSR_SHUFFLE(__shfl_xor_sync, int bits, self ^ bits, from >= group + width)
QVSR_SHUFFLE(__shfl_down_sync, unsigned delta, self + int(delta), from >= group + width)
QVSR_SHUFFLE(__shfl_up_sync, unsigned delta, self - int(delta), from < group)
#undef QVSR_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int yes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulate::all_lanes(mask, file, line);
    const auto values = emulate::exchange(yes, file, line);
    unsigned bits = 0;
    for (int i = 0; i < emulate::current->warp->lanes; ++i) bits |= unsigned(values[i] != 0) << i;
    return bits;
}
inline int __any_sync(unsigned mask, int yes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return __ballot_sync(mask, yes, file, line) != 0;
}

// One operating system thread runs all fibers: plain operations are atomic.
template <class T> inline T atomicAdd(T* at, T value) { const T old = *at; *at = old + value; return old; }
template <class T> inline T atomicMin(T* at, T value) { const T old = *at; *at = std::min(old, value); return old; }
template <class T> inline T atomicMax(T* at, T value) { const T old = *at; *at = std::max(old, value); return old; }
template <class T> inline T atomicOr(T* at, T value) { const T old = *at; *at = old | value; return old; }
template <class T> inline T atomicExch(T* at, T value) { const T old = *at; *at = value; return old; }
template <class T> inline T atomicCAS(T* at, T compare, T value) { const T old = *at; if (old == compare) *at = value; return old; }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> inline T __ldg(const T* at) { return *at; }

template <class To, class From> inline To qvsr_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
inline int __float_as_int(float x) { return qvsr_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return qvsr_bits<unsigned>(x); }
inline float __int_as_float(int x) { return qvsr_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return qvsr_bits<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float2int_rn(float x) {  // to the nearest even; saturates, and NaN is 0, as on a GPU
    return std::isnan(x) ? 0 : x >= 2147483648.0f ? INT32_MAX : x <= -2147483648.0f ? INT32_MIN : int(rintf(x));
}
inline float __int2float_rn(int x) { return float(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> 4 * i & 15;
        unsigned byte = unsigned(bytes >> 8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;  // its sign, eight times
        result |= byte << 8 * i;
    }
    return result;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int8_t(b >> 8 * i);
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}
using std::max;
using std::min;

// Rounded to the nearest even, as the instructions do; NaN stays one.
struct __half { uint16_t x; };
struct __nv_bfloat16 { uint16_t x; };
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(uint32_t(value.x) << 16); }
inline __half __float2half_rn(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return {0x7fff};
    if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on
    if (size < 0x38800000) return {uint16_t(sign | uint32_t(rintf(fabsf(value) * 16777216.0f)))};  // in steps of 2^-24
    return {uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13)};
}
inline float __half2float(__half value) {
    const uint32_t sign = uint32_t(value.x & 0x8000) << 16, size = value.x & 0x7fff;
    if (size >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (size & 0x3ff) << 13);
    if (size < 0x400) return __uint_as_float(sign | __float_as_uint(float(size) / 16777216.0f));
    return __uint_as_float(sign | ((size << 13) + 0x38000000));
}

// ---------------------------------------------------------------- what launchers use

enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
enum { cudaStreamNonBlocking = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaMalloc(void** at, size_t bytes) { return *at = malloc(bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* at) { return free(at), cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) { return *status = cudaStreamCaptureStatusNone, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) { return memset(at, value, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) { return memcpy(to, from, bytes), cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t code) {
    return code == cudaSuccess ? "no error" : code == cudaErrorLaunchFailure ? "unspecified launch failure" : "invalid argument";
}

namespace qvsr {
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Arguments... arguments) {
    return emulate::run(grid, block, shared_bytes, [=] { kernel(static_cast<Parameters>(arguments)...); });
}
}  // namespace qvsr
