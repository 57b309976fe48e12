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

// y (columns, 4) = four rows, zero where there are fewer.
inline __attribute__((always_inline)) void transpose(const uint8_t* const* rows, int count, int64_t columns, uint8_t* y) {
    static const uint8_t none[1] = {};
    const uint8_t *a = rows[0], *b = count > 1 ? rows[1] : none, *c = count > 2 ? rows[2] : none, *d = count > 3 ? rows[3] : none;
    if (count == 4)
        for (int64_t n = 0; n < columns; ++n) y[4 * n] = a[n], y[4 * n + 1] = b[n], y[4 * n + 2] = c[n], y[4 * n + 3] = d[n];
    else
        for (int64_t n = 0; n < columns; ++n)
            y[4 * n] = a[n], y[4 * n + 1] = count > 1 ? b[n] : 0, y[4 * n + 2] = count > 2 ? c[n] : 0, y[4 * n + 3] = 0;
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
    transpose(rows, part + 1, N, words);
    copy<4 * N>(static_cast<uint8_t*>(p.y) + 4 * (row / 4 * p.y_ld + at), words, 4 * n);
}

// Stores one column of W rows, one sum each.
template <int W>
void finish_rows(const Product& p, const int32_t* order, int64_t first, int64_t at, const int32_t* sums) {
    alignas(32) int32_t correction[W] = {};
    alignas(32) float scale[W] = {}, bias[W] = {}, v[W];
    uint8_t codes[W];
    const bool neighbours = !order && first + W <= p.rows;
    const auto row_of = [&](int i) { return order ? order[first + i] : first + i < p.rows ? first + i : -1; };
    if (neighbours) {
        copy<W>(correction, p.correction + first, W), copy<W>(scale, p.scale + first, W), copy<W>(bias, p.bias + first, W);
    } else {
        for (int i = 0; i < W && row_of(i) >= 0; ++i)
            correction[i] = p.correction[row_of(i)], scale[i] = p.scale[row_of(i)], bias[i] = p.bias[row_of(i)];
    }
    const float slope = p.slope, inverse = p.inverse, zero = p.zero, highest = p.highest;
    for (int i = 0; i < W; ++i) v[i] = value(sums[i], correction[i], scale[i], bias[i], slope);
    for (int i = 0; i < W; ++i) codes[i] = code(v[i], inverse, zero, highest);
    auto* const bytes = static_cast<uint8_t*>(p.y);
    auto* const floats = static_cast<float*>(p.y);
    if (neighbours && p.y_ld == 1 && p.store == Store::codes) return copy<W>(bytes + first + at, codes, W);
    for (int i = 0; i < W && row_of(i) >= 0; ++i) {
        const int64_t row = row_of(i);
        if (p.store == Store::floats) floats[row * p.y_ld + at] = v[i];
        else if (p.store == Store::codes) bytes[row * p.y_ld + at] = codes[i];
        else bytes[4 * (row / 4 * p.y_ld + at) + row % 4] = codes[i];
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

// Rows of x as words: y (ceil(rows / 4), columns, 4). Row k begins at offsets[k] * ld.
template <int N>
void as_words(const uint8_t* x, int64_t ld, const int32_t* offsets, int64_t rows, int64_t columns, uint8_t* y) {
    for (int64_t row = 0; row < rows; row += 4, y += 4 * columns) {
        const uint8_t* from[4];
        for (int i = 0; i < 4; ++i) from[i] = x + (row + i >= rows ? 0 : offsets ? offsets[row + i] : row + i) * ld;
        const int count = static_cast<int>(rows - row < 4 ? rows - row : 4);
        if (columns == N) transpose(from, count, N, y);
        else transpose(from, count, columns, y);
    }
}

void interleave(const uint8_t* x, int64_t ld, int64_t rows, int64_t columns, uint8_t* y) { as_words<64>(x, ld, nullptr, rows, columns, y); }

// All rows of a dense matrix, R at a time, over NV registers of words in the scratch.
template <class Set, int NV>
void dense_tile(const Product& p, const Weights& w, int64_t line, int64_t at, int n) {
    using L = typename Set::Lanes;
    using Int = typename L::Int;
    constexpr int R = Set::dense_rows, N = NV * L::width;
    const int64_t words = (w.places + 3) / 4;
    const auto* const x = reinterpret_cast<const uint32_t*>(w.scratch);
    const auto* weights = reinterpret_cast<const int32_t*>(w.bytes);
    as_words<N>(p.x + line * p.x_step + at, p.ld, w.offsets, w.places, n, w.scratch);
    uint8_t four[4][N];
    for (int64_t row = 0; row < p.rows; row += R) {
        Int sums[R][NV];
        const auto add = [&](Int* sum, const uint32_t* from, int32_t weight) {
            UNROLLED for (int i = 0; i < NV; ++i) sum[i] = L::dot(sum[i], L::load(from + i * L::width), L::broadcast(weight));
        };
        UNROLLED for (int r = 0; r < R; ++r) UNROLLED for (int i = 0; i < NV; ++i) sums[r][i] = L::zero();
        for (int64_t k = 0; k < words; ++k, weights += R)
            UNROLLED for (int r = 0; r < R; ++r) add(sums[r], x + k * n, weights[r]);
        UNROLLED for (int r = 0; r < R; ++r)
            for (int64_t k = w.starts[row + r]; k < w.starts[row + r + 1]; ++k) add(sums[r], x + w.words[2 * k] * n, w.words[2 * k + 1]);
        alignas(64) int32_t stored[R][N];
        UNROLLED for (int r = 0; r < R; ++r) UNROLLED for (int i = 0; i < NV; ++i) L::store(stored[r] + i * L::width, sums[r][i]);
        for (int r = 0; r < R && row + r < p.rows; ++r) finish(p, row + r, line * p.y_step + at, n, stored[r], four);
    }
}

template <class Set>
void dense(const Product& p, const Weights& w) {
    constexpr int NV = Set::dense_vectors, W = Set::Lanes::width;
    each_tile(p, NV * W, [&](int64_t line, int64_t at, int n) {
        with_registers<NV>(n, W, [&](auto nv) { dense_tile<Set, nv>(p, w, line, at, n); });
    });
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

// Rows are padded to a multiple of eight, places to one of 64.
template <class Set>
void few_dense(const Product& p, const Weights& w) {
    const int64_t ld = (w.places + 63) / 64 * 64;
    each_column<8>(p, w, w.offsets, nullptr, [&](const uint8_t* x, int64_t first, int32_t* sums) {
        for (int r = 0; r < 8; r += 4) Set::four_dots(w.bytes + (first + r) * ld, ld, x, sums + r);
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
    return {Set::terms, Set::Lanes::width, Set::window, Set::dense_rows, sparse<Set>, blocks<Set>, dense<Set>,
            few_rounds<Set>, few_dense<Set>, interleave, quantize, dequantize};
}

}  // namespace
}  // namespace noctule::runtime::NOCTULE_ISA
