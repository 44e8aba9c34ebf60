/* Products of narrow factors in float32. Included by native_typed.h for each kind of activation.
 *
 * Where a CPU is slow in bfloat16, a weight that is kept in it becomes float32 on its way in. It does so a panel at a time:
 * PANEL columns of the answer side by side, over at most DEPTH of what is summed, in the nearest caches (Goto & van de Geijn
 * 2008, "Anatomy of high-performance matrix multiplication"). A block of rows of the other factor goes by a panel before the
 * next is made, so that making it costs a few percent, and no part of the weight stands in memory once more.
 * Sums over the depth run in one order, whatever the threads: the bytes depend on nothing else.
 *
 * A weight in int8, on a CPU that is slow at integers, goes the same way: its numbers become float32, times the scale of
 * their column of the answer, as their panel is made. The low-rank part is so many more rows of the panel.
 */

#ifndef MYNA_PRODUCTS
#define MYNA_PRODUCTS

enum { PANEL = 3 * VW, DEPTH = 640, MOST_ROWS = 256, FEWEST_ROWS = 64 };

/* of the running thread: a panel, and the sums of a block of rows */
static _Thread_local struct {
    float panel[DEPTH * PANEL] __attribute__((aligned(64)));
    float sums[MOST_ROWS * PANEL] __attribute__((aligned(64)));
    float rows[2 * LOW_ROWS * DEPTH] __attribute__((aligned(64)));
} room;

/* VW vectors as columns instead of rows, in place */
#if VW == 16
ALWAYS void turn_vectors(vf *x) {
    __m512 a[16], b[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_ps((__m512)x[2 * i], (__m512)x[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps((__m512)x[2 * i], (__m512)x[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        x[i] = (vf)_mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
        x[i + 8] = (vf)_mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    }
}
#elif VW == 8
ALWAYS void turn_vectors(vf *x) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        x[i + 4] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
#else
ALWAYS void turn_vectors(vf *x) {
    for (int i = 0; i < VW; i++)
        for (int j = i + 1; j < VW; j++) {
            float held = x[i][j];
            x[i][j] = x[j][i];
            x[j][i] = held;
        }
}
#endif

/* the first n of VW numbers in float32, the rest 0 */
ALWAYS vf load_b(const int8_t *p, int64_t n) {
    int8_t b[VW] = {0};
    if (n < VW) p = memcpy(b, p, n);
    return __builtin_convertvector(__builtin_convertvector(*(const vbu *)p, vi), vf);
}

/* what is summed goes in equal parts of at most DEPTH, a whole number of vectors each */
ALWAYS int64_t whole(int64_t n) { return (n + VW - 1) / VW * VW; }
ALWAYS int64_t part_of(int64_t depth) {
    int64_t parts = (depth + DEPTH - 1) / DEPTH, part = (depth + parts - 1) / parts;
    return MIN(DEPTH, whole(part));
}

/* rows of a piece, so that every thread gets several pieces; a multiple of the tallest tile */
ALWAYS int64_t rows_of(int64_t T, int64_t panels) {
    int64_t blocks = (4 * num_threads + panels - 1) / panels, rows = (T + blocks - 1) / blocks;
    rows = (MAX(rows, FEWEST_ROWS) + 2 * LOW_ROWS - 1) / (2 * LOW_ROWS) * (2 * LOW_ROWS);
    return MIN(rows, MOST_ROWS);
}

#endif

/* ---- out [T][N] = x [T][K] · w (+ h [T][R] · m [R][N]) (+ bias), w is [N][K] where `turned`, else [K][N] ---- */

typedef struct {
    const TYPE *x, *w, *bias;
    const int8_t *quants;        /* w, where it is int8: x · fold goes in, w · column is multiplied */
    const float *fold, *column;  /* [K], [N]; either may be missing */
    const TYPE *h, *m;
    const int64_t *blocks; /* of m, as in dequantize */
    float *wide;           /* x and h in float32, [T][ldwide], K in whole vectors and R */
    TYPE *out;
    int64_t T, K, N, R, B, ldx, ldw, ldh, ldm, ldo, ldwide, rows, panels;
    int turned;
} NAME(product_job);

enum { NAME(WIDE_ROWS) = 16 };

static void NAME(wide_piece)(void *job, int64_t piece) {
    const NAME(product_job) *a = job;
    int64_t first = piece * NAME(WIDE_ROWS), n = MIN(NAME(WIDE_ROWS), a->T - first);
    float *wide = a->wide + first * a->ldwide;
    NAME(low_rows)(a->x, a->ldx, first, n, a->T, 0, a->K, wide, a->ldwide);
    for (int64_t r = 0; a->fold && r < n; r++)
        EACH(i, m, a->K) store_f(wide + r * a->ldwide + i, load_f(wide + r * a->ldwide + i) * GETF(a->fold + i, m));
    if (a->R) NAME(low_rows)(a->h, a->ldh, first, n, a->T, 0, a->R, wide + whole(a->K), a->ldwide);
}

/* as product_pack, of an int8 weight */
static void NAME(product_pack_int8)(const NAME(product_job) *a, int64_t k, int64_t n, int64_t at, int64_t width, int nv,
                                    float *panel) {
    for (int v = 0; v < nv; v++) {
        int64_t m = MIN(VW, width - v * VW), first = at + v * VW;
        vf scale = a->column ? GETF(a->column + first, m) : splat(1);
        for (int64_t i = 0; !a->turned && i < n; i++)
            store_f(panel + (i * nv + v) * VW, load_b(a->quants + (k + i) * a->ldw + first, m) * scale);
        for (int64_t i = 0; a->turned && i < n; i += VW) {
            int64_t deep = MIN(VW, n - i);
            vf x[VW];
            for (int r = 0; r < VW; r++)
                x[r] = r < m ? load_b(a->quants + (first + r) * a->ldw + k + i, deep) : splat(0);
            turn_vectors(x);
            for (int r = 0; r < deep; r++) store_f(panel + ((i + r) * nv + v) * VW, x[r] * scale);
        }
    }
}

/* rows [k, k + n) of w's columns [at, at + width) in float32, [n][nv][VW] */
static void NAME(product_pack)(const NAME(product_job) *a, int64_t k, int64_t n, int64_t at, int64_t width, int nv,
                               float *panel) {
    if (a->quants) {
        NAME(product_pack_int8)(a, k, n, at, width, nv, panel);
        return;
    }
    if (!a->turned) {
        NAME(low_pack)(a->w + k * a->ldw + at, a->ldw, n, width, MIN(16, a->K - k - n), panel);
        return;
    }
    for (int v = 0; v < nv; v++)
        for (int64_t i = 0; i < n; i += VW) {
            int64_t m = MIN(VW, n - i);
            vf x[VW];
            for (int r = 0; r < VW; r++) {
                const TYPE *row = a->w + (at + v * VW + r) * a->ldw + k + i;
                x[r] = v * VW + r < width ? GET(row, m) : splat(0);
                if (v * VW + r < width) __builtin_prefetch(row + 4 * VW);
            }
            turn_vectors(x);
            for (int r = 0; r < m; r++) store_f(panel + ((i + r) * nv + v) * VW, x[r]);
        }
}

static void NAME(product_piece)(void *job, int64_t piece) {
    const NAME(product_job) *a = job;
    int64_t at = piece % a->panels * PANEL, first = piece / a->panels * a->rows;
    int64_t end = MIN(a->T, first + a->rows), width = MIN(PANEL, a->N - at), part = part_of(a->K), k = 0, low, lows;
    int nv = panel_vectors(at, a->N), height = nv == 1 ? 2 * LOW_ROWS : LOW_ROWS;
    ranks_of(a->blocks, a->B, a->R, at, at + width, &low, &lows);
    int kept = part < a->K || low < lows; /* the sums of one part to the next */
    for (int begun = 0, done = 0; !done; begun = 1) {
        int64_t n, column; /* of the wide rows, where what is summed now begins */
        if (k < a->K) {
            n = MIN(part, a->K - k);
            NAME(product_pack)(a, k, n, at, width, nv, room.panel);
            column = k;
            k += n;
        } else {
            n = MIN(DEPTH, lows - low);
            NAME(low_pack)(a->m + low * a->ldm + at, a->ldm, n, width, 0, room.panel);
            column = whole(a->K) + low;
            low += n;
        }
        done = k == a->K && low >= lows;
        for (int64_t t = first; t < end; t += height) {
            const float *rows = a->wide + t * a->ldwide + column;
            float *sums = room.sums + (kept ? (t - first) * PANEL : 0);
            int64_t ld = a->ldwide;
            if (t + height > a->T) { /* fewer rows than a tile has: the last one again */
                for (int r = 0; r < height; r++)
                    memcpy(room.rows + r * DEPTH, a->wide + MIN(t + r, a->T - 1) * a->ldwide + column, sizeof(float) * n);
                rows = room.rows;
                ld = DEPTH;
            }
            if (!begun) memset(sums, 0, sizeof(float) * PANEL * height);
            low_tile(nv, 1, rows, ld, 1, room.panel, n, sums, PANEL);
            for (int64_t r = 0; done && r < MIN(height, end - t); r++)
                EACH(i, m, width) {
                    vf y = load_f(sums + r * PANEL + i);
                    if (a->bias) y += GET(a->bias + at + i, m);
                    PUT(a->out + (t + r) * a->ldo + at + i, y, m);
                }
        }
    }
}

static void NAME(run_product)(NAME(product_job) job) {
    job.panels = (job.N + PANEL - 1) / PANEL;
    job.rows = rows_of(job.T, job.panels);
    job.ldwide = whole(job.K) + whole(job.R);
    for_pieces(NAME(wide_piece), &job, (job.T + NAME(WIDE_ROWS) - 1) / NAME(WIDE_ROWS));
    for_pieces(NAME(product_piece), &job, job.panels * ((job.T + job.rows - 1) / job.rows));
}

void NAME(myna_product)(const TYPE *x, int64_t ldx, const TYPE *w, int64_t ldw, int64_t turned, const TYPE *bias, float *wide,
                        TYPE *out, int64_t ldo, int64_t T, int64_t K, int64_t N) {
    NAME(run_product)((NAME(product_job)){.x = x, .ldx = ldx, .w = w, .ldw = ldw, .turned = (int)turned, .bias = bias,
                                          .wide = wide, .out = out, .ldo = ldo, .T = T, .K = K, .N = N});
}

void NAME(myna_product_int8)(const TYPE *x, int64_t ldx, const float *fold, const int8_t *quants, int64_t ldw, int64_t turned,
                             const float *column, const TYPE *bias, const TYPE *h, int64_t ldh, const TYPE *m, int64_t ldm,
                             int64_t R, const int64_t *blocks, int64_t B, float *wide, TYPE *out, int64_t ldo, int64_t T,
                             int64_t K, int64_t N) {
    NAME(run_product)((NAME(product_job)){.x = x, .ldx = ldx, .fold = fold, .quants = quants, .ldw = ldw,
                                          .turned = (int)turned, .column = column, .bias = bias, .h = h, .ldh = ldh, .m = m,
                                          .ldm = ldm, .R = R, .blocks = blocks, .B = B, .wide = wide, .out = out, .ldo = ldo,
                                          .T = T, .K = K, .N = N});
}
