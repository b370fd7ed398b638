/* Activations to integers: rotate, find the range, rotate again, round, channels last.
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
#include "vectors.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LARGEST_FACTOR = 64 };

/* One part of an input: its channels start .. start + n of `channels`.
 * frames x positions rows; channels first: x[frame][channel][position], else x[frame][position][channel]. */
typedef struct {
    const void *x; /* float32, or bfloat16 if `half` */
    int64_t frames, positions, channels, start, n;
    int32_t channels_first, signs_first; /* signs before the rotation (linear layers), or after it (convolutions) */
    const float *signs;                  /* n values of +-1/sqrt(n), or NULL: not rotated */
    const float *factors;                /* the factor matrices one after another, each of size s stored so that out[i] = sum h[i*s+j] in[j] */
    const int32_t *sizes;
    int32_t count, half;
} Part;

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

/* Products and sums are fused: those by +-1 are exact, so the bytes are the same. `together` rows at a time hide how long a sum takes. */
static inline __attribute__((always_inline)) void rows_of(vec *t, int64_t inner, int s, const float *h, const vec *in, int k, int together) {
    vec y[10];
#pragma GCC unroll 10
    for (int r = 0; r < together; r++) y[r] = (vec){0};
#pragma GCC unroll 20
    for (int j = 0; j < s; j++)
#pragma GCC unroll 10
        for (int r = 0; r < together; r++) y[r] = fused(in[j], splat(h[(k + r) * s + j]), y[r]);
#pragma GCC unroll 10
    for (int r = 0; r < together; r++) t[(k + r) * inner] = y[r];
}

static inline __attribute__((always_inline)) void product(vec *t, int64_t n, int64_t inner, int s, const float *h, int together) {
    vec in[LARGEST_FACTOR];
    for (int64_t o = 0; o < n; o += s * inner)
        for (int64_t i = o; i < o + inner; i++) {
#pragma GCC unroll 20
            for (int j = 0; j < s; j++) in[j] = t[i + j * inner];
            int k = 0;
            for (; k + together <= s; k += together) rows_of(t + i, inner, s, h, in, k, together);
            for (; k < s; k++) rows_of(t + i, inner, s, h, in, k, 1);
        }
}

/* The two sizes that channels of diffusion models ask for, and any other. */
static void dense(vec *t, int64_t n, int64_t inner, int s, const float *h) {
    if (s == 20)
        product(t, n, inner, 20, h, 10);
    else if (s == 12)
        product(t, n, inner, 12, h, 6);
    else
        product(t, n, inner, s, h, 8);
}

/* A value, and 16 side by side, of an input. */
static inline __attribute__((always_inline)) float one(const Part *p, int64_t at, int half) {
    return half ? widened_one(((const uint16_t *)p->x)[at]) : ((const float *)p->x)[at];
}
static inline __attribute__((always_inline)) vec sixteen(const Part *p, int64_t at, int half) {
    return half ? widened(*(const hvec_load *)((const uint16_t *)p->x + at)) : (vec) * (const vec_load *)((const float *)p->x + at);
}

/* All channels of up to 16 positions. Lanes beyond `width` repeat the first position: they change no range. */
static inline __attribute__((always_inline)) void read(const Part *p, int64_t frame, int64_t first, int width, vec *t, int half) {
    const int64_t n = p->n;
    if (p->channels_first) {
        int64_t at = (frame * p->channels + p->start) * p->positions + first;
        for (int64_t c = 0; c < n; c++, at += p->positions) {
            if (width == LANES)
                t[c] = sixteen(p, at, half);
            else
                for (int l = 0; l < LANES; l++) t[c][l] = one(p, at + (l < width ? l : 0), half);
        }
    } else {
        const int64_t at = (frame * p->positions + first) * p->channels + p->start;
        int64_t c = 0;
        for (; c + 16 <= n; c += 16) {
            for (int l = 0; l < LANES; l++) t[c + l] = sixteen(p, at + (l < width ? l : 0) * p->channels + c, half);
            transpose(t + c);
        }
        for (; c < n; c++)
            for (int l = 0; l < LANES; l++) t[c][l] = one(p, at + (l < width ? l : 0) * p->channels + c, half);
    }
}

/* The same, rotated. */
static void load(const Part *p, int64_t frame, int64_t first, int width, vec *t) {
    const int64_t n = p->n;
    if (p->half)
        read(p, frame, first, width, t, 1);
    else
        read(p, frame, first, width, t, 0);
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

/* x / s, rounded once, of s above 0 and its rounded inverse. Two corrections by the exact remainder reach the nearest quotient (Markstein 1990)
 * in a quarter of the time of a division; where the remainder is none, next to the ends of the exponents, it is divided. */
static inline vec quotient(vec x, vec s, vec inverse) {
#ifdef __AVX512F__
    vec q = x * inverse;
    q = fused(fused(-q, s, x), inverse, q);
    q = fused(fused(-q, s, x), inverse, q);
    const ivec odd = (q != q) | (s < 1e-30f) | (s > 1e30f);
    return _mm512_test_epi32_mask((__m512i)odd, (__m512i)odd) ? x / s : q;
#else
    (void)inverse;
    return x / s;
#endif
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
            const vec inverse = 1 / s;
            uint8_t *out = q + row * n;
            for (int64_t c = 0; c < n; c += 4 * LANES) {
                const int64_t some = n - c < 4 * LANES ? n - c : 4 * LANES;
                vec packed[LANES];
                for (int64_t g = 0; g < (some + 3) / 4; g++) {
                    uvec four = {0};
                    for (int64_t k = 0; k < 4 && 4 * g + k < some; k++) {
                        const vec value = t[c + 4 * g + k];
                        missing |= value != value;
                        vec v = quotient(value, s, inverse);
                        for (int l = 0; l < LANES; l++) v[l] = __builtin_rintf(v[l]);
                        v = either(v < least, least, v);
                        v = either(v > most, most, v);
                        four |= (uvec)__builtin_convertvector(v + z, ivec) << (8 * k);
                    }
                    packed[g] = (vec)four;
                }
                transpose(packed); /* a position's 64 integers side by side */
                for (int l = 0; l < width; l++) {
                    if (some == 4 * LANES)
                        memcpy(out + l * n + c, packed + l, 4 * LANES);
                    else
                        memcpy(out + l * n + c, packed + l, (size_t)some);
                }
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
