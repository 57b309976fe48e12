// What brings numbers to where the products read them: transposes, framed images, rows on cache lines.
//
// Included by kernels.inl, for the instruction set of the including file.

namespace noctule::NOCTULE_ISA {
namespace {

// y (columns, rows) = x (rows, columns) transposed, for a block of at most W x W.
template <class Lanes, bool Whole, class E>
void transpose_block(const E* x, int64_t x_ld, E* y, int64_t y_ld, int rows, int columns) {
    using Raw = typename Lanes::Raw;
    const auto across = Raw::tail(Whole ? 0 : columns), down = Raw::tail(Whole ? 0 : rows);
    Lanes::transpose(
        [&](int i) {
            if constexpr (Whole) return Raw::load(x + i * x_ld);
            else return Raw::load(x + (i < rows ? i : 0) * x_ld, across);
        },
        [&](int j, auto row) {
            if constexpr (Whole) Raw::store(y + j * y_ld, row);
            else if (j < columns) Raw::store(y + j * y_ld, row, down);
        });
}

// The same for a strip of any number of rows and at most W columns.
template <class Lanes, class E>
void transpose_strip(const E* x, int64_t x_ld, E* y, int64_t y_ld, int64_t rows, int columns) {
    constexpr int W = Lanes::width;
    for (int64_t r = 0; r < rows; r += W) {
        const int n = rows - r < W ? static_cast<int>(rows - r) : W;
        if (n == W && columns == W) transpose_block<Lanes, true>(x + r * x_ld, x_ld, y + r, y_ld, n, columns);
        else transpose_block<Lanes, false>(x + r * x_ld, x_ld, y + r, y_ld, n, columns);
    }
}

template <class Lanes, class E>
void transpose(Matrix<E> x, Matrix<E> y, int64_t rows, int64_t columns, int threads) {
    constexpr int W = Lanes::width;
    const int64_t strips = (columns + W - 1) / W;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t c = strip * W;
        const int n = columns - c < W ? static_cast<int>(columns - c) : W;
        transpose_strip<Lanes>(x.data + c, x.ld, y.data + c * y.ld, y.ld, rows, n);
    }
}

// One row of an image: `wide` places of `batch` elements, those from `first` to `last` (excluded) from x, the others zero.
template <class Lanes, class E>
void place_row(const Place<E>& p, const E* x, int64_t x_column, E* y, int64_t first, int64_t last) {
    constexpr int W = Lanes::width;
    const int64_t batch = p.batch;
    if (first > 0) std::memset(y, 0, sizeof(E) * static_cast<size_t>(first * batch));
    if (last < p.wide) std::memset(y + last * batch, 0, sizeof(E) * static_cast<size_t>((p.wide - last) * batch));
    if (last <= first) return;
    E* const to = y + first * batch;
    const int64_t n = last - first;
    if (p.x_batch == 1 || batch == 1) {
        if (x_column == batch) std::memcpy(to, x, sizeof(E) * static_cast<size_t>(n * batch));
        else
            for (int64_t i = 0; i < n; ++i)
                for (int64_t b = 0; b < batch; ++b) to[i * batch + b] = x[i * x_column + b];
    } else if (x_column == 1) {
        for (int64_t i = 0; i < n; i += W)
            transpose_strip<Lanes>(x + i, p.x_batch, to + i * batch, batch, batch, n - i < W ? static_cast<int>(n - i) : W);
    } else {
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t i = 0; i < n; ++i) to[i * batch + b] = x[b * p.x_batch + i * x_column];
    }
}

template <class Lanes, class E>
void place(const Place<E>& p, int threads) {
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
        const E* const x = p.x + c * p.x_channel + row * p.x_row + (first * p.phases_wide + q - p.left) * p.x_column;
        place_row<Lanes>(p, x, p.x_column * p.phases_wide, p.y + c * p.y_channel + (phase % phases * p.high + h) * p.wide * p.batch, first, last);
    }
}

template <class Lanes, class E>
void copy_rows(Matrix<E> x, Matrix<E> y, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
        std::memcpy(y.data + row * y.ld, x.data + row * x.ld, sizeof(E) * static_cast<size_t>(columns));
}

}  // namespace
}  // namespace noctule::NOCTULE_ISA
