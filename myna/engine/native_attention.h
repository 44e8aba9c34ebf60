/* Attention over a tree of segments, in float32. Included by native.c.
 *
 * Tiles of queries meet chunks of keys, all of them small enough for a core's nearest caches (Dao et al. 2022, "FlashAttention",
 * algorithms 1 and 4): scores never leave the tile, forward and back. Forward, a tile of queries of one head is a piece of work.
 * Back, one head over one whole tree is: then every gradient has one writer, and scores are made once for all three of them.
 */

/* ---- the two products ---- */

#if VW == 16
#define MOST_VECTORS 4 /* 16 sums of 32 registers */
#else
#define MOST_VECTORS 2 /* 8 of 16 */
#endif

enum { ROWS = 4, TILE = 32, CHUNK = 64, DEEPEST = 4096 };

/* out[r][j] = rows[r] · column j of mt ([D][CHUNK]), j < NV vectors; `out` has rows of CHUNK */
#define DOTS(NR, NV)                                                                                              \
    static void dots_##NR##_##NV(const float *rows, const float *mt, int64_t D, float *out) {                     \
        vf acc[NR][NV];                                                                                           \
        for (int r = 0; r < NR; r++)                                                                              \
            for (int v = 0; v < NV; v++) acc[r][v] = splat(0);                                                    \
        for (int64_t d = 0; d < D; d++) {                                                                         \
            vf b[NV];                                                                                             \
            for (int v = 0; v < NV; v++) b[v] = load_f(mt + d * CHUNK + v * VW);                                  \
            for (int r = 0; r < NR; r++) {                                                                        \
                vf a = splat(rows[r * D + d]);                                                                    \
                for (int v = 0; v < NV; v++) acc[r][v] += a * b[v];                                               \
            }                                                                                                     \
        }                                                                                                         \
        for (int r = 0; r < NR; r++)                                                                              \
            for (int v = 0; v < NV; v++) store_f(out + r * CHUNK + v * VW, acc[r][v]);                            \
    }
DOTS(4, 2) DOTS(4, 1) DOTS(1, 2) DOTS(1, 1)
#if MOST_VECTORS == 4
DOTS(4, 4) DOTS(4, 3) DOTS(1, 4) DOTS(1, 3)
#endif

typedef void (*dots_fn)(const float *, const float *, int64_t, float *);
static const dots_fn DOTS_4[] = {
    dots_4_1, dots_4_2,
#if MOST_VECTORS == 4
    dots_4_3, dots_4_4,
#endif
};
static const dots_fn DOTS_1[] = {
    dots_1_1, dots_1_2,
#if MOST_VECTORS == 4
    dots_1_3, dots_1_4,
#endif
};

/* out[r][j] = rows[r] · column j of mt, r < nr ≤ 4, j < n; up to VW - 1 more of each row are written */
static void dots(const float *rows, int nr, const float *mt, int64_t D, int64_t n, float *out) {
    for (int64_t j = 0; j < n; j += MOST_VECTORS * VW) {
        int nv = (int)MIN(MOST_VECTORS, (n - j + VW - 1) / VW);
        if (nr == 4) DOTS_4[nv - 1](rows, mt + j, D, out + j);
        else
            for (int r = 0; r < nr; r++) DOTS_1[nv - 1](rows + r * D, mt + j, D, out + r * CHUNK + j);
    }
}

/* out[r] += sum over j < n of p[r · ldp + j · step] · mat[j] ([n][D]), NV vectors of it */
#define BLEND(NR, NV)                                                                                             \
    static void blend_##NR##_##NV(const float *p, int64_t ldp, int64_t step, int64_t n, const float *mat, int64_t D, \
                                  float *out) {                                                                   \
        vf acc[NR][NV];                                                                                           \
        for (int r = 0; r < NR; r++)                                                                              \
            for (int v = 0; v < NV; v++) acc[r][v] = load_f(out + r * D + v * VW);                                \
        for (int64_t j = 0; j < n; j++) {                                                                         \
            vf b[NV];                                                                                             \
            for (int v = 0; v < NV; v++) b[v] = load_f(mat + j * D + v * VW);                                     \
            for (int r = 0; r < NR; r++) {                                                                        \
                vf a = splat(p[r * ldp + j * step]);                                                              \
                for (int v = 0; v < NV; v++) acc[r][v] += a * b[v];                                               \
            }                                                                                                     \
        }                                                                                                         \
        for (int r = 0; r < NR; r++)                                                                              \
            for (int v = 0; v < NV; v++) store_f(out + r * D + v * VW, acc[r][v]);                                \
    }
BLEND(4, 1) BLEND(1, 1)
#if MOST_VECTORS == 4
BLEND(4, 4) BLEND(1, 4)
#define BLEND_WIDE(nr) ((nr) == 4 ? blend_4_4 : blend_1_4)
#else
BLEND(4, 2) BLEND(1, 2)
#define BLEND_WIDE(nr) ((nr) == 4 ? blend_4_2 : blend_1_2)
#endif

/* out[r] += sum over j < n of p[r · ldp + j · step] · mat[j], r < nr ≤ 4; D is a multiple of VW */
static void blend(const float *p, int64_t ldp, int64_t step, int nr, int64_t n, const float *mat, int64_t D, float *out) {
    int at_once = nr == 4 ? 4 : 1;
    for (int64_t c = 0; c < D;) {
        int wide = D - c >= MOST_VECTORS * VW;
        for (int r = 0; r < nr; r += at_once)
            (wide ? BLEND_WIDE(nr) : nr == 4 ? blend_4_1 : blend_1_1)(p + r * ldp, ldp, step, n, mat + c, D, out + r * D + c);
        c += wide ? MOST_VECTORS * VW : VW;
    }
}

/* ---- where everything lies ---- */

/* A key at position c of a row is seen by a query at position p of it where p - window < c <= p. Segments make a tree: the
 * row of a query is its segment's ancestors, then its segment, so position and place in that row are one number. */
typedef struct {
    int64_t T, H, KV, D, R;       /* tokens, query heads, key heads, head width, rotary width */
    int64_t query_at, query_step, key_at, value_at, kv_step;
    int64_t window;               /* very large: none */
    int64_t num_places;           /* columns of `kt` and `vt` for each key head */
    const int64_t *segments;      /* [S][4]: start, length, position of its first token, parent */
    const int64_t *blocks;        /* [B][3]: segment, first token, tokens (at most TILE) */
    int64_t num_blocks;
    const int64_t *below;         /* descendants of each segment, one after another … */
    const int64_t *below_at;      /* … [S + 1] */
    const int64_t *places;        /* [S]: where its keys begin among those of `kt`, a multiple of CHUNK */
    const int64_t *roots;         /* [num_roots]: segments without a parent */
    int64_t num_roots;
    const float *cos, *sin;       /* [T][R] */
    const float *query_norm, *key_norm; /* [D] or null */
    float query_eps, key_eps, scale, softcap; /* softcap 0: none */
    float *q, *k, *v;             /* [H][T][D], [KV][T][D] */
    float *kt, *vt;               /* [KV][num_places / CHUNK][D][CHUNK]: keys and values as columns, chunk by chunk */
    float *lse;                   /* [H][T] */
    float *o;                     /* [H][T][D]; in the backward the incoming gradient */
    float *delta;                 /* [H][T] */
    float *gq, *gk, *gv;          /* gradients, [H][T][D] each: those of a key head are the sum of its query heads' */
} attention_job;

/* queries of one head that lie side by side, and keys that do: their first token, its position in the row, how many, and
 * where they are among the columns */
typedef struct {
    int64_t at, position, n, place;
} span;

ALWAYS span span_of(const attention_job *a, int64_t segment, int64_t first, int64_t n) {
    const int64_t *s = a->segments + 4 * segment;
    return (span){s[0] + first, s[2] + first, n, a->places[segment] + first};
}

ALWAYS const float *columns_of(const attention_job *a, const float *columns, int64_t kv, span keys) {
    return columns + (kv * a->num_places + keys.place) * a->D;
}

/* how many of a chunk's keys some of `nr` queries from position p on may see; those beyond come later than all of them */
ALWAYS int64_t keys_seen(span keys, int64_t p, int nr) { return MIN(keys.n, p + nr - keys.position); }

/* 1 where a query at position p sees the key that is j-th of the chunk, for VW keys from j on */
ALWAYS vi sees(const attention_job *a, int64_t p, span keys, int64_t j) {
    int64_t last = MIN(p - keys.position, CHUNK), first = MAX(p - a->window + 1 - keys.position, -1);
    vi place = lanes() + (int32_t)j;
    return (place <= (int32_t)last) & (place >= (int32_t)first);
}

ALWAYS int all_seen(const attention_job *a, int64_t p, span keys, int64_t n) {
    return p >= keys.position + n - 1 && p - a->window < keys.position && n % VW == 0;
}

/* ---- forward ---- */

ALWAYS vf capped(vf s, float scale, float cap) {
    s = s * scale;
    return cap > 0 ? vtanh(s / cap) * cap : s;
}

/* one query's scores of n keys become weights against the largest so far; what was summed before is scaled to it */
ALWAYS void soften(const attention_job *a, float *s, int64_t n, int64_t p, span keys, float *most, float *sum, float *o) {
    if (p < keys.position || p - a->window >= keys.position + n - 1) {
        memset(s, 0, sizeof(float) * n); /* it sees none of them */
        return;
    }
    int all = all_seen(a, p, keys, n);
    vf top = splat(-INFINITY);
    for (int64_t j = 0; j < n; j += VW) {
        vf x = capped(load_f(s + j), a->scale, a->softcap);
        if (!all) x = choose(sees(a, p, keys, j) & (lanes() + (int32_t)j < (int32_t)n), x, splat(-INFINITY));
        store_f(s + j, x);
        top = vmax(top, x);
    }
    float before = *most, now = MAX(before, largest(top));
    vf added = splat(0);
    for (int64_t j = 0; j < n; j += VW) {
        vf e = vexp(load_f(s + j) - now);
        store_f(s + j, e);
        added += e;
    }
    *most = now;
    if (before == -INFINITY) { /* these are its first: `o` is zero */
        *sum = total(added);
        return;
    }
    float fade = before == now ? 1.0f : expf(before - now);
    *sum = *sum * fade + total(added);
    if (fade != 1.0f)
        for (int64_t i = 0; i < a->D; i += VW) store_f(o + i, load_f(o + i) * fade);
}

static void attend(void *job, int64_t piece) {
    const attention_job *a = job;
    int64_t head = piece / a->num_blocks, kv = head / (a->H / a->KV);
    const int64_t *block = a->blocks + 3 * (piece % a->num_blocks);
    span queries = span_of(a, block[0], block[1] - a->segments[4 * block[0]], block[2]);
    int64_t chain[DEEPEST], depth = 0, at = head * a->T + queries.at;
    for (int64_t s = block[0]; s >= 0; s = a->segments[4 * s + 3]) chain[depth++] = s;
    int64_t seen = MAX(0, queries.position - a->window + 1), last = queries.position + queries.n - 1;
    float s[ROWS * CHUNK] __attribute__((aligned(64))), most[TILE], sum[TILE];
    const float *q = a->q + at * a->D;
    float *o = a->o + at * a->D;
    memset(o, 0, sizeof(float) * queries.n * a->D);
    for (int64_t r = 0; r < queries.n; r++) most[r] = -INFINITY, sum[r] = 0;
    while (depth-- > 0) {
        const int64_t *own = a->segments + 4 * chain[depth];
        int64_t end = MIN(own[1], last - own[2] + 1);
        for (int64_t c = MAX(0, seen - own[2]) / CHUNK * CHUNK; c < end; c += CHUNK) {
            span keys = span_of(a, chain[depth], c, MIN(CHUNK, end - c));
            const float *kt = columns_of(a, a->kt, kv, keys), *v = a->v + (kv * a->T + keys.at) * a->D;
            for (int64_t r0 = 0; r0 < queries.n; r0 += ROWS) {
                int nr = (int)MIN(ROWS, queries.n - r0);
                int64_t n = keys_seen(keys, queries.position + r0, nr);
                if (n <= 0) continue;
                dots(q + r0 * a->D, nr, kt, a->D, n, s);
                for (int r = 0; r < nr; r++)
                    soften(a, s + r * CHUNK, n, queries.position + r0 + r, keys, most + r0 + r, sum + r0 + r,
                           o + (r0 + r) * a->D);
                blend(s, CHUNK, 1, nr, n, v, a->D, o + r0 * a->D);
            }
        }
    }
    for (int64_t r = 0; r < queries.n; r++) {
        float inverse = 1.0f / sum[r];
        a->lse[at + r] = most[r] + logf(sum[r]);
        for (int64_t i = 0; i < a->D; i += VW) store_f(o + r * a->D + i, load_f(o + r * a->D + i) * inverse);
    }
}

/* ---- backward ---- */

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

/* one query's scores become its probabilities, the products of its gradient with the values the scores' gradients; n keys of
 * them, and zeros up to `width` */
ALWAYS void harden(const attention_job *a, float *s, float *gs, int64_t n, int64_t width, int64_t p, span keys, int64_t at) {
    int all = all_seen(a, p, keys, n);
    vf lse = splat(a->lse[at]), delta = splat(a->delta[at]);
    for (int64_t j = 0; j < n; j += VW) {
        vf slope, weight = probability(load_f(s + j), a->scale, a->softcap, lse, &slope);
        vf g = weight * (load_f(gs + j) - delta) * slope;
        if (!all) {
            vi in = sees(a, p, keys, j) & (lanes() + (int32_t)j < (int32_t)n);
            weight = choose(in, weight, splat(0));
            g = choose(in, g, splat(0));
        }
        store_f(s + j, weight);
        store_f(gs + j, g);
    }
    for (int64_t j = (n + VW - 1) / VW * VW; j < width; j += VW) {
        store_f(s + j, splat(0));
        store_f(gs + j, splat(0));
    }
}

/* what one tile of queries and one chunk of keys give each other */
static void attend_back_tile(const attention_job *a, int64_t head, span queries, span keys) {
    int64_t kv = head / (a->H / a->KV), D = a->D, at = head * a->T + queries.at, key = head * a->T + keys.at;
    float s[TILE * CHUNK] __attribute__((aligned(64))), gs[TILE * CHUNK] __attribute__((aligned(64)));
    const float *kt = columns_of(a, a->kt, kv, keys), *vt = columns_of(a, a->vt, kv, keys);
    const float *k = a->k + (kv * a->T + keys.at) * D, *q = a->q + at * D, *g = a->o + at * D;
    for (int64_t r0 = 0; r0 < queries.n; r0 += ROWS) {
        int nr = (int)MIN(ROWS, queries.n - r0);
        int64_t n = MAX(0, keys_seen(keys, queries.position + r0, nr));
        float *rows = s + r0 * CHUNK, *grows = gs + r0 * CHUNK;
        dots(q + r0 * D, nr, kt, D, n, rows);
        dots(g + r0 * D, nr, vt, D, n, grows);
        for (int r = 0; r < nr; r++)
            harden(a, rows + r * CHUNK, grows + r * CHUNK, n, keys.n, queries.position + r0 + r, keys, at + r0 + r);
        blend(grows, CHUNK, 1, nr, n, k, D, a->gq + (at + r0) * D);
    }
    for (int64_t c = 0; c < keys.n; c += ROWS) {
        int nr = (int)MIN(ROWS, keys.n - c);
        int64_t first = MAX(0, keys.position + c - queries.position), n = queries.n - first; /* earlier ones do not see it */
        if (n <= 0) continue;
        blend(s + first * CHUNK + c, 1, CHUNK, nr, n, g + first * D, D, a->gv + (key + c) * D);
        blend(gs + first * CHUNK + c, 1, CHUNK, nr, n, q + first * D, D, a->gk + (key + c) * D);
    }
}

/* all gradients of one head over one tree */
static void attend_back(void *job, int64_t piece) {
    const attention_job *a = job;
    int64_t head = piece % a->H, root = a->roots[piece / a->H];
    int64_t num_members = a->below_at[root + 1] - a->below_at[root] + 1;
    for (int64_t m = 0; m < num_members; m++) {
        int64_t member = m ? a->below[a->below_at[root] + m - 1] : root;
        const int64_t *own = a->segments + 4 * member;
        int64_t from = (head * a->T + own[0]) * a->D, bytes = sizeof(float) * own[1] * a->D;
        memset(a->gq + from, 0, bytes);
        memset(a->gk + from, 0, bytes);
        memset(a->gv + from, 0, bytes);
    }
    for (int64_t m = 0; m < num_members; m++) {
        int64_t member = m ? a->below[a->below_at[root] + m - 1] : root;
        const int64_t *own = a->segments + 4 * member;
        for (int64_t c = 0; c < own[1]; c += CHUNK) {
            span keys = span_of(a, member, c, MIN(CHUNK, own[1] - c));
            for (int64_t b = a->below_at[member] - 1; b < a->below_at[member + 1]; b++) {
                int64_t reader = b < a->below_at[member] ? member : a->below[b];
                const int64_t *other = a->segments + 4 * reader;
                /* from the first query that sees one of them to the last one whose window holds one */
                int64_t first = MAX(0, keys.position - other[2]) / TILE * TILE;
                int64_t end = MIN(other[1], keys.position + keys.n - 1 + a->window - other[2]);
                for (int64_t t = first; t < end; t += TILE)
                    attend_back_tile(a, head, span_of(a, reader, t, MIN(TILE, end - t)), keys);
            }
        }
    }
}

/* ---- heads, turned by their positions ---- */

/* what `rep` query heads, `plane` apart, give the key head that they share; the sum is in the first of them */
ALWAYS void add_heads(float *g, int64_t plane, int64_t rep, int64_t D) {
    for (int64_t r = 1; r < rep; r++)
        for (int64_t i = 0; i < D; i += VW) store_f(g + i, load_f(g + i) + load_f(g + r * plane + i));
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

/* n rows as columns, CHUNK apart from row to row */
ALWAYS void transpose(const float *x, int64_t D, int64_t n, float *out) {
    for (int64_t d = 0; d < D; d++)
        for (int64_t t = 0; t < n; t++) out[d * CHUNK + t] = x[t * D + d];
}

