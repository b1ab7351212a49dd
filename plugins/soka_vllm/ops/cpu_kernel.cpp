// Adds Kronecker deltas to the outputs of a layer, on a CPU. What the table and the buffer hold: torch_ops.py.
//
// Tokens are taken by slot, so that factors are widened to float32 once for several tokens. Both orders of the products
// are two products of row-major matrices: (m r, n) (n, q), then (m, r q) (r q, p); or (n, q) (q, r p), then
// (m, n r) (n r, p). They run in float32, and the sum is rounded once, to the output's dtype.
//
// Each result is computed by itself: it does not depend on the other tokens of the call, nor on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 8;  // 16 of 32 registers hold sums
#else
constexpr int LANES = 8, ROWS = 4;  // 8 of 16 with AVX2, 16 of 32 with NEON
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));

constexpr int64_t FIELDS = 12;
constexpr int64_t FACTORS = 1 << 16;  // values of the factors that are held widened: 256 KiB
constexpr int64_t TOKENS = 16;        // most tokens of a task
constexpr int64_t SLACK = 2 * LANES;  // what is read behind the end of a matrix, and not used
constexpr int64_t FEW = 1 << 19;      // multiply-adds that one thread does sooner than several begin

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Row {  // of the table
    int64_t start, kind, rank, m, n, p, q, order, out_skip, in_skip, begin, width;
};
static_assert(sizeof(Row) == FIELDS * sizeof(int64_t));

struct Task {
    const Row *row;
    const int64_t *tokens;
    int64_t count;
};

// C (R x columns) = A B, or C += A B: R rows and the columns of V registers; the sums stay in registers.
template <int R, int V>
void block(int64_t depth, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
           int64_t columns, bool add) {
    Lanes sums[R][V] = {};
    for (int64_t k = 0; k < depth; ++k, b += ldb) {
        Lanes row[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) std::memcpy(&row[v], b + v * LANES, sizeof(Lanes));
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            Lanes factor = Lanes{} + a[i * lda + k];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[i][v] += factor * row[v];
        }
    }
    float tile[R][V * LANES];  // so that no address of the sums is taken, which would keep them in memory
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) std::memcpy(&tile[i][v * LANES], &sums[i][v], sizeof(Lanes));
    for (int i = 0; i < R; ++i, c += ldc) {
        if (add)
            for (int64_t j = 0; j < columns; ++j) c[j] += tile[i][j];
        else
            std::memcpy(c, tile[i], columns * sizeof(float));
    }
}

template <int V, int R = ROWS>
void rest(int64_t rows, int64_t depth, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
          int64_t columns, bool add) {
    if constexpr (R > 0) {
        if (rows == R)
            block<R, V>(depth, a, lda, b, ldb, c, ldc, columns, add);
        else
            rest<V, R - 1>(rows, depth, a, lda, b, ldb, c, ldc, columns, add);
    }
}

template <int V>
void strip(int64_t rows, int64_t depth, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
           int64_t columns, bool add) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * lda, c += ROWS * ldc)
        block<ROWS, V>(depth, a, lda, b, ldb, c, ldc, columns, add);
    rest<V>(rows, depth, a, lda, b, ldb, c, ldc, columns, add);
}

// C (rows x columns) = A (rows x depth) B (depth x columns), or C += A B; all row by row without gaps.
void product(int64_t rows, int64_t columns, int64_t depth, const float *a, const float *b, float *c, bool add) {
    int64_t j = 0;
    for (; columns - j > LANES; j += 2 * LANES)
        strip<2>(rows, depth, a, depth, b + j, columns, c + j, columns, std::min<int64_t>(2 * LANES, columns - j), add);
    if (j < columns) strip<1>(rows, depth, a, depth, b + j, columns, c + j, columns, columns - j, add);
}

inline float to_float(uint16_t bits) {  // bfloat16
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {  // to the nearest, of two the even one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);  // NaN stays NaN
}

void widen(const void *values, int32_t type, int64_t start, int64_t count, float *result) {
    if (type == FLOAT32) {
        std::memcpy(result, static_cast<const float *>(values) + start, count * sizeof(float));
    } else if (type == BFLOAT16) {
        const uint16_t *from = static_cast<const uint16_t *>(values) + start;
        for (int64_t i = 0; i < count; ++i) result[i] = to_float(from[i]);
    }
#ifdef __FLT16_MANT_DIG__
    else {
        const _Float16 *from = static_cast<const _Float16 *>(values) + start;
        for (int64_t i = 0; i < count; ++i) result[i] = float(from[i]);
    }
#endif
}

void add(void *out, int32_t type, int64_t start, int64_t count, const float *delta) {
    if (type == FLOAT32) {
        float *to = static_cast<float *>(out) + start;
        for (int64_t i = 0; i < count; ++i) to[i] += delta[i];
    } else if (type == BFLOAT16) {
        uint16_t *to = static_cast<uint16_t *>(out) + start;
        for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(to_float(to[i]) + delta[i]);
    }
#ifdef __FLT16_MANT_DIG__
    else {
        _Float16 *to = static_cast<_Float16 *>(out) + start;
        for (int64_t i = 0; i < count; ++i) to[i] = _Float16(float(to[i]) + delta[i]);
    }
#endif
}

struct Call {
    void *out;
    int32_t out_type;
    int64_t out_stride;
    const void *x;
    int32_t x_type;
    int64_t x_stride, features;
    const void *values;
    int32_t values_type;
};

// Factors of terms [first, first + some) in float32, as if they were all: Left, then Right, `SLACK` apart.
void take_terms(const Call &call, const Row &row, int64_t first, int64_t some, float *left, float *right) {
    auto [start, kind, r, m, n, p, q, order, out_skip, in_skip, begin, width] = row;
    int64_t behind = start + r * m * n;
    auto take = [&](int64_t at, int64_t count, float *to) { widen(call.values, call.values_type, at, count, to); };
    if (some == r) {
        take(start, r * m * n, left);
        take(behind, r * p * q, right);
    } else if (order == 0) {
        for (int64_t i = 0; i < m; ++i) take(start + (i * r + first) * n, some * n, left + i * some * n);
        take(behind + first * q * p, some * q * p, right);
    } else {
        for (int64_t i = 0; i < m * n; ++i) take(start + i * r + first, some, left + i * some);
        for (int64_t j = 0; j < q; ++j) take(behind + (j * r + first) * p, some * p, right + j * some * p);
    }
}

void run(const Call &call, const Task &task) {
    static thread_local std::vector<float> memory;
    const Row &row = *task.row;
    auto [start, kind, r, m, n, p, q, order, out_skip, in_skip, begin, width] = row;
    int64_t terms = std::clamp<int64_t>(FACTORS / (m * n + p * q), 1, r), inputs = n * q, outputs = m * p;
    int64_t between = terms * (order == 0 ? m * q : n * p);
    int64_t sizes[] = {terms * m * n, terms * p * q, between, task.count * inputs, task.count * outputs};
    float *parts[5];
    int64_t size = 0;
    for (int64_t one : sizes) size += one + SLACK;
    if (int64_t(memory.size()) < size) memory.resize(size);
    float *free = memory.data();
    for (int i = 0; i < 5; ++i) parts[i] = free, free += sizes[i] + SLACK;
    auto [left, right, middle, x, y] = parts;

    if (inputs != call.features) std::fill(x, x + task.count * inputs, 0.0f);
    for (int64_t t = 0; t < task.count; ++t)
        widen(call.x, call.x_type, task.tokens[t] * call.x_stride, call.features, x + t * inputs + in_skip);
    for (int64_t first = 0; first < r; first += terms) {
        int64_t some = std::min(terms, r - first);
        take_terms(call, row, first, some, left, right);
        for (int64_t t = 0; t < task.count; ++t) {
            float *own_x = x + t * inputs, *own_y = y + t * outputs;
            if (order == 0) {
                product(m * some, q, n, left, own_x, middle, false);
                product(m, p, some * q, middle, right, own_y, first > 0);
            } else {
                product(n, some * p, q, own_x, right, middle, false);
                product(m, p, n * some, left, middle, own_y, first > 0);
            }
        }
    }
    for (int64_t t = 0; t < task.count; ++t)
        add(call.out, call.out_type, task.tokens[t] * call.out_stride + begin, width, y + t * outputs + out_skip);
}

}  // namespace

extern "C" int32_t soka_takes(int32_t type) {
#ifdef __FLT16_MANT_DIG__
    return type <= FLOAT16;
#else
    return type <= BFLOAT16;
#endif
}

// Strides in values; the last dimension of out and x has no gaps. The table: (slices, slots, FIELDS).
extern "C" void soka_add_kron(void *out, int32_t out_type, int64_t out_stride, const void *x, int32_t x_type,
                              int64_t x_stride, int64_t features, const int64_t *token_slots, int64_t tokens,
                              const void *values, int32_t values_type, const int64_t *table, int64_t slices,
                              int64_t slots, int32_t threads) {
    static thread_local std::vector<int64_t> ends, order;
    static thread_local std::vector<Task> tasks;
    auto exists = [&](int64_t t) { return token_slots[t] >= 0 && token_slots[t] < slots; };

    ends.assign(slots + 1, 0);  // order holds the tokens of slot s in [ends[s], ends[s + 1])
    for (int64_t t = 0; t < tokens; ++t)
        if (exists(t)) ++ends[token_slots[t] + 1];
    for (int64_t s = 0; s < slots; ++s) ends[s + 1] += ends[s];
    order.resize(ends[slots] + 1);
    for (int64_t t = 0; t < tokens; ++t)
        if (exists(t)) order[ends[token_slots[t]]++] = t;
    for (int64_t s = slots; s > 0; --s) ends[s] = ends[s - 1];
    ends[0] = 0;

    int64_t most = std::clamp<int64_t>((tokens + threads - 1) / threads, 1, TOKENS), work = 0;
    tasks.clear();
    for (int64_t s = 0; s < slots; ++s) {
        for (int64_t slice = 0; slice < slices && ends[s] < ends[s + 1]; ++slice) {
            const Row &row = reinterpret_cast<const Row *>(table)[slice * slots + s];
            if (row.rank == 0) continue;
            for (int64_t at = ends[s]; at < ends[s + 1]; at += most)
                tasks.push_back({&row, &order[at], std::min(most, ends[s + 1] - at)});
            int64_t first = row.order == 0 ? row.m * row.n * row.q : row.n * row.q * row.p;
            int64_t second = row.order == 0 ? row.m * row.q * row.p : row.m * row.n * row.p;
            work += (ends[s + 1] - ends[s]) * row.rank * (first + second);
        }
    }
    Call call{out, out_type, out_stride, x, x_type, x_stride, features, values, values_type};
    const Task *all = tasks.data();  // thread_local: others have none
    int64_t count = int64_t(tasks.size());
    int team = work < FEW ? 1 : int(std::min<int64_t>(threads, count));
#pragma omp parallel for schedule(dynamic) num_threads(team) if (team > 1)
    for (int64_t i = 0; i < count; ++i) run(call, all[i]);
}
