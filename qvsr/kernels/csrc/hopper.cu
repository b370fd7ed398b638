// Products and convolutions by wgmma, on compute capability 9.0: the transposed product y^T = w q^T, so that the weights are the operand in registers.
//
//     n                one warpgroup: 64 channels (Wide9: twice), 128 rows                 a step: 64 bytes of k, two instructions deep
//     |   +-----------------------------+                                                   k 0..31        32..63
//     v   | warpgroup 0                 |   16 channels a warp: two tiles of
//         +-----------------------------+   pack.cuh are its A, widened from       +-------------+-------------+
//         | warpgroup 1                 |   4 or 6 bits in registers               |  128 rows of q, as place()|  read by wgmma
//         +-----------------------------+                                          |  lays them                |  through a descriptor
//          128 rows of the result, m ->                                            +-------------+-------------+
//
// Why this way round. wgmma takes A from registers or shared memory, B from shared memory only. With w as A, weights of 4 and 6 bits go from shared
// memory to registers, are widened there by an AND and a shift for four of them, and are multiplied; no byte of them is written again. With q as A they
// would have to be widened into shared memory: 16 KB more written and 16 KB read a step of 512 clocks (Wide9), of the 64 KB that can move. And a lane's
// share of two tiles is A as it is: weights lie in memory as for mma.sync, so that either way can compute any layer.
//
// The loop. All eight warps copy and multiply; one barrier a step. The second half of a step is under way while the next one begins:
//
//     step i     wait for its copies -> fence.proxy.async -> barrier -> weights to registers
//                -> multiply the first half -> copy step i + AHEAD into the stage of i - 2 -> wait for the second half of i - 1
//                -> multiply the second half -> wait for the first half
//
// - The barrier says both: everybody's copies are there, and nobody multiplies stage i - 2 any more.
// - Behind the barrier the tensor cores still have 256 clocks (Wide9; two blocks of Large9: as many) of second halves to do. The loop is about 180
//   instructions a warp (counted in machine code, the way to another tap included), and two warps share a scheduler: 360 of 512 clocks at most.
// - Therefore no warps of their own for copies, which would spare the others some 40 of these and cost a handshake over two barriers in memory each
//   step. What they could do better is to copy for the next tile while one is stored; here Large9's second block does that.
// - cp.async and no TMA: rows of a convolution are gathered from wherever the tap is, and a tensor map (of the driver's library, one for each call)
//   could do that only for some windows.
// - Steps are 64 bytes, not the 128 of the widest swizzle: 320 inputs are five steps. wgmma.cuh says more.
// - The end: a thread has two neighbouring rows of a channel and changes one of each with the lane of the next channel, so that it stores two channels.
//
// Limits, computed and not measured; what an H100 gives is in the head of matmul.cu. m64n128k32 is 524288 operations, 64 clocks at the full rate.
//
//                 clocks a step    shared memory, of 128 bytes a clock            caches beyond it, of 24 bytes a clock (5.8 TB/s, a guess)
//                 at full rate     8-bit weights    6     4                      8-bit weights    6       4
//     Wide9       512              144              128   112                    48               40      32
//     Large9      256              160              144   128                    64               56      48
//
//     share of the full rate that follows
//     Wide9                        89 %             100   100                    50 %             60      75
//     Large9                       80 %             89    100                    38 %             43      50
//
// So the second-level cache bounds both, if the guess is right. Wide9 is for long sums; Large9 for short ones, where storing takes as long as
// multiplying and the second block fills the gap, and where there are few tiles, whose sums blocks can share. 256 x 128 sums are half of all registers:
// larger tiles there are none. What would help is a cluster of two blocks that send each other half of the weights (a stretch of memory each, so bulk
// copies would do): 32, 28 and 24 bytes a clock for Wide9, 75 to 100 %.
//
// The U-Net's typical shapes; us on an H100: floors as in matmul.cu, and the rounds of tiles on 132 multiprocessors by the clocks above, without what
// begins and ends a block:
//
//     M x N x K (x taps)        operations   bytes W8 / W4    tiles                 products W8 / W4   share of the full rate
//     20480 x  320 x  320          2.1        9.8 /  9.8      480 Large9              7.5 /  5.6       28 / 38 %, below the bytes of the result
//      5120 x 5120 x  640         17.0       33.3 / 32.8      1600 Large9            48   / 36         35 / 47
//      1280 x 10240 x 1280        17.0       20.1 / 18.1      800 Large9             52   / 39         32 / 43
//     20480 x  320 x  320 x 9     19.1       10.1 /  9.9      480 Large9             67   / 50         28 / 38, the third tile of a row is half empty
//      5120 x  640 x  640 x 9     19.1        6.0 /  5.4      120 Wide9              50   / 34         38 / 57, as is the third here
//      1280 x 1280 x 1280 x 9     19.1        6.8 /  4.6      100 Large9             67   / 50         28 / 38, 32 multiprocessors have none
//
// Whether it is right. The instructions are emulated from their manual (wgmma.cuh); what was misread there would be wrong here and right in the tests.
// So the first product on a device that would go this way computes a small one in both ways, and if a byte differs, or nothing runs, all products of
// that device stay with mma.sync: qvsr_wgmma() says so. A program that the device stops is beyond that.
#include <atomic>
#include <vector>

#include "hopper.cuh"
#include "hopper.h"

namespace qvsr {
namespace {

// Calls `use` with a tile and a form as types.
template <class Use>
int with_kernel(int tile, int form, Use use) {
    const auto with_form = [&](auto t) {
        switch (form) {
            case QVSR_BYTES_4: return use(t, std::integral_constant<int, QVSR_BYTES_4>());
            case QVSR_BYTES_6: return use(t, std::integral_constant<int, QVSR_BYTES_6>());
            default: return use(t, std::integral_constant<int, QVSR_BYTES_8>());
        }
    };
    return tile == QVSR_WGMMA_256 ? with_form(Wide9()) : with_form(Large9());
}

}  // namespace

int wgmma_stage_bytes(int tile, int form) {
    return with_kernel(tile, form, [](auto t, auto f) { return decltype(t)::template stage_bytes<f()>(); });
}

int wgmma_shared_bytes(int tile, int form, int parts) {
    return with_kernel(tile, form, [&](auto t, auto f) { return bytes_by_wgmma<decltype(t), f()>(parts); });
}

int start_by_wgmma(const Gemm& g, int form, const Plan& plan, cudaStream_t stream) {
    return with_kernel(plan.tile, form, [&](auto t, auto f) -> int {
        using T = decltype(t);
        const int64_t tiles = ceil_div(g.M, T::ROWS) * ceil_div(g.N, T::COLUMNS);
        if (tiles > INT32_MAX) return QVSR_SIZE;
        const dim3 grid(unsigned(tiles), unsigned(plan.splits)), block(T::THREADS);
#ifndef QVSR_EMULATE  // all of it as shared memory, so that as many blocks as registers allow find room; a wish, whatever comes of it
        cudaFuncSetAttribute(reinterpret_cast<const void*>(gemm_by_wgmma<T, f()>), cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
#endif
        return QVSR_LAUNCH(gemm_by_wgmma<T, f()>, grid, block, bytes_by_wgmma<T, f()>(g.parts), stream, g);
    });
}

namespace {

constexpr int MAX_DEVICES = 64, CHECKING = 2;
std::atomic<int> states[MAX_DEVICES];  // of each device: QVSR_WGMMA_...; CHECKING while a thread finds out

// A stream and memory of the current device as long as the check takes.
struct Scratch {
    cudaStream_t stream = nullptr;
    unsigned char* memory = nullptr;
    bool ready;

    explicit Scratch(size_t bytes) {
        ready = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess;
        ready = ready && cudaMalloc(reinterpret_cast<void**>(&memory), bytes) == cudaSuccess;
    }
    ~Scratch() {
        if (memory) cudaFree(memory);
        if (stream) cudaStreamDestroy(stream);
        (void)cudaGetLastError();
    }
};

// 200 x 320 results of 208 inputs, which no tile divides, in all forms and both tiles: the same bytes as from mma.sync? The data are any bytes; what
// they mean is the same for both.
int check_sums() {
    constexpr int M = 200, N = 320, K = 208, STEPS = 4;
    constexpr size_t Q = M * K, TOTALS = M * 4, TILES = STEPS * (N / TILE_CHANNELS) * tile_bytes(QVSR_BYTES_8), BOXES = 2 * N * 4, FLOATS = (2 + 2 * N) * 4;
    constexpr size_t IN = Q + TOTALS + TILES + BOXES + FLOATS, OUT = size_t(M) * N * 4;
    static_assert(Q % 16 == 0 && TOTALS % 16 == 0 && TILES % 16 == 0 && BOXES % 16 == 0 && IN % 8 == 0, "all are aligned");
    std::vector<unsigned char> in(IN), out(2 * OUT);
    uint32_t random = 1;
    for (size_t i = 0; i < IN; ++i) random = random * 1664525 + 1013904223, in[i] = uint8_t(random >> 24);
    for (size_t i = 0; i < M + 2 * N; ++i) {  // totals and boxes are of the size that sums are
        auto* const at = in.data() + (i < M ? Q + 4 * i : Q + TOTALS + TILES + 4 * (i - M));
        const int value = at[0] * 104;
        memcpy(at, &value, 4);
    }
    for (size_t i = 0; i < 2 + 2 * N; ++i) {  // scale, zero point, scales and zero points of the weights
        const float value = i == 0 ? 0.75f : i == 1 ? 99.0f : i < 2 + N ? 0.5f + float(i % 7) : float(i % 250);
        memcpy(in.data() + IN - FLOATS + 4 * i, &value, 4);
    }
    Scratch scratch(IN + OUT);
    if (!scratch.ready || cudaMemcpyAsync(scratch.memory, in.data(), IN, cudaMemcpyHostToDevice, scratch.stream) != cudaSuccess) return QVSR_WGMMA_UNKNOWN;
    auto* const q = scratch.memory;
    const auto* const floats = reinterpret_cast<const float*>(q + IN - FLOATS);
    QvsrPart part[2]{};
    part[0] = {q,          reinterpret_cast<const int32_t*>(q + Q), floats, floats + 1, q + Q + TOTALS, reinterpret_cast<const int32_t*>(q + Q + TOTALS + TILES),
               floats + 2, floats + 2 + N,                         M,      K,          1,              K};
    part[1] = part[0], part[1].K = 80;
    QvsrLayer layer{};
    layer.N = N, layer.out = q + IN;
    for (const int form : {QVSR_BYTES_4, QVSR_BYTES_6, QVSR_BYTES_8}) {
        layer.form = layer.weight_bits = form, layer.parts = form == QVSR_BYTES_4 ? 2 : 1;
        const Gemm g = gemm_of(part, layer, window_of_rows(M), M);
        for (const int tile : {128, int(QVSR_WGMMA_128), int(QVSR_WGMMA_256)}) {
            unsigned char* const to = out.data() + (tile == 128 ? 0 : OUT);
            int code = cudaMemsetAsync(layer.out, 255, OUT, scratch.stream);
            if (!code) code = start_plan(g, form, {tile, 1}, scratch.stream);
            if (!code) code = cudaMemcpyAsync(to, layer.out, OUT, cudaMemcpyDeviceToHost, scratch.stream);
            if (!code) code = cudaStreamSynchronize(scratch.stream);
            if (code) return QVSR_WGMMA_FAILED;
            if (tile != 128 && memcmp(out.data(), to, OUT)) return QVSR_WGMMA_DIFFERS;
        }
    }
    return QVSR_WGMMA_USED;
}

std::atomic<int>* state_of_device() {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return (void)cudaGetLastError(), nullptr;
    return device < MAX_DEVICES ? states + device : nullptr;
}

}  // namespace

bool wgmma_is_right(cudaStream_t stream) {
    std::atomic<int>* const state = state_of_device();
    if (!state) return false;
    int found = QVSR_WGMMA_UNKNOWN;
    if (state->load() == QVSR_WGMMA_UNKNOWN) {
        cudaStreamCaptureStatus captured = cudaStreamCaptureStatusNone;
        if (cudaStreamIsCapturing(stream, &captured) != cudaSuccess) return (void)cudaGetLastError(), false;
        if (captured != cudaStreamCaptureStatusNone || !state->compare_exchange_strong(found, CHECKING)) return false;
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // another stream of this thread or process may be captured
        const bool exchanged = cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess;
        state->store(check_sums());
        if (exchanged) cudaThreadExchangeStreamCaptureMode(&mode);
    }
    return state->load() == QVSR_WGMMA_USED;
}

}  // namespace qvsr

using namespace qvsr;

QVSR_API int qvsr_wgmma() {
    const std::atomic<int>* const state = state_of_device();
    const int found = state ? state->load() : int(QVSR_WGMMA_UNKNOWN);
    return found == CHECKING ? int(QVSR_WGMMA_UNKNOWN) : found;
}

#ifdef QVSR_EMULATE
// For tests: from here on wgmma reads another swizzle than the copies write, or not; and nothing is known of it.
QVSR_API void qvsr_emulate_misread(int misread) {
    wgmma_broken = misread;
    for (auto& state : states) state = QVSR_WGMMA_UNKNOWN;
}
#endif
