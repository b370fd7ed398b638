// HEAD
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
