/* A packed layer behind its rounded input: integer products, scales, branch and bias, in one pass over the output.
 *
 *   qvsr_layer    a linear layer or a convolution: packed weights times 8-bit inputs, to the layer's output
 *   qvsr_finish   the same from sums that somebody else has computed
 *   qvsr_unpack   packed weights to centred 8-bit integers
 *
 *          a panel of the weight, unpacked: up to PANEL bytes, in a core's second cache while all rows pass
 *            k/4 -> | 16 columns x 4 | 16 columns x 4 | ...     tiles of 16 x 64 bytes, one below the other
 *   32 rows ------> +----------------+----------------+
 *   of inputs,      |     2 x 2 tiles of 16 x 16 sums  |        a part after the other; scaled and added to bias and branch
 *   side by side    +----------------+----------------+         while they are in the first cache
 *
 * A row of inputs holds what one position of the output sees, tap after tap (a convolution is a matrix product of rows gathered 32 at a time,
 * padded with the zero point). Weights are unsigned less their centre, signed 8 bits: see qvsr/kernels/cpu.py. 64 inputs of 16 rows are a tile
 * of AMX; without it 4 inputs of a row times 16 columns are one instruction of AVX-512 VNNI, or two of AVX-VNNI, on the same layout.
 *
 * Sums are exact, each row of the output is computed by one thread: the same bytes for any number of threads, and with all engines.
 */
#include "vectors.h"

#include <stdlib.h>
#include <string.h>

#if defined(__AVXVNNI__)
#include <immintrin.h>
#define HAS_AVX_VNNI 1
#else
#define HAS_AVX_VNNI 0
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif
#if HAS_VNNI && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

/* 32 rows and columns at a time; bytes of K are a multiple of a tile's 64. */
enum { ROWS = 32, COLUMNS = 32, STEP = 64, TILE = 16 * STEP, PANEL = 3 << 19 };
enum { HIGH = 8 }; /* rows that go through the scaling together */
enum { NO_ENGINE = 0, AVX_VNNI = 1, VNNI = 2, AMX = 3 };

/* ---------------------------------------------------------------- weights */

/* `count` values from `start` of a row of qvsr/kernels/packing.py's layout in memory, `bits` bytes a group of eight values, less a centre. */
static void unpack_row(const uint8_t *row, int64_t groups, int bits, int64_t start, int64_t count, int8_t centre, int8_t *y) {
    const int mask = (1 << bits) - 1;
    const uint8_t c = (uint8_t)centre;
    if (bits == 8) {
        for (int64_t i = 0; i < count; i++) y[i] = (int8_t)(uint8_t)(row[start + i] - c);
        return;
    }
    for (int stretch = 0; stretch < 8; stretch++) {
        int64_t from = start - stretch * groups, to = start + count - stretch * groups;
        from = from < 0 ? 0 : from;
        to = to > groups ? groups : to;
        const int byte = stretch * bits / 8, shift = stretch * bits % 8;
        const uint8_t *a = row + byte * groups, *b = a + groups;
        int8_t *target = y + stretch * groups - start;
        if (shift + bits > 8)
            for (int64_t g = from; g < to; g++) target[g] = (int8_t)(uint8_t)((((a[g] >> shift) | (b[g] << (8 - shift))) & mask) - c);
        else
            for (int64_t g = from; g < to; g++) target[g] = (int8_t)(uint8_t)(((a[g] >> shift) & mask) - c);
    }
}

void qvsr_unpack(const uint8_t *packed, int64_t row_bytes, int bits, int64_t start, int64_t count, const int8_t *centre, int8_t *out,
                 int64_t rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; m++) unpack_row(packed + m * row_bytes, row_bytes / bits, bits, start, count, centre[m], out + m * count);
}

/* ---------------------------------------------------------------- from sums to outputs */

/* One part of a layer: its sums and what scales them. */
typedef struct {
    const void *sums; /* whole numbers: float32, or int32 from which zero[m] * total[n] is taken */
    int64_t ld;
    const float *step, *scale;   /* step[n], scale[m] or one number */
    const int32_t *zero, *total; /* zero[m] or one number; NULL where sums are float32 */
    const int32_t *rest;         /* rest[n] * inputs[m] belongs to the sums; both NULL: nothing */
    const float *inputs;
    int32_t whole, by_row;
} Sums;

/* What else an output is made of: bias[n] + sum over r of thin[m][r] * up[r][n]; bias may be NULL, rank 0: no branch. */
typedef struct {
    void *out; /* float32, or bfloat16 if `half` */
    int64_t ld;
    const float *bias, *thin, *up;
    int64_t rank, ld_up;
    int32_t half;
} Output;

static inline vec get(const float *p, int n) {
    if (n >= LANES) return (vec) * (const vec_load *)p;
    vec v = {0};
    memcpy(&v, p, sizeof(float) * (size_t)n);
    return v;
}
static inline ivec get_int(const int32_t *p, int n) { return (ivec)get((const float *)p, n); }
static inline void put(float *p, vec v, int n) {
    if (n >= LANES)
        *(vec_load *)p = v;
    else
        memcpy(p, &v, sizeof(float) * (size_t)n);
}

static inline void put_half(uint16_t *p, hvec v, int n) {
    if (n >= LANES)
        *(hvec_load *)p = v;
    else
        memcpy(p, &v, sizeof(uint16_t) * (size_t)n);
}

/* `count` rows from m, n <= 16 columns from `first`; their sums start at row sums_row and column sums_first, `up` at column up_first.
 * The branch adds fused products, in one order; all else is rounded one by one. */
static inline __attribute__((always_inline)) void finish_rows(const Output *o, const Sums *parts, int n_parts, int64_t m, int count,
                                                              int64_t first, int n, int64_t sums_row, int64_t sums_first, int64_t up_first) {
    vec y[HIGH];
    const vec start = o->bias ? get(o->bias + first, n) : (vec){0};
    for (int i = 0; i < count; i++) y[i] = start;
    const float *thin = o->thin + m * o->rank, *up = o->up + up_first;
    for (int64_t r = 0; r < o->rank; r++) {
        const int64_t now = r < o->rank / 4 * 4 ? r ^ 3 : r; /* fours in reverse */
        const vec u = get(up + now * o->ld_up, n);
        for (int i = 0; i < count; i++) y[i] = fused(splat(thin[i * o->rank + now]), u, y[i]);
    }
    for (const Sums *p = parts; p < parts + n_parts; p++) {
        const vec step = get(p->step + first, n), rest = p->rest ? __builtin_convertvector(get_int(p->rest + first, n), vec) : (vec){0};
        const ivec total = p->whole ? get_int(p->total + first, n) : (ivec){0};
        vec factor = step * p->scale[0];
        ivec less = p->whole ? total * p->zero[0] : (ivec){0};
        for (int i = 0; i < count; i++) {
            const int64_t at = (sums_row + i) * p->ld + sums_first;
            if (p->by_row) {
                factor = step * p->scale[m + i];
                less = p->whole ? total * p->zero[m + i] : less;
            }
            vec value = get((const float *)p->sums + at, n);
            if (p->whole) value = __builtin_convertvector((ivec)value - less, vec);
            if (p->rest) value += rest * p->inputs[sums_row + i];
            y[i] += value * factor;
        }
    }
    for (int i = 0; i < count; i++) {
        const int64_t at = (m + i) * o->ld + first;
        if (o->half)
            put_half((uint16_t *)o->out + at, narrowed(y[i]), n);
        else
            put((float *)o->out + at, y[i], n);
    }
}

/* The same for any number of rows and columns. */
static void finish(const Output *o, const Sums *parts, int n_parts, int64_t m, int64_t rows, int64_t first, int64_t columns, int64_t sums_row,
                   int64_t sums_first, int64_t up_first) {
    for (int64_t c = 0; c < columns; c += LANES) {
        const int n = columns - c < LANES ? (int)(columns - c) : LANES;
        int64_t i = 0;
        if (n == LANES)
            for (; i + HIGH <= rows; i += HIGH)
                finish_rows(o, parts, n_parts, m + i, HIGH, first + c, LANES, sums_row + i, sums_first + c, up_first + c);
        for (; i < rows; i++) finish_rows(o, parts, n_parts, m + i, 1, first + c, n, sums_row + i, sums_first + c, up_first + c);
    }
}

/* out[m][n] = bias[n] + sum over r of thin[m][r] * up[r][n] + sum over parts of (sum + rest[n] * inputs[m]) * (step[n] * scale[m]),
 * for rows of `ld` values; up has rows of `ld_up`. */
void qvsr_finish(const Output *o, const Sums *parts, int count, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < (rows + ROWS - 1) / ROWS * ROWS; m += ROWS)
        for (int64_t first = 0; first < columns; first += 4 * LANES)
            finish(o, parts, count, m, rows - m < ROWS ? rows - m : ROWS, first, columns - first < 4 * LANES ? columns - first : 4 * LANES, m,
                   first, first);
}

/* ---------------------------------------------------------------- products */

/* What a layer sees of its input: sizes of three axes, of which leading ones are 1 where there are fewer. A linear layer has one row of positions. */
typedef struct {
    int64_t frames, in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
} Shape;

/* One part of the input and of the weight. */
typedef struct {
    const uint8_t *q; /* q[frame][position][channels] */
    int64_t channels;
    int64_t first; /* values of a weight's row before this part's */
    const int8_t *centre; /* centre[n] */
} Part;

/* 16 rows of `bytes` weights, `pitch` bytes apart, as tiles of 64: four inputs of 16 columns side by side. */
static void interleave(const int8_t *rows, int64_t pitch, int64_t bytes, int8_t *tiles) {
    for (int64_t k = 0; k < bytes; k += STEP) {
        vec t[16];
        for (int i = 0; i < 16; i++) memcpy(t + i, rows + i * pitch + k, STEP);
        transpose(t);
        memcpy(tiles + k * 16, t, TILE);
    }
}

/* The inputs that `rows` positions of the output from m on see, a row each of `pitch` bytes; outside of the input they are `zero`. */
static void gather(const Shape *s, const Part *part, const int32_t *zero, int by_row, int64_t m, int64_t rows, int64_t pitch, uint8_t *a) {
    const int64_t n = part->channels, plane = s->out[1] * s->out[2], volume = s->out[0] * plane;
    const int64_t taps = s->kernel[0] * s->kernel[1] * s->kernel[2];
    const int joined = s->dilation[2] == 1; /* taps side by side are side by side in the input */
    for (int64_t i = 0; i < rows; i++, a += pitch) {
        const int64_t row = m + i, frame = row / volume, z = row % volume / plane, y = row % plane / s->out[2], x = row % s->out[2];
        if (taps == 1 && !s->padding[0] && !s->padding[1] && !s->padding[2]) {
            const int64_t at = ((frame * s->in[0] + z * s->stride[0]) * s->in[1] + y * s->stride[1]) * s->in[2] + x * s->stride[2];
            memcpy(a, part->q + at * n, (size_t)n);
            continue;
        }
        const uint8_t outside = (uint8_t)zero[by_row ? row : 0];
        uint8_t *to = a;
        for (int64_t d = 0; d < s->kernel[0]; d++)
            for (int64_t h = 0; h < s->kernel[1]; h++) {
                const int64_t iz = z * s->stride[0] + d * s->dilation[0] - s->padding[0];
                const int64_t iy = y * s->stride[1] + h * s->dilation[1] - s->padding[1];
                const int inside = iz >= 0 && iz < s->in[0] && iy >= 0 && iy < s->in[1];
                const int64_t x0 = x * s->stride[2] - s->padding[2];
                const uint8_t *from = part->q + (((frame * s->in[0] + iz) * s->in[1] + iy) * s->in[2] + x0) * n;
                if (inside && joined && x0 >= 0 && x0 + s->kernel[2] <= s->in[2]) {
                    memcpy(to, from, (size_t)(n * s->kernel[2]));
                    to += n * s->kernel[2];
                    continue;
                }
                for (int64_t w = 0; w < s->kernel[2]; w++, to += n) {
                    const int64_t ix = x0 + w * s->dilation[2];
                    if (inside && ix >= 0 && ix < s->in[2])
                        memcpy(to, from + w * s->dilation[2] * n, (size_t)n);
                    else
                        memset(to, outside, (size_t)n);
                }
            }
    }
}

#if HAS_AVX_VNNI
static void product_avx_vnni(const uint8_t *a, int64_t pitch, const int8_t *b0, const int8_t *b1, int64_t bytes, int32_t *c) {
    for (int r = 0; r < ROWS; r += 2) { /* 8 sums, 4 weights and an input: 16 registers */
        __m256i y[2][4];
        for (int i = 0; i < 8; i++) y[i / 4][i % 4] = _mm256_setzero_si256();
        for (int64_t k = 0; k < bytes; k += 4) {
            const int8_t *w = b0 + k * 16, *x = b1 + k * 16;
            const __m256i columns[4] = {_mm256_load_si256((const void *)w), _mm256_load_si256((const void *)(w + 32)),
                                        _mm256_load_si256((const void *)x), _mm256_load_si256((const void *)(x + 32))};
            for (int i = 0; i < 2; i++) {
                int32_t four;
                memcpy(&four, a + (r + i) * pitch + k, 4);
                for (int n = 0; n < 4; n++) y[i][n] = _mm256_dpbusd_avx_epi32(y[i][n], _mm256_set1_epi32(four), columns[n]);
            }
        }
        for (int i = 0; i < 8; i++) _mm256_store_si256((void *)(c + (r + i / 4) * COLUMNS + i % 4 * 8), y[i / 4][i % 4]);
    }
}
#endif

#if HAS_VNNI
static void product_vnni(const uint8_t *a, int64_t pitch, const int8_t *b0, const int8_t *b1, int64_t bytes, int32_t *c) {
    for (int r = 0; r < ROWS; r += 8) {
        __m512i y0[8], y1[8];
        for (int i = 0; i < 8; i++) y0[i] = y1[i] = _mm512_setzero_si512();
        for (int64_t k = 0; k < bytes; k += 4) {
            const __m512i w0 = _mm512_load_si512(b0 + k * 16), w1 = _mm512_load_si512(b1 + k * 16);
            for (int i = 0; i < 8; i++) {
                int32_t four;
                memcpy(&four, a + (r + i) * pitch + k, 4);
                y0[i] = _mm512_dpbusd_epi32(y0[i], _mm512_set1_epi32(four), w0);
                y1[i] = _mm512_dpbusd_epi32(y1[i], _mm512_set1_epi32(four), w1);
            }
        }
        for (int i = 0; i < 8; i++) {
            _mm512_store_si512(c + (r + i) * COLUMNS, y0[i]);
            _mm512_store_si512(c + (r + i) * COLUMNS + 16, y1[i]);
        }
    }
}
#endif

#if HAS_AMX
static int allowed(void) { /* Linux wants to be asked for the tiles' memory once */
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    static int known = -1;
    if (known < 0) known = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return known;
}

static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles __attribute__((aligned(64))) = {1, 0, {0}, {0}, {0}};
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = STEP;
        tiles.rows[i] = 16;
    }
    _tile_loadconfig(&tiles);
}

static void product_amx(const uint8_t *a, int64_t pitch, const int8_t *b0, const int8_t *b1, int64_t bytes, int32_t *c) {
    const uint8_t *a1 = a + 16 * pitch;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < bytes; k += STEP) {
        _tile_loadd(4, a + k, pitch);
        _tile_loadd(6, b0 + k * 16, STEP);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, b1 + k * 16, STEP);
        _tile_dpbusd(1, 4, 7);
        _tile_loadd(5, a1 + k, pitch);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, c, 4 * COLUMNS);
    _tile_stored(1, c + 16, 4 * COLUMNS);
    _tile_stored(2, c + 16 * COLUMNS, 4 * COLUMNS);
    _tile_stored(3, c + 16 * COLUMNS + 16, 4 * COLUMNS);
}
#endif

/* The best engine of this processor. */
int qvsr_engine(void) {
#if HAS_AMX
    if (allowed()) return AMX;
#endif
    return HAS_VNNI ? VNNI : HAS_AVX_VNNI ? AVX_VNNI : NO_ENGINE;
}

/* Whether an engine can be asked for here; AMX is the best where it can. */
int qvsr_has_engine(int engine) { return engine == AVX_VNNI ? HAS_AVX_VNNI : engine == VNNI ? HAS_VNNI : engine == AMX && qvsr_engine() == AMX; }

static inline int64_t padded(int64_t bytes) { return (bytes + STEP - 1) / STEP * STEP; }

/* A layer of `count` parts: sums[part] says what scales its sums (sums, ld and whole are not read, inputs may not be), weight[n] is a packed row.
 * by_row of a part: its scale and zero point are one for each position of the output. Returns 0; 1 without memory, 2 without an engine. */
int qvsr_layer(const Shape *s, const Part *parts, const Sums *scales, int count, const uint8_t *weight, int64_t row_bytes, int bits,
               int64_t columns, const Output *o, int engine, int threads) {
    const int64_t rows = s->frames * s->out[0] * s->out[1] * s->out[2], taps = s->kernel[0] * s->kernel[1] * s->kernel[2];
    int64_t all = 0, longest = 0;
    for (int p = 0; p < count; p++) {
        const int64_t bytes = padded(parts[p].channels * taps);
        all += bytes;
        longest = bytes > longest ? bytes : longest;
    }
    if (!qvsr_has_engine(engine)) return 2;
    int64_t wide = PANEL / all / COLUMNS * COLUMNS, most = (columns + COLUMNS - 1) / COLUMNS * COLUMNS;
    wide = wide < COLUMNS ? COLUMNS : wide > most ? most : wide;
    const int64_t panels = (columns + wide - 1) / wide, blocks = (rows + ROWS - 1) / ROWS;
    wide = ((columns + panels - 1) / panels + COLUMNS - 1) / COLUMNS * COLUMNS; /* about equal panels */
    const int64_t pitch = all + STEP; /* an odd multiple of 64 would do: rows do not meet in the same sets of a cache */
    int8_t *panel = aligned_alloc(64, (size_t)(wide * all));
    /* `up` by blocks of columns: its own rows lie so far apart that they push each other out of the nearest cache */
    float *up = aligned_alloc(64, sizeof(float) * (size_t)(wide * (o->rank + 1)));
    Output output = *o;
    output.up = up;
    output.ld_up = COLUMNS;
    const int placed = panel && up;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        /* 16 unpacked rows, or 32 gathered ones; then sums of all parts, and of the inputs */
        uint8_t *room = aligned_alloc(64, (size_t)(ROWS * pitch));
        int32_t *c = aligned_alloc(64, sizeof(int32_t) * (size_t)(count * ROWS * COLUMNS));
        float *inputs = malloc(sizeof(float) * (size_t)(count * ROWS));
        Sums *sums = malloc(sizeof(Sums) * (size_t)count);
        const int ready = placed && room && c && inputs && sums;
        failed |= !ready;
        if (ready) {
            memset(room, 0, (size_t)(ROWS * pitch));
            for (int p = 0; p < count; p++) {
                sums[p] = scales[p];
                sums[p].sums = c + p * ROWS * COLUMNS;
                sums[p].ld = COLUMNS;
                sums[p].whole = 1;
                sums[p].inputs = inputs + p * ROWS;
            }
#if HAS_AMX
            if (engine == AMX) configure();
#endif
        }
        for (int64_t first = 0; first < columns; first += wide) {
            const int64_t n = columns - first < wide ? columns - first : wide;
#pragma omp for schedule(static)
            for (int64_t group = 0; group < (n + 31) / 32 * 2; group++) {
                if (!ready) continue;
                int8_t *to = panel + group * 16 * all;
                for (int p = 0; p < count; p++) {
                    const int64_t values = parts[p].channels * taps, bytes = padded(values);
                    for (int64_t i = 0; i < 16; i++) {
                        const int64_t column = group * 16 + i;
                        int8_t *y = (int8_t *)room + i * (bytes + STEP);
                        if (column < n)
                            unpack_row(weight + (first + column) * row_bytes, row_bytes / bits, bits, parts[p].first, values,
                                       parts[p].centre[first + column], y);
                        else
                            memset(y, 0, (size_t)values);
                        memset(y + values, 0, (size_t)(bytes - values));
                    }
                    interleave((const int8_t *)room, bytes + STEP, bytes, to);
                    to += bytes * 16;
                }
                const int64_t at = group / 2 * COLUMNS, high = n - at < COLUMNS ? n - at : COLUMNS;
                for (int64_t r = group % 2; r < o->rank; r += 2)
                    memcpy(up + at * o->rank + r * COLUMNS, o->up + r * o->ld_up + first + at, sizeof(float) * (size_t)high);
            }
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++) {
                if (!ready) continue;
                const int64_t m = block * ROWS, high = rows - m < ROWS ? rows - m : ROWS;
                int64_t at = 0;
                for (int p = 0; p < count; p++) {
                    const int64_t values = parts[p].channels * taps;
                    gather(s, parts + p, scales[p].zero, scales[p].by_row, m, high, pitch, room + at);
                    if (scales[p].rest)
                        for (int64_t i = 0; i < high; i++) {
                            int32_t sum = 0;
                            const uint8_t *a = room + at + i * pitch;
                            for (int64_t k = 0; k < values; k++) sum += a[k];
                            inputs[p * ROWS + i] = (float)(sum - scales[p].zero[scales[p].by_row ? m + i : 0] * (int32_t)values);
                        }
                    at += padded(values);
                }
                for (int64_t column = 0; column < n; column += COLUMNS) {
                    const int8_t *b = panel + column * all;
                    at = 0;
                    for (int p = 0; p < count; p++) {
                        const int64_t bytes = padded(parts[p].channels * taps);
#if HAS_AMX
                        if (engine == AMX) product_amx(room + at, pitch, b + at * 16, b + (all + at) * 16, bytes, c + p * ROWS * COLUMNS);
#endif
#if HAS_AVX_VNNI
                        if (engine == AVX_VNNI) product_avx_vnni(room + at, pitch, b + at * 16, b + (all + at) * 16, bytes, c + p * ROWS * COLUMNS);
#endif
#if HAS_VNNI
                        if (engine == VNNI) product_vnni(room + at, pitch, b + at * 16, b + (all + at) * 16, bytes, c + p * ROWS * COLUMNS);
#endif
                        at += bytes;
                    }
                    finish(&output, sums, count, m, high, first + column, n - column < COLUMNS ? n - column : COLUMNS, 0, 0, column * o->rank);
                }
            }
        }
#if HAS_AMX
        if (ready && engine == AMX) _tile_release();
#endif
        free(room);
        free(c);
        free(inputs);
        free(sums);
    }
    free(panel);
    free(up);
    return failed;
}
