// The kernels, once, for the instruction set of the including file, which gives `Set`: its registers, tiles and products.
//
// Everything here has internal linkage: the same template compiled for another instruction set must never replace it.
// Sums are whole numbers of 32 bits; the epilogue rounds after each product and each sum, so all instruction sets agree to the bit.
#include <cstring>

#include "integer.h"

namespace noctule::runtime::NOCTULE_ISA {
namespace {

#define UNROLLED _Pragma("GCC unroll 16")

template <class Lanes>
typename Lanes::Int code(const Product& p, typename Lanes::Float v) {
    using L = Lanes;
    return L::clamp(L::add(L::nearest(L::mul(v, L::number(p.inverse))), L::number(p.zero)), L::number(p.highest));
}

template <class Lanes>
typename Lanes::Float value(typename Lanes::Int sum, typename Lanes::Int correction, typename Lanes::Float scale,
                            typename Lanes::Float bias, float slope) {
    using L = Lanes;
    const auto v = L::add(L::mul(L::convert(L::add(sum, correction)), scale), bias);
    return slope == 1.0f ? v : L::negative_times(v, L::number(slope));
}

// Stores the first n columns of a row of sums, NV registers in order. Words are complete with every fourth row, until then they
// wait in `words`.
template <class Lanes, int NV>
void finish(const Product& p, int64_t row, int64_t at, int n, const typename Lanes::Int* sums, typename Lanes::Int* words) {
    using L = Lanes;
    constexpr int W = L::width, room = (NV + 3) / 4 * 4;
    typename L::Float v[NV];
    const auto correction = L::broadcast(p.correction[row]);
    const auto scale = L::number(p.scale[row]), bias = L::number(p.bias[row]);
    UNROLLED for (int i = 0; i < NV; ++i) v[i] = value<L>(sums[i], correction, scale, bias, p.slope);
    if (p.store == Store::floats) {
        float* const y = static_cast<float*>(p.y) + row * p.y_ld + at;
        if (n == NV * W) {
            UNROLLED for (int i = 0; i < NV; ++i) L::store(y + i * W, v[i]);
        } else {
            float kept[NV * W];
            UNROLLED for (int i = 0; i < NV; ++i) L::store(kept + i * W, v[i]);
            std::memcpy(y, kept, sizeof(float) * static_cast<size_t>(n));
        }
        return;
    }
    typename L::Int c[room];
    UNROLLED for (int i = 0; i < room; ++i) c[i] = i < NV ? code<L>(p, v[i < NV ? i : 0]) : L::zero();
    if (p.store == Store::codes) {
        uint8_t* const y = static_cast<uint8_t*>(p.y) + row * p.y_ld + at;
        if (n == room * W) {
            UNROLLED for (int i = 0; i < room; i += 4) L::narrow(y + i * W, c + i);
        } else {
            uint8_t kept[room * W];
            UNROLLED for (int i = 0; i < room; i += 4) L::narrow(kept + i * W, c + i);
            std::memcpy(y, kept, static_cast<size_t>(n));
        }
        return;
    }
    const int part = static_cast<int>(row % 4);
    UNROLLED for (int i = 0; i < NV; ++i) words[i] = part ? L::either(words[i], L::up(c[i], 8 * part)) : c[i];
    if (part < 3 && row + 1 < p.rows) return;
    uint32_t* const y = static_cast<uint32_t*>(p.y) + row / 4 * p.y_ld + at;
    if (n == NV * W) {
        UNROLLED for (int i = 0; i < NV; ++i) L::store(y + i * W, words[i]);
    } else {
        uint32_t kept[NV * W];
        UNROLLED for (int i = 0; i < NV; ++i) L::store(kept + i * W, words[i]);
        std::memcpy(y, kept, sizeof(uint32_t) * static_cast<size_t>(n));
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
void each_tile(const Product& p, int64_t tile, F&& f) {
    for (int64_t line = 0; line < p.lines; ++line)
        for (int64_t at = 0; at < p.columns; at += tile)
            f(line, at, static_cast<int>(p.columns - at < tile ? p.columns - at : tile));
}

// All rows over one tile of at most Tile::columns columns.
template <class Tile>
void sparse_tile(const Product& p, const Records& r, int64_t line, int64_t at, int n) {
    using L = typename Tile::Lanes;
    const uint8_t* const x = p.x + line * p.x_step + at;
    typename L::Int words[Tile::vectors];
    for (int64_t row = 0; row < p.rows; ++row) {
        Tile tile;
        typename L::Int sums[Tile::vectors];
        const int32_t* const stop = r.words + r.starts[row + 1] * Tile::words;
        for (const int32_t* at_word = r.words + r.starts[row] * Tile::words; at_word < stop; at_word += Tile::words * Tile::group)
            tile.add(at_word, x, p.ld);
        tile.finish(sums);
        finish<L, Tile::vectors>(p, row, line * p.y_step + at, n, sums, words);
    }
}

template <class Set>
void sparse(const Product& p, const Records& r) {
    each_tile(p, Set::sparse_columns, [&](int64_t line, int64_t at, int n) {
        Set::with_tile(n, r.group, [&](auto tile) { sparse_tile<decltype(tile)>(p, r, line, at, n); });
    });
}

// One record is a word of four places and its weights.
template <class L, int NV>
void blocks_tile(const Product& p, const Records& r, int64_t line, int64_t at, int n) {
    using Int = typename L::Int;
    const uint32_t* const x = reinterpret_cast<const uint32_t*>(p.x) + line * p.x_step + at;
    Int words[NV];
    for (int64_t row = 0; row < p.rows; ++row) {
        Int sums[NV];
        UNROLLED for (int i = 0; i < NV; ++i) sums[i] = L::zero();
        const int32_t* const stop = r.words + 2 * r.starts[row + 1];
        for (const int32_t* word = r.words + 2 * r.starts[row]; word < stop; word += 2) {
            const uint32_t* const from = x + word[0] * p.ld;
            const Int w = L::broadcast(word[1]);
            UNROLLED for (int i = 0; i < NV; ++i) sums[i] = L::dot(sums[i], L::load(from + i * L::width), w);
        }
        finish<L, NV>(p, row, line * p.y_step + at, n, sums, words);
    }
}

template <class Set>
void blocks(const Product& p, const Records& r) {
    using L = typename Set::Lanes;
    each_tile(p, Set::block_vectors * L::width, [&](int64_t line, int64_t at, int n) {
        with_registers<Set::block_vectors>(n, L::width, [&](auto nv) { blocks_tile<L, nv>(p, r, line, at, n); });
    });
}

// Rows of x as words: y (ceil(rows / 4), columns), zero behind the last row. Row k begins at offsets[k] * ld.
template <class Set>
void as_words(const uint8_t* x, int64_t ld, const int32_t* offsets, int64_t rows, int64_t columns, uint8_t* y) {
    using L = typename Set::Lanes;
    constexpr int W = 4 * L::width;
    static const uint8_t nothing[W] = {};
    for (int64_t row = 0; row < rows; row += 4, y += 4 * columns)
        for (int64_t at = 0; at < columns; at += W) {
            const uint8_t* from[4];
            for (int i = 0; i < 4; ++i)
                from[i] = row + i < rows ? x + (offsets ? offsets[row + i] : row + i) * ld + at : nothing;
            if (columns - at >= W) {
                L::interleave(from, y + 4 * at);
                continue;
            }
            uint8_t kept[4 * W];
            L::interleave(from, kept);
            std::memcpy(y + 4 * at, kept, 4 * static_cast<size_t>(columns - at));
        }
}

template <class Set>
void interleave(const uint8_t* x, int64_t ld, int64_t rows, int64_t columns, uint8_t* y) {
    as_words<Set>(x, ld, nullptr, rows, columns, y);
}

// R rows of a dense matrix over NV registers of words; weights (ceil(rows / R), words, R).
template <class Set, int NV>
void dense_tile(const Product& p, const int32_t* weights, int64_t words, const uint32_t* x, int64_t line, int64_t at, int n) {
    using L = typename Set::Lanes;
    using Int = typename L::Int;
    constexpr int R = Set::dense_rows;
    Int packed[NV];
    for (int64_t row = 0; row < p.rows; row += R) {
        Int sums[R][NV];
        UNROLLED for (int r = 0; r < R; ++r) UNROLLED for (int i = 0; i < NV; ++i) sums[r][i] = L::zero();
        const int32_t* w = weights + row * words;
        const uint32_t* from = x + at;
        for (int64_t k = 0; k < words; ++k, w += R, from += p.columns) {
            Int column[NV];
            UNROLLED for (int i = 0; i < NV; ++i) column[i] = L::load(from + i * L::width);
            UNROLLED for (int r = 0; r < R; ++r) {
                const Int weight = L::broadcast(w[r]);
                UNROLLED for (int i = 0; i < NV; ++i) sums[r][i] = Set::dense_dot(sums[r][i], column[i], weight);
            }
        }
        for (int r = 0; r < R && row + r < p.rows; ++r)
            finish<L, NV>(p, row + r, line * p.y_step + at, n, sums[r], packed);
    }
}

template <class Set>
void dense(const Product& p, const Weights& w) {
    using L = typename Set::Lanes;
    const int64_t words = (w.places + Set::paired - 1) / Set::paired;
    for (int64_t line = 0; line < p.lines; ++line) {
        Set::dense_words(p.x + line * p.x_step, p.ld, w.offsets, w.places, p.columns, w.scratch);
        const auto* const x = reinterpret_cast<const uint32_t*>(w.scratch);
        for (int64_t at = 0; at < p.columns; at += Set::dense_vectors * L::width) {
            const int n = static_cast<int>(p.columns - at < Set::dense_vectors * L::width ? p.columns - at : Set::dense_vectors * L::width);
            with_registers<Set::dense_vectors>(n, L::width, [&](auto nv) {
                dense_tile<Set, nv>(p, reinterpret_cast<const int32_t*>(w.values), words, x, line, at, n);
            });
        }
    }
}

// Stores one column of a group of rows, one row in a lane.
template <class L>
void finish_rows(const Product& p, const int32_t* order, int64_t first, int64_t at, const int32_t* sums) {
    constexpr int W = L::width;
    int32_t correction[W];
    float scale[W], bias[W], v[W];
    int64_t rows[W];
    int count = 0;
    if (!order && first + W <= p.rows) {
        count = W;
        for (int i = 0; i < W; ++i) rows[i] = first + i;
        L::store(correction, L::load(p.correction + first));
        L::store(scale, L::numbers(p.scale + first));
        L::store(bias, L::numbers(p.bias + first));
    } else {
        for (int i = 0; i < W; ++i) {
            const int64_t row = order ? order[first + i] : first + i;
            const bool there = row >= 0 && row < p.rows;
            rows[i] = there ? row : -1;
            count += there;
            correction[i] = there ? p.correction[row] : 0;
            scale[i] = there ? p.scale[row] : 0.0f;
            bias[i] = there ? p.bias[row] : 0.0f;
        }
    }
    const auto numbers = value<L>(L::load(sums), L::load(correction), L::numbers(scale), L::numbers(bias), p.slope);
    if (p.store == Store::floats) {
        L::store(v, numbers);
        for (int i = 0; i < count; ++i) static_cast<float*>(p.y)[rows[i] * p.y_ld + at] = v[i];
        return;
    }
    int32_t codes[W];
    L::store(codes, code<L>(p, numbers));
    auto* const y = static_cast<uint8_t*>(p.y);
    for (int i = 0; i < count; ++i) {
        const int64_t row = rows[i];
        const int64_t to = p.store == Store::codes ? row * p.y_ld + at : 4 * (row / 4 * p.y_ld + at) + row % 4;
        y[to] = static_cast<uint8_t>(codes[i]);
    }
}

// Calls f(x of one column, at) for every column, x contiguous over w.places rows: where the columns lie apart, they are gathered.
template <class F>
void each_column(const Product& p, const Weights& w, bool gather, F&& f) {
    for (int64_t line = 0; line < p.lines; ++line) {
        const uint8_t* const x = p.x + line * p.x_step;
        const bool direct = p.ld == 1 && !gather;
        const int64_t stride = direct ? 1 : (w.places + 63) / 64 * 64;
        if (!direct)
            for (int64_t k = 0; k < w.places; ++k) {
                const uint8_t* const from = x + (gather ? w.offsets[k] : k) * p.ld;
                for (int64_t n = 0; n < p.columns; ++n) w.scratch[n * stride + k] = from[n];
            }
        const uint8_t* const columns = direct ? x : w.scratch;
        f([=](int64_t n) { return columns + n * stride; }, line * p.y_step);
    }
}

template <class L>
void rounds_of(const Product& p, const Rounds& r, const Weights& w) {
    constexpr int W = L::width;
    each_column(p, w, false, [&](auto column, int64_t at) {
        for (int64_t first = 0; first < p.rows; first += W)
            for (int64_t n = 0; n < p.columns; ++n) {
                const uint8_t* const x = column(n);
                auto sum = L::zero();
                for (int64_t i = r.starts[first / W]; i < r.starts[first / W + 1]; ++i) {
                    const int8_t* const bytes = r.bytes + i * 8 * W;
                    sum = L::dot(sum, L::look_up(x + r.bases[i], L::load(bytes)), L::load(bytes + 4 * W));
                }
                int32_t sums[W];
                L::store(sums, sum);
                finish_rows<L>(p, r.order, first, at + n, sums);
            }
    });
}

template <class Set>
void few_rounds(const Product& p, const Rounds& r, const Weights& w) {
    if constexpr (Set::window > 0) rounds_of<typename Set::Lanes>(p, r, w);
}

template <class Set>
void few_list(const Product& p, const Weights& w) {
    using L = typename Set::Lanes;
    each_column(p, w, false, [&](auto column, int64_t at) {
        for (int64_t first = 0; first < p.rows; first += L::width)
            for (int64_t n = 0; n < p.columns; ++n) {
                const uint8_t* const x = column(n);
                int32_t sums[L::width] = {};
                for (int64_t row = first; row < first + L::width && row < p.rows; ++row) {
                    int32_t sum[4] = {};
                    int64_t k = w.starts[row];
                    const int64_t stop = w.starts[row + 1];
                    for (; k + 4 <= stop; k += 4)
                        UNROLLED for (int i = 0; i < 4; ++i) sum[i] += w.values[k + i] * x[w.offsets[k + i]];
                    for (; k < stop; ++k) sum[0] += w.values[k] * x[w.offsets[k]];
                    sums[row - first] = sum[0] + sum[1] + sum[2] + sum[3];
                }
                finish_rows<L>(p, nullptr, first, at + n, sums);
            }
    });
}

// Rows of `places` values, padded with zeros to a multiple of Set::step.
template <class Set>
void few_dense(const Product& p, const Weights& w) {
    using L = typename Set::Lanes;
    const int64_t ld = (w.places + Set::step - 1) / Set::step * Set::step;
    each_column(p, w, w.offsets != nullptr, [&](auto column, int64_t at) {
        for (int64_t first = 0; first < p.rows; first += L::width)
            for (int64_t n = 0; n < p.columns; ++n) {
                int32_t sums[L::width] = {};
                for (int64_t row = first; row < first + L::width && row < p.rows; row += 4)
                    Set::row_dots(w.values + row * ld, ld, static_cast<int>(p.rows - row < 4 ? p.rows - row : 4), column(n), sums + (row - first));
                finish_rows<L>(p, nullptr, first, at + n, sums);
            }
    });
}

template <class Set>
bool quantize(const float* x, int64_t n, float inverse, float zero, float highest, uint8_t* codes) {
    using L = typename Set::Lanes;
    constexpr int W = L::width;
    Product p{};
    p.inverse = inverse, p.zero = zero, p.highest = highest;
    bool finite = true;
    const auto part = [&](const float* from, uint8_t* to) {
        typename L::Int c[4];
        for (int i = 0; i < 4; ++i) {
            const auto v = L::numbers(from + i * W);
            finite &= L::finite(v);
            c[i] = code<L>(p, v);
        }
        L::narrow(to, c);
    };
    int64_t at = 0;
    for (; at + 4 * W <= n; at += 4 * W) part(x + at, codes + at);
    if (at < n) {
        float from[4 * W] = {};
        uint8_t to[4 * W];
        std::memcpy(from, x + at, sizeof(float) * static_cast<size_t>(n - at));
        part(from, to);
        std::memcpy(codes + at, to, static_cast<size_t>(n - at));
    }
    return finite;
}

template <class Set>
void dequantize(const uint8_t* codes, int64_t n, float scale, float zero, float* x) {
    using L = typename Set::Lanes;
    int64_t at = 0;
    for (; at + L::width <= n; at += L::width)
        L::store(x + at, L::mul(L::sub(L::convert(L::load_bytes(codes + at)), L::number(zero)), L::number(scale)));
    for (; at < n; ++at) {
        const float difference = static_cast<float>(codes[at]) - zero;
        x[at] = difference * scale;
    }
}

template <class Set>
Integers table() {
    return {Set::terms, Set::Lanes::width, Set::window, Set::step, Set::paired, Set::dense_rows, sparse<Set>, blocks<Set>, dense<Set>,
            few_rounds<Set>, few_list<Set>, few_dense<Set>, interleave<Set>, quantize<Set>, dequantize<Set>};
}

}  // namespace
}  // namespace noctule::runtime::NOCTULE_ISA
