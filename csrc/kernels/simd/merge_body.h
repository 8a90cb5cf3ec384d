/* Template body: sorting more rows than registers hold, by bitonic merges of sorted runs, all lanes in step.
 *
 * Included by   kernels/sort_body.h: once per working type and CPU variant.
 * Expects       what real.h sets, and network_body.h.
 * Leaves        no macro of its own.
 *
 * Rows lo[0..p) and lo[p..p+m) ascend, p a power of two, m <= p. Comparing rows p - 1 - i and p + i for all i < m (the
 * mirror stage) brings the p smallest into the first half and leaves both halves bitonic; comparing rows p / 2 apart,
 * p / 4 apart, ... sorts a bitonic stretch. Every comparator puts the smaller row first, so rows that are missing up to
 * the next power of two behave like rows larger than all others: they take part by being left out.
 *
 * Stages are done several at a time, on as many rows as fit into registers, and depth first, so that what fits into
 * the first-level cache is finished there. */

/* Stages of a bitonic stretch of 2, 4, 8, 16 rows from row o on. */
#define STAGES2(X, o) X(o, o + 1)
#define STAGES4(X, o) X(o, o + 2) X(o + 1, o + 3) STAGES2(X, o) STAGES2(X, o + 2)
#define STAGES8(X, o) X(o, o + 4) X(o + 1, o + 5) X(o + 2, o + 6) X(o + 3, o + 7) STAGES4(X, o) STAGES4(X, o + 4)
/* clang-format off */
#define STAGES16(X, o)                                                                                                 \
    X(o, o + 8) X(o + 1, o + 9) X(o + 2, o + 10) X(o + 3, o + 11) X(o + 4, o + 12) X(o + 5, o + 13) X(o + 6, o + 14)   \
    X(o + 7, o + 15) STAGES8(X, o) STAGES8(X, o + 8)
/* clang-format on */

/* The mirror stage of 4, 8 rows with all that follows. */
#define MIRROR4(X, o) X(o, o + 3) X(o + 1, o + 2) STAGES2(X, o) STAGES2(X, o + 2)
#define MIRROR8(X, o) X(o, o + 7) X(o + 1, o + 6) X(o + 2, o + 5) X(o + 3, o + 4) STAGES4(X, o) STAGES4(X, o + 4)

#define EXCHANGE(i, j) VNAME(vec_exchange)(&r[i], &r[j]);

/* A network of `rows` rows, `stride` apart: the first half from `low`, the second from `high` on. */
#define PASS(name, NETWORK, rows)                                                                                      \
    static inline void VNAME(name)(key * low, key * high, int64_t stride)                                              \
    {                                                                                                                  \
        for (int part = 0; part < LANES; part += VEC_LANES) {                                                          \
            VNAME(vec) r[rows];                                                                                        \
            for (int i = 0; i < rows; i++) {                                                                           \
                r[i] = VNAME(vec_load)((i < rows / 2 ? low : high) + i * stride * LANES + part);                       \
            }                                                                                                          \
            NETWORK(EXCHANGE, 0)                                                                                       \
            for (int i = 0; i < rows; i++) {                                                                           \
                VNAME(vec_store)((i < rows / 2 ? low : high) + i * stride * LANES + part, r[i]);                       \
            }                                                                                                          \
        }                                                                                                              \
    }

PASS(stages2, STAGES2, 2)
PASS(stages4, STAGES4, 4)
PASS(stages8, STAGES8, 8)
PASS(stages16, STAGES16, 16)
PASS(mirror4, MIRROR4, 4)
PASS(mirror8, MIRROR8, 8)

#undef STAGES2
#undef STAGES4
#undef STAGES8
#undef STAGES16
#undef MIRROR4
#undef MIRROR8
#undef EXCHANGE
#undef PASS

/* How many stages the next pass over a stretch of 2^stages rows takes; the last four are one pass. */
static inline int VNAME(pass_stages)(int stages)
{
    return stages == 5 ? 1 : stages == 6 || stages == 8 ? 2 : 3;
}

/* Sorts a bitonic stretch of 2^stages rows, stages >= 4. */
static void VNAME(sort_bitonic)(key *keys, int stages)
{
    if (stages == 4) {
        VNAME(stages16)(keys, keys, 1);
        return;
    }
    const int taken = VNAME(pass_stages)(stages), rest = stages - taken;
    const int64_t stride = INT64_C(1) << rest;
    for (int64_t i = 0; i < stride; i++) {
        key *at = keys + i * LANES;
        if (taken == 1) {
            VNAME(stages2)(at, at, stride);
        } else if (taken == 2) {
            VNAME(stages4)(at, at, stride);
        } else {
            VNAME(stages8)(at, at, stride);
        }
    }
    for (int64_t i = 0; i < INT64_C(1) << taken; i++) {
        VNAME(sort_bitonic)(keys + i * stride * LANES, rest);
    }
}

void VNAME(lns_merge_rows)(key *keys, int stages, int64_t rows)
{
    const int64_t p = INT64_C(1) << stages;
    if (rows == 2 * p) {
        const int taken = VNAME(pass_stages)(stages + 1) == 3 ? 3 : 2, rest = stages + 1 - taken;
        const int64_t stride = INT64_C(1) << rest;
        for (int64_t i = 0; i < stride; i++) {
            key *low = keys + i * LANES, *high = keys + (stride - 1 - i) * LANES;
            if (taken == 2) {
                VNAME(mirror4)(low, high, stride);
            } else {
                VNAME(mirror8)(low, high, stride);
            }
        }
        for (int64_t i = 0; i < INT64_C(1) << taken; i++) {
            VNAME(sort_bitonic)(keys + i * stride * LANES, rest);
        }
        return;
    }
    for (int64_t i = 0; i < rows - p; i++) {
        key *low = keys + (p - 1 - i) * LANES, *high = keys + (p + i) * LANES;
        VNAME(stages2)(low, high - LANES, 1);
    }
    VNAME(sort_bitonic)(keys, stages);
    keys += p * LANES;
    rows -= p;
    for (; rows > 0; stages--) {
        const int64_t half = INT64_C(1) << stages;
        if (rows < half) {
            continue;
        }
        for (int64_t i = 0; i < rows - half; i++) {
            VNAME(stages2)(keys + i * LANES, keys + i * LANES, half);
        }
        VNAME(sort_bitonic)(keys, stages);
        keys += half * LANES;
        rows -= half;
    }
}

void VNAME(lns_sort_rows)(key *keys, int64_t rows)
{
    int stages = 5;
    if (rows <= LNS_RUN) {
        VNAME(run)(keys, NULL, LNS_PLAIN);
        return;
    }
    while (INT64_C(2) << stages < rows) {
        stages++;
    }
    const int64_t half = INT64_C(1) << stages;
    VNAME(lns_sort_rows)(keys, half);
    VNAME(lns_sort_rows)(keys + half * LANES, rows - half);
    VNAME(lns_merge_rows)(keys, stages, rows);
}

void VNAME(lns_sort_tile)(key *keys, int64_t n)
{
    VNAME(fill_up)(keys, n);
    if (n <= 16) {
        VNAME(block16)(keys, 1, NULL, LNS_PLAIN, LNS_SORT);
    } else {
        VNAME(lns_sort_rows)(keys, lns_network_rows(n));
    }
}
