// The kernels, once, for the instruction set of the including file, which gives `Set`: its registers, tiles and products.
//
// Everything here has internal linkage: the same template compiled for another instruction set must never replace it.
// Sums are whole numbers of 32 bits; the epilogue rounds after each product and each sum, so all instruction sets agree to the bit.
#include <cstring>
#include <type_traits>

#include "integer.h"

namespace noctule::runtime::NOCTULE_ISA {
namespace {

#define UNROLLED _Pragma("GCC unroll 16")

// To the nearest whole number, halves to the even one; NaN becomes 0.
inline uint8_t code(float v, float inverse, float zero, float highest) {
    float t = v * inverse;
#ifdef __SSE4_1__
    t = __builtin_rintf(t);
#else
    t = t < 2097152.0f ? t : 2097152.0f;  // beyond are no codes
    t = t > -2097152.0f ? t : -2097152.0f;
    t = (t + 12582912.0f) - 12582912.0f;
#endif
    t = t + zero;
    t = t > 0.0f ? t : 0.0f;
    return static_cast<uint8_t>(static_cast<int32_t>(t < highest ? t : highest));
}

inline float value(int32_t sum, int32_t correction, float scale, float bias, float slope) {
    const float product = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(correction))) * scale;
    const float v = product + bias;
    return v > 0.0f ? v : v * slope;
}

// Copies n of N elements.
template <int N, class T>
void copy(void* to, const T* from, int n) {
    std::memcpy(to, from, sizeof(T) * static_cast<size_t>(n == N ? N : n));
}

// y (columns, C) = C rows of x, zero behind the last.
template <int C, class T>
void transpose(const uint8_t* const* rows, int count, int64_t columns, T* y) {
    static_assert(C == 2 || C == 4);
    const uint8_t *a = rows[0], *b = rows[1], *c = rows[C - 2], *d = rows[C - 1];
    if (count < C) std::memset(y, 0, sizeof(T) * static_cast<size_t>(C * columns));
    if (count == C && C == 4)
        for (int64_t n = 0; n < columns; ++n) y[4 * n] = a[n], y[4 * n + 1] = b[n], y[4 * n + 2] = c[n], y[4 * n + 3] = d[n];
    else if (count == C)
        for (int64_t n = 0; n < columns; ++n) y[2 * n] = a[n], y[2 * n + 1] = b[n];
    else
        for (int i = 0; i < count; ++i)
            for (int64_t n = 0; n < columns; ++n) y[C * n + i] = rows[i][n];
}

// Stores the first n of N sums of a row. Codes wait in `four` until a fourth row completes their words.
template <int N>
void finish(const Product& p, int64_t row, int64_t at, int n, const int32_t* sums, uint8_t (*four)[N]) {
    alignas(64) float v[N];
    const int32_t correction = p.correction[row];
    const float scale = p.scale[row], bias = p.bias[row], slope = p.slope, inverse = p.inverse, zero = p.zero, highest = p.highest;
    for (int i = 0; i < N; ++i) v[i] = value(sums[i], correction, scale, bias, slope);
    if (p.store == Store::floats) return copy<N>(static_cast<float*>(p.y) + row * p.y_ld + at, v, n);
    const int part = static_cast<int>(row % 4);
    uint8_t* const codes = four[part];
    for (int i = 0; i < N; ++i) codes[i] = code(v[i], inverse, zero, highest);
    if (p.store == Store::codes) return copy<N>(static_cast<uint8_t*>(p.y) + row * p.y_ld + at, codes, n);
    if (part < 3 && row + 1 < p.rows) return;
    uint8_t words[4 * N];
    const uint8_t* const rows[4] = {four[0], four[1], four[2], four[3]};
    transpose<4>(rows, part + 1, N, words);
    copy<4 * N>(static_cast<uint8_t*>(p.y) + 4 * (row / 4 * p.y_ld + at), words, 4 * n);
}

// Stores one column of W rows, one sum each.
template <int W>
void finish_rows(const Product& p, const int32_t* order, int64_t first, int64_t at, const int32_t* sums) {
    for (int i = 0; i < W; ++i) {
        const int64_t row = order ? order[first + i] : first + i;
        if (row < 0 || row >= p.rows) return;
        const float v = value(sums[i], p.correction[row], p.scale[row], p.bias[row], p.slope);
        const int64_t to = p.store == Store::words ? 4 * (row / 4 * p.y_ld + at) + row % 4 : row * p.y_ld + at;
        if (p.store == Store::floats) static_cast<float*>(p.y)[to] = v;
        else static_cast<uint8_t*>(p.y)[to] = code(v, p.inverse, p.zero, p.highest);
    }
}

// Calls f with the number of registers that n columns of this width need, at most `most` of them.
template <int most, class F>
void with_registers(int n, int width, F&& f) {
    if constexpr (most > 1) {
        if (n <= (most - 1) * width) return with_registers<most - 1>(n, width, f);
    }
    f(std::integral_constant<int, most>());
}

// Calls f(line, at, n) for every tile of columns.
template <class F>
void each_tile(const Product& p, int tile, F&& f) {
    for (int64_t line = 0; line < p.lines; ++line)
        for (int64_t at = 0; at < p.columns; at += tile)
            f(line, at, static_cast<int>(p.columns - at < tile ? p.columns - at : tile));
}

// All rows over one tile of at most Tile::columns columns; x in elements E.
template <class Tile, class E>
void rows_of_tile(const Product& p, const Weights& w, int64_t line, int64_t at, int n) {
    const E* const x = reinterpret_cast<const E*>(p.x) + line * p.x_step + at;
    uint8_t four[4][Tile::columns];
    for (int64_t row = 0; row < p.rows; ++row) {
        Tile tile;
        const int32_t* const stop = w.words + w.starts[row + 1] * Tile::words;
        for (const int32_t* record = w.words + w.starts[row] * Tile::words; record < stop; record += Tile::words * Tile::group)
            tile.add(record, x, p.ld);
        alignas(64) int32_t sums[Tile::columns];
        tile.store(sums);
        finish(p, row, line * p.y_step + at, n, sums, four);
    }
}

template <class Set>
void sparse(const Product& p, const Weights& w) {
    each_tile(p, Set::sparse_columns, [&](int64_t line, int64_t at, int n) {
        Set::with_tile(n, w.group, [&](auto tile) { rows_of_tile<decltype(tile), uint8_t>(p, w, line, at, n); });
    });
}

// Sums of NV registers; a record is the offset of a word of four places and its weights.
template <class L, int NV>
struct Block {
    static constexpr int group = 1, words = 2, columns = NV * L::width;
    typename L::Int sum[NV];

    Block() {
        UNROLLED for (int i = 0; i < NV; ++i) sum[i] = L::zero();
    }
    void add(const int32_t* record, const uint32_t* x, int64_t ld) {
        const uint32_t* const from = x + record[0] * ld;
        const auto w = L::broadcast(record[1]);
        UNROLLED for (int i = 0; i < NV; ++i) sum[i] = L::dot(sum[i], L::load(from + i * L::width), w);
    }
    void store(int32_t* sums) const {
        UNROLLED for (int i = 0; i < NV; ++i) L::store(sums + i * L::width, sum[i]);
    }
};

template <class Set>
void blocks(const Product& p, const Weights& w) {
    using L = typename Set::Lanes;
    each_tile(p, 64, [&](int64_t line, int64_t at, int n) {
        with_registers<64 / L::width>(n, L::width, [&](auto nv) { rows_of_tile<Block<L, nv>, uint32_t>(p, w, line, at, n); });
    });
}

// Rows of x as words of C elements T. Row k begins at offsets[k] * ld.
template <int C, class T>
void as_words(const uint8_t* x, int64_t ld, const int32_t* offsets, int64_t rows, int64_t columns, T* y) {
    for (int64_t row = 0; row < rows; row += C, y += C * columns) {
        const uint8_t* from[C];
        for (int i = 0; i < C; ++i) from[i] = x + (row + i >= rows ? 0 : offsets ? offsets[row + i] : row + i) * ld;
        transpose<C>(from, static_cast<int>(rows - row < C ? rows - row : C), columns, y);
    }
}

void interleave(const uint8_t* x, int64_t ld, int64_t rows, int64_t columns, uint8_t* y) { as_words<4>(x, ld, nullptr, rows, columns, y); }

// A tile of R rows of a dense matrix and NV registers of words.
template <class Set, int NV>
void dense_tile(const Product& p, const int32_t* w, int64_t words, const uint32_t* x, int64_t line, int64_t at, int n) {
    using L = typename Set::Lanes;
    using Int = typename L::Int;
    constexpr int R = Set::dense_rows, N = NV * L::width;
    uint8_t four[4][N];
    for (int64_t row = 0; row < p.rows; row += R) {
        Int sums[R][NV];
        UNROLLED for (int r = 0; r < R; ++r) UNROLLED for (int i = 0; i < NV; ++i) sums[r][i] = L::zero();
        const uint32_t* from = x + at;
        for (int64_t k = 0; k < words; ++k, w += R, from += p.columns) {
            Int column[NV];
            UNROLLED for (int i = 0; i < NV; ++i) column[i] = L::load(from + i * L::width);
            UNROLLED for (int r = 0; r < R; ++r) {
                const Int weight = L::broadcast(w[r]);
                UNROLLED for (int i = 0; i < NV; ++i) sums[r][i] = Set::dense_dot(sums[r][i], column[i], weight);
            }
        }
        alignas(64) int32_t stored[R][N];
        UNROLLED for (int r = 0; r < R; ++r) UNROLLED for (int i = 0; i < NV; ++i) L::store(stored[r] + i * L::width, sums[r][i]);
        for (int r = 0; r < R && row + r < p.rows; ++r) finish(p, row + r, line * p.y_step + at, n, stored[r], four);
    }
}

template <class Set>
void dense(const Product& p, const Weights& w) {
    using L = typename Set::Lanes;
    constexpr int NV = Set::dense_vectors, C = Set::word;
    using Place = std::conditional_t<C == 4, uint8_t, uint16_t>;
    for (int64_t line = 0; line < p.lines; ++line) {
        as_words<C>(p.x + line * p.x_step, p.ld, w.offsets, w.places, p.columns, reinterpret_cast<Place*>(w.scratch));
        const auto* const x = reinterpret_cast<const uint32_t*>(w.scratch);
        for (int64_t at = 0; at < p.columns; at += NV * L::width) {
            const int n = static_cast<int>(p.columns - at < NV * L::width ? p.columns - at : NV * L::width);
            with_registers<NV>(n, L::width, [&](auto nv) { dense_tile<Set, nv>(p, w.words, (w.places + C - 1) / C, x, line, at, n); });
        }
    }
}

// Calls f(x of a column, first row, sums) for every W rows and column, and stores the sums. x of a column is contiguous over
// w.places: where it lies apart, it is gathered.
template <int W, class F>
void each_column(const Product& p, const Weights& w, const int32_t* offsets, const int32_t* order, F&& f) {
    const bool direct = p.ld == 1 && !offsets;
    const int64_t stride = direct ? 1 : (w.places + 63) / 64 * 64;
    for (int64_t line = 0; line < p.lines; ++line) {
        const uint8_t* const x = p.x + line * p.x_step;
        for (int64_t k = 0; k < w.places && !direct; ++k)
            for (int64_t n = 0; n < p.columns; ++n) w.scratch[n * stride + k] = x[(offsets ? offsets[k] : k) * p.ld + n];
        for (int64_t first = 0; first < p.rows; first += W)
            for (int64_t n = 0; n < p.columns; ++n) {
                alignas(64) int32_t sums[W] = {};
                f((direct ? x : w.scratch) + n * stride, first, sums);
                finish_rows<W>(p, order, first, line * p.y_step + n, sums);
            }
    }
}

template <class Set>
void few_rounds(const Product& p, const Weights& w) {
    if constexpr (Set::window > 0) {
        using L = typename Set::Lanes;
        constexpr int W = L::width;
        each_column<W>(p, w, nullptr, w.offsets, [&](const uint8_t* x, int64_t first, int32_t* sums) {
            auto sum = L::zero();
            for (int64_t i = w.starts[first / W]; i < w.starts[first / W + 1]; ++i) {
                const int8_t* const bytes = w.bytes + i * 8 * W;
                sum = L::dot(sum, L::look_up(x + w.bases[i], L::load(bytes)), L::load(bytes + 4 * W));
            }
            L::store(sums, sum);
        });
    }
}

template <class Set>
void few_dense(const Product& p, const Weights& w) {
    constexpr int W = 4;
    const int64_t places = (w.places + 63) / 64 * 64;
    each_column<W>(p, w, w.offsets, nullptr, [&](const uint8_t* x, int64_t first, int32_t* sums) {
        for (int64_t row = first; row < first + W && row < p.rows; ++row) {
            const int8_t* const values = w.bytes + row * places;
            int32_t sum = 0;
            for (int64_t k = 0; k < places; ++k) sum += values[k] * x[k];
            sums[row - first] = sum;
        }
    });
}

bool quantize(const float* x, int64_t n, float inverse, float zero, float highest, uint8_t* codes) {
    int32_t unlike = 0;
    for (int64_t i = 0; i < n; ++i) {
        unlike |= !(x[i] - x[i] == 0.0f);
        codes[i] = code(x[i], inverse, zero, highest);
    }
    return !unlike;
}

void dequantize(const uint8_t* codes, int64_t n, float scale, float zero, float* x) {
    for (int64_t i = 0; i < n; ++i) {
        const float difference = static_cast<float>(codes[i]) - zero;
        x[i] = difference * scale;
    }
}

template <class Set>
Integers table() {
    return {Set::terms, Set::Lanes::width, Set::window, Set::word, Set::dense_rows, sparse<Set>, blocks<Set>, dense<Set>,
            few_rounds<Set>, few_dense<Set>, interleave, quantize, dequantize};
}

}  // namespace
}  // namespace noctule::runtime::NOCTULE_ISA
