/* Vectors of 16 numbers, by GCC's vector types. */
#ifndef QVSR_VECTORS_H
#define QVSR_VECTORS_H
#include <stdint.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16 };
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float vec_load __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t hvec_load __attribute__((vector_size(2 * LANES), aligned(2)));

static inline vec splat(float value) { return value - (vec){0}; }
static inline vec either(ivec which, vec yes, vec no) { return (vec)(((ivec)yes & which) | ((ivec)no & ~which)); }

/* bfloat16 is the upper half of float32. */
static inline vec widened(hvec v) { return (vec)(__builtin_convertvector(v, uvec) << 16); }
static inline float widened_one(uint16_t v) {
    const union { uint32_t bits; float value; } one = {(uint32_t)v << 16};
    return one.value;
}

/* To bfloat16: to the nearest, in the middle to the even one; NaN stays NaN. */
static inline hvec narrowed(vec v) {
    const uvec u = (uvec)v, up = u + 0x7fff + ((u >> 16) & 1);
    return __builtin_convertvector(((uvec)(v != v) & 0x7fc00000u) >> 16 | (up & (uvec)(v == v)) >> 16, hvec);
}

/* a * b + c, rounded once where the processor can. */
static inline vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    for (int l = 0; l < LANES; l++) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return c;
#else
    return a * b + c;
#endif
}

/* 16 rows of 16 values to 16 columns. */
static inline __attribute__((always_inline)) void transpose(vec *m) {
#ifdef __AVX512F__
    __m512 *a = (__m512 *)m, b[16]; /* pairs, fours, then quarters of vectors: no tables of places, which would want registers */
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            const __m512d x = (__m512d)b[i + k], y = (__m512d)b[i + k + 2];
            a[i + 2 * k] = (__m512)_mm512_unpacklo_pd(x, y);
            a[i + 2 * k + 1] = (__m512)_mm512_unpackhi_pd(x, y);
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; k++) {
            b[i + k] = _mm512_shuffle_f32x4(a[i + k], a[i + k + 4], 0x88);
            b[i + k + 4] = _mm512_shuffle_f32x4(a[i + k], a[i + k + 4], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        a[k] = _mm512_shuffle_f32x4(b[k], b[k + 8], 0x88);
        a[k + 8] = _mm512_shuffle_f32x4(b[k], b[k + 8], 0xdd);
    }
#else
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
#endif
}

#endif
