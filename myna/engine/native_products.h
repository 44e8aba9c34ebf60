/* Products of narrow factors in float32. Included by native_typed.h for each kind of activation.
 *
 * Where a CPU is slow in bfloat16, a weight that is kept in it becomes float32 on its way in. It does so a panel at a time:
 * PANEL columns of the answer side by side, over at most DEPTH of what is summed, in the nearest caches (Goto & van de Geijn
 * 2008, "Anatomy of high-performance matrix multiplication"). A block of rows of the other factor goes by a panel before the
 * next is made, so that making it costs a few percent, and no part of the weight stands in memory once more.
 * Sums over the depth run in one order, whatever the threads: the bytes depend on nothing else.
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

/* what is summed goes in equal parts of at most DEPTH, a whole number of vectors each */
ALWAYS int64_t part_of(int64_t depth) {
    int64_t parts = (depth + DEPTH - 1) / DEPTH, part = (depth + parts - 1) / parts;
    return MIN(DEPTH, (part + VW - 1) / VW * VW);
}

/* rows of a piece, so that every thread gets several pieces; a multiple of the tallest tile */
ALWAYS int64_t rows_of(int64_t T, int64_t panels) {
    int64_t blocks = (4 * num_threads + panels - 1) / panels, rows = (T + blocks - 1) / blocks;
    rows = (MAX(rows, FEWEST_ROWS) + 2 * LOW_ROWS - 1) / (2 * LOW_ROWS) * (2 * LOW_ROWS);
    return MIN(rows, MOST_ROWS);
}

#endif

/* ---- out [T][N] = x [T][K] · w (+ bias), w is [N][K] where `turned`, else [K][N] ---- */

typedef struct {
    const TYPE *x, *w, *bias;
    float *wide; /* x in float32, [T][ldwide], K in whole vectors */
    TYPE *out;
    int64_t T, K, N, ldx, ldw, ldo, ldwide, rows, panels;
    int turned;
} NAME(product_job);

enum { NAME(WIDE_ROWS) = 16 };

static void NAME(wide_piece)(void *job, int64_t piece) {
    const NAME(product_job) *a = job;
    int64_t first = piece * NAME(WIDE_ROWS);
    NAME(low_rows)(a->x, a->ldx, first, MIN(NAME(WIDE_ROWS), a->T - first), a->T, 0, a->K, a->wide + first * a->ldwide, a->ldwide);
}

/* rows [k, k + n) of w's columns [at, at + width) in float32, [n][nv][VW] */
static void NAME(product_pack)(const NAME(product_job) *a, int64_t k, int64_t n, int64_t at, int64_t width, int nv,
                               float *panel) {
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
    int64_t end = MIN(a->T, first + a->rows), width = MIN(PANEL, a->N - at), part = part_of(a->K);
    int nv = panel_vectors(at, a->N), height = nv == 1 ? 2 * LOW_ROWS : LOW_ROWS;
    for (int64_t k = 0; k < a->K; k += part) {
        int64_t n = MIN(part, a->K - k);
        NAME(product_pack)(a, k, n, at, width, nv, room.panel);
        for (int64_t t = first; t < end; t += height) {
            const float *rows = a->wide + t * a->ldwide + k;
            float *sums = room.sums + (part < a->K ? (t - first) * PANEL : 0); /* one part alone: they need not be kept */
            int64_t ld = a->ldwide;
            if (t + height > a->T) { /* fewer rows than a tile has: the last one again */
                for (int r = 0; r < height; r++)
                    memcpy(room.rows + r * DEPTH, a->wide + MIN(t + r, a->T - 1) * a->ldwide + k, sizeof(float) * n);
                rows = room.rows;
                ld = DEPTH;
            }
            if (!k) memset(sums, 0, sizeof(float) * PANEL * height);
            low_tile(nv, 1, rows, ld, 1, room.panel, n, sums, PANEL);
            for (int64_t r = 0; k + n == a->K && r < MIN(height, end - t); r++)
                EACH(i, m, width) {
                    vf y = load_f(sums + r * PANEL + i);
                    if (a->bias) y += GET(a->bias + at + i, m);
                    PUT(a->out + (t + r) * a->ldo + at + i, y, m);
                }
        }
    }
}

void NAME(myna_product)(const TYPE *x, int64_t ldx, const TYPE *w, int64_t ldw, int64_t turned, const TYPE *bias, float *wide,
                        TYPE *out, int64_t ldo, int64_t T, int64_t K, int64_t N) {
    int64_t panels = (N + PANEL - 1) / PANEL, rows = rows_of(T, panels), blocks = (T + rows - 1) / rows;
    NAME(product_job) job = {x, w, bias, wide, out, T, K, N, ldx, ldw, ldo, (K + VW - 1) / VW * VW, rows, panels, (int)turned};
    for_pieces(NAME(wide_piece), &job, (T + NAME(WIDE_ROWS) - 1) / NAME(WIDE_ROWS));
    for_pieces(NAME(product_piece), &job, panels * blocks);
}
