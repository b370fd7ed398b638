/* Three loops of packed execution that PyTorch has no operator for: what stands before and behind the integer products.
 *
 *   qvsr_activation   activations to integers: rotate, find the range, rotate again, round, channels last
 *   qvsr_finish       whole-number sums to the layer's output: times the scales, plus what is there
 *   qvsr_unpack       packed weights to centred 8-bit integers
 *
 * Plain C with GCC's vector types, compiled for the machine it runs on (qvsr/kernels/native.py); OpenMP's threads are those of torch.
 * A float32 activation of a convolution with 320 channels at 64x64 takes 26 MB. In PyTorch rotation, range, division, rounding, clamping,
 * conversion and transposition read and write it seven times; here it is read twice and its integers are written once.
 *
 * Rotations. A Hadamard matrix is a Kronecker product of small ones, most of them [1 1; 1 -1]. 16 positions lie side by side in a vector
 * and a tile holds all channels of them, so a factor combines whole vectors, whatever its size: 640 = 20 x 2^5 takes 25 additions a value.
 * A tile of 640 channels is 40 KB: it stays in a core's nearest caches, and rotating twice is cheaper than writing 26 MB in between.
 *
 * Every loop gives the same bytes for any number of threads: threads divide tiles and rows, and nothing is summed across them. Products
 * and sums of the same expression are not fused (-ffp-contract=off), so the plain PyTorch versions give the same bytes too, rotation apart.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, LARGEST_FACTOR = 64 };
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float uvec_load __attribute__((vector_size(4 * LANES), aligned(4)));

/* One part of an input: its channels start .. start + n of `channels`.
 * frames x positions rows; channels first: x[frame][channel][position], else x[frame][position][channel]. */
typedef struct {
    const float *x;
    int64_t frames, positions, channels, start, n;
    int32_t channels_first, signs_first; /* signs before the rotation (linear layers), or after it (convolutions) */
    const float *signs;                  /* n values of +-1/sqrt(n), or NULL: not rotated */
    const float *factors;                /* the factor matrices one after another, each of size s stored so that out[i] = sum h[i*s+j] in[j] */
    const int32_t *sizes;
    int32_t count;
} Part;

static inline vec splat(float value) { return value - (vec){0}; }
static inline vec either(ivec which, vec yes, vec no) { return (vec)(((ivec)yes & which) | ((ivec)no & ~which)); }

static void butterflies(vec *t, int64_t n, int64_t inner) {
    for (int64_t o = 0; o < n; o += 2 * inner)
        for (int64_t i = o; i < o + inner; i++) {
            vec a = t[i], b = t[i + inner];
            t[i] = a + b;
            t[i + inner] = a - b;
        }
}

/* Two stages at once, of which the second has the smaller distance. */
static void double_butterflies(vec *t, int64_t n, int64_t inner) {
    for (int64_t o = 0; o < n; o += 4 * inner)
        for (int64_t i = o; i < o + inner; i++) {
            vec a = t[i], b = t[i + inner], c = t[i + 2 * inner], d = t[i + 3 * inner];
            vec ac = a + c, bd = b + d, a_c = a - c, b_d = b - d;
            t[i] = ac + bd;
            t[i + inner] = ac - bd;
            t[i + 2 * inner] = a_c + b_d;
            t[i + 3 * inner] = a_c - b_d;
        }
}

/* Fused products and sums: those by +-1 are exact, so the bytes are the same. */
__attribute__((optimize("fp-contract=fast"))) static void dense(vec *t, int64_t n, int64_t inner, int s, const float *h) {
    vec in[LARGEST_FACTOR];
    for (int64_t o = 0; o < n; o += s * inner)
        for (int64_t i = o; i < o + inner; i++) {
            for (int j = 0; j < s; j++) in[j] = t[i + j * inner];
            int k = 0;
            for (; k + 4 <= s; k += 4) {
                const float *h0 = h + k * s, *h1 = h0 + s, *h2 = h1 + s, *h3 = h2 + s;
                vec y0 = {0}, y1 = {0}, y2 = {0}, y3 = {0};
                for (int j = 0; j < s; j++) {
                    y0 += in[j] * h0[j];
                    y1 += in[j] * h1[j];
                    y2 += in[j] * h2[j];
                    y3 += in[j] * h3[j];
                }
                t[i + k * inner] = y0;
                t[i + (k + 1) * inner] = y1;
                t[i + (k + 2) * inner] = y2;
                t[i + (k + 3) * inner] = y3;
            }
            for (; k < s; k++) {
                vec y = {0};
                for (int j = 0; j < s; j++) y += in[j] * h[k * s + j];
                t[i + k * inner] = y;
            }
        }
}

/* 16 rows of 16 channels to 16 channels of 16 rows. */
static void transpose(vec *m) {
    vec n[16];
    static const ivec low1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    static const ivec high1 = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
    static const ivec low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    static const ivec high2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    static const ivec low4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    static const ivec high4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
    static const ivec low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    static const ivec high8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
#define STAGE(from, to, step, low, high)                              \
    for (int i = 0; i < 16; i++)                                      \
        if (!(i & step)) {                                            \
            to[i] = __builtin_shuffle(from[i], from[i + step], low);  \
            to[i + step] = __builtin_shuffle(from[i], from[i + step], high); \
        }
    STAGE(m, n, 1, low1, high1)
    STAGE(n, m, 2, low2, high2)
    STAGE(m, n, 4, low4, high4)
    STAGE(n, m, 8, low8, high8)
#undef STAGE
}

/* All channels of up to 16 positions, rotated. Lanes beyond `width` repeat the first position: they change no range. */
static void load(const Part *p, int64_t frame, int64_t first, int width, vec *t) {
    const int64_t n = p->n;
    if (p->channels_first) {
        const float *x = p->x + (frame * p->channels + p->start) * p->positions + first;
        for (int64_t c = 0; c < n; c++, x += p->positions) {
            if (width == LANES)
                t[c] = (vec) * (const uvec_load *)x;
            else
                for (int l = 0; l < LANES; l++) ((float *)&t[c])[l] = x[l < width ? l : 0];
        }
    } else {
        const float *x = p->x + (frame * p->positions + first) * p->channels + p->start;
        int64_t c = 0;
        for (; c + 16 <= n; c += 16) {
            for (int l = 0; l < LANES; l++) t[c + l] = (vec) * (const uvec_load *)(x + (l < width ? l : 0) * p->channels + c);
            transpose(t + c);
        }
        for (; c < n; c++)
            for (int l = 0; l < LANES; l++) ((float *)&t[c])[l] = x[(l < width ? l : 0) * p->channels + c];
    }
    if (!p->signs) return;
    if (p->signs_first)
        for (int64_t c = 0; c < n; c++) t[c] *= p->signs[c];
    const float *h = p->factors;
    int64_t inner = n;
    for (int f = 0; f < p->count; f++) {
        const int s = p->sizes[f];
        inner /= s;
        if (s == 2 && f + 1 < p->count && p->sizes[f + 1] == 2) {
            inner /= 2;
            double_butterflies(t, n, inner);
            h += 8;
            f++;
        } else if (s == 2) {
            butterflies(t, n, inner);
            h += 4;
        } else {
            dense(t, n, inner, s, h);
            h += s * s;
        }
    }
    if (!p->signs_first)
        for (int64_t c = 0; c < n; c++) t[c] *= p->signs[c];
}

static vec *tile(int64_t n) { return aligned_alloc(64, sizeof(vec) * (size_t)(n + 16)); }

/* Minimum and maximum; NaN if there is one.
 * by_token: low, high[frames * positions]; else a pair for each run of 16 positions, [frames * ceil(positions / 16)].
 * Returns 0, or 1 without memory. */
static int find_range(const Part *p, int by_token, float *low, float *high, int threads) {
    const int64_t runs = (p->positions + LANES - 1) / LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        vec *t = tile(p->n);
        failed = !t;
#pragma omp for schedule(static)
        for (int64_t run = 0; run < p->frames * runs; run++) {
            if (!t) continue;
            const int64_t frame = run / runs, first = run % runs * LANES;
            const int width = p->positions - first < LANES ? (int)(p->positions - first) : LANES;
            load(p, frame, first, width, t);
            vec least = t[0], most = t[0], odd = t[0] * 0;
            for (int64_t c = 0; c < p->n; c++) {
                vec v = t[c];
                least = either(v < least, v, least);
                most = either(v > most, v, most);
                odd += v * 0; /* NaN from NaN; from infinity too, which is set right below */
            }
            for (int l = 0; l < LANES; l++)
                if (odd[l] != odd[l]) {
                    int missing = 0;
                    for (int64_t c = 0; c < p->n; c++) missing |= t[c][l] != t[c][l];
                    if (missing) least[l] = most[l] = NAN;
                }
            if (by_token) {
                memcpy(low + frame * p->positions + first, &least, sizeof(float) * (size_t)width);
                memcpy(high + frame * p->positions + first, &most, sizeof(float) * (size_t)width);
                continue;
            }
            float a = least[0], b = most[0];
            for (int l = 1; l < LANES; l++) {
                a = least[l] < a || least[l] != least[l] ? least[l] : a;
                b = most[l] > b || most[l] != most[l] ? most[l] : b;
            }
            low[run] = a;
            high[run] = b;
        }
        free(t);
    }
    return failed;
}

/* Integers 0 .. top, channels last, q[frames][positions][n]: clamp(round(v / scale), -zero, top - zero) + zero.
 * scale and zero are one number (stride 0), one a frame (1) or one a position (2).
 * Returns 0; 1 without memory, 2 if there was NaN, 3 if both. */
static int quantize(const Part *p, const float *scale, const float *zero, int stride, int top, uint8_t *q, int threads) {
    const int64_t runs = (p->positions + LANES - 1) / LANES, n = p->n;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        ivec missing = {0};
        vec *t = tile(n);
        failed = !t;
#pragma omp for schedule(static)
        for (int64_t run = 0; run < p->frames * runs; run++) {
            if (!t) continue;
            const int64_t frame = run / runs, first = run % runs * LANES, row = frame * p->positions + first;
            const int width = p->positions - first < LANES ? (int)(p->positions - first) : LANES;
            load(p, frame, first, width, t);
            vec s, z;
            if (stride < 2) {
                s = splat(scale[stride ? frame : 0]);
                z = splat(zero[stride ? frame : 0]);
            } else
                for (int l = 0; l < LANES; l++) {
                    s[l] = scale[row + (l < width ? l : 0)];
                    z[l] = zero[row + (l < width ? l : 0)];
                }
            const vec least = -z, most = (float)top - z;
            uint8_t *out = q + row * n;
            int64_t c = 0;
            for (; c < n; c += 4) {
                const int some = n - c < 4 ? (int)(n - c) : 4;
                uvec packed = {0};
                for (int k = 0; k < some; k++) {
                    vec v = t[c + k] / s;
                    missing |= t[c + k] != t[c + k];
                    float r[LANES] __attribute__((aligned(64)));
                    memcpy(r, &v, sizeof r);
                    for (int l = 0; l < LANES; l++) r[l] = __builtin_rintf(r[l]);
                    memcpy(&v, r, sizeof r);
                    v = either(v < least, least, v);
                    v = either(v > most, most, v);
                    packed |= (uvec)__builtin_convertvector(v + z, ivec) << (8 * k);
                }
                if (some == 4)
                    for (int l = 0; l < width; l++) memcpy(out + l * n + c, (uint32_t *)&packed + l, 4);
                else
                    for (int l = 0; l < width; l++)
                        for (int k = 0; k < some; k++) out[l * n + c + k] = (uint8_t)(packed[l] >> (8 * k));
            }
        }
        for (int l = 0; l < LANES; l++) failed |= missing[l] ? 2 : 0;
        free(t);
    }
    return failed;
}

/* scale and zero of ranges: minimum and maximum narrowed by `clip`, or symmetric about 0; the operations of qvsr/kernels/reference.py. */
static void grid(const float *low, const float *high, int64_t count, float clip, int symmetric, float floor, int top, float *scale,
                 float *zero) {
    const float half = (float)((top + 1) / 2), wider = (float)((double)half / ((double)half - 1));
    for (int64_t i = 0; i < count; i++) {
        float a = low[i] * clip, b = high[i] * clip;
        if (symmetric) {
            b = -a > b || a != a ? -a : b;
            a = -b * wider;
        }
        const float s = (b - a) / (float)top;
        scale[i] = s < floor ? floor : s;
        zero[i] = __builtin_rintf(-a / scale[i]);
    }
}

/* Ranges if `dynamic`, else scale and zero are given; then integers. `stride` as of quantize.
 * room: floats, 2 * frames * positions for ranges by position, else 2 * frames * ceil(positions / 16). Returns what quantize does. */
int qvsr_activation(const Part *p, int dynamic, int stride, float clip, int symmetric, float floor, int top, float *scale, float *zero,
                    float *room, uint8_t *q, int threads) {
    if (dynamic) {
        const int64_t runs = (p->positions + LANES - 1) / LANES, all = p->frames * (stride == 2 ? p->positions : runs);
        float *low = room, *high = room + all;
        if (find_range(p, stride == 2, low, high, threads)) return 1;
        int64_t count = all;
        if (stride < 2) { /* runs to frames, or to one */
            const int64_t each = stride == 1 ? runs : all;
            count = all / each;
            for (int64_t i = 0; i < count; i++) {
                float a = low[i * each], b = high[i * each];
                for (int64_t run = i * each + 1; run < (i + 1) * each; run++) {
                    a = low[run] < a || low[run] != low[run] ? low[run] : a;
                    b = high[run] > b || high[run] != high[run] ? high[run] : b;
                }
                low[i] = a;
                high[i] = b;
            }
        }
        grid(low, high, count, clip, symmetric, floor, top, scale, zero);
    }
    return quantize(p, scale, zero, stride, top, q, threads);
}

/* One part of a layer's sums, rows of `ld` values. */
typedef struct {
    const void *sums; /* whole numbers: float32, or int32 from which zero[m] * total[n] is taken */
    int64_t ld;
    const float *step, *scale;         /* step[n], scale[m] or one number */
    const int32_t *zero, *total;       /* zero[m] or one number; NULL where sums are float32 */
    const int32_t *rest;               /* rest[n] * inputs[m] belongs to the sums; both NULL: nothing */
    const float *inputs;
    int32_t whole, by_row;
} Sums;

/* Some columns of the branch's second layer (24 KB at rank 24) stay in the nearest cache while the rows of a block pass. */
enum { COLUMNS = 256, ROWS = 64 };

/* y[n] += sum over r of thin[r] * up[r][n]: four rows of `up` at a time, so that y is loaded and stored less often. */
__attribute__((optimize("fp-contract=fast"))) static void branch(float *restrict y, const float *thin, const float *up, int64_t rank,
                                                                  int64_t ld, int64_t n) {
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) {
        const float a = thin[r], b = thin[r + 1], c = thin[r + 2], d = thin[r + 3];
        const float *u = up + r * ld, *v = u + ld, *w = v + ld, *x = w + ld;
        for (int64_t i = 0; i < n; i++) y[i] = a * u[i] + (b * v[i] + (c * w[i] + (d * x[i] + y[i])));
    }
    for (; r < rank; r++)
        for (int64_t i = 0; i < n; i++) y[i] += thin[r] * up[r * ld + i];
}

/* Columns first .. first + n of row m. */
static void finish_row(float *out, const float *bias, const float *thin, const float *up, int64_t rank, int64_t ld_up, const Sums *parts,
                       int count, int64_t m, int64_t first, int64_t n) {
    float y[COLUMNS] __attribute__((aligned(64)));
    if (bias)
        memcpy(y, bias, sizeof(float) * (size_t)n);
    else
        memset(y, 0, sizeof(float) * (size_t)n);
    if (rank) branch(y, thin, up, rank, ld_up, n);
    for (int part = 0; part < count; part++) {
        const Sums *p = parts + part;
        const float *f = (const float *)p->sums + m * p->ld + first, *step = p->step + first;
        const int32_t *w = (const int32_t *)p->sums + m * p->ld + first;
        const int32_t *total = p->whole ? p->total + first : NULL, *rest = p->rest ? p->rest + first : NULL;
        const float s = p->scale[p->by_row ? m : 0], x = rest ? p->inputs[m] : 0;
        const int32_t z = p->whole ? p->zero[p->by_row ? m : 0] : 0;
#define ADD(value) \
    for (int64_t i = 0; i < n; i++) y[i] += (value) * (step[i] * s);
        if (p->whole && rest)
            ADD((float)(w[i] - z * total[i]) + (float)rest[i] * x)
        else if (p->whole)
            ADD((float)(w[i] - z * total[i]))
        else if (rest)
            ADD(f[i] + (float)rest[i] * x)
        else
            ADD(f[i])
#undef ADD
    }
    memcpy(out, y, sizeof(float) * (size_t)n);
}

/* out[m][n] = bias[n] + sum over r of thin[m][r] * up[r][n] + sum over parts of (sum + rest[n] * inputs[m]) * (step[n] * scale[m]),
 * for rows of `ld` values; up has rows of `ld_up`. bias may be NULL; rank 0: no branch. */
void qvsr_finish(float *out, int64_t ld, const float *bias, const float *thin, const float *up, int64_t rank, int64_t ld_up,
                 const Sums *parts, int count, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (rows + ROWS - 1) / ROWS; block++)
        for (int64_t first = 0; first < columns; first += COLUMNS) {
            const int64_t n = columns - first < COLUMNS ? columns - first : COLUMNS;
            for (int64_t m = block * ROWS; m < (block + 1) * ROWS && m < rows; m++)
                finish_row(out + m * ld + first, bias ? bias + first : NULL, rank ? thin + m * rank : NULL, rank ? up + first : NULL, rank,
                           ld_up, parts, count, m, first, n);
        }
}

/* Rows of qvsr/kernels/packing.py's layout in memory, `bits` bytes a group of eight values, less centre: values start .. start + count
 * of each row, to out[rows][count]. */
void qvsr_unpack(const uint8_t *packed, int64_t row_bytes, int bits, int64_t start, int64_t count, const int8_t *centre, int8_t *out,
                 int64_t rows, int threads) {
    const int64_t groups = row_bytes / bits;
    const int mask = (1 << bits) - 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        const uint8_t *row = packed + m * row_bytes;
        int8_t *y = out + m * count;
        const uint8_t c = (uint8_t)centre[m];
        if (bits == 8) {
            for (int64_t i = 0; i < count; i++) y[i] = (int8_t)(uint8_t)(row[start + i] - c);
            continue;
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
}
