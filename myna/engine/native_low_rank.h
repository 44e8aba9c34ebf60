/* The low-rank products of LoRA, in float32. Included by native_typed.h for each kind of activation.
 *
 * A product with a side of some 16 or 48 spends more on conversions and on tensors in between than on its multiplications.
 * Here the activations are read as they lie, turned to float32 a few rows at a time, and the answer is written where it
 * belongs: h and its gradient beside their input, the low-rank part into what int8 gives, A's and B's gradients onto what
 * the optimizer reads.
 *
 * The narrow matrix is packed first: panels of at most LOW_WIDE columns, row by row, so that a tile reads it in one line.
 */

#ifndef MYNA_LOW_RANK
#define MYNA_LOW_RANK

/* out[r][j] += sum over i < n of a[r · row + i · step] · panel[i][j], r < NR, j < NV · VW */
#define LOW_TILE(NR, NV)                                                                                            \
    static void low_tile_##NR##_##NV(const float *a, int64_t row, int64_t step, const float *panel, int64_t n,      \
                                     float *out, int64_t ldo) {                                                     \
        vf acc[NR][NV];                                                                                             \
        for (int r = 0; r < NR; r++)                                                                                \
            for (int v = 0; v < NV; v++) acc[r][v] = load_f(out + r * ldo + v * VW);                                \
        for (int64_t i = 0; i < n; i++) {                                                                           \
            vf b[NV];                                                                                               \
            for (int v = 0; v < NV; v++) {                                                                          \
                b[v] = load_f(panel + (i * NV + v) * VW);                                                           \
                __builtin_prefetch(panel + ((i + 12) * NV + v) * VW);                                               \
            }                                                                                                       \
            for (int r = 0; r < NR; r++) {                                                                          \
                vf x = splat(a[r * row + i * step]);                                                                \
                for (int v = 0; v < NV; v++) acc[r][v] += x * b[v];                                                 \
            }                                                                                                       \
        }                                                                                                           \
        for (int r = 0; r < NR; r++)                                                                                \
            for (int v = 0; v < NV; v++) store_f(out + r * ldo + v * VW, acc[r][v]);                                \
    }

/* as many sums at once as the registers hold: 32 of them with vectors of 16, else 16 */
#if VW == 16
enum { LOW_ROWS = 8 };
LOW_TILE(8, 3) LOW_TILE(8, 2) LOW_TILE(8, 1) LOW_TILE(16, 1)
#define low_tile_3 low_tile_8_3
#define low_tile_2 low_tile_8_2
#define low_tile_1 low_tile_8_1
#define low_tile_tall low_tile_16_1
#else
enum { LOW_ROWS = 4 };
LOW_TILE(4, 3) LOW_TILE(4, 2) LOW_TILE(4, 1) LOW_TILE(8, 1)
#define low_tile_3 low_tile_4_3
#define low_tile_2 low_tile_4_2
#define low_tile_1 low_tile_4_1
#define low_tile_tall low_tile_8_1
#endif
enum { LOW_WIDE = 3 * VW, LOW_CHUNK = 128, LOW_TOKENS = 16 };

/* vectors in a panel whose first column is `at` of n */
ALWAYS int panel_vectors(int64_t at, int64_t n) { return (int)((MIN(LOW_WIDE, n - at) + VW - 1) / VW); }

/* LOW_ROWS rows; `tall`, for one vector alone: twice as many, or a sum would wait for the one before */
ALWAYS void low_tile(int nv, int tall, const float *a, int64_t row, int64_t step, const float *panel, int64_t n, float *out,
                     int64_t ldo) {
    if (nv == 3) low_tile_3(a, row, step, panel, n, out, ldo);
    else if (nv == 2) low_tile_2(a, row, step, panel, n, out, ldo);
    else if (tall) low_tile_tall(a, row, step, panel, n, out, ldo);
    else low_tile_1(a, row, step, panel, n, out, ldo);
}

/* of m in blocks [B][4], columns [0], [1]) and ranks [2], [3]): the ranks that add to any of the columns [at, to) */
static void ranks_of(const int64_t *blocks, int64_t B, int64_t R, int64_t at, int64_t to, int64_t *from, int64_t *end) {
    *from = R;
    *end = 0;
    for (const int64_t *b = blocks; b < blocks + 4 * B; b += 4)
        if (b[0] < to && at < b[1]) {
            *from = MIN(*from, b[2]);
            *end = MAX(*end, b[3]);
        }
}
#endif

/* m [K][R] to panels in float32, the last one filled up with zeros to whole vectors: K · (R rounded up to VW) floats;
 * what is read `ahead` rows from here is fetched, 0: nothing */
static void NAME(low_pack)(const TYPE *m, int64_t ldm, int64_t K, int64_t R, int64_t ahead, float *panels) {
    for (int64_t at = 0; at < R; at += LOW_WIDE) {
        int64_t width = MIN(LOW_WIDE, R - at);
        for (int64_t k = 0; k < K; k++)
            EACH(i, n, width) {
                store_f(panels, GET(m + k * ldm + at + i, n));
                if (ahead) __builtin_prefetch(m + (k + ahead) * ldm + at + i);
                panels += VW;
            }
    }
}

/* n rows of x from row t on, columns [from, to), in float32; beyond the last row it once more */
ALWAYS void NAME(low_rows)(const TYPE *x, int64_t ldx, int64_t t, int64_t n, int64_t T, int64_t from, int64_t to, float *rows,
                           int64_t ld) {
    for (int64_t r = 0; r < n; r++) {
        const TYPE *row = x + MIN(t + r, T - 1) * ldx + from;
        EACH(i, m, to - from) {
            store_f(rows + r * ld + i, GET(row + i, m));
            __builtin_prefetch(row + i + ld);
        }
    }
}

/* ---- down: out [T][R] = x [T][K] · m [K][R] ---- */

typedef struct {
    const TYPE *x;
    const float *panels;
    TYPE *out;
    int64_t T, K, R, ldx, ldo;
} NAME(low_job);

static void NAME(low_piece)(void *job, int64_t piece) {
    const NAME(low_job) *a = job;
    int64_t first = piece * LOW_TOKENS, end = MIN(a->T, first + LOW_TOKENS);
    float rows[2 * LOW_ROWS * LOW_CHUNK] __attribute__((aligned(64)));
    float sums[LOW_TOKENS * LOW_WIDE] __attribute__((aligned(64)));
    for (int64_t at = 0; at < a->R; at += LOW_WIDE) {
        int nv = panel_vectors(at, a->R), height = nv == 1 ? 2 * LOW_ROWS : LOW_ROWS;
        const float *panel = a->panels + at * a->K;
        memset(sums, 0, sizeof sums);
        for (int64_t k = 0; k < a->K; k += LOW_CHUNK) {
            int64_t n = MIN(LOW_CHUNK, a->K - k);
            for (int64_t t = first; t < end; t += height) {
                NAME(low_rows)(a->x, a->ldx, t, height, a->T, k, k + n, rows, LOW_CHUNK);
                low_tile(nv, 1, rows, LOW_CHUNK, 1, panel + k * nv * VW, n, sums + (t - first) * LOW_WIDE, LOW_WIDE);
            }
        }
        for (int64_t t = first; t < end; t++)
            EACH(i, n, MIN(LOW_WIDE, a->R - at))
            PUT(a->out + t * a->ldo + at + i, load_f(sums + (t - first) * LOW_WIDE + i), n);
    }
}

void NAME(myna_low_rank)(const TYPE *x, int64_t ldx, const TYPE *m, int64_t ldm, float *panels, TYPE *out, int64_t ldo,
                         int64_t T, int64_t K, int64_t R) {
    NAME(low_pack)(m, ldm, K, R, 0, panels);
    NAME(low_job) job = {x, panels, out, T, K, R, ldx, ldo};
    for_pieces(NAME(low_piece), &job, (T + LOW_TOKENS - 1) / LOW_TOKENS);
}

/* ---- outer: into[r][k] += scale · sum over t of g[t][r] · x[t][k]; with `turned` into[0][k · turned + r] ---- */

enum { NAME(OUTER_COLUMNS) = 48, NAME(OUTER_TOKENS) = 64, NAME(OUTER_RANKS) = 256 };

typedef struct {
    const float *g; /* [T][ldg], ldg a multiple of LOW_ROWS */
    const TYPE *x;
    float *const *into;
    int64_t T, R, K, ldg, ldx, turned;
    float scale;
} NAME(outer_job);

/* every piece has columns of its own, over all tokens: what it writes nobody else does, always in the same order */
static void NAME(outer_piece)(void *job, int64_t piece) {
    const NAME(outer_job) *a = job;
    int64_t first = piece * NAME(OUTER_COLUMNS), width = MIN(NAME(OUTER_COLUMNS), a->K - first), ld = NAME(OUTER_COLUMNS);
    float x[NAME(OUTER_TOKENS) * NAME(OUTER_COLUMNS)] __attribute__((aligned(64)));
    float sums[NAME(OUTER_RANKS) * NAME(OUTER_COLUMNS)] __attribute__((aligned(64)));
    float scale = a->scale;
    for (int64_t from = 0; from < a->R; from += NAME(OUTER_RANKS)) {
        int64_t to = MIN(a->R, from + NAME(OUTER_RANKS));
        memset(sums, 0, sizeof sums);
        for (int64_t t = 0; t < a->T; t += NAME(OUTER_TOKENS)) {
            int64_t n = MIN(NAME(OUTER_TOKENS), a->T - t);
            NAME(low_pack)(a->x + t * a->ldx + first, a->ldx, n, width, NAME(OUTER_TOKENS), x);
            for (int64_t at = 0; at < width; at += LOW_WIDE)
                for (int64_t r = from; r < to; r += LOW_ROWS)
                    low_tile(panel_vectors(at, width), 0, a->g + t * a->ldg + r, 1, a->ldg, x + at * n, n,
                             sums + (r - from) * ld + at, ld);
        }
        for (int64_t r = from; r < to && !a->turned; r++) {
            float *into = a->into[r] + first;
            for (int64_t k = 0; k < width; k++) into[k] += scale * sums[(r - from) * ld + k];
        }
        for (int64_t k = 0; k < width && a->turned; k++) {
            float *into = a->into[0] + (first + k) * a->turned;
            for (int64_t r = from; r < to; r++) into[r] += scale * sums[(r - from) * ld + k];
        }
    }
}

void NAME(myna_add_outer)(const TYPE *g, int64_t ldg, const TYPE *x, int64_t ldx, float *wide, float *const *into,
                          int64_t turned, float scale, int64_t T, int64_t R, int64_t K) {
    int64_t ld = (R + LOW_ROWS - 1) / LOW_ROWS * LOW_ROWS;
    for (int64_t t = 0; t < T; t++) /* zeros after R, of which the next row takes back what is its own */
        EACH(i, n, R) store_f(wide + t * ld + i, GET(g + t * ldg + i, n));
    NAME(outer_job) job = {wide, x, into, T, R, K, ld, ldx, turned, scale};
    for_pieces(NAME(outer_piece), &job, (K + NAME(OUTER_COLUMNS) - 1) / NAME(OUTER_COLUMNS));
}

/* ---- int8: out = sums · row (· column) (+ bias) (+ h [T][R] · m [R][N]) ---- */

typedef struct {
    const int32_t *sums;
    const float *row, *column;
    const TYPE *bias, *h;
    const float *panels;
    float *wide;           /* h in float32, [T rounded up to LOW_ROWS][R + VW] */
    const int64_t *blocks; /* [B][4]: the columns [0], [1]) and ranks [2], [3]) of m's blocks; outside of them it is 0 */
    TYPE *out;
    int64_t T, N, R, B, ldh;
} NAME(dequantize_job);

static void NAME(dequantize_piece)(void *job, int64_t piece) {
    const NAME(dequantize_job) *a = job;
    int64_t first = piece * LOW_ROWS, end = MIN(a->T, first + LOW_ROWS);
    float y[LOW_ROWS * LOW_WIDE] __attribute__((aligned(64)));
    int64_t ld = a->R + VW;
    float *h = a->wide + first * ld;
    if (a->R) NAME(low_rows)(a->h, a->ldh, first, LOW_ROWS, a->T, 0, a->R, h, ld);
    for (int64_t at = 0; at < a->N; at += LOW_WIDE) {
        int64_t width = MIN(LOW_WIDE, a->N - at), from, to;
        int nv = panel_vectors(at, a->N);
        memset(y, 0, sizeof y);
        ranks_of(a->blocks, a->B, a->R, at, at + width, &from, &to);
        if (from < to)
            low_tile(nv, 0, h + from, ld, 1, a->panels + at * a->R + from * nv * VW, to - from, y, LOW_WIDE);
        for (int64_t t = first; t < end; t++) {
            float row = a->row[t];
            const int32_t *sums = a->sums + t * a->N + at;
            EACH(i, m, width) {
                vi s = (vi){};
                if (m == VW) s = *(const viu *)(sums + i);
                else memcpy(&s, sums + i, m * 4);
                vf v = __builtin_convertvector(s, vf) * row;
                if (a->column) v *= GETF(a->column + at + i, m);
                if (a->bias) v += GET(a->bias + at + i, m);
                PUT(a->out + t * a->N + at + i, v + load_f(y + (t - first) * LOW_WIDE + i), m);
            }
        }
    }
}

void NAME(myna_dequantize)(const int32_t *sums, const float *row, const float *column, const TYPE *bias, const TYPE *h,
                           int64_t ldh, const TYPE *m, int64_t ldm, int64_t R, const int64_t *blocks, int64_t B,
                           float *panels, float *wide, TYPE *out, int64_t T, int64_t N) {
    NAME(low_pack)(m, ldm, R, N, 0, panels);
    NAME(dequantize_job) job = {sums, row, column, bias, h, panels, wide, blocks, out, T, N, R, B, ldh};
    for_pieces(NAME(dequantize_piece), &job, (T + LOW_ROWS - 1) / LOW_ROWS);
}
