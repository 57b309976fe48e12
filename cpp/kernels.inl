// The kernels, once, for the instruction set of the including file and over the `Lanes` of an element: `Float32` or `BFloat16`.
//
// Everything here has internal linkage: the same template compiled for another instruction set must never replace it.
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#else  // one thread, as in noctule.runtime
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif


#include "elements.inl"
#include "kernels.h"

namespace noctule::NOCTULE_ISA {
namespace {

// Before loops over the vectors of a tile: rolled up, they would index the sums, which could then not stay in registers.
#define UNROLLED _Pragma("GCC unroll 16")

// How far ahead of the sums the rows of x are called into the cache.
constexpr int64_t ahead = 8;

// Calls n elements into the cache: every second line, its neighbour comes along.
template <class E>
void prefetch(const E* p, int n) {
    for (int i = 0; i < n; i += 128 / static_cast<int>(sizeof(E))) __builtin_prefetch(p + i);
}

// The first row of a part, when rows are shared out by their non-zeros (a row itself costs as much as a few).
template <class Ptr>
int64_t first_row(const Ptr* row_ptr, int64_t rows, int part, int parts) {
    constexpr int64_t row_cost = 4;
    const int64_t start = row_ptr[0];
    const int64_t total = row_ptr[rows] - start + row_cost * rows;
    const int64_t target = total / parts * part + total % parts * part / parts;
    int64_t low = 0, high = rows;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (row_ptr[middle] - start + row_cost * middle < target) low = middle + 1;
        else high = middle;
    }
    return low;
}

// One random word for each element, a function of (seed, row, position) alone: a 32-bit integer hash
// (Wellons, hash-prospector, 2018) whose two halves are keyed from the row.
template <class Lanes>
struct Random {
    using Word = typename Lanes::Word;
    Word first, second;

    Random(uint64_t seed, int64_t row) {
        uint64_t z = seed + (static_cast<uint64_t>(row) + 1) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        first = Lanes::words(static_cast<uint32_t>(z));
        second = Lanes::words(static_cast<uint32_t>(z >> 32));
    }
    Word operator()(int64_t position) const {
        Word x = Lanes::add(Lanes::add(Lanes::words(static_cast<uint32_t>(position)), Lanes::iota()), first);
        x = Lanes::mul(Lanes::template fold<16>(x), Lanes::words(0x21F0AAADu));
        x = Lanes::add(Lanes::template fold<15>(x), second);
        x = Lanes::mul(Lanes::template fold<15>(x), Lanes::words(0xD35A2D97u));
        return Lanes::template fold<15>(x);
    }
};

void store_bits(uint8_t* to, uint32_t bits, int lanes) {
    bits &= static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
    for (int i = 0; 8 * i < lanes; ++i) to[i] = static_cast<uint8_t>(bits >> 8 * i);
}

uint32_t load_bits(const uint8_t* from, int lanes) {
    uint32_t bits = 0;
    for (int i = 0; 8 * i < lanes; ++i) bits |= static_cast<uint32_t>(from[i]) << 8 * i;
    return bits;
}

// A row of a tile: NV vectors, the last of them ragged or not.
template <class Lanes, int NV, bool Ragged>
struct Row {
    using E = typename Lanes::Element;
    using Float = typename Lanes::Float;
    static constexpr int W = Lanes::width;
    int last;  // elements in the last vector
    typename Lanes::Tail tail;

    explicit Row(int64_t n) : last(static_cast<int>(n - (NV - 1) * W)), tail(Lanes::tail(Ragged ? last : 0)) {}
    int lanes(int v) const { return Ragged && v == NV - 1 ? last : W; }
    Float load(const E* row, int v) const {
        return Ragged && v == NV - 1 ? Lanes::load(row + v * W, tail) : Lanes::load(row + v * W);
    }
    void store(E* row, int v, Float x) const {
        if (Ragged && v == NV - 1) Lanes::store(row + v * W, x, tail);
        else Lanes::store(row + v * W, x);
    }
};

// The sums of a row, NV vectors of it, through activation and dropout to `to`. Its kept bits begin at byte `first_bits` of the row,
// its columns at `position`.
template <class Lanes, int NV, bool Ragged, class E>
inline __attribute__((always_inline)) void finish(const Epilogue& e, const Row<Lanes, NV, Ragged>& tile, int64_t row, int64_t first_bits,
                                                  int64_t position, typename Lanes::Float (&sum)[NV], E* to) {
    using Float = typename Lanes::Float;
    constexpr int W = Lanes::width;
    const auto keep = [&](uint8_t* bits, int v, typename Lanes::Bits on) {
        if (bits) store_bits(bits + row * e.bits_ld + first_bits + v * W / 8, Lanes::packed(on), tile.lanes(v));
    };
    if (e.slope != 1.0f) {
        const Float slope = Lanes::broadcast(e.slope);
        UNROLLED for (int v = 0; v < NV; ++v) {
            const auto on = Lanes::positive(sum[v]);
            sum[v] = Lanes::select(on, sum[v], Lanes::mul(sum[v], slope));
            keep(e.positive, v, on);
        }
    }
    if (e.drop_below) {
        const Random<Lanes> random(e.seed, row);
        const Float scale = Lanes::broadcast(e.scale);
        const auto below = Lanes::words(e.drop_below);
        UNROLLED for (int v = 0; v < NV; ++v) {
            const auto on = Lanes::at_least(random(position + v * W), below);
            sum[v] = Lanes::select(on, Lanes::mul(sum[v], scale), Lanes::zero());
            keep(e.kept, v, on);
        }
    }
    UNROLLED for (int v = 0; v < NV; ++v) tile.store(to, v, sum[v]);
}

template <class E, class Ptr, class Col>
struct SpmmTask {
    const Pattern<Ptr, Col>& pattern;
    const E* values;
    Matrix<E> x, y;
    Lines lines;
    const Epilogue& epilogue;
};

// Rows [begin, end) of Y = W X over the columns [at, at + n) of a line, n <= NV * W; only the last vector is ragged.
template <class Lanes, bool Slots, int NV, bool Ragged, class E, class Ptr, class Col>
void spmm_tile(const SpmmTask<E, Ptr, Col>& task, int64_t begin, int64_t end, int64_t line, int64_t at, int64_t n) {
    using Float = typename Lanes::Float;
    constexpr int W = Lanes::width;
    const auto& p = task.pattern;
    const auto& e = task.epilogue;
    const Row<Lanes, NV, Ragged> tile(n);
    const E* const x = task.x.data + line * task.x.step + at;
    E* const y = task.y.data + line * task.y.step + at;
    const int64_t first_bits = line * ((task.lines.columns + 7) / 8) + at / 8, position = line * task.lines.columns + at;
    const int64_t stored = p.row_ptr[p.rows];
    for (int64_t row = begin; row < end; ++row) {
        Float sum[NV];
        const Float start = e.bias ? Lanes::broadcast(e.bias[row]) : Lanes::zero();
        UNROLLED for (int v = 0; v < NV; ++v) sum[v] = start;
        const int64_t stop = p.row_ptr[row + 1];
        int64_t k = p.row_ptr[row];
        if constexpr (NV == 1 && Ragged) {  // one sum alone would wait for itself at each weight
            if (task.lines.columns < W) {
                Float part[4] = {sum[0], Lanes::zero(), Lanes::zero(), Lanes::zero()};
                for (; k + 4 <= stop; k += 4)
                    UNROLLED for (int j = 0; j < 4; ++j) {
                        const E* const from = x + static_cast<int64_t>(p.columns[k + j]) * task.x.ld;
                        part[j] = Lanes::fma(Lanes::broadcast(task.values[Slots ? static_cast<int64_t>(p.slots[k + j]) : k + j]), tile.load(from, 0), part[j]);
                    }
                sum[0] = Lanes::add(Lanes::add(part[0], part[1]), Lanes::add(part[2], part[3]));
            }
        }
        for (; k < stop; ++k) {
            const E* const from = x + static_cast<int64_t>(p.columns[k]) * task.x.ld;
            const Float w = Lanes::broadcast(task.values[Slots ? static_cast<int64_t>(p.slots[k]) : k]);
            if (k + ahead < stored) prefetch(x + static_cast<int64_t>(p.columns[k + ahead]) * task.x.ld, NV * W);
            UNROLLED for (int v = 0; v < NV; ++v) sum[v] = Lanes::fma(w, tile.load(from, v), sum[v]);
        }
        finish(e, tile, row, first_bits, position, sum, y + row * task.y.ld);
    }
}

template <class Lanes, bool Slots, int NV, class E, class Ptr, class Col>
void spmm_last(const SpmmTask<E, Ptr, Col>& task, int64_t begin, int64_t end, int64_t line, int64_t at, int64_t n) {
    if constexpr (NV > 1) {
        if (n <= (NV - 1) * Lanes::width) return spmm_last<Lanes, Slots, NV - 1>(task, begin, end, line, at, n);
    }
    if (n == NV * Lanes::width) spmm_tile<Lanes, Slots, NV, false>(task, begin, end, line, at, n);
    else spmm_tile<Lanes, Slots, NV, true>(task, begin, end, line, at, n);
}

template <class Lanes, bool Slots, class E, class Ptr, class Col>
void spmm_part(const SpmmTask<E, Ptr, Col>& task, int part, int parts) {
    constexpr int64_t NV = Lanes::spmm_vectors, tile = NV * Lanes::width;
    const auto& p = task.pattern;
    const int64_t begin = first_row(p.row_ptr, p.rows, part, parts), end = first_row(p.row_ptr, p.rows, part + 1, parts);
    const int64_t columns = task.lines.columns;
    for (int64_t line = 0; line < task.lines.count; ++line)
        for (int64_t at = 0; at < columns; at += tile)
            spmm_last<Lanes, Slots, NV>(task, begin, end, line, at, columns - at < tile ? columns - at : tile);
}

template <class Lanes, class E, class Ptr, class Col>
void spmm(const Pattern<Ptr, Col>& pattern, const E* values, Matrix<E> x, Matrix<E> y, Lines lines, const Epilogue& epilogue,
          int threads) {
    const SpmmTask<E, Ptr, Col> task{pattern, values, x, y, lines, epilogue};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        if (pattern.slots) spmm_part<Lanes, true>(task, part, parts);
        else spmm_part<Lanes, false>(task, part, parts);
    }
}

// Where sums wait from one tile to the next: in the results, or in room of their own where those are no floats.
struct Sums {
    float *values, *bias, *own;
};

Sums room(float* dvalues, float* dbias, int64_t, int64_t) { return {dvalues, dbias, nullptr}; }

Sums room(bfloat16*, bfloat16*, int64_t stored, int64_t rows) {
    float* const own = new float[static_cast<size_t>(stored + rows)];
    return {own, own + stored, own};
}

template <class E, class Ptr, class Col>
struct SddmmTask {
    const Pattern<Ptr, Col>& pattern;
    Matrix<E> dy, x;
    E *dvalues, *dbias;
    Sums sums;
};

// dvalues[k] = dy[row(k)] . x[column(k)], of which this tile adds n columns, from `dy` and `x` on.
template <class Lanes, int NV, bool Ragged, class E, class Ptr, class Col>
void sddmm_tile(const SddmmTask<E, Ptr, Col>& task, int64_t begin, int64_t end, int64_t n, bool first, bool last) {
    using Float = typename Lanes::Float;
    using Sum = Floats::Float;
    constexpr int dots = Floats::width;
    const auto p = task.pattern;  // copies, which no store can change
    const Matrix<E> x = task.x;
    E* const dvalues = task.dvalues;
    float* const sums = task.sums.values;
    const Row<Lanes, NV, Ragged> tile(n);
    const int64_t stored = p.row_ptr[p.rows];
    const auto put = [&](E* result, float* so_far, int64_t i, float sum) {
        if (!first) sum += so_far[i];
        if (last) Lanes::store_sum(result + i, sum);
        else so_far[i] = sum;
    };
    for (int64_t row = begin; row < end; ++row) {
        int64_t k = p.row_ptr[row];
        const int64_t stop = p.row_ptr[row + 1];
        if (k == stop && !task.dbias) continue;
        const E* const d = task.dy.data + row * task.dy.ld;
        Float g[NV];
        UNROLLED for (int v = 0; v < NV; ++v) g[v] = tile.load(d, v);
        if (task.dbias) {
            Float total = g[0];
            UNROLLED for (int v = 1; v < NV; ++v) total = Lanes::add(total, g[v]);
            put(task.dbias, task.sums.bias, row, Lanes::sum(total));
        }
        const auto dot = [&](int64_t place) {
            const E* const from = x.data + static_cast<int64_t>(p.columns[place]) * x.ld;
            if (place + 2 * ahead < stored)
                prefetch(x.data + static_cast<int64_t>(p.columns[place + 2 * ahead]) * x.ld, NV * Lanes::width);
            Float s = Lanes::mul(g[0], tile.load(from, 0));
            UNROLLED for (int v = 1; v < NV; ++v) s = Lanes::fma(g[v], tile.load(from, v), s);
            return Lanes::joined(s);
        };
        for (; k + dots <= stop; k += dots) {
            Sum fours[dots / 4];  // the sums of four places each
            UNROLLED for (int q = 0; q < dots / 4; ++q) {
                const Sum s[4] = {dot(k + 4 * q), dot(k + 4 * q + 1), dot(k + 4 * q + 2), dot(k + 4 * q + 3)};
                fours[q] = Floats::lane_sums(s);
            }
            Sum total = Floats::sums(fours);
            if (!first) total = Floats::add(total, Floats::load(sums + k));
            if (last) Lanes::store_sums(dvalues + k, total);
            else Floats::store(sums + k, total);
        }
        for (; k < stop; k += 4) {
            const int64_t left = stop - k < 4 ? stop - k : 4;
            Sum s[4];
            for (int64_t j = 0; j < 4; ++j) s[j] = j < left ? dot(k + j) : Floats::zero();
            float total[4];
            Floats::four_sums(Floats::lane_sums(s), total);
            for (int64_t j = 0; j < left; ++j) put(dvalues, sums, k + j, total[j]);
        }
    }
}

template <class Lanes, int NV, class E, class Ptr, class Col>
void sddmm_last(const SddmmTask<E, Ptr, Col>& task, int64_t begin, int64_t end, int64_t n, bool first, bool last) {
    if constexpr (NV > 1) {
        if (n <= (NV - 1) * Lanes::width) return sddmm_last<Lanes, NV - 1>(task, begin, end, n, first, last);
    }
    if (n == NV * Lanes::width) sddmm_tile<Lanes, NV, false>(task, begin, end, n, first, last);
    else sddmm_tile<Lanes, NV, true>(task, begin, end, n, first, last);
}

template <class Lanes, class E, class Ptr, class Col>
void sddmm(const Pattern<Ptr, Col>& p, Matrix<E> dy, Matrix<E> x, int64_t sources, E* dvalues, E* dbias, Lines lines, int threads) {
    constexpr int64_t NV = Lanes::sddmm_vectors, tile = NV * Lanes::width;
    const int64_t stored = p.row_ptr[p.rows];
    if (lines.columns == 0 || lines.count == 0) {
        std::memset(dvalues, 0, sizeof(E) * static_cast<size_t>(stored));
        if (dbias) std::memset(dbias, 0, sizeof(E) * static_cast<size_t>(p.rows));
        return;
    }
    const Sums sums = lines.count > 1 || lines.columns > tile ? room(dvalues, dbias, stored, p.rows) : Sums{};
    // In a long row a tile is a few lines on a page of its own; side by side all rows of x are within reach of the address cache.
    const bool gather = lines.count == 1 && lines.columns > 4 * tile && stored >= 8 * sources;
    E* const tiles = gather ? static_cast<E*>(std::aligned_alloc(64, sizeof(E) * static_cast<size_t>(sources * tile))) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = first_row(p.row_ptr, p.rows, part, parts), end = first_row(p.row_ptr, p.rows, part + 1, parts);
        for (int64_t line = 0; line < lines.count; ++line)
            for (int64_t at = 0; at < lines.columns; at += tile) {
                const int64_t n = lines.columns - at < tile ? lines.columns - at : tile;
                const Matrix<E> d{dy.data + line * dy.step + at, dy.ld, 0};
                Matrix<E> from{x.data + line * x.step + at, x.ld, 0};
                if (tiles) {
#pragma omp for schedule(static)
                    for (int64_t i = 0; i < sources; ++i) std::memcpy(tiles + i * tile, from.data + i * x.ld, sizeof(E) * static_cast<size_t>(n));
                    from = {tiles, tile, 0};
                }
                const SddmmTask<E, Ptr, Col> task{p, d, from, dvalues, dbias, sums};
                const bool first = line == 0 && at == 0, last = line == lines.count - 1 && lines.columns - at <= tile;
                sddmm_last<Lanes, NV>(task, begin, end, n, first, last);
                if (tiles) {
#pragma omp barrier
                }
            }
    }
    std::free(tiles);
    delete[] sums.own;
}

template <class Lanes, class E>
void epilogue_backward(Matrix<E> dy, Matrix<E> dz, E* dbias, int64_t rows, int64_t batch, const Epilogue& e, int threads) {
    using Float = typename Lanes::Float;
    constexpr int W = Lanes::width;
    const Float slope = Lanes::broadcast(e.slope), one = Lanes::broadcast(1.0f), scale = Lanes::broadcast(e.scale);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const E* const from = dy.data + row * dy.ld;
        E* const to = dz.data ? dz.data + row * dz.ld : nullptr;
        Float total = Lanes::zero();
        for (int64_t at = 0; at < batch; at += W) {
            const int lanes = batch - at < W ? static_cast<int>(batch - at) : W;
            const auto tail = Lanes::tail(lanes < W ? lanes : 0);
            const auto bits = [&](const uint8_t* kept) { return Lanes::unpacked(load_bits(kept + row * e.bits_ld + at / 8, lanes)); };
            Float g = lanes < W ? Lanes::load(from + at, tail) : Lanes::load(from + at);
            if (e.positive) g = Lanes::mul(g, Lanes::select(bits(e.positive), one, slope));
            if (e.kept) g = Lanes::select(bits(e.kept), Lanes::mul(g, scale), Lanes::zero());
            total = Lanes::add(total, g);
            if (!to) continue;
            if (lanes < W) Lanes::store(to + at, g, tail);
            else Lanes::store(to + at, g);
        }
        if (dbias) Lanes::store_sum(dbias + row, Lanes::sum(total));
    }
}

}  // namespace
}  // namespace noctule::NOCTULE_ISA

#include "blocks.inl"
#include "layout.inl"

namespace noctule::NOCTULE_ISA {
namespace {

template <class Lanes, class Ptr, class Col, class E = typename Lanes::Element>
Products<E, Ptr, Col> products() {
    return {spmm<Lanes, E, Ptr, Col>, sddmm<Lanes, E, Ptr, Col>, block_spmm<Lanes, E, Ptr, Col>, block_sddmm<Lanes, E, Ptr, Col>};
}

template <class Lanes, class E = typename Lanes::Element>
Code<E> code() {
    return {products<Lanes, int32_t, uint16_t>(), products<Lanes, int32_t, int32_t>(), products<Lanes, int64_t, uint16_t>(),
            products<Lanes, int64_t, int32_t>(),  epilogue_backward<Lanes, E>,         place<Lanes, E>,
            transpose<Lanes, E>,                  copy_rows<Lanes, E>};
}

}  // namespace
}  // namespace noctule::NOCTULE_ISA
