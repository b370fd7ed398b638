// Packed matmul: y[m, n] = sum over parts of scale[m] w_scale[n] sum over k of (q[m, k] - zero[m]) (w[n, k] - w_zero[n])
//                         + sum over r of thin[m, r] up[n, r] + bias[n].   The kernel is in gemm.cuh; here is what to know about it.
//
// The tiling. Large is drawn; Wide has 256 rows in warps of 64 x 64, Small 64 x 64 in warps of 32 x 32:
//
//           n ->        128 channels                   one warp: 64 x 32                a step: 64 bytes of k, two MMA deep
//         +--------+--------+--------+--------+         8 columns                         k 0..31        32..63
//      m  | warp 0 | warp 1 | warp 2 | warp 3 |       +----+----+----+----+             +------------+------------+
//      |  | 64x32  |        |        |        |    16 | m16n8k32 (or k64) |    16 rows  | ldmatrix   | ldmatrix   |  q, swizzled
//      v  +--------+--------+--------+--------+  rows +----+----+----+----+             +------------+------------+
//    128  | warp 4 | warp 5 | warp 6 | warp 7 |       |    |    |    |    |             | 16 bytes a lane of a    |  w, in the order
//   rows  |        |        |        |        |       +----+----+----+----+  8 channels | tile of pack.cuh        |  of registers
//         +--------+--------+--------+--------+         4 x 4 sums of 16 x 8            +-------------------------+
//
// The loop: four stages of shared memory in a ring (Wide three), so that three steps are copied (Wide two) while one is multiplied:
//
//     step i     wait_groups<2> -> barrier -> copy step i+3 into stage (i+3) % 4 -> multiply stage i % 4
//                (its copies came)  (all threads' came, and all have left stage (i-1) % 4 = (i+3) % 4)
//
// Why each stage is there:
// - cp.async (sm_80 and later) writes to shared memory without registers. A step of Large is 256 MMA, 256 clocks of an H100 at least and 512 of an
//   A100; memory answers after some 500 to 800 (a guess): so three steps are under way. A step of Small is a quarter, and three blocks share a
//   multiprocessor.
// - Weights stay at 4, 6 or 8 bits in memory and in shared memory and become bytes in registers, by one AND and one shift for four of them.
// - q is swizzled (place()), so that ldmatrix never meets a bank twice; tiles of w need none, for lanes read side by side.
// - Parts (channel halves with ranges of their own) are summed in one launch: at a part's end the integers are scaled into float32 sums, in as many
//   registers (Wide: in shared memory), and begin again. A launch a part would write and read the whole result once more.
// - Where the result has few tiles (M = 1, or maps of 8 x 8), several blocks share a sum: they add integers to the workspace with atomics, which
//   come to the same in any order, and the last of them goes on. It leaves the workspace as zeros.
// - The zero points are corrected by whole numbers: sum q w - v sum q - z (sum w - v K), modulo 2^32 where the true value fits, else in 64 bits.
// - Float32 begins behind that, in this order: value * w_scale, fma with scale into the sum of the parts, fma of the branch by rising r, + bias.
//   On the branch: M N R multiply-adds on ordinary cores, 12.5 us for 20480 x 320 and R = 64 at 67 TFLOPS; in place it costs no pass over the
//   result, where a product before it would write and read 2 x 26 MB, 16 us at 3.35 TB/s, beside the same multiply-adds.
//
// Chips: 8.0 to 8.9 take the 4-bit MMA (m16n8k64) where both sides have at most 4 bits, and the 8-bit MMA (m16n8k32) otherwise. 7.5 does the same by
// quarters (m8n8k32, m8n8k16) and copies through registers. 9.0 and later have no 4-bit unit: w is unpacked to bytes. Newer chips take the ways of
// 9.0, as PTX where there is no binary. On 9.0 itself large products go through wgmma: hopper.cu. tcgen05 of 10.0 is not used.
//
// Limits, counted and not measured. H100: 1979 TOPS of 8 bits, 3.35 TB/s, 132 multiprocessors; an MMA is 8192 operations, so one a clock and
// multiprocessor at most, which the instruction used here does not reach there (wgmma does; two thirds is a guess). What feeds it:
//
//                 shared memory, which gives 128 bytes a clock      caches beyond it, at the full rate of 1979 TOPS
//     Large       192 bytes an MMA (4-bit weights: 160)             15.4 TB/s (11.6)
//     Wide        128 (96)                                          11.6 TB/s (9.7)
//
// So Large can reach two thirds, and both wait for the second-level cache before that if it gives 5 to 6 TB/s (a guess): half the rate. Keeping more
// of q and w on the chip, by clusters of blocks or the larger tiles of hopper.cu, is what lifts it. An A100 does half an MMA a clock with the same
// tiles: 96 of 128 bytes for Large, and 4.9 TB/s (W8), 3.7 (Wide).
//
// The floors of the U-Net's linear layers, us on an H100, float32 result:
//
//     M x N x K              calls   operations   bytes W8 / W4     what bounds it
//     20480 x  320 x  320      40        2.1        9.8 /  9.8      26 of 33 MB are the result: half of them with bfloat16
//      5120 x  640 x  640      40        2.1        5.0 /  5.0      the result
//      1280 x 1280 x 1280      40        2.1        2.9 /  2.7      the result, then weights
//     20480 x 2560 x  320       5       17.0       64.8 / 64.7      the result
//      5120 x 5120 x  640       5       17.0       33.3 / 32.8      the result
//      1280 x 10240 x 1280      5       17.0       20.1 / 18.1      both
//     20480 x  320 x 1280       5        8.5       15.8 / 15.7      the result
//      1280 x 1280 x 5120       5        8.5        5.9 /  4.9      operations
//         1 x 1280 x 1280      14        0.0        0.5 /  0.2      the launch
#include "hopper.h"

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
    const bool by_wgmma = l.arch == 90 && (l.tile == QVSR_WGMMA_128 || l.tile == QVSR_WGMMA_256);
    if ((l.tile != 0 && l.tile != 64 && l.tile != 128 && l.tile != 256 && !by_wgmma) || l.splits < 0) return QVSR_TILE;
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

constexpr double WGMMA_EPILOGUE = 128 << 10;  // bytes that could be copied meanwhile: 5000 clocks at 26 bytes, a guess
constexpr int64_t MAX_SPLITS = 256;  // times the steps it stays far below 2^31

// Shared memory that a block may have, of the chips that have more than all others from 8.0 on.
int64_t shared_memory(int arch) { return arch == 90 || arch / 10 == 10 ? 227 << 10 : arch == 80 || arch == 87 ? 163 << 10 : 99 << 10; }

// Which tile, and how many blocks share one: the rounds that all blocks take, times what a tile costs. A large tile reads each byte half as often
// from the caches and from shared memory as a small one, which fills the multiprocessors better, and where sums are short one block multiplies
// while another stores. What they cost is a guess (Small 1.25 of a quarter of Large, or as much where sums are short; Wide 0.85 of two Large), and so
// are four small blocks a multiprocessor with four steps or more for each. By wgmma a tile costs the bytes that it copies (hopper.cu says why), and one
// block alone on a multiprocessor copies nothing while it scales and stores.
Plan choose(const QvsrLayer& layer, int64_t M, int64_t N, int64_t steps, bool by_wgmma) {
    const int64_t units = layer.multiprocessors > 0 ? layer.multiprocessors : 64;
    const auto tiles = [&](int64_t rows, int64_t columns) { return ceil_div(M, rows) * ceil_div(N, columns); };
    const auto rounds = [&](int64_t rows, int64_t columns) { return double(ceil_div(tiles(rows, columns), units)); };
    // As many blocks for a sum as are asked for, or as fill the multiprocessors `blocks` times with `least` steps or more for each; if there is room.
    const auto splits = [&](int64_t count, int64_t filled, int64_t blocks, int64_t least, int64_t sums) {
        const int64_t bytes = ceil_div(tiles(64, 64), 4) * 16 + count * layer.parts * sums * int64_t(sizeof(int));
        const int64_t wanted = layer.splits ? layer.splits : count >= filled * units ? 1 : std::min(blocks * units / count, steps / least);
        const bool room = layer.workspace && bytes <= layer.workspace_bytes;
        return room ? int(std::max<int64_t>(1, std::min({wanted, steps, MAX_SPLITS}))) : 1;
    };
    const bool is_short = steps < 16;
    const double wide = 6.8 * rounds(256, 128), large = 4.0 * rounds(128, 128), small = (is_short ? 1.0 : 1.25) * rounds(64, 64);
    const bool room = shared_bytes<Wide, QVSR_BYTES_8>(layer.parts) <= shared_memory(layer.arch);
    Plan plan{layer.tile, 1};
    const int splits_by_wgmma = splits(tiles(128, 128), 1, 2, 8, 128 * 128);
    if (plan.tile == 0 && by_wgmma && M > 64 && N > 64 && 2 * tiles(128, 128) * splits_by_wgmma >= units) {
        const auto bytes = [&](int tile) { return double(wgmma_stage_bytes(tile, layer.form) * steps); };
        const double alone = (bytes(QVSR_WGMMA_256) + WGMMA_EPILOGUE) * rounds(128, 256), two = bytes(QVSR_WGMMA_128) * rounds(128, 128);
        plan.tile = alone < two ? QVSR_WGMMA_256 : QVSR_WGMMA_128;
    }
    if (plan.tile == QVSR_WGMMA_256 && wgmma_shared_bytes(plan.tile, layer.form, layer.parts) > shared_memory(90)) plan.tile = QVSR_WGMMA_128;
    if (plan.tile >= QVSR_WGMMA_128 && !by_wgmma) plan.tile = 128;
    if (plan.tile == QVSR_WGMMA_128) plan.splits = splits_by_wgmma;
    if (plan.tile >= QVSR_WGMMA_128) return plan;
    if (plan.tile == 0) plan.tile = small < std::min(wide, large) ? 64 : wide < large && !is_short ? 256 : 128;
    if (plan.tile == 256 && !room) plan.tile = 128;
    if (layer.arch < 80) plan.tile = 64;
    if (plan.tile == 64) plan.splits = splits(tiles(64, 64), 2, 4, 4, Small::SUMS * Small::THREADS);
    return plan;
}

template <class T>
int start(const Gemm& g, int form, const Plan& plan, cudaStream_t stream) {
    const int64_t tiles = ceil_div(g.M, T::ROWS) * ceil_div(g.N, T::COLUMNS);
    if (tiles > INT32_MAX) return QVSR_SIZE;
    const dim3 grid(unsigned(tiles), unsigned(plan.splits)), block(T::THREADS);
    switch (form) {
        case QVSR_NIBBLES: return QVSR_LAUNCH(gemm<T, QVSR_NIBBLES>, grid, block, shared_bytes<T, QVSR_NIBBLES>(g.parts), stream, g);
        case QVSR_BYTES_4: return QVSR_LAUNCH(gemm<T, QVSR_BYTES_4>, grid, block, shared_bytes<T, QVSR_BYTES_4>(g.parts), stream, g);
        case QVSR_BYTES_6: return QVSR_LAUNCH(gemm<T, QVSR_BYTES_6>, grid, block, shared_bytes<T, QVSR_BYTES_6>(g.parts), stream, g);
        default: return QVSR_LAUNCH(gemm<T, QVSR_BYTES_8>, grid, block, shared_bytes<T, QVSR_BYTES_8>(g.parts), stream, g);
    }
}

}  // namespace

Gemm gemm_of(const QvsrPart* parts, const QvsrLayer& l, const Window& window, int64_t M) {
    Gemm g{};
    g.window = window;
    g.taps = window.kernel[0] * window.kernel[1] * window.kernel[2];
    g.empty_box = 1;
    for (int axis = 0; axis < 3; ++axis) {
        const int size = window.kernel[axis];
        g.full_box = g.full_box * int(intervals(size)) + int(interval(0, size - 1));
        g.empty_box *= int(intervals(size));
    }
    for (int i = 0; i < l.parts; ++i) {
        static_cast<QvsrPart&>(g.part[i]) = parts[i];
        g.part[i].width = int(padded_bytes(parts[i].K, l.form));
        g.part[i].rows_a_scale = int(std::min<int64_t>(parts[i].group, INT32_MAX));
        g.part[i].stride = int(parts[i].w_stride), g.part[i].inputs = g.taps * int(parts[i].K);
        g.part[i].tap_steps = int(ceil_div(g.part[i].width, SUM_BYTES));
        g.steps += g.taps * g.part[i].tap_steps;
    }
    g.M = int(M), g.N = int(l.N), g.columns = int(ceil_div(l.N, TILE_CHANNELS)), g.rank = l.rank, g.out = l.out, g.bias = l.bias, g.thin = l.thin, g.up = l.up;
    g.weight_top = float((1 << l.weight_bits) - 1);
    g.parts = l.parts, g.dtype = l.dtype;
    g.pairs = l.N % 2 == 0 && aligned(l.out, l.dtype == QVSR_FLOAT32 ? 8 : 4);
    g.tickets = static_cast<int*>(l.workspace);
    g.partial = g.tickets + ceil_div(ceil_div(M, Small::ROWS) * ceil_div(l.N, Small::COLUMNS), 4) * 4;
    return g;
}

int start_plan(const Gemm& g, int form, const Plan& plan, cudaStream_t stream) {
    switch (plan.tile) {
        case QVSR_WGMMA_128:
        case QVSR_WGMMA_256: return start_by_wgmma(g, form, plan, stream);
        case 256: return start<Wide>(g, form, plan, stream);
        case 128: return start<Large>(g, form, plan, stream);
        default: return start<Small>(g, form, plan, stream);
    }
}

int start_gemm(const QvsrPart* parts, const QvsrLayer* layer, const Window& window, int64_t M, cudaStream_t stream) {
    if (M < 0 || M > INT32_MAX - 128) return QVSR_SIZE;
    if (M == 0 || (layer && layer->N == 0)) return QVSR_OK;
    if (const int code = check_layer(parts, layer, window)) return code;
    const Gemm g = gemm_of(parts, *layer, window, M);
    Plan plan = choose(*layer, M, layer->N, g.steps, layer->arch == 90);
    if (plan.tile >= QVSR_WGMMA_128 && !wgmma_is_right(stream)) plan = choose(*layer, M, layer->N, g.steps, false);
    return start_plan(g, layer->form, plan, stream);
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
    return start_gemm(parts, layer, window_of_rows(M), M, stream);
}

#ifdef QVSR_EMULATE
// For tests: how often lanes that read at once met in a bank of shared memory.
QVSR_API int64_t qvsr_bank_conflicts() { return bank_conflicts; }
#endif
