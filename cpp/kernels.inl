// The kernels, once, for whichever `Lanes` the including file chose.
//
// Everything here has internal linkage: the same template compiled for another instruction set must never replace it.
#include <omp.h>

#include <cstring>

#include "kernels.h"

namespace noctule::NOCTULE_ISA {
namespace {

using Float = Lanes::Float;
using Word = Lanes::Word;
using Tail = Lanes::Tail;
constexpr int W = Lanes::width;

// How far ahead of the sums the rows of x are called into the cache: every second line, its neighbour comes along.
constexpr int64_t ahead = 8;

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
struct Random {
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
        x = Lanes::mul(Lanes::fold<16>(x), Lanes::words(0x21F0AAADu));
        x = Lanes::add(Lanes::fold<15>(x), second);
        x = Lanes::mul(Lanes::fold<15>(x), Lanes::words(0xD35A2D97u));
        return Lanes::fold<15>(x);
    }
};

void store_bits(uint8_t* to, uint32_t bits, int lanes) {
    bits &= static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
    to[0] = static_cast<uint8_t>(bits);
    if (lanes > 8) to[1] = static_cast<uint8_t>(bits >> 8);
}

uint32_t load_bits(const uint8_t* from, int lanes) {
    return lanes > 8 ? static_cast<uint32_t>(from[0]) | static_cast<uint32_t>(from[1]) << 8 : from[0];
}

template <class Ptr, class Col>
struct SpmmTask {
    const Pattern<Ptr, Col>& pattern;
    const float* values;
    Matrix x, y;
    const Epilogue& epilogue;
};

// Rows [begin, end) of Y = W X over the columns [at, at + n) of the batch, n <= NV * W; only the last vector is ragged.
template <bool Slots, int NV, bool Ragged, class Ptr, class Col>
void spmm_tile(const SpmmTask<Ptr, Col>& task, int64_t begin, int64_t end, int64_t at, int64_t n) {
    const auto& p = task.pattern;
    const auto& e = task.epilogue;
    const int last = static_cast<int>(n - (NV - 1) * W);
    const Tail tail = Lanes::tail(Ragged ? last : 0);
    const float* const x = task.x.data + at;
    const int64_t stored = p.row_ptr[p.rows];
    for (int64_t row = begin; row < end; ++row) {
        Float sum[NV];
        const Float start = e.bias ? Lanes::broadcast(e.bias[row]) : Lanes::zero();
        for (int v = 0; v < NV; ++v) sum[v] = start;
        const int64_t stop = p.row_ptr[row + 1];
        for (int64_t k = p.row_ptr[row]; k < stop; ++k) {
            const float* const from = x + static_cast<int64_t>(p.columns[k]) * task.x.ld;
            const Float w = Lanes::broadcast(task.values[Slots ? static_cast<int64_t>(p.slots[k]) : k]);
            if (k + ahead < stored) {
                const float* const next = x + static_cast<int64_t>(p.columns[k + ahead]) * task.x.ld;
                for (int v = 0; v < NV * W; v += 32) __builtin_prefetch(next + v);
            }
            for (int v = 0; v < NV - 1; ++v) sum[v] = Lanes::fma(w, Lanes::load(from + v * W), sum[v]);
            const float* const f = from + (NV - 1) * W;
            sum[NV - 1] = Lanes::fma(w, Ragged ? Lanes::load(f, tail) : Lanes::load(f), sum[NV - 1]);
        }
        if (e.slope != 1.0f) {
            const Float slope = Lanes::broadcast(e.slope);
            for (int v = 0; v < NV; ++v) {
                const uint32_t bits = Lanes::positive(sum[v]);
                sum[v] = Lanes::select(bits, sum[v], Lanes::mul(sum[v], slope));
                if (e.positive) store_bits(e.positive + row * e.bits_ld + (at + v * W) / 8, bits, Ragged && v == NV - 1 ? last : W);
            }
        }
        if (e.drop_below) {
            const Random random(e.seed, row);
            const Float scale = Lanes::broadcast(e.scale);
            const Word below = Lanes::words(e.drop_below);
            for (int v = 0; v < NV; ++v) {
                const uint32_t bits = Lanes::at_least(random(at + v * W), below);
                sum[v] = Lanes::select(bits, Lanes::mul(sum[v], scale), Lanes::zero());
                if (e.kept) store_bits(e.kept + row * e.bits_ld + (at + v * W) / 8, bits, Ragged && v == NV - 1 ? last : W);
            }
        }
        float* const to = task.y.data + row * task.y.ld + at;
        for (int v = 0; v < NV - 1; ++v) Lanes::store(to + v * W, sum[v]);
        if (Ragged) Lanes::store(to + (NV - 1) * W, sum[NV - 1], tail);
        else Lanes::store(to + (NV - 1) * W, sum[NV - 1]);
    }
}

template <bool Slots, int NV, class Ptr, class Col>
void spmm_last(const SpmmTask<Ptr, Col>& task, int64_t begin, int64_t end, int64_t at, int64_t n) {
    if constexpr (NV > 1) {
        if (n <= (NV - 1) * W) return spmm_last<Slots, NV - 1>(task, begin, end, at, n);
    }
    if (n == NV * W) spmm_tile<Slots, NV, false>(task, begin, end, at, n);
    else spmm_tile<Slots, NV, true>(task, begin, end, at, n);
}

template <bool Slots, class Ptr, class Col>
void spmm_part(const SpmmTask<Ptr, Col>& task, int64_t batch, int part, int parts) {
    constexpr int NV = Lanes::spmm_vectors;
    const auto& p = task.pattern;
    const int64_t begin = first_row(p.row_ptr, p.rows, part, parts), end = first_row(p.row_ptr, p.rows, part + 1, parts);
    for (int64_t at = 0; at < batch; at += NV * W) {
        const int64_t n = batch - at < NV * W ? batch - at : NV * W;
        spmm_last<Slots, NV>(task, begin, end, at, n);
    }
}

template <class Ptr, class Col>
void spmm(const Pattern<Ptr, Col>& pattern, const float* values, Matrix x, Matrix y, int64_t batch, const Epilogue& epilogue,
          int threads) {
    const SpmmTask<Ptr, Col> task{pattern, values, x, y, epilogue};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        if (pattern.slots) spmm_part<true>(task, batch, part, parts);
        else spmm_part<false>(task, batch, part, parts);
    }
}

// dvalues[k] (+)= dy[row(k)] . x[column(k)] over n columns of the batch from `at` on; the first tile sets, the others add.
template <int NV, bool Ragged, class Ptr, class Col>
void sddmm_tile(const Pattern<Ptr, Col>& p, Matrix dy, Matrix xs, float* dvalues, float* dbias, int64_t begin, int64_t end, int64_t at, int64_t n) {
    const Tail tail = Lanes::tail(Ragged ? static_cast<int>(n - (NV - 1) * W) : 0);
    const float* const x = xs.data + at;
    const int64_t stored = p.row_ptr[p.rows];
    for (int64_t row = begin; row < end; ++row) {
        int64_t k = p.row_ptr[row];
        const int64_t stop = p.row_ptr[row + 1];
        if (k == stop && !dbias) continue;
        const float* const d = dy.data + row * dy.ld + at;
        Float g[NV];
        for (int v = 0; v < NV - 1; ++v) g[v] = Lanes::load(d + v * W);
        g[NV - 1] = Ragged ? Lanes::load(d + (NV - 1) * W, tail) : Lanes::load(d + (NV - 1) * W);
        if (dbias) {
            Float total = g[0];
            for (int v = 1; v < NV; ++v) total = Lanes::add(total, g[v]);
            dbias[row] = at ? dbias[row] + Lanes::sum(total) : Lanes::sum(total);
        }
        const auto dot = [&](int64_t place) {
            const float* const from = x + static_cast<int64_t>(p.columns[place]) * xs.ld;
            if (place + 2 * ahead < stored) {
                const float* const next = x + static_cast<int64_t>(p.columns[place + 2 * ahead]) * xs.ld;
                for (int v = 0; v < NV * W; v += 32) __builtin_prefetch(next + v);
            }
            const float* const f = from + (NV - 1) * W;
            Float s = Lanes::mul(g[NV - 1], Ragged ? Lanes::load(f, tail) : Lanes::load(f));
            for (int v = 0; v < NV - 1; ++v) s = Lanes::fma(g[v], Lanes::load(from + v * W), s);
            return s;
        };
        for (; k + W <= stop; k += W) {
            Float s[W];
            for (int j = 0; j < W; ++j) s[j] = dot(k + j);
            Float total = Lanes::sums(s);
            if (at) total = Lanes::add(total, Lanes::load(dvalues + k));
            Lanes::store(dvalues + k, total);
        }
        for (; k < stop; k += 4) {
            const int64_t left = stop - k < 4 ? stop - k : 4;
            Float s[4];
            for (int64_t j = 0; j < 4; ++j) s[j] = j < left ? dot(k + j) : Lanes::zero();
            float total[4];
            Lanes::four_sums(s, total);
            for (int64_t j = 0; j < left; ++j) dvalues[k + j] = at ? dvalues[k + j] + total[j] : total[j];
        }
    }
}

template <int NV, class Ptr, class Col>
void sddmm_last(const Pattern<Ptr, Col>& p, Matrix dy, Matrix x, float* dvalues, float* dbias, int64_t begin, int64_t end, int64_t at, int64_t n) {
    if constexpr (NV > 1) {
        if (n <= (NV - 1) * W) return sddmm_last<NV - 1>(p, dy, x, dvalues, dbias, begin, end, at, n);
    }
    if (n == NV * W) sddmm_tile<NV, false>(p, dy, x, dvalues, dbias, begin, end, at, n);
    else sddmm_tile<NV, true>(p, dy, x, dvalues, dbias, begin, end, at, n);
}

template <class Ptr, class Col>
void sddmm(const Pattern<Ptr, Col>& p, Matrix dy, Matrix x, float* dvalues, float* dbias, int64_t batch, int threads) {
    constexpr int NV = Lanes::sddmm_vectors;
    if (batch == 0)
        for (int64_t k = 0; k < p.row_ptr[p.rows]; ++k) dvalues[k] = 0.0f;
    if (batch == 0 && dbias)
        for (int64_t row = 0; row < p.rows; ++row) dbias[row] = 0.0f;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = first_row(p.row_ptr, p.rows, part, parts), end = first_row(p.row_ptr, p.rows, part + 1, parts);
        for (int64_t at = 0; at < batch; at += NV * W) {
            const int64_t n = batch - at < NV * W ? batch - at : NV * W;
            sddmm_last<NV>(p, dy, x, dvalues, dbias, begin, end, at, n);
        }
    }
}

void epilogue_backward(Matrix dy, Matrix dz, float* dbias, int64_t rows, int64_t batch, const Epilogue& e, int threads) {
    const Float slope = Lanes::broadcast(e.slope), one = Lanes::broadcast(1.0f), scale = Lanes::broadcast(e.scale);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* const from = dy.data + row * dy.ld;
        float* const to = dz.data ? dz.data + row * dz.ld : nullptr;
        Float total = Lanes::zero();
        for (int64_t at = 0; at < batch; at += W) {
            const int lanes = batch - at < W ? static_cast<int>(batch - at) : W;
            const Tail tail = Lanes::tail(lanes < W ? lanes : 0);
            Float g = lanes < W ? Lanes::load(from + at, tail) : Lanes::load(from + at);
            if (e.positive) g = Lanes::mul(g, Lanes::select(load_bits(e.positive + row * e.bits_ld + at / 8, lanes), one, slope));
            if (e.kept) g = Lanes::select(load_bits(e.kept + row * e.bits_ld + at / 8, lanes), Lanes::mul(g, scale), Lanes::zero());
            total = Lanes::add(total, g);
            if (!to) continue;
            if (lanes < W) Lanes::store(to + at, g, tail);
            else Lanes::store(to + at, g);
        }
        if (dbias) dbias[row] = Lanes::sum(total);
    }
}

void transpose(Matrix x, Matrix y, int64_t rows, int64_t columns, int threads) {
    const int64_t blocks = (columns + W - 1) / W;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t c = block * W, c_end = c + W < columns ? c + W : columns;
        int64_t r = 0;
        if (c_end - c == W)
            for (; r + W <= rows; r += W) Lanes::transpose(x.data + r * x.ld + c, x.ld, y.data + c * y.ld + r, y.ld);
        for (; r < rows; ++r)
            for (int64_t i = c; i < c_end; ++i) y.data[i * y.ld + r] = x.data[r * x.ld + i];
    }
}

void copy_rows(Matrix x, Matrix y, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
        std::memcpy(y.data + row * y.ld, x.data + row * x.ld, sizeof(float) * static_cast<size_t>(columns));
}

template <class Ptr, class Col>
Products<Ptr, Col> products() {
    return {spmm<Ptr, Col>, sddmm<Ptr, Col>};
}

Kernels table() {
    return {products<int32_t, uint16_t>(), products<int32_t, int32_t>(), products<int64_t, uint16_t>(),
            products<int64_t, int32_t>(),  epilogue_backward,            transpose,
            copy_rows};
}

}  // namespace
}  // namespace noctule::NOCTULE_ISA
