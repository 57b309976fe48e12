// The products over blocks: place k of the pattern is R x C weights, and one row of x that is read serves R rows of y.
//
// Included by kernels.inl, for the instruction set of the including file.

namespace noctule::NOCTULE_ISA {
namespace {

// Columns whose x stays in the cache while the rows of y are gone through.
constexpr int64_t block_columns = 128;

template <class E, class Ptr, class Col>
struct BlockTask {
    const Pattern<Ptr, Col>& pattern;
    const E* values;
    Block block;
    Matrix<E> x, y;
    const Epilogue& epilogue;
};

// G rows of y, from row `first` of block row `row` on, over n columns from `at` on.
template <class Lanes, int G, int NV, bool Ragged, class E, class Ptr, class Col>
void block_tile(const BlockTask<E, Ptr, Col>& task, int64_t row, int64_t first, int64_t at, int64_t n) {
    using Float = typename Lanes::Float;
    const auto& p = task.pattern;
    const auto& e = task.epilogue;
    const Block b = task.block;
    const Row<Lanes, NV, Ragged> tile(n);
    const E* const x = task.x.data + at;
    const int64_t ld = task.x.ld, out = row * b.out + first, stop = p.row_ptr[row + 1], stored = p.row_ptr[p.rows];
    Float sum[G][NV];
    UNROLLED for (int r = 0; r < G; ++r) {
        const Float start = e.bias ? Lanes::broadcast(e.bias[out + r]) : Lanes::zero();
        UNROLLED for (int v = 0; v < NV; ++v) sum[r][v] = start;
    }
    const auto value_of = [&](int64_t k) { return task.values + (p.slots ? static_cast<int64_t>(p.slots[k]) : k) * b.out * b.in + first * b.out_step; };
    for (int64_t k = p.row_ptr[row]; k < stop; ++k) {
        const E* w = value_of(k);
        const E* from = x + static_cast<int64_t>(p.columns[k]) * b.in * ld;
        const int64_t next = k + 1 < stored ? k + 1 : k;
        const E* ahead_x = x + static_cast<int64_t>(p.columns[next]) * b.in * ld;
        if (p.slots) prefetch(value_of(next), static_cast<int>(b.out * b.in));
        for (int64_t c = 0; c < b.in; ++c, w += b.in_step, from += ld, ahead_x += ld) {
            Float value[NV];
            UNROLLED for (int v = 0; v < NV; ++v) value[v] = tile.load(from, v);
            prefetch(ahead_x, NV * Lanes::width);
            UNROLLED for (int r = 0; r < G; ++r) {
                const Float weight = Lanes::broadcast(w[r * b.out_step]);
                UNROLLED for (int v = 0; v < NV; ++v) sum[r][v] = Lanes::fma(weight, value[v], sum[r][v]);
            }
        }
    }
    UNROLLED for (int r = 0; r < G; ++r) finish(e, tile, out + r, at / 8, at, sum[r], task.y.data + (out + r) * task.y.ld + at);
}

template <class Lanes, int G, int NV, class E, class Ptr, class Col>
void block_last(const BlockTask<E, Ptr, Col>& task, int64_t row, int64_t first, int64_t at, int64_t n) {
    if constexpr (NV > 1) {
        if (n <= (NV - 1) * Lanes::width) return block_last<Lanes, G, NV - 1>(task, row, first, at, n);
    }
    if (n == NV * Lanes::width) block_tile<Lanes, G, NV, false>(task, row, first, at, n);
    else block_tile<Lanes, G, NV, true>(task, row, first, at, n);
}

template <class Lanes, int G, int NV, class E, class Ptr, class Col>
void block_part(const BlockTask<E, Ptr, Col>& task, int64_t begin, int64_t end, int64_t columns) {
    constexpr int64_t tile = NV * Lanes::width;
    for (int64_t from = 0; from < columns; from += block_columns) {
        const int64_t to = columns - from < block_columns ? columns : from + block_columns;
        for (int64_t row = begin; row < end; ++row)
            for (int64_t at = from; at < to; at += tile)
                for (int64_t first = 0; first < task.block.out; first += G)
                    block_last<Lanes, G, NV>(task, row, first, at, to - at < tile ? to - at : tile);
    }
}

// Y = W X through the epilogue; with `slots` the blocks are those of the transpose.
template <class Lanes, class E, class Ptr, class Col>
void block_spmm(const Pattern<Ptr, Col>& p, const E* values, Block block, Matrix<E> x, Matrix<E> y, int64_t columns, const Epilogue& epilogue,
                int threads) {
    const BlockTask<E, Ptr, Col> task{p, values, block, x, y, epilogue};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = first_row(p.row_ptr, p.rows, part, parts), end = first_row(p.row_ptr, p.rows, part + 1, parts);
        block_part<Lanes, Lanes::block_rows, Lanes::block_vectors>(task, begin, end, columns);
    }
}

float as_float(float x) { return x; }
float as_float(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// The rows of dy of which a register has one lane each, G of them, with P columns of the batch side by side.
//
// packed[t][r * P + p] = dy[r][t * P + p]; columns behind the last whole P have a vector each, with zeros beside them.
template <int P, class E>
void pack(const E* dy, int64_t ld, int64_t columns, float* packed) {
    constexpr int W = Floats::width, G = W / P;
    int64_t t = 0;
    if constexpr (P == 1 && sizeof(E) == 4) {
        for (; t + W <= columns; t += W) {
            Floats::Float rows[W];
            UNROLLED for (int r = 0; r < W; ++r) rows[r] = Floats::load(dy + r * ld + t);
            Floats::transpose(rows);
            UNROLLED for (int r = 0; r < W; ++r) Floats::store(packed + (t + r) * W, rows[r]);
        }
    }
    const int64_t whole = columns / P;
    for (; t < whole; ++t)
        for (int r = 0; r < G; ++r)
            for (int i = 0; i < P; ++i) packed[t * W + r * P + i] = as_float(dy[r * ld + t * P + i]);
    for (int64_t b = whole * P; b < columns; ++b, ++t)
        for (int i = 0; i < W; ++i) packed[t * W + i] = i % P ? 0.0f : as_float(dy[i / P * ld + b]);
}

// sum[j] = the products of the packed rows with column j, for 8 columns at from[j].
template <int P>
void block_dots(const float* packed, int64_t columns, const float* const* from, Floats::Float* sum) {
    constexpr int W = Floats::width;
    const float *x0 = from[0], *x1 = from[1], *x2 = from[2], *x3 = from[3], *x4 = from[4], *x5 = from[5], *x6 = from[6], *x7 = from[7];
    Floats::Float s[8];
    UNROLLED for (int j = 0; j < 8; ++j) s[j] = Floats::zero();
    const int64_t whole = columns / P * P;
    const auto add = [&](int64_t b, auto load) {
        const Floats::Float d = Floats::load(packed);
        packed += W;
        s[0] = Floats::fma(d, load(x0 + b), s[0]);
        s[1] = Floats::fma(d, load(x1 + b), s[1]);
        s[2] = Floats::fma(d, load(x2 + b), s[2]);
        s[3] = Floats::fma(d, load(x3 + b), s[3]);
        s[4] = Floats::fma(d, load(x4 + b), s[4]);
        s[5] = Floats::fma(d, load(x5 + b), s[5]);
        s[6] = Floats::fma(d, load(x6 + b), s[6]);
        s[7] = Floats::fma(d, load(x7 + b), s[7]);
    };
    for (int64_t b = 0; b < whole; b += P) add(b, [](const float* x) { return Floats::template repeated<P>(x); });
    for (int64_t b = whole; b < columns; ++b) add(b, [](const float* x) { return Floats::broadcast(*x); });
    UNROLLED for (int j = 0; j < 8; ++j) sum[j] = s[j];
}

template <class E, class Ptr, class Col>
struct BlockGradient {
    const Pattern<Ptr, Col>& pattern;
    int64_t rows, columns;  // of a block
    Matrix<E> dy;
    Matrix<float> x;
    E* dvalues;
    int64_t batch;
};

// The blocks of a row, for the W / P rows of dy from row `first` of it on: W columns of the blocks at a time.
template <class Lanes, int P, class E, class Ptr, class Col>
void block_gradient(const BlockGradient<E, Ptr, Col>& task, int64_t row, int64_t first, float* packed) {
    constexpr int W = Floats::width, G = W / P;
    const auto& p = task.pattern;
    const int64_t C = task.columns, begin = p.row_ptr[row] * C, end = p.row_ptr[row + 1] * C;
    if (begin == end) return;
    pack<P>(task.dy.data + (row * task.rows + first) * task.dy.ld, task.dy.ld, task.batch, packed);
    const auto column = [&](int64_t j) { return task.x.data + (static_cast<int64_t>(p.columns[j / C]) * C + j % C) * task.x.ld; };
    for (int64_t at = begin; at < end; at += W) {
        const int count = static_cast<int>(end - at < W ? end - at : W);
        Floats::Float sum[W];
        for (int part = 0; part < W; part += 8) {
            if (part >= count) {
                for (int j = part; j < W; ++j) sum[j] = Floats::zero();
                break;
            }
            const float* from[8];
            for (int j = 0; j < 8; ++j) from[j] = column(at + part + j < end ? at + part + j : at);
            block_dots<P>(packed, task.batch, from, sum + part);
        }
        Floats::transpose(sum);  // now of a row and a column of the batch each
        for (int r = 0; r < G; ++r) {
            Floats::Float total = sum[r * P];
            for (int i = 1; i < P; ++i) total = Floats::add(total, sum[r * P + i]);
            float all[W];
            E* const to = task.dvalues + (first + r) * C;
            if (C % W == 0) {
                Lanes::store_sums(to + at / C * task.rows * C + at % C, total);
                continue;
            }
            Floats::store(all, total);
            for (int j = 0; j < count; ++j) Lanes::store_sum(to + (at + j) / C * task.rows * C + (at + j) % C, all[j]);
        }
    }
}

// dvalues = the blocks of dy x^T at the places; dbias = sums of the rows of dy, or null.
template <class Lanes, class E, class Ptr, class Col>
void block_sddmm(const Pattern<Ptr, Col>& p, int64_t rows, int64_t columns, Matrix<E> dy, Matrix<E> x, int64_t sources, E* dvalues, E* dbias,
                 int64_t batch, int threads) {
    constexpr int W = Floats::width;
    Matrix<float> floats{nullptr, batch, 0};
    float* const own = sizeof(E) == 4 ? nullptr : new float[static_cast<size_t>(sources * batch)];
    if constexpr (sizeof(E) == 4) floats = x;
    else floats.data = own;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (own) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < sources; ++i)
                for (int64_t j = 0; j < batch; ++j) own[i * batch + j] = as_float(x.data[i * x.ld + j]);
        }
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = first_row(p.row_ptr, p.rows, part, parts), end = first_row(p.row_ptr, p.rows, part + 1, parts);
        float* const packed = new float[static_cast<size_t>((batch + W) * W)];
        const BlockGradient<E, Ptr, Col> task{p, rows, columns, dy, floats, dvalues, batch};
        for (int64_t row = begin; row < end; ++row) {
            if (rows % W == 0)
                for (int64_t first = 0; first < rows; first += W) block_gradient<Lanes, 1>(task, row, first, packed);
            else if (rows % (W / 2) == 0)
                for (int64_t first = 0; first < rows; first += W / 2) block_gradient<Lanes, 2>(task, row, first, packed);
            else
                for (int64_t first = 0; first < rows; first += W / 4) block_gradient<Lanes, (W >= 16 ? 4 : 2)>(task, row, first, packed);
            for (int64_t r = row * rows; dbias && r < (row + 1) * rows; ++r) {
                float total = 0.0f;
                for (int64_t j = 0; j < batch; ++j) total += as_float(dy.data[r * dy.ld + j]);
                Lanes::store_sum(dbias + r, total);
            }
        }
        delete[] packed;
    }
    delete[] own;
}

}  // namespace
}  // namespace noctule::NOCTULE_ISA
