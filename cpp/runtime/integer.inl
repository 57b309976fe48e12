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

template <int W>
struct Vector {
    typedef int32_t Int __attribute__((vector_size(4 * W)));
    typedef float Float __attribute__((vector_size(4 * W)));
};

template <class V>
V read(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
void write(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

template <int W>
typename Vector<W>::Float values(typename Vector<W>::Int sum, typename Vector<W>::Float scale, typename Vector<W>::Float bias, float slope) {
    const auto product = __builtin_convertvector(sum, typename Vector<W>::Float) * scale;
    const auto v = product + bias;
    return v > 0.0f ? v : v * slope;
}

// clamp(rint(v * inverse) + zero, 0, highest), halves to the even number; NaN becomes 0.
template <int W>
typename Vector<W>::Int codes_of(const Product& p, typename Vector<W>::Float v) {
    using Float = typename Vector<W>::Float;
    const Float low = Float{} - p.zero, high = Float{} + (p.highest - p.zero);
    v = v * p.inverse;
    v = v > low ? v : low;
    v = v < high ? v : high;
    v = v + 12582912.0f;  // 1.5 * 2^23: what is left of the fraction is rounded away, the last bits are the whole number
    return reinterpret_cast<typename Vector<W>::Int>(v) - (0x4B400000 - static_cast<int32_t>(p.zero));
}

// Copies n of N elements.
template <int N, class T>
void copy(void* to, const T* from, int n) {
    if (n == N) std::memcpy(to, from, sizeof(T) * N);
    else std::memcpy(to, from, sizeof(T) * static_cast<size_t>(n));
}

// Stores the first n of N sums of a row.
template <int W, int N>
void finish(const Product& p, int64_t row, int64_t at, int n, const int32_t* sums) {
    using Int = typename Vector<W>::Int;
    using Float = typename Vector<W>::Float;
    const Int correction = Int{} + p.correction[row];
    const Float scale = Float{} + p.scale[row], bias = Float{} + p.bias[row];
    const auto value = [&](int i) { return values<W>(read<Int>(sums + i) + correction, scale, bias, p.slope); };
    if (!p.codes) {
        alignas(64) float v[N];
        for (int i = 0; i < N; i += W) write(v + i, value(i));
        copy<N>(static_cast<float*>(p.y) + row * p.y_ld + at, v, n);
    } else {
        alignas(64) int32_t wide[N];
        uint8_t codes[N];
        for (int i = 0; i < N; i += W) write(wide + i, codes_of<W>(p, value(i)));
        for (int i = 0; i < N; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
        copy<N>(static_cast<uint8_t*>(p.y) + row * p.y_ld + at, codes, n);
    }
}

// Stores one column of W rows, one sum each.
template <int W>
void finish_rows(const Product& p, const int32_t* order, int64_t first, int64_t at, const int32_t* sums) {
    using Int = typename Vector<W>::Int;
    using Float = typename Vector<W>::Float;
    alignas(64) int32_t correction[W] = {}, codes[W];
    alignas(64) float scale[W] = {}, bias[W] = {}, v[W];
    const bool neighbours = !order && first + W <= p.rows;
    const auto row_of = [&](int i) { return order ? order[first + i] : first + i < p.rows ? first + i : -1; };
    for (int i = 0; !neighbours && i < W && row_of(i) >= 0; ++i)
        correction[i] = p.correction[row_of(i)], scale[i] = p.scale[row_of(i)], bias[i] = p.bias[row_of(i)];
    const Int sum = read<Int>(sums) + read<Int>(neighbours ? p.correction + first : correction);
    const Float value = values<W>(sum, read<Float>(neighbours ? p.scale + first : scale), read<Float>(neighbours ? p.bias + first : bias), p.slope);
    write(v, value);
    write(codes, codes_of<W>(p, value));
    for (int i = 0; i < W && row_of(i) >= 0; ++i) {
        const int64_t row = row_of(i);
        if (!p.codes) static_cast<float*>(p.y)[row * p.y_ld + at] = v[i];
        else static_cast<uint8_t*>(p.y)[row * p.y_ld + at] = static_cast<uint8_t>(codes[i]);
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
    for (int64_t row = 0; row < p.rows; ++row) {
        Tile tile;
        const int32_t* const stop = w.words + w.starts[row + 1] * Tile::words;
        for (const int32_t* record = w.words + w.starts[row] * Tile::words; record < stop; record += Tile::words * Tile::group)
            tile.add(record, x, p.ld);
        alignas(64) int32_t sums[Tile::columns];
        tile.store(sums);
        finish<Tile::lanes, Tile::columns>(p, row, line * p.y_step + at, n, sums);
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
    static constexpr int group = 1, words = 2, lanes = L::width, columns = NV * lanes;
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

// Rows of x as words: y (ceil(rows / 4), columns, 4), zero behind the last row. Row k begins at offsets[k] * ld.
void as_words(const uint8_t* x, int64_t ld, const int32_t* offsets, int64_t rows, int64_t columns, uint8_t* y) {
    for (int64_t row = 0; row < rows; row += 4, y += 4 * columns) {
        const auto from = [&](int64_t k) { return x + (offsets ? offsets[k] : k) * ld; };
        if (rows - row >= 4) {
            const uint8_t *const a = from(row), *const b = from(row + 1), *const c = from(row + 2), *const d = from(row + 3);
            for (int64_t n = 0; n < columns; ++n) y[4 * n] = a[n], y[4 * n + 1] = b[n], y[4 * n + 2] = c[n], y[4 * n + 3] = d[n];
        } else {
            std::memset(y, 0, 4 * static_cast<size_t>(columns));
            for (int64_t k = row; k < rows; ++k)
                for (int64_t n = 0; n < columns; ++n) y[4 * n + k - row] = from(k)[n];
        }
    }
}

void interleave(const uint8_t* x, int64_t ld, int64_t rows, int64_t columns, uint8_t* y) { as_words(x, ld, nullptr, rows, columns, y); }

// All rows of a dense matrix, R at a time, over NV registers of words in the scratch.
template <class Set, int NV>
void dense_tile(const Product& p, const Weights& w, int64_t line, int64_t at, int n) {
    using L = typename Set::Lanes;
    using Int = typename L::Int;
    constexpr int R = Set::dense_rows, N = NV * L::width;
    const int64_t words = (w.places + 3) / 4;
    const auto* const x = reinterpret_cast<const uint32_t*>(w.scratch);
    const auto* weights = reinterpret_cast<const int32_t*>(w.bytes);
    as_words(p.x + line * p.x_step + at, p.ld, w.offsets, w.places, n, w.scratch);
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
        for (int r = 0; r < R && row + r < p.rows; ++r) finish<L::width, N>(p, row + r, line * p.y_step + at, n, stored[r]);
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

template <int W>
bool quantize(const float* x, int64_t n, float inverse, float zero, float highest, uint8_t* codes) {
    constexpr int N = 64;
    using Int = typename Vector<W>::Int;
    using Float = typename Vector<W>::Float;
    Product p{};
    p.inverse = inverse, p.zero = zero, p.highest = highest;
    Int finite = Int{} - 1;
    for (int64_t at = 0; at < n; at += N) {
        const int count = n - at < N ? static_cast<int>(n - at) : N;
        alignas(64) float from[N] = {};
        alignas(64) int32_t wide[N];
        uint8_t narrow[N];
        copy<N>(from, x + at, count);
        for (int i = 0; i < N; i += W) {
            const Float v = read<Float>(from + i);
            finite &= v - v == 0.0f;
            write(wide + i, codes_of<W>(p, v));
        }
        for (int i = 0; i < N; ++i) narrow[i] = static_cast<uint8_t>(wide[i]);
        copy<N>(codes + at, narrow, count);
    }
    bool all = true;
    for (int i = 0; i < W; ++i) all &= finite[i] != 0;
    return all;
}

template <class Set>
Integers table() {
    return {Set::terms, Set::Lanes::width, Set::window, Set::dense_rows, sparse<Set>, blocks<Set>, dense<Set>,
            few_rounds<Set>, few_dense<Set>, interleave, quantize<Set::Lanes::width>};
}

}  // namespace
}  // namespace noctule::runtime::NOCTULE_ISA
