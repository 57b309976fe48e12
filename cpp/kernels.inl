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
    Lines lines;
    const Epilogue& epilogue;
};

// Rows [begin, end) of Y = W X over the columns [at, at + n) of a line, n <= NV * W; only the last vector is ragged.
template <bool Slots, int NV, bool Ragged, class Ptr, class Col>
void spmm_tile(const SpmmTask<Ptr, Col>& task, int64_t begin, int64_t end, int64_t line, int64_t at, int64_t n) {
    const auto& p = task.pattern;
    const auto& e = task.epilogue;
    const int last = static_cast<int>(n - (NV - 1) * W);
    const Tail tail = Lanes::tail(Ragged ? last : 0);
    const float* const x = task.x.data + line * task.x.step + at;
    float* const y = task.y.data + line * task.y.step + at;
    const int64_t first_bits = line * ((task.lines.columns + 7) / 8) + at / 8, position = line * task.lines.columns + at;
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
                if (e.positive) store_bits(e.positive + row * e.bits_ld + first_bits + v * W / 8, bits, Ragged && v == NV - 1 ? last : W);
            }
        }
        if (e.drop_below) {
            const Random random(e.seed, row);
            const Float scale = Lanes::broadcast(e.scale);
            const Word below = Lanes::words(e.drop_below);
            for (int v = 0; v < NV; ++v) {
                const uint32_t bits = Lanes::at_least(random(position + v * W), below);
                sum[v] = Lanes::select(bits, Lanes::mul(sum[v], scale), Lanes::zero());
                if (e.kept) store_bits(e.kept + row * e.bits_ld + first_bits + v * W / 8, bits, Ragged && v == NV - 1 ? last : W);
            }
        }
        float* const to = y + row * task.y.ld;
        for (int v = 0; v < NV - 1; ++v) Lanes::store(to + v * W, sum[v]);
        if (Ragged) Lanes::store(to + (NV - 1) * W, sum[NV - 1], tail);
        else Lanes::store(to + (NV - 1) * W, sum[NV - 1]);
    }
}

template <bool Slots, int NV, class Ptr, class Col>
void spmm_last(const SpmmTask<Ptr, Col>& task, int64_t begin, int64_t end, int64_t line, int64_t at, int64_t n) {
    if constexpr (NV > 1) {
        if (n <= (NV - 1) * W) return spmm_last<Slots, NV - 1>(task, begin, end, line, at, n);
    }
    if (n == NV * W) spmm_tile<Slots, NV, false>(task, begin, end, line, at, n);
    else spmm_tile<Slots, NV, true>(task, begin, end, line, at, n);
}

template <bool Slots, class Ptr, class Col>
void spmm_part(const SpmmTask<Ptr, Col>& task, int part, int parts) {
    constexpr int NV = Lanes::spmm_vectors;
    const auto& p = task.pattern;
    const int64_t begin = first_row(p.row_ptr, p.rows, part, parts), end = first_row(p.row_ptr, p.rows, part + 1, parts);
    const int64_t columns = task.lines.columns;
    for (int64_t line = 0; line < task.lines.count; ++line)
        for (int64_t at = 0; at < columns; at += NV * W) {
            const int64_t n = columns - at < NV * W ? columns - at : NV * W;
            spmm_last<Slots, NV>(task, begin, end, line, at, n);
        }
}

template <class Ptr, class Col>
void spmm(const Pattern<Ptr, Col>& pattern, const float* values, Matrix x, Matrix y, Lines lines, const Epilogue& epilogue,
          int threads) {
    const SpmmTask<Ptr, Col> task{pattern, values, x, y, lines, epilogue};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        if (pattern.slots) spmm_part<true>(task, part, parts);
        else spmm_part<false>(task, part, parts);
    }
}

// dvalues[k] (+)= dy[row(k)] . x[column(k)] over n columns from `dy` and `x` on; the first tile sets, the others add.
template <int NV, bool Ragged, class Ptr, class Col>
void sddmm_tile(const Pattern<Ptr, Col>& p, Matrix dy, Matrix xs, float* dvalues, float* dbias, int64_t begin, int64_t end, bool add, int64_t n) {
    const Tail tail = Lanes::tail(Ragged ? static_cast<int>(n - (NV - 1) * W) : 0);
    const float* const x = xs.data;
    const int64_t stored = p.row_ptr[p.rows];
    for (int64_t row = begin; row < end; ++row) {
        int64_t k = p.row_ptr[row];
        const int64_t stop = p.row_ptr[row + 1];
        if (k == stop && !dbias) continue;
        const float* const d = dy.data + row * dy.ld;
        Float g[NV];
        for (int v = 0; v < NV - 1; ++v) g[v] = Lanes::load(d + v * W);
        g[NV - 1] = Ragged ? Lanes::load(d + (NV - 1) * W, tail) : Lanes::load(d + (NV - 1) * W);
        if (dbias) {
            Float total = g[0];
            for (int v = 1; v < NV; ++v) total = Lanes::add(total, g[v]);
            dbias[row] = add ? dbias[row] + Lanes::sum(total) : Lanes::sum(total);
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
            if (add) total = Lanes::add(total, Lanes::load(dvalues + k));
            Lanes::store(dvalues + k, total);
        }
        for (; k < stop; k += 4) {
            const int64_t left = stop - k < 4 ? stop - k : 4;
            Float s[4];
            for (int64_t j = 0; j < 4; ++j) s[j] = j < left ? dot(k + j) : Lanes::zero();
            float total[4];
            Lanes::four_sums(s, total);
            for (int64_t j = 0; j < left; ++j) dvalues[k + j] = add ? dvalues[k + j] + total[j] : total[j];
        }
    }
}

template <int NV, class Ptr, class Col>
void sddmm_last(const Pattern<Ptr, Col>& p, Matrix dy, Matrix x, float* dvalues, float* dbias, int64_t begin, int64_t end, bool add, int64_t n) {
    if constexpr (NV > 1) {
        if (n <= (NV - 1) * W) return sddmm_last<NV - 1>(p, dy, x, dvalues, dbias, begin, end, add, n);
    }
    if (n == NV * W) sddmm_tile<NV, false>(p, dy, x, dvalues, dbias, begin, end, add, n);
    else sddmm_tile<NV, true>(p, dy, x, dvalues, dbias, begin, end, add, n);
}

template <class Ptr, class Col>
void sddmm(const Pattern<Ptr, Col>& p, Matrix dy, Matrix x, float* dvalues, float* dbias, Lines lines, int threads) {
    constexpr int NV = Lanes::sddmm_vectors;
    const bool empty = lines.columns == 0 || lines.count == 0;
    if (empty)
        for (int64_t k = 0; k < p.row_ptr[p.rows]; ++k) dvalues[k] = 0.0f;
    if (empty && dbias)
        for (int64_t row = 0; row < p.rows; ++row) dbias[row] = 0.0f;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = first_row(p.row_ptr, p.rows, part, parts), end = first_row(p.row_ptr, p.rows, part + 1, parts);
        for (int64_t line = 0; line < lines.count; ++line)
            for (int64_t at = 0; at < lines.columns; at += NV * W) {
                const int64_t n = lines.columns - at < NV * W ? lines.columns - at : NV * W;
                const Matrix d{dy.data + line * dy.step + at, dy.ld, 0}, from{x.data + line * x.step + at, x.ld, 0};
                sddmm_last<NV>(p, d, from, dvalues, dbias, begin, end, line || at, n);
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

// One row of an image: `wide` places of `batch` floats, those from `first` to `last` (excluded) from x, the others zero.
void place_row(const Place& p, const float* x, int64_t x_column, float* y, int64_t first, int64_t last) {
    const int64_t batch = p.batch;
    if (first > 0) std::memset(y, 0, sizeof(float) * static_cast<size_t>(first * batch));
    if (last < p.wide) std::memset(y + last * batch, 0, sizeof(float) * static_cast<size_t>((p.wide - last) * batch));
    if (last <= first) return;
    float* const to = y + first * batch;
    const int64_t n = last - first;
    if (p.x_batch == 1 || batch == 1) {
        if (x_column == batch) std::memcpy(to, x, sizeof(float) * static_cast<size_t>(n * batch));
        else
            for (int64_t i = 0; i < n; ++i)
                for (int64_t b = 0; b < batch; ++b) to[i * batch + b] = x[i * x_column + b];
        return;
    }
    int64_t i = 0;
    if (x_column == 1)
        for (; i + W <= n; i += W) {
            int64_t b = 0;
            for (; b + W <= batch; b += W) Lanes::transpose(x + b * p.x_batch + i, p.x_batch, to + i * batch + b, batch);
            for (; b < batch; ++b)
                for (int64_t j = i; j < i + W; ++j) to[j * batch + b] = x[b * p.x_batch + j];
        }
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t j = i; j < n; ++j) to[j * batch + b] = x[b * p.x_batch + j * x_column];
}

void place(const Place& p, int threads) {
    const int64_t phases = p.phases_high * p.phases_wide, rows = p.channels * phases * p.high;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t h = r % p.high, phase = r / p.high;
        const int64_t q = phase % p.phases_wide, i = phase % phases / p.phases_wide, c = phase / phases;
        const int64_t row = h * p.phases_high + i - p.top;
        // the places whose column w * SW + q - left lies in the image
        int64_t first = 0, last = 0;
        if (row >= 0 && row < p.rows) {
            const int64_t skip = p.left - q;
            first = skip > 0 ? (skip + p.phases_wide - 1) / p.phases_wide : 0;
            last = (p.columns - 1 + p.left - q) / p.phases_wide + 1;
            if (p.columns - 1 + p.left - q < 0) last = 0;
            if (last > p.wide) last = p.wide;
            if (first > last) first = last;
        }
        const float* const x = p.x + c * p.x_channel + row * p.x_row + (first * p.phases_wide + q - p.left) * p.x_column;
        place_row(p, x, p.x_column * p.phases_wide, p.y + c * p.y_channel + (phase % phases * p.high + h) * p.wide * p.batch, first, last);
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
            products<int64_t, int32_t>(),  epilogue_backward,            place,
            transpose,                    copy_rows};
}

}  // namespace
}  // namespace noctule::NOCTULE_ISA
