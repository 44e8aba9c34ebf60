/* Included by native.c once for float32 and once for bfloat16 activations. */

#define GET(p, m) ((m) == VW ? LOAD(p) : LOAD_PART(p, (int)(m)))
#define PUT(p, x, m) do { if ((m) == VW) STORE(p, x); else STORE_PART(p, x, (int)(m)); } while (0)
#define GETF(p, m) ((m) == VW ? load_f(p) : load_f_part(p, (int)(m)))

/* ---- RMSNorm ---- */

typedef struct {
    const TYPE *x, *g, *plus;
    const float *weight;
    float *inverse;
    TYPE *out;
    int64_t T, d, ldx, ldg, ldp, ldo;
    float eps;
} NAME(norm_job);

enum { NAME(NORM_ROWS) = 8 };

static void NAME(norm_piece)(void *job, int64_t piece) {
    const NAME(norm_job) *a = job;
    int64_t end = MIN(a->T, (piece + 1) * NAME(NORM_ROWS));
    for (int64_t t = piece * NAME(NORM_ROWS); t < end; t++) {
        const TYPE *x = a->x + t * a->ldx;
        vf square = splat(0);
        EACH(i, m, a->d) { vf v = GET(x + i, m); square += v * v; }
        float inverse = 1.0f / sqrtf(total(square) / a->d + a->eps);
        a->inverse[t] = inverse;
        EACH(i, m, a->d) PUT(a->out + t * a->ldo + i, GET(x + i, m) * inverse * GETF(a->weight + i, m), m);
    }
}

void NAME(myna_norm)(const TYPE *x, int64_t ldx, const float *weight, float eps, float *inverse, TYPE *out, int64_t ldo,
                     int64_t T, int64_t d) {
    NAME(norm_job) job = {.x = x, .weight = weight, .inverse = inverse, .out = out, .T = T, .d = d, .ldx = ldx, .ldo = ldo,
                          .eps = eps};
    for_pieces(NAME(norm_piece), &job, (T + NAME(NORM_ROWS) - 1) / NAME(NORM_ROWS));
}

static void NAME(norm_back_piece)(void *job, int64_t piece) {
    const NAME(norm_job) *a = job;
    int64_t end = MIN(a->T, (piece + 1) * NAME(NORM_ROWS));
    for (int64_t t = piece * NAME(NORM_ROWS); t < end; t++) {
        const TYPE *x = a->x + t * a->ldx, *g = a->g + t * a->ldg;
        float inverse = a->inverse[t];
        vf dot = splat(0);
        EACH(i, m, a->d) dot += GET(g + i, m) * GETF(a->weight + i, m) * GET(x + i, m);
        float share = total(dot) * inverse * inverse / a->d;
        EACH(i, m, a->d) {
            vf y = (GET(g + i, m) * GETF(a->weight + i, m) - GET(x + i, m) * share) * inverse;
            if (a->plus) y += GET(a->plus + t * a->ldp + i, m);
            PUT(a->out + t * a->ldo + i, y, m);
        }
    }
}

void NAME(myna_norm_back)(const TYPE *g, int64_t ldg, const TYPE *x, int64_t ldx, const float *weight, float *inverse,
                          const TYPE *plus, int64_t ldp, TYPE *out, int64_t ldo, int64_t T, int64_t d) {
    NAME(norm_job) job = {.x = x, .g = g, .plus = plus, .weight = weight, .inverse = inverse, .out = out, .T = T, .d = d,
                          .ldx = ldx, .ldg = ldg, .ldp = ldp, .ldo = ldo};
    for_pieces(NAME(norm_back_piece), &job, (T + NAME(NORM_ROWS) - 1) / NAME(NORM_ROWS));
}

/* ---- gated activations: kind 0 silu, 1 gelu by tanh ---- */

typedef struct {
    const TYPE *g, *h;
    TYPE *out, *again;
    int64_t T, width, ldg, ldh, ldo, lda;
    int kind;
} NAME(gate_job);

ALWAYS vf NAME(act)(vf x, int kind, vf *slope) {
    if (kind == 0) {
        vf s = vsigmoid(x);
        *slope = s * (1.0f + x * (1.0f - s));
        return x * s;
    }
    vf inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    vf t = vtanh(inner);
    *slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 3 * 0.044715f * x * x);
    return 0.5f * x * (1.0f + t);
}

enum { NAME(GATE_ROWS) = 4 };

static void NAME(gate_piece)(void *job, int64_t piece) {
    const NAME(gate_job) *a = job;
    int64_t end = MIN(a->T, (piece + 1) * NAME(GATE_ROWS));
    for (int64_t t = piece * NAME(GATE_ROWS); t < end; t++) {
        const TYPE *h = a->h + t * a->ldh;
        EACH(i, m, a->width) {
            vf slope, y = NAME(act)(GET(h + i, m), a->kind, &slope);
            PUT(a->out + t * a->ldo + i, y * GET(h + a->width + i, m), m);
        }
    }
}

void NAME(myna_gate)(const TYPE *h, int64_t ldh, TYPE *out, int64_t ldo, int64_t T, int64_t width, int kind) {
    NAME(gate_job) job = {.h = h, .out = out, .T = T, .width = width, .ldh = ldh, .ldo = ldo, .kind = kind};
    for_pieces(NAME(gate_piece), &job, (T + NAME(GATE_ROWS) - 1) / NAME(GATE_ROWS));
}

static void NAME(gate_back_piece)(void *job, int64_t piece) {
    const NAME(gate_job) *a = job;
    int64_t end = MIN(a->T, (piece + 1) * NAME(GATE_ROWS));
    for (int64_t t = piece * NAME(GATE_ROWS); t < end; t++) {
        const TYPE *h = a->h + t * a->ldh, *g = a->g + t * a->ldg;
        TYPE *out = a->out + t * a->ldo;
        EACH(i, m, a->width) {
            vf slope, y = NAME(act)(GET(h + i, m), a->kind, &slope), gi = GET(g + i, m), up = GET(h + a->width + i, m);
            PUT(out + i, gi * up * slope, m);
            PUT(out + a->width + i, gi * y, m);
            PUT(a->again + t * a->lda + i, y * up, m);
        }
    }
}

void NAME(myna_gate_back)(const TYPE *g, int64_t ldg, const TYPE *h, int64_t ldh, TYPE *out, int64_t ldo,
                          TYPE *again, int64_t lda, int64_t T, int64_t width, int kind) {
    NAME(gate_job) job = {.g = g, .h = h, .out = out, .again = again, .T = T, .width = width, .ldg = ldg, .ldh = ldh,
                          .ldo = ldo, .lda = lda, .kind = kind};
    for_pieces(NAME(gate_back_piece), &job, (T + NAME(GATE_ROWS) - 1) / NAME(GATE_ROWS));
}

/* ---- attention: from the fused product and back ---- */

enum { NAME(TURN_TOKENS) = 16 };

typedef struct {
    attention_job *a;
    const TYPE *qkv, *g, *answer;
    TYPE *out;
    int64_t ld, ldg, lda, ldo;
    int back;
} NAME(turn_job);

/* one head of a block of tokens: typed to float32, turned, and as columns where asked for */
static void NAME(fetch_head)(const NAME(turn_job) *j, int64_t at, int64_t t0, int64_t n, float *rows, float *columns, int turned,
                             const float *norm, float eps) {
    const attention_job *a = j->a;
    for (int64_t t = t0; t < t0 + n; t++) {
        float *row = rows + t * a->D;
        const TYPE *x = j->qkv + t * j->ld + at;
        EACH(i, m, a->D) store_f(row + i, GET(x + i, m));
        if (turned) turn(row, a->D, a->R, a->cos + t * a->R, a->sin + t * a->R, norm, eps);
    }
    if (columns) transpose(rows + t0 * a->D, a->D, n, columns);
}

static void NAME(turn_piece)(void *job, int64_t piece) {
    const NAME(turn_job) *j = job;
    const attention_job *a = j->a;
    int64_t head = piece / a->num_blocks, plane = a->T * a->D;
    const int64_t *block = a->blocks + 3 * (piece % a->num_blocks);
    int64_t t0 = block[1], n = block[2];
    if (head < a->H) {
        NAME(fetch_head)(j, a->query_at + head * a->query_step, t0, n, a->q + head * plane, 0, 1, a->query_norm, a->query_eps);
        if (!j->back) return;
        float *g = a->o + head * plane;
        for (int64_t t = t0; t < t0 + n; t++) {
            vf dot = splat(0);
            EACH(i, m, a->D) {
                vf gi = GET(j->g + t * j->ldg + head * a->D + i, m);
                store_f(g + t * a->D + i, gi);
                dot += gi * GET(j->answer + t * j->lda + head * a->D + i, m);
            }
            a->delta[head * a->T + t] = total(dot);
        }
        return;
    }
    head -= a->H;
    int64_t place = a->places[block[0]] + t0 - a->segments[4 * block[0]];
    int64_t column = (head * a->num_places + place / CHUNK * CHUNK) * a->D + place % CHUNK;
    NAME(fetch_head)(j, a->key_at + head * a->kv_step, t0, n, a->k + head * plane, a->kt + column, 1, a->key_norm, a->key_eps);
    NAME(fetch_head)(j, a->value_at + head * a->kv_step, t0, n, a->v + head * plane, j->back ? a->vt + column : 0, 0, 0, 0);
}

static void NAME(answer_piece)(void *job, int64_t piece) {
    const NAME(turn_job) *j = job;
    const attention_job *a = j->a;
    int64_t end = MIN(a->T, (piece + 1) * NAME(TURN_TOKENS));
    for (int64_t t = piece * NAME(TURN_TOKENS); t < end; t++)
        for (int64_t head = 0; head < a->H; head++)
            EACH(i, m, a->D) PUT(j->out + t * j->ldo + head * a->D + i, load_f(a->o + (head * a->T + t) * a->D + i), m);
}

void NAME(myna_attention)(attention_job *a, const TYPE *qkv, int64_t ld, TYPE *out, int64_t ldo) {
    NAME(turn_job) job = {.a = a, .qkv = qkv, .ld = ld, .out = out, .ldo = ldo};
    int64_t groups = (a->T + NAME(TURN_TOKENS) - 1) / NAME(TURN_TOKENS);
    for_pieces(NAME(turn_piece), &job, a->num_blocks * (a->H + a->KV));
    for_pieces(attend, a, a->num_blocks * a->H);
    for_pieces(NAME(answer_piece), &job, groups);
}

static void NAME(turn_back_piece)(void *job, int64_t piece) {
    const NAME(turn_job) *j = job;
    const attention_job *a = j->a;
    int64_t end = MIN(a->T, (piece + 1) * NAME(TURN_TOKENS)), plane = a->T * a->D, rep = a->H / a->KV;
    float raw[1024];
    for (int64_t t = piece * NAME(TURN_TOKENS); t < end; t++) {
        const float *cos = a->cos + t * a->R, *sin = a->sin + t * a->R;
        for (int64_t head = 0; head < a->H + a->KV; head++) {
            int is_query = head < a->H;
            int64_t own = is_query ? head : head - a->H;
            int64_t at = is_query ? a->query_at + own * a->query_step : a->key_at + own * a->kv_step;
            float *g = (is_query ? a->gq + own * plane : a->gk + own * rep * plane) + t * a->D;
            if (!is_query) add_heads(g, plane, rep, a->D);
            const float *norm = is_query ? a->query_norm : a->key_norm;
            if (norm) EACH(i, m, a->D) store_f(raw + i, GET(j->qkv + t * j->ld + at + i, m));
            turn_back(g, raw, a->D, a->R, cos, sin, norm, is_query ? a->query_eps : a->key_eps);
            EACH(i, m, a->D) PUT(j->out + t * j->ldo + at + i, load_f(g + i), m);
        }
        for (int64_t head = 0; head < a->KV; head++) {
            float *g = a->gv + head * rep * plane + t * a->D;
            add_heads(g, plane, rep, a->D);
            EACH(i, m, a->D) PUT(j->out + t * j->ldo + a->value_at + head * a->kv_step + i, load_f(g + i), m);
        }
    }
}

void NAME(myna_attention_back)(attention_job *a, const TYPE *g, int64_t ldg, const TYPE *qkv, int64_t ld, const TYPE *answer,
                               int64_t lda, TYPE *out, int64_t ldo) {
    NAME(turn_job) job = {.a = a, .qkv = qkv, .g = g, .answer = answer, .out = out, .ld = ld, .ldg = ldg, .lda = lda,
                          .ldo = ldo, .back = 1};
    int64_t groups = (a->T + NAME(TURN_TOKENS) - 1) / NAME(TURN_TOKENS);
    for_pieces(NAME(turn_piece), &job, a->num_blocks * (a->H + a->KV));
    for_pieces(attend_back, a, a->num_roots * a->H);
    for_pieces(NAME(turn_back_piece), &job, groups);
}

/* ---- dropout: engine/dropout.py says which numbers are kept ---- */

typedef struct {
    const TYPE *x;
    const int32_t *rows, *columns;
    TYPE *out;
    int64_t T, K, ldx, ldo;
    int32_t threshold;
    float scale;
    int add;
} NAME(drop_job);

static void NAME(drop_piece)(void *job, int64_t piece) {
    const NAME(drop_job) *a = job;
    int64_t end = MIN(a->T, (piece + 1) * 4);
    for (int64_t t = piece * 4; t < end; t++) {
        const TYPE *x = a->x + t * a->ldx;
        TYPE *out = a->out + t * a->ldo;
        EACH(i, m, a->K) {
            vu word = (vu){};
            if (m == VW) word = (vu)*(const viu *)(a->columns + i);
            else memcpy(&word, a->columns + i, m * 4);
            word = (word ^ (uint32_t)a->rows[t]) * 0x21f0aaadu;
            word = (word ^ (vu)((vi)word >> 15)) * 0xd35a2d97u;
            vf y = GET(x + i, m) * choose((vi)word >= a->threshold, splat(a->scale), splat(0));
            PUT(out + i, a->add ? y + GET(out + i, m) : y, m);
        }
    }
}

void NAME(myna_drop)(const TYPE *x, int64_t ldx, const int32_t *rows, const int32_t *columns, int64_t threshold, float scale,
                     TYPE *out, int64_t ldo, int64_t T, int64_t K, int64_t add) {
    NAME(drop_job) job = {x, rows, columns, out, T, K, ldx, ldo, (int32_t)threshold, scale, (int)add};
    for_pieces(NAME(drop_piece), &job, (T + 3) / 4);
}

/* ---- int8 rows ---- */

typedef struct {
    const TYPE *x;
    const float *fold;
    int8_t *quants;
    float *scale;
    int64_t T, n, ldx;
} NAME(quantize_job);

static void NAME(quantize_piece)(void *job, int64_t piece) {
    const NAME(quantize_job) *a = job;
    int64_t end = MIN(a->T, (piece + 1) * 4);
    for (int64_t t = piece * 4; t < end; t++) {
        const TYPE *x = a->x + t * a->ldx;
        int8_t *out = a->quants + t * a->n;
        vf top = splat(0), spoiled = splat(0);
        EACH(i, m, a->n) {
            vf v = GET(x + i, m);
            if (a->fold) v *= GETF(a->fold + i, m);
            top = vmax(top, vmax(v, -v));
            spoiled += v * 0.0f; /* NaN where any value is not finite: then so is the scale, and all that comes of it */
        }
        float scale = largest(top) / 127.0f + total(spoiled), inverse = scale > 0 ? 1.0f / scale : 0.0f;
        a->scale[t] = scale;
        EACH(i, m, a->n) {
            vf v = GET(x + i, m);
            if (a->fold) v *= GETF(a->fold + i, m);
            v = (v * inverse + 12582912.0f) - 12582912.0f; /* to the nearest whole number, ties to even */
            v = vmin(vmax(v, splat(-127)), splat(127));
            vb q = __builtin_convertvector(__builtin_convertvector(v, vi), vb);
            if (m == VW) *(vbu *)(out + i) = q;
            else memcpy(out + i, &q, m);
        }
    }
}

void NAME(myna_quantize_rows)(const TYPE *x, int64_t ldx, const float *fold, int8_t *quants, float *scale, int64_t T,
                              int64_t n) {
    NAME(quantize_job) job = {x, fold, quants, scale, T, n, ldx};
    for_pieces(NAME(quantize_piece), &job, (T + 3) / 4);
}

/* ---- the loss: a row of logits becomes the gradient of -log softmax(row)[target], in place ---- */

typedef struct {
    TYPE *logits;
    const int64_t *targets;
    float *loss;
    int64_t V, ld;
    float softcap;
} NAME(loss_job);

static void NAME(loss_piece)(void *job, int64_t n) {
    const NAME(loss_job) *a = job;
    TYPE *row = a->logits + n * a->ld;
    float cap = a->softcap;
    vf top = splat(-INFINITY);
    EACH(i, m, a->V) {
        vf x = GET(row + i, m);
        if (m < VW) x = choose(lanes() < (int32_t)m, x, splat(-INFINITY));
        top = vmax(top, x); /* a cap keeps the order */
    }
    float most = largest(top);
    if (cap > 0) most = tanhf(most / cap) * cap;
    vf sum = splat(0);
    EACH(i, m, a->V) {
        vf x = GET(row + i, m);
        if (cap > 0) x = vtanh(x / cap) * cap;
        vf e = vexp(x - most);
        if (m < VW) e = choose(lanes() < (int32_t)m, e, splat(0));
        sum += e;
    }
    float log_norm = most + logf(total(sum));
    int64_t target = a->targets[n];
    vf only = LOAD_PART(row + target, 1);
    float hit = only[0], t = cap > 0 ? tanhf(hit / cap) : 0, slope_hit = cap > 0 ? 1 - t * t : 1;
    a->loss[n] = log_norm - (cap > 0 ? t * cap : hit);
    float p_hit = expf((cap > 0 ? t * cap : hit) - log_norm);
    EACH(i, m, a->V) {
        vf x = GET(row + i, m), slope = splat(1);
        if (cap > 0) {
            vf u = vtanh(x / cap);
            x = u * cap;
            slope = 1.0f - u * u;
        }
        PUT(row + i, vexp(x - log_norm) * slope, m);
    }
    STORE_PART(row + target, splat((p_hit - 1.0f) * slope_hit), 1);
}

void NAME(myna_loss)(TYPE *logits, int64_t ld, const int64_t *targets, float *loss, int64_t N, int64_t V, float softcap) {
    NAME(loss_job) job = {logits, targets, loss, V, ld, softcap};
    for_pieces(NAME(loss_piece), &job, N);
}

#include "native_low_rank.h"
#include "native_products.h"

#undef GET
#undef PUT
#undef GETF
