/* The small work between the matrix products, fused: what myna/engine/kernels.py says in torch, in C.
 *
 * Compiled on first use by the machine's own C compiler (see native.py), for its own vector width. No header of torch or
 * OpenMP is needed: native.py hands over the address of GOMP_parallel of the OpenMP that torch has loaded, so that the two
 * share one pool of threads. Work is dealt out in small pieces from one counter: a core that is kept busy by somebody else
 * takes fewer of them. Every piece writes its own part of the output, so the bytes do not depend on who did what.
 *
 * T tokens, d width, D head width. Sums are float32. `ld…` are row strides in elements.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VW 16
#include <immintrin.h>
#elif defined(__AVX__)
#define VW 8
#include <immintrin.h>
#else
#define VW 4
#endif

typedef float vf __attribute__((vector_size(VW * 4)));
typedef float vfu __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));
typedef uint16_t vhu __attribute__((vector_size(VW * 2), aligned(2), may_alias));
typedef int8_t vb __attribute__((vector_size(VW)));
typedef int8_t vbu __attribute__((vector_size(VW), aligned(1), may_alias));
typedef int32_t viu __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint16_t bf16;

#define ALWAYS static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* ---- threads ---- */

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned);
static parallel_fn run_parallel;
static int num_threads = 1;

void myna_threads(void *gomp_parallel, int threads) {
    run_parallel = (parallel_fn)gomp_parallel;
    num_threads = run_parallel ? threads : 1;
}

typedef void (*piece_fn)(void *job, int64_t piece);
typedef struct {
    piece_fn fn;
    void *job;
    int64_t pieces;
    int64_t next;
} deal;

static void take(void *arg) {
    deal *d = arg;
    for (;;) {
        int64_t piece = __atomic_fetch_add(&d->next, 1, __ATOMIC_RELAXED);
        if (piece >= d->pieces) return;
        d->fn(d->job, piece);
    }
}

static void for_pieces(piece_fn fn, void *job, int64_t pieces) {
    deal d = {fn, job, pieces, 0};
    if (num_threads > 1 && pieces > 1)
        run_parallel(take, &d, (unsigned)num_threads, 0);
    else
        take(&d);
}

/* ---- vectors ---- */

ALWAYS vf splat(float x) { return x - (vf){}; } /* 0 + x would be an addition, as it makes 0 of -0; this is none */
ALWAYS vf vmax(vf a, vf b) { vi m = a > b; return (vf)(((vi)a & m) | ((vi)b & ~m)); }
ALWAYS vf vmin(vf a, vf b) { vi m = a < b; return (vf)(((vi)a & m) | ((vi)b & ~m)); }
ALWAYS vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
#if defined(__AVX__)
ALWAYS __m256 lower(vf x) {
#if VW == 16
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)x, 1)));
#else
    return (__m256)x;
#endif
}
ALWAYS float total(vf x) {
    __m256 y = lower(x);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
#else
ALWAYS float total(vf x) { float s = 0; for (int i = 0; i < VW; i++) s += x[i]; return s; }
#endif
ALWAYS float largest(vf x) {
    float b[VW];
    *(vfu *)b = x;
    for (int n = VW / 2; n; n /= 2)
        for (int i = 0; i < n; i++) b[i] = MAX(b[i], b[i + n]);
    return b[0];
}
ALWAYS vi lanes(void) { vi x; for (int i = 0; i < VW; i++) x[i] = i; return x; }

ALWAYS vf load_f(const float *p) { return *(const vfu *)p; }
ALWAYS void store_f(float *p, vf x) { *(vfu *)p = x; }
ALWAYS vf load_h(const bf16 *p) { return (vf)(__builtin_convertvector(*(const vhu *)p, vu) << 16); }
ALWAYS void store_h(bf16 *p, vf x) {
#if defined(__AVX512BF16__) && VW == 16
    *(vhu *)p = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu u = (vu)x;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16; /* to the nearest, ties to even */
    vu kept = (u >> 16) | 0x40;                        /* a NaN stays one */
    vu is_nan = (vu)((u & 0x7fffffff) > 0x7f800000);
    *(vhu *)p = __builtin_convertvector((kept & is_nan) | (rounded & ~is_nan), vh);
#endif
}

/* the first n of VW; the rest of a load is 0 */
ALWAYS vf load_f_part(const float *p, int n) { float b[VW] = {0}; memcpy(b, p, n * 4); return load_f(b); }
ALWAYS void store_f_part(float *p, vf x, int n) { float b[VW]; store_f(b, x); memcpy(p, b, n * 4); }
ALWAYS vf load_h_part(const bf16 *p, int n) { bf16 b[VW] = {0}; memcpy(b, p, n * 2); return load_h(b); }
ALWAYS void store_h_part(bf16 *p, vf x, int n) { bf16 b[VW]; store_h(b, x); memcpy(p, b, n * 2); }

/* e^x to about one unit in the last place (Cephes expf: Moshier 1989); 0 below -87.3, a NaN stays one */
ALWAYS vf vexp(vf x) {
    vi tiny = x < splat(-87.33f), is_nan = x != x;
    vf given = x;
    x = vmin(vmax(x, splat(-87.33f)), splat(88.3f));
    vf n = x * 1.44269504088896341f;
    n = (n + 12582912.0f) - 12582912.0f; /* to the nearest whole number */
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    vf scale = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return choose(is_nan, given, choose(tiny, splat(0), y * scale));
}

ALWAYS vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
ALWAYS vf vtanh(vf x) { return 1.0f - 2.0f / (vexp(x + x) + 1.0f); }

/* every loop over n elements: i, m = how many of this vector are real */
#define EACH(i, m, n) for (int64_t i = 0, m = MIN(VW, (n)); i < (n); i += VW, m = MIN(VW, (n) - i))

#include "native_attention.h"

/* ---- for both kinds of activation ---- */

#define TYPE float
#define NAME(x) x##_f32
#define LOAD load_f
#define STORE store_f
#define LOAD_PART load_f_part
#define STORE_PART store_f_part
#include "native_typed.h"
#undef TYPE
#undef NAME
#undef LOAD
#undef STORE
#undef LOAD_PART
#undef STORE_PART

#define TYPE bf16
#define NAME(x) x##_bf16
#define LOAD load_h
#define STORE store_h
#define LOAD_PART load_h_part
#define STORE_PART store_h_part
#include "native_typed.h"
