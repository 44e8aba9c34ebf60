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

ALWAYS vf splat(float x) { return (vf){} + x; }
ALWAYS vf vmax(vf a, vf b) { vi m = a > b; return (vf)(((vi)a & m) | ((vi)b & ~m)); }
ALWAYS vf vmin(vf a, vf b) { vi m = a < b; return (vf)(((vi)a & m) | ((vi)b & ~m)); }
ALWAYS vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
ALWAYS float total(vf x) { float s = 0; for (int i = 0; i < VW; i++) s += x[i]; return s; }
ALWAYS float largest(vf x) { float s = x[0]; for (int i = 1; i < VW; i++) s = MAX(s, x[i]); return s; }
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

/* ---- attention's two products, over float32 ---- */

/* out[r][j] = rows[r] · columns of matT ([D][ld]), r < nr ≤ 4, j < n; up to VW - 1 more of each row are written */
#define DOTS(NR, NV)                                                                                              \
    static void dots_##NR##_##NV(const float *rows, int64_t ldr, const float *mt, int64_t ld, int64_t D, float *out, \
                                 int64_t ldo) {                                                                   \
        vf acc[NR][NV];                                                                                           \
        for (int r = 0; r < NR; r++)                                                                              \
            for (int v = 0; v < NV; v++) acc[r][v] = splat(0);                                                    \
        for (int64_t d = 0; d < D; d++) {                                                                         \
            vf b[NV];                                                                                             \
            for (int v = 0; v < NV; v++) b[v] = load_f(mt + d * ld + v * VW);                                     \
            for (int r = 0; r < NR; r++) {                                                                        \
                vf a = splat(rows[r * ldr + d]);                                                                  \
                for (int v = 0; v < NV; v++) acc[r][v] += a * b[v];                                               \
            }                                                                                                     \
        }                                                                                                         \
        for (int r = 0; r < NR; r++)                                                                              \
            for (int v = 0; v < NV; v++) store_f(out + r * ldo + v * VW, acc[r][v]);                              \
    }
DOTS(4, 4) DOTS(4, 3) DOTS(4, 2) DOTS(4, 1) DOTS(1, 4) DOTS(1, 3) DOTS(1, 2) DOTS(1, 1)

ALWAYS void dots(const float *rows, int64_t ldr, int nr, const float *mt, int64_t ld, int64_t D, int64_t n, float *out,
                 int64_t ldo) {
    int64_t j = 0;
    while (j < n) {
        int64_t left = n - j;
        int nv = left > 3 * VW ? 4 : left > 2 * VW ? 3 : left > VW ? 2 : 1;
        if (nr == 4) {
            if (nv == 4) dots_4_4(rows, ldr, mt + j, ld, D, out + j, ldo);
            else if (nv == 3) dots_4_3(rows, ldr, mt + j, ld, D, out + j, ldo);
            else if (nv == 2) dots_4_2(rows, ldr, mt + j, ld, D, out + j, ldo);
            else dots_4_1(rows, ldr, mt + j, ld, D, out + j, ldo);
        } else {
            for (int r = 0; r < nr; r++) {
                if (nv == 4) dots_1_4(rows + r * ldr, ldr, mt + j, ld, D, out + r * ldo + j, ldo);
                else if (nv == 3) dots_1_3(rows + r * ldr, ldr, mt + j, ld, D, out + r * ldo + j, ldo);
            else if (nv == 2) dots_1_2(rows + r * ldr, ldr, mt + j, ld, D, out + r * ldo + j, ldo);
                else dots_1_1(rows + r * ldr, ldr, mt + j, ld, D, out + r * ldo + j, ldo);
            }
        }
        j += nv * VW;
    }
}

/* out[r] += sum over j < n of p[r · ldp + j · step] · mat[j] ([n][D]); D is a multiple of VW */
#define BLEND(NR, NV)                                                                                             \
    static void blend_##NR##_##NV(const float *p, int64_t ldp, int64_t step, int64_t n, const float *mat, int64_t D, \
                                  float *out, int64_t ldo) {                                                      \
        vf acc[NR][NV];                                                                                           \
        for (int r = 0; r < NR; r++)                                                                              \
            for (int v = 0; v < NV; v++) acc[r][v] = load_f(out + r * ldo + v * VW);                              \
        for (int64_t j = 0; j < n; j++) {                                                                         \
            vf b[NV];                                                                                             \
            for (int v = 0; v < NV; v++) b[v] = load_f(mat + j * D + v * VW);                                     \
            for (int r = 0; r < NR; r++) {                                                                        \
                vf a = splat(p[r * ldp + j * step]);                                                              \
                for (int v = 0; v < NV; v++) acc[r][v] += a * b[v];                                               \
            }                                                                                                     \
        }                                                                                                         \
        for (int r = 0; r < NR; r++)                                                                              \
            for (int v = 0; v < NV; v++) store_f(out + r * ldo + v * VW, acc[r][v]);                              \
    }
BLEND(4, 4) BLEND(4, 1) BLEND(1, 4) BLEND(1, 1)

ALWAYS void blend(const float *p, int64_t ldp, int64_t step, int nr, int64_t n, const float *mat, int64_t D, float *out,
                  int64_t ldo) {
    for (int64_t c = 0; c < D;) {
        int nv = D - c >= 4 * VW ? 4 : 1;
        if (nr == 4) {
            if (nv == 4) blend_4_4(p, ldp, step, n, mat + c, D, out + c, ldo);
            else blend_4_1(p, ldp, step, n, mat + c, D, out + c, ldo);
        } else {
            for (int r = 0; r < nr; r++) {
                if (nv == 4) blend_1_4(p + r * ldp, ldp, step, n, mat + c, D, out + r * ldo + c, ldo);
                else blend_1_1(p + r * ldp, ldp, step, n, mat + c, D, out + r * ldo + c, ldo);
            }
        }
        c += nv * VW;
    }
}

/* ---- attention: where everything lies ---- */

/* A key at position c of a row is seen by a query at position p of it where p - window < c <= p. Segments make a tree: the
 * row of a query is its segment's ancestors, then its segment, so position and place in that row are one number. */
typedef struct {
    int64_t T, H, KV, D, R;       /* tokens, query heads, key heads, head width, rotary width */
    int64_t query_at, query_step, key_at, value_at, kv_step;
    int64_t window;               /* very large: none */
    int64_t num_segments, ldt;    /* ldt: row stride of the transposed copies */
    const int64_t *segments;      /* [S][4]: start, length, position of its first token, parent */
    const int64_t *blocks;        /* [B][3]: segment, first token, tokens (at most 4) */
    int64_t num_blocks;
    const int64_t *below;         /* descendants of each segment, one after another … */
    const int64_t *below_at;      /* … [S + 1] */
    const float *cos, *sin;       /* [T][R] */
    const float *query_norm, *key_norm; /* [D] or null */
    float query_eps, key_eps, scale, softcap; /* softcap 0: none */
    float *q, *k, *v;             /* [H][T][D], [KV][T][D] */
    float *qt, *kt, *vt;          /* [H][D][ldt] … */
    float *lse;                   /* [H][T] */
    float *o;                     /* [H][T][D]; in the backward the incoming gradient */
    float *ot;                    /* [H][D][ldt]: the incoming gradient */
    float *delta;                 /* [H][T] */
    float *gq, *gk, *gv;          /* gradients, as q, k, v */
    float *p, *gp;                /* [H][T][ldp]: probabilities and their scores' gradients by key position; null: not kept */
    int64_t ldp;
} attention_job;

enum { ROWS = 4 };

/* scratch of a running piece: from the stack of the thread where it fits, else from the heap */
#define SCRATCH(name, floats)                                                                 \
    float name##_near[16384] __attribute__((aligned(64)));                                    \
    float *name = (floats) <= 16384 ? name##_near : (float *)malloc(sizeof(float) * (floats))
#define SCRATCH_END(name) do { if (name != name##_near) free(name); } while (0)

static void row_ranges(const attention_job *a, int64_t segment, int64_t *chain, int *depth) {
    int n = 0;
    for (int64_t s = segment; s >= 0; s = a->segments[4 * s + 3]) chain[n++] = s;
    *depth = n;
}

/* scores of ROWS queries against the keys of their row, by position, through columns of `mt` (kt or vt) */
static void row_dots(const attention_job *a, const int64_t *chain, int depth, int64_t first_seen, int64_t last,
                     const float *rows, int nr, const float *mt, float *out, int64_t ldo) {
    for (int n = depth - 1; n >= 0; n--) {
        const int64_t *s = a->segments + 4 * chain[n];
        int64_t from = MAX(s[2], first_seen), to = MIN(s[2] + s[1] - 1, last);
        if (to < from) continue;
        dots(rows, a->D, nr, mt + s[0] + (from - s[2]), a->ldt, a->D, to - from + 1, out + from, ldo);
    }
}

static void row_blend(const attention_job *a, const int64_t *chain, int depth, int64_t first_seen, int64_t last,
                      const float *p, int64_t ldp, int nr, const float *mat, float *out, int64_t ldo) {
    for (int n = depth - 1; n >= 0; n--) {
        const int64_t *s = a->segments + 4 * chain[n];
        int64_t from = MAX(s[2], first_seen), to = MIN(s[2] + s[1] - 1, last);
        if (to < from) continue;
        blend(p + from, ldp, 1, nr, to - from + 1, mat + (s[0] + (from - s[2])) * a->D, a->D, out, ldo);
    }
}

ALWAYS vf capped(vf s, float scale, float cap) {
    s = s * scale;
    return cap > 0 ? vtanh(s / cap) * cap : s;
}

enum { DEEPEST = 4096 };

static void attend(void *job, int64_t piece) {
    const attention_job *a = job;
    int64_t head = piece / a->num_blocks;
    const int64_t *block = a->blocks + 3 * (piece % a->num_blocks);
    const int64_t *own = a->segments + 4 * block[0];
    int64_t chain[DEEPEST];
    int depth, nr = (int)block[2];
    row_ranges(a, block[0], chain, &depth);
    int64_t first = own[2] + block[1] - own[0], last = first + nr - 1; /* positions of the queries */
    int64_t seen = MAX(0, first - a->window + 1);
    int64_t ld = last + 1 + 4 * VW;
    SCRATCH(p, ROWS * ld);
    int64_t kv = head / (a->H / a->KV);
    const float *q = a->q + (head * a->T + block[1]) * a->D;
    float *o = a->o + (head * a->T + block[1]) * a->D;
    row_dots(a, chain, depth, seen, last, q, nr, a->kt + kv * a->D * a->ldt, p, ld);
    for (int r = 0; r < nr; r++) {
        float *row = p + r * ld;
        int64_t begin = MAX(0, first + r - a->window + 1), end = first + r + 1;
        for (int64_t j = seen; j < begin; j++) row[j] = -INFINITY;
        for (int64_t j = end; j <= last + VW; j++) row[j] = -INFINITY;
        vf top = splat(-INFINITY);
        for (int64_t j = seen; j < end; j += VW) {
            vf s = load_f(row + j);
            vi out = s == splat(-INFINITY);
            s = choose(out, s, capped(s, a->scale, a->softcap));
            store_f(row + j, s);
            top = vmax(top, s);
        }
        float most = largest(top);
        vf sum = splat(0);
        for (int64_t j = seen; j <= last; j += VW) {
            vf e = j < end ? vexp(load_f(row + j) - most) : splat(0);
            store_f(row + j, e);
            sum += e;
        }
        float all = total(sum), inverse = 1.0f / all;
        a->lse[head * a->T + block[1] + r] = most + logf(all);
        for (int64_t j = seen; j <= last; j += VW) store_f(row + j, load_f(row + j) * inverse);
        memset(o + r * a->D, 0, sizeof(float) * a->D);
    }
    row_blend(a, chain, depth, seen, last, p, ld, nr, a->v + kv * a->T * a->D, o, a->D);
    SCRATCH_END(p);
}

/* from a score before scaling and the row's lse: the probability, and d capped / d score */
ALWAYS vf probability(vf s, float scale, float cap, vf lse, vf *slope) {
    s = s * scale;
    *slope = splat(scale);
    if (cap > 0) {
        vf t = vtanh(s / cap);
        s = t * cap;
        *slope = scale * (1.0f - t * t);
    }
    return vexp(s - lse);
}

/* gradient of a block of queries */
static void attend_back_q(void *job, int64_t piece) {
    const attention_job *a = job;
    int64_t head = piece / a->num_blocks;
    const int64_t *block = a->blocks + 3 * (piece % a->num_blocks);
    const int64_t *own = a->segments + 4 * block[0];
    int64_t chain[DEEPEST];
    int depth, nr = (int)block[2];
    row_ranges(a, block[0], chain, &depth);
    int64_t first = own[2] + block[1] - own[0], last = first + nr - 1;
    int64_t seen = MAX(0, first - a->window + 1);
    int64_t kv = head / (a->H / a->KV), at = head * a->T + block[1];
    int64_t ld = a->p ? a->ldp : last + 1 + 4 * VW;
    SCRATCH(near_s, a->p ? 1 : ROWS * ld);
    SCRATCH(near_gp, a->p ? 1 : ROWS * ld);
    float *s = a->p ? a->p + at * ld : near_s, *gp = a->p ? a->gp + at * ld : near_gp;
    row_dots(a, chain, depth, seen, last, a->q + at * a->D, nr, a->kt + kv * a->D * a->ldt, s, ld);
    row_dots(a, chain, depth, seen, last, a->o + at * a->D, nr, a->vt + kv * a->D * a->ldt, gp, ld);
    float *gq = a->gq + at * a->D;
    for (int r = 0; r < nr; r++) {
        float *row = s + r * ld, *grow = gp + r * ld;
        int64_t begin = MAX(0, first + r - a->window + 1), end = first + r;
        vf lse = splat(a->lse[at + r]), delta = splat(a->delta[at + r]);
        for (int64_t j = seen; j <= last; j += VW) {
            vf slope, p = probability(load_f(row + j), a->scale, a->softcap, lse, &slope);
            vi place = lanes() + (int32_t)j;
            vi in = (place >= (int32_t)begin) & (place <= (int32_t)end);
            store_f(grow + j, choose(in, p * (load_f(grow + j) - delta) * slope, splat(0)));
            store_f(row + j, choose(in, p, splat(0)));
        }
        /* a block of keys that only the rows before this one see in part is read whole */
        for (int64_t j = MAX(0, seen - ROWS); j < seen; j++) row[j] = grow[j] = 0;
        memset(gq + r * a->D, 0, sizeof(float) * a->D);
    }
    row_blend(a, chain, depth, seen, last, gp, ld, nr, a->k + kv * a->T * a->D, gq, a->D);
    SCRATCH_END(near_gp);
    SCRATCH_END(near_s);
}

/* what the queries [from, from + n) of one head, the first at position p0, give the keys of a block */
static void give_back_kv(const attention_job *a, int64_t head, int64_t kv, const int64_t *block, int64_t key0, int64_t from,
                         int64_t n, int64_t p0, float *s, float *gp) {
    enum { WIDE = 256 };
    int nr = (int)block[2];
    if (a->p) {
        int64_t at = head * a->T + from, place = at * a->ldp + key0, own = (kv * a->T + block[1]) * a->D;
        blend(a->p + place, 1, a->ldp, nr, n, a->o + at * a->D, a->D, a->gv + own, a->D);
        blend(a->gp + place, 1, a->ldp, nr, n, a->q + at * a->D, a->D, a->gk + own, a->D);
        return;
    }
    const float *k = a->k + (kv * a->T + block[1]) * a->D, *v = a->v + (kv * a->T + block[1]) * a->D;
    float *gk = a->gk + (kv * a->T + block[1]) * a->D, *gv = a->gv + (kv * a->T + block[1]) * a->D;
    const float *qt = a->qt + head * a->D * a->ldt, *gt = a->ot + head * a->D * a->ldt;
    for (int64_t c = 0; c < n; c += WIDE) {
        int64_t wide = MIN(WIDE, n - c), ld = WIDE + 4 * VW, at = head * a->T + from + c;
        dots(k, a->D, nr, qt + from + c, a->ldt, a->D, wide, s, ld);
        dots(v, a->D, nr, gt + from + c, a->ldt, a->D, wide, gp, ld);
        for (int r = 0; r < nr; r++) {
            int32_t key = (int32_t)(key0 + r);
            EACH(j, m, wide) {
                vf lse = m == VW ? load_f(a->lse + at + j) : load_f_part(a->lse + at + j, (int)m);
                vf delta = m == VW ? load_f(a->delta + at + j) : load_f_part(a->delta + at + j, (int)m);
                vf slope, p = probability(load_f(s + r * ld + j), a->scale, a->softcap, lse, &slope);
                vi query = lanes() + (int32_t)(p0 + c + j);
                vi in = (query >= key) & (query - key < (int32_t)MIN(a->window, 1 << 30)) & (lanes() < (int32_t)m);
                p = choose(in, p, splat(0));
                vf g = choose(in, p * (load_f(gp + r * ld + j) - delta) * slope, splat(0));
                store_f(s + r * ld + j, p);
                store_f(gp + r * ld + j, g);
            }
        }
        blend(s, ld, 1, nr, wide, a->o + at * a->D, a->D, gv, a->D);
        blend(gp, ld, 1, nr, wide, a->q + at * a->D, a->D, gk, a->D);
    }
}

/* gradient of a block of keys and values, over all queries that see them */
static void attend_back_kv(void *job, int64_t piece) {
    const attention_job *a = job;
    int64_t kv = piece / a->num_blocks;
    const int64_t *block = a->blocks + 3 * (piece % a->num_blocks);
    const int64_t *own = a->segments + 4 * block[0];
    int64_t key0 = own[2] + block[1] - own[0], rep = a->H / a->KV;
    float s[ROWS * (256 + 4 * VW)], gp[ROWS * (256 + 4 * VW)];
    memset(a->gk + (kv * a->T + block[1]) * a->D, 0, sizeof(float) * a->D * block[2]);
    memset(a->gv + (kv * a->T + block[1]) * a->D, 0, sizeof(float) * a->D * block[2]);
    int64_t farthest = key0 + block[2] - 1 + a->window - 1; /* the last position that sees any of them */
    for (int64_t head = kv * rep; head < (kv + 1) * rep; head++) {
        int64_t n = MIN(own[0] + own[1] - block[1], farthest - key0 + 1);
        give_back_kv(a, head, kv, block, key0, block[1], n, key0, s, gp);
        for (int64_t b = a->below_at[block[0]]; b < a->below_at[block[0] + 1]; b++) {
            const int64_t *t = a->segments + 4 * a->below[b];
            int64_t count = MIN(t[1], farthest - t[2] + 1);
            if (count > 0) give_back_kv(a, head, kv, block, key0, t[0], count, t[2], s, gp);
        }
    }
}

/* one head's row: normed where the family does so, turned by its position */
ALWAYS void turn(float *x, int64_t D, int64_t R, const float *cos, const float *sin, const float *norm, float eps) {
    if (norm) {
        vf square = splat(0);
        for (int64_t i = 0; i < D; i += VW) square += load_f(x + i) * load_f(x + i);
        float inverse = 1.0f / sqrtf(total(square) / D + eps);
        for (int64_t i = 0; i < D; i += VW) store_f(x + i, load_f(x + i) * inverse * load_f(norm + i));
    }
    int64_t half = R / 2;
    EACH(i, m, half) {
        if (m == VW) {
            vf a = load_f(x + i), b = load_f(x + half + i);
            store_f(x + i, a * load_f(cos + i) - b * load_f(sin + i));
            store_f(x + half + i, b * load_f(cos + half + i) + a * load_f(sin + half + i));
        } else
            for (int64_t j = i; j < half; j++) {
                float a = x[j], b = x[half + j];
                x[j] = a * cos[j] - b * sin[j];
                x[half + j] = b * cos[half + j] + a * sin[half + j];
            }
    }
}

/* the gradient of `turn`: g in place, x is what went in */
ALWAYS void turn_back(float *g, const float *x, int64_t D, int64_t R, const float *cos, const float *sin, const float *norm,
                      float eps) {
    int64_t half = R / 2;
    EACH(i, m, half) {
        if (m == VW) {
            vf a = load_f(g + i), b = load_f(g + half + i);
            store_f(g + i, a * load_f(cos + i) + b * load_f(sin + half + i));
            store_f(g + half + i, b * load_f(cos + half + i) - a * load_f(sin + i));
        } else
            for (int64_t j = i; j < half; j++) {
                float a = g[j], b = g[half + j];
                g[j] = a * cos[j] + b * sin[half + j];
                g[half + j] = b * cos[half + j] - a * sin[j];
            }
    }
    if (norm) {
        vf square = splat(0), dot = splat(0);
        for (int64_t i = 0; i < D; i += VW) {
            vf v = load_f(x + i);
            square += v * v;
            dot += load_f(g + i) * load_f(norm + i) * v;
        }
        float inverse = 1.0f / sqrtf(total(square) / D + eps);
        float share = total(dot) * inverse * inverse / D;
        for (int64_t i = 0; i < D; i += VW)
            store_f(g + i, (load_f(g + i) * load_f(norm + i) - load_f(x + i) * share) * inverse);
    }
}

ALWAYS void transpose(const float *x, int64_t D, int64_t n, float *out, int64_t ld) {
    for (int64_t d = 0; d < D; d++)
        for (int64_t t = 0; t < n; t++) out[d * ld + t] = x[t * D + d];
}

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
