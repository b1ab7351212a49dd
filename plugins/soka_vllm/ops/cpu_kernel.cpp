// Adds Kronecker deltas to the outputs of a layer, on a CPU. What the table and the buffer hold: torch_ops.py.
//
// Tokens are taken by slot, so that factors are prepared once for several tokens. Both orders of the products are two
// products of row-major matrices: (m r, n) (n, q), then (m, r q) (r q, p); or (n, q) (q, r p), then (m, n r) (n r, p).
// Values are widened to float32, and the result is rounded once, to the output's dtype. Where all tensors are bfloat16,
// depths are even, and the CPU multiplies pairs of bfloat16 (vdpbf16ps), values stay as they are: sums are in float32,
// and what lies between the products is rounded to bfloat16, as in vLLM's LoRA kernels.
//
// Each result is computed by itself: it does not depend on the other tokens of the call, nor on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined __AVX512BF16__ && defined __AVX512BW__ && defined __AVX512VL__
#define PAIRS
#endif

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

// What an instruction takes of the depth at a time: a value of float32, or two neighbours of bfloat16.
struct __attribute__((packed, may_alias)) Pair {
    uint32_t bits;
};
template <class T>
using Step = std::conditional_t<std::is_same_v<T, float>, float, Pair>;

// The matrix before a product, whose rows run along the depth.
inline const float *rows_in_steps(const float *a) { return a; }
inline const Pair *rows_in_steps(const uint16_t *a) { return reinterpret_cast<const Pair *>(a); }

// The matrix behind a product, whose columns run along the depth: in `room`, if steps are not its values.
inline const float *columns_in_steps(const float *b, int64_t, int64_t, float *) { return b; }
inline const Pair *columns_in_steps(const uint16_t *b, int64_t rows, int64_t columns, Pair *room) {
    Pair *to = room;
    for (int64_t k = 0; k < rows; k += 2, b += 2 * columns, to += columns)
        for (int64_t j = 0; j < columns; ++j) to[j].bits = b[j] | uint32_t(b[columns + j]) << 16;
    return room;
}

inline Lanes added(Lanes sum, float factor, Lanes row) { return sum + factor * row; }

// c = the first `columns` sums, or c += these.
inline void store(Lanes sums, float *c, int64_t columns, bool add) {
#ifdef __AVX512F__
    __mmask16 mask = columns >= LANES ? 0xffff : (1 << columns) - 1;
    if (add) sums += (Lanes)_mm512_maskz_loadu_ps(mask, c);
    _mm512_mask_storeu_ps(c, mask, (__m512)sums);
#else
    if (columns >= LANES) {
        Lanes before = {};
        if (add) std::memcpy(&before, c, sizeof before);
        sums += before;
        std::memcpy(c, &sums, sizeof sums);
    } else {
        float tile[LANES];
        std::memcpy(tile, &sums, sizeof sums);
        for (int64_t j = 0; j < columns; ++j) c[j] = add ? c[j] + tile[j] : tile[j];
    }
#endif
}

#ifdef PAIRS
inline Lanes added(Lanes sum, Pair factor, Lanes row) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(factor.bits), (__m512bh)row);
}
inline void store(Lanes sums, uint16_t *c, int64_t columns, bool) {
    __mmask16 mask = columns >= LANES ? 0xffff : (1 << columns) - 1;
    _mm256_mask_storeu_epi16(c, mask, (__m256i)_mm512_cvtneps_pbh((__m512)sums));
}
#endif

// C (R x columns) = A B, or C += A B: R rows and the columns of V registers; the sums stay in registers.
template <int R, int V, class S, class C>
void block(int64_t depth, const S *a, int64_t lda, const S *b, int64_t ldb, C *c, int64_t ldc, int64_t columns,
           bool add) {
    Lanes sums[R][V] = {};
    for (int64_t k = 0; k < depth; ++k, b += ldb) {
        Lanes row[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) std::memcpy(&row[v], b + v * LANES, sizeof(Lanes));
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            S factor = a[i * lda + k];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[i][v] = added(sums[i][v], factor, row[v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store(sums[i][v], c + i * ldc + v * LANES, columns - v * LANES, add);
}

template <int V, int R = ROWS, class S, class C>
void rest(int64_t rows, int64_t depth, const S *a, int64_t lda, const S *b, int64_t ldb, C *c, int64_t ldc,
          int64_t columns, bool add) {
    if constexpr (R > 0) {
        if (rows == R)
            block<R, V>(depth, a, lda, b, ldb, c, ldc, columns, add);
        else
            rest<V, R - 1>(rows, depth, a, lda, b, ldb, c, ldc, columns, add);
    }
}

template <int V, class S, class C>
void strip(int64_t rows, int64_t depth, const S *a, int64_t lda, const S *b, int64_t ldb, C *c, int64_t ldc,
           int64_t columns, bool add) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * lda, c += ROWS * ldc)
        block<ROWS, V>(depth, a, lda, b, ldb, c, ldc, columns, add);
    rest<V>(rows, depth, a, lda, b, ldb, c, ldc, columns, add);
}

// C (rows x columns) = A (rows x depth) B (depth x columns), or C += A B; all row by row without gaps.
template <class T, class C>
void product(int64_t rows, int64_t columns, int64_t depth, const T *values, const Step<T> *b, C *c, bool add) {
    auto a = rows_in_steps(values);
    depth /= sizeof(Step<T>) / sizeof(T);
    int64_t j = 0;
    for (; columns - j > LANES; j += 2 * LANES)
        strip<2>(rows, depth, a, depth, b + j, columns, c + j, columns, std::min<int64_t>(2 * LANES, columns - j), add);
    if (j < columns) strip<1>(rows, depth, a, depth, b + j, columns, c + j, columns, columns - j, add);
}

inline void take(const void *values, int32_t, int64_t start, int64_t count, uint16_t *result) {
    std::memcpy(result, static_cast<const uint16_t *>(values) + start, count * sizeof(uint16_t));
}

void take(const void *values, int32_t type, int64_t start, int64_t count, float *result) {
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
        int64_t i = 0;  // below float32's normal numbers a sum is 0 in registers, as in the products
#ifdef PAIRS
        for (; i + LANES <= count; i += LANES) {
            auto wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(to + i))), 16);
            Lanes sums = (Lanes)wide + (Lanes)_mm512_loadu_ps(delta + i);
            store(sums, to + i, LANES, false);
        }
#endif
        for (; i < count; ++i) to[i] = to_bfloat16(to_float(to[i]) + delta[i]);
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

// Values that a product can read where they are.
inline const float *in_place(const void *, int64_t, float) { return nullptr; }  // their type is known at run time
inline const uint16_t *in_place(const void *values, int64_t start, uint16_t) {
    return static_cast<const uint16_t *>(values) + start;
}

// Factors of terms [first, first + some), as if they were all.
template <class T>
void take_terms(const Call &call, const Row &row, int64_t first, int64_t some, T *left, T *right) {
    auto [start, kind, r, m, n, p, q, order, out_skip, in_skip, begin, width] = row;
    int64_t behind = start + r * m * n;
    auto part = [&](int64_t at, int64_t count, T *to) { take(call.values, call.values_type, at, count, to); };
    if (some == r) {
        part(start, r * m * n, left);
        part(behind, r * p * q, right);
    } else if (order == 0) {
        for (int64_t i = 0; i < m; ++i) part(start + (i * r + first) * n, some * n, left + i * some * n);
        part(behind + first * q * p, some * q * p, right);
    } else {
        for (int64_t i = 0; i < m * n; ++i) part(start + i * r + first, some, left + i * some);
        for (int64_t j = 0; j < q; ++j) part(behind + (j * r + first) * p, some * p, right + j * some * p);
    }
}

// A thread's memory, taken part by part. Parts begin at cache lines, with `SLACK` behind each.
class Memory {
  public:
    void begin(int64_t most) {  // values of all parts together
        size_t size = (most + 8 * (SLACK + LINE)) * sizeof(float);
        if (bytes_.size() < size) bytes_.resize(size);
        next_ = bytes_.data() + (-reinterpret_cast<uintptr_t>(bytes_.data()) & (LINE * sizeof(float) - 1));
    }
    template <class T>
    T *take(int64_t count) {
        T *part = reinterpret_cast<T *>(next_);
        int64_t line = LINE * sizeof(float);
        next_ += (count * sizeof(T) + SLACK * sizeof(float) + line - 1) / line * line;
        return part;
    }

  private:
    static constexpr int64_t LINE = 16;  // values of float32 in a cache line
    std::vector<char> bytes_;
    char *next_ = nullptr;
};

// Multiplies values of type T: float, or bfloat16 in pairs.
template <class T>
void run_as(const Call &call, const Task &task) {
    static thread_local Memory memory;
    const Row &row = *task.row;
    auto [start, kind, r, m, n, p, q, order, out_skip, in_skip, begin, width] = row;
    int64_t terms = std::clamp<int64_t>(FACTORS / (m * n + p * q), 1, r), inputs = n * q, outputs = m * p;
    int64_t between = terms * (order == 0 ? m * q : n * p), each = order == 0 ? inputs : between;
    int64_t factors = terms * (m * n + p * q), pairs = terms * p * q + each;
    memory.begin(factors + between + task.count * (inputs + outputs) + pairs);
    T *some_left = memory.take<T>(terms * m * n), *some_right = memory.take<T>(terms * p * q);
    T *middle = memory.take<T>(between);
    T *x = memory.take<T>(task.count * inputs);
    float *y = memory.take<float>(task.count * outputs);
    auto *room = memory.take<Step<T>>(terms * p * q), *own_room = memory.take<Step<T>>(each);

    const T *left = terms < r ? nullptr : in_place(call.values, start, T{});
    const T *right = left ? left + r * m * n : some_right;
    bool x_is_whole = inputs == call.features && in_place(call.x, 0, T{});
    if (inputs != call.features) std::fill(x, x + task.count * inputs, T{});
    for (int64_t t = 0; t < task.count && !x_is_whole; ++t)
        take(call.x, call.x_type, task.tokens[t] * call.x_stride, call.features, x + t * inputs + in_skip);
    for (int64_t first = 0; first < r; first += terms) {
        int64_t some = std::min(terms, r - first);
        if (right == some_right) {
            take_terms(call, row, first, some, some_left, some_right);
            left = some_left;
        }
        int64_t deep = order == 0 ? some * q : q;
        auto right_steps = columns_in_steps(right, deep, some * p * q / deep, room);
        for (int64_t t = 0; t < task.count; ++t) {
            const T *own_x = x + t * inputs;
            if (x_is_whole) own_x = in_place(call.x, task.tokens[t] * call.x_stride, T{});
            float *own_y = y + t * outputs;
            if (order == 0) {
                product(m * some, q, n, left, columns_in_steps(own_x, n, q, own_room), middle, false);
                product(m, p, some * q, middle, right_steps, own_y, first > 0);
            } else {
                product(n, some * p, q, own_x, right_steps, middle, false);
                product(m, p, n * some, left, columns_in_steps(middle, n * some, p, own_room), own_y, first > 0);
            }
        }
    }
    for (int64_t t = 0; t < task.count; ++t)
        add(call.out, call.out_type, task.tokens[t] * call.out_stride + begin, width, y + t * outputs + out_skip);
}

void run(const Call &call, const Task &task) {
#ifdef PAIRS
    bool narrow = call.out_type == BFLOAT16 && call.x_type == BFLOAT16 && call.values_type == BFLOAT16;
    if (narrow && task.row->n % 2 == 0 && task.row->q % 2 == 0) return run_as<uint16_t>(call, task);  // even depths
#endif
    run_as<float>(call, task);
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
