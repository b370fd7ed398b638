#include "gemm.cuh"

namespace qvsr {
namespace {

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int check_layer(const QvsrPart* parts, const QvsrLayer* layer, const Window& window) {
    if (!parts || !layer) return QVSR_NULL;
    const QvsrLayer& l = *layer;
    if (l.arch < 75) return QVSR_ARCH;
    if (l.parts < 1 || l.parts > QVSR_MAX_PARTS) return QVSR_PARTS;
    if (l.weight_bits < 2 || l.weight_bits > 8) return QVSR_BITS;
    if (!is_form(l.form) || l.weight_bits > (l.form == QVSR_NIBBLES ? 4 : l.form) || (l.form == QVSR_NIBBLES && l.arch >= 90)) return QVSR_FORM;
    if (l.dtype < QVSR_FLOAT32 || l.dtype > QVSR_BFLOAT16) return QVSR_DTYPE;
    if ((l.tile != 0 && l.tile != 64 && l.tile != 128) || l.splits < 0) return QVSR_TILE;
    if (l.N < 0 || l.N > INT32_MAX - 128 || l.rank < 0 || l.rank > INT32_MAX || l.workspace_bytes < 0) return QVSR_SIZE;
    if (l.rank && (!l.thin || !l.up)) return QVSR_BRANCH;
    if (!l.out) return QVSR_NULL;
    if (!aligned(l.out, l.dtype == QVSR_FLOAT32 ? 4 : 2) || !aligned(l.workspace, 16)) return QVSR_ALIGNMENT;
    const int64_t taps = int64_t(window.kernel[0]) * window.kernel[1] * window.kernel[2];
    for (int i = 0; i < l.parts; ++i) {
        const QvsrPart& p = parts[i];
        if (!p.q || !p.totals || !p.scale || !p.zero_point || !p.tiles || !p.boxes || !p.w_scale || !p.w_zero_point) return QVSR_NULL;
        if (p.K < 1 || p.K > INT32_MAX || p.w_stride < 1 || (l.N && p.w_stride > INT32_MAX / l.N) || p.pitch < padded_bytes(p.K, l.form)) return QVSR_SIZE;
        if (p.pitch % 16 || !aligned(p.q, 16) || !aligned(p.tiles, 16)) return QVSR_ALIGNMENT;
        if (p.K > ((int64_t(1) << 32) - 1) / (255 * ((1 << l.weight_bits) - 1)) / taps) return QVSR_SUM;
        const int64_t frame = int64_t(window.in[0]) * window.in[1] * window.in[2];
        if (p.group < 1 || (taps > 1 && p.group % frame)) return QVSR_GROUP;
    }
    return QVSR_OK;
}

constexpr int64_t MAX_SPLITS = 256;  // times the steps it stays far below 2^31

struct Plan {
    bool large;
    int splits;
};

// Which tile, and how many blocks share one. Large tiles read each byte half as often from the cache and from shared memory, small ones fill
// the multiprocessors better: the rounds that all blocks take, times what a tile costs. That a small one costs 1.25 quarters of a large one is
// a guess, and so are four small blocks at a time on a multiprocessor and at least four steps for each.
Plan choose(const QvsrLayer& layer, int64_t M, int64_t N, int64_t steps) {
    const int64_t units = layer.multiprocessors > 0 ? layer.multiprocessors : 64;
    const auto tiles = [&](int64_t side) { return ceil_div(M, side) * ceil_div(N, side); };
    const double large = 4.0 * double(ceil_div(tiles(128), units)), small = 1.25 * double(ceil_div(tiles(64), units));
    Plan plan{layer.arch >= 80 && (layer.tile ? layer.tile == 128 : large <= small), 1};
    const int64_t count = tiles(plan.large ? 128 : 64);
    if (plan.large || !layer.workspace) return plan;
    const int64_t bytes = ceil_div(count, 4) * 16 + count * layer.parts * Small::SUMS * Small::THREADS * int64_t(sizeof(int));
    const int64_t wanted = layer.splits ? layer.splits : count >= 2 * units ? 1 : std::min(4 * units / count, steps / 4);
    if (bytes <= layer.workspace_bytes) plan.splits = int(std::max<int64_t>(1, std::min({wanted, steps, MAX_SPLITS})));
    return plan;
}

template <class T>
int start(const Gemm& g, int form, const Plan& plan, cudaStream_t stream) {
    const int64_t tiles = ceil_div(g.M, T::ROWS) * ceil_div(g.N, T::COLUMNS);
    if (tiles > INT32_MAX) return QVSR_SIZE;
    const dim3 grid(unsigned(tiles), unsigned(plan.splits)), block(T::THREADS);
    switch (form) {
        case QVSR_NIBBLES: return QVSR_LAUNCH(gemm<T, QVSR_NIBBLES>, grid, block, shared_bytes<T, QVSR_NIBBLES>(), stream, g);
        case QVSR_BYTES_4: return QVSR_LAUNCH(gemm<T, QVSR_BYTES_4>, grid, block, shared_bytes<T, QVSR_BYTES_4>(), stream, g);
        case QVSR_BYTES_6: return QVSR_LAUNCH(gemm<T, QVSR_BYTES_6>, grid, block, shared_bytes<T, QVSR_BYTES_6>(), stream, g);
        default: return QVSR_LAUNCH(gemm<T, QVSR_BYTES_8>, grid, block, shared_bytes<T, QVSR_BYTES_8>(), stream, g);
    }
}

}  // namespace

int start_gemm(const QvsrPart* parts, const QvsrLayer* layer, const Window& window, int64_t M, cudaStream_t stream) {
    if (M < 0 || M > INT32_MAX - 128) return QVSR_SIZE;
    if (M == 0 || (layer && layer->N == 0)) return QVSR_OK;
    if (const int code = check_layer(parts, layer, window)) return code;
    const QvsrLayer& l = *layer;
    Gemm g{};
    g.window = window;
    g.taps = window.kernel[0] * window.kernel[1] * window.kernel[2];
    g.empty_box = 1;
    for (int axis = 0; axis < 3; ++axis) {
        const int size = window.kernel[axis];
        g.full_box = g.full_box * int(intervals(size)) + int(interval(0, size - 1));
        g.empty_box *= int(intervals(size));
    }
    int64_t steps = 0;
    for (int i = 0; i < l.parts; ++i) {
        static_cast<QvsrPart&>(g.part[i]) = parts[i];
        g.part[i].width = int(padded_bytes(parts[i].K, l.form));
        g.part[i].rows_a_scale = int(std::min<int64_t>(parts[i].group, INT32_MAX));
        g.part[i].stride = int(parts[i].w_stride), g.part[i].inputs = g.taps * int(parts[i].K);
        g.part[i].tap_steps = int(ceil_div(g.part[i].width, SUM_BYTES));
        steps += int64_t(g.taps) * g.part[i].tap_steps;
    }
    g.M = int(M), g.N = int(l.N), g.columns = int(ceil_div(l.N, TILE_CHANNELS)), g.rank = l.rank, g.out = l.out, g.bias = l.bias, g.thin = l.thin, g.up = l.up;
    g.weight_top = float((1 << l.weight_bits) - 1);
    g.parts = l.parts, g.steps = int(steps), g.dtype = l.dtype;
    g.pairs = l.N % 2 == 0 && aligned(l.out, l.dtype == QVSR_FLOAT32 ? 8 : 4);
    const Plan plan = choose(l, M, l.N, steps);
    const int64_t tiles = ceil_div(M, plan.large ? 128 : 64) * ceil_div(l.N, plan.large ? 128 : 64);
    g.tickets = static_cast<int*>(l.workspace);
    g.partial = g.tickets + ceil_div(tiles, 4) * 4;
    return plan.large ? start<Large>(g, l.form, plan, stream) : start<Small>(g, l.form, plan, stream);
}

}  // namespace qvsr

using namespace qvsr;

QVSR_API int64_t qvsr_workspace_bytes(int multiprocessors, int parts) {
    if (parts < 1 || parts > QVSR_MAX_PARTS) return QVSR_PARTS;
    if (multiprocessors < 1) return QVSR_SIZE;
    const int64_t tiles = 2 * int64_t(multiprocessors);
    return ceil_div(tiles, 4) * 16 + tiles * parts * Small::SUMS * Small::THREADS * int64_t(sizeof(int));
}

QVSR_API int qvsr_matmul(const QvsrPart* parts, const QvsrLayer* layer, int64_t M, cudaStream_t stream) {
    const Window rows{{1, 1, int(std::min<int64_t>(M, INT32_MAX))}, {1, 1, int(std::min<int64_t>(M, INT32_MAX))}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
    return start_gemm(parts, layer, rows, M, stream);
}

#ifdef QVSR_EMULATE
// For tests: how often lanes that read at once met in a bank of shared memory.
QVSR_API int64_t qvsr_bank_conflicts() { return bank_conflicts; }
#endif
