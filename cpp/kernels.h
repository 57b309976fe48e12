// What every instruction set provides, as plain structs and one table of functions.
//
// All matrices are feature-major: a row is a feature, the batch is contiguous within it, `ld` elements lie between rows.
// Rows may overlap: the rows of an image, shifted by the places of a kernel, are the rows of a matrix that is never made.
//
// An element E is a float or a bfloat16; sums are float32 either way.
#pragma once
#include <cstdint>

namespace noctule {

// The upper half of a float.
struct bfloat16 {
    uint16_t bits;
};

// The places of a sparse matrix: row r holds columns[row_ptr[r] .. row_ptr[r + 1]).
template <class Ptr, class Col>
struct Pattern {
    int64_t rows;
    const Ptr* row_ptr;
    const Col* columns;
    const Ptr* slots;  // where each place's value lies; null: in order
};

// A place that is a block: `out` rows of the product, `in` columns; the weight of row r and column c is r * out_step + c * in_step
// behind the first.
struct Block {
    int64_t out, in, out_step, in_step;
};

template <class E>
struct Matrix {
    E* data;
    int64_t ld;
    int64_t step;  // from one line to the next
};

// The columns of a product: several lines of so many each. A linear layer has one line, its batch; a convolution one for each
// row of an image.
struct Lines {
    int64_t columns;
    int64_t count;
};

// What happens to a row of the product while it is in registers: bias, two-slope activation, dropout.
struct Epilogue {
    const float* bias;  // (rows), or null
    float slope;        // of the negative side; 1: no activation
    float scale;        // of what dropout keeps
    uint32_t drop_below;  // drop where the random word is below; 0: no dropout
    uint64_t seed;
    uint8_t* positive;  // (rows, bits_ld) bits of z > 0, or null: not kept; a line begins with a byte of its own
    uint8_t* kept;      // (rows, bits_ld) bits of what dropout kept, or null
    int64_t bits_ld;
};

// y (C, SH, SW, H, W, B), contiguous but for the channels, gets x (B, C, rows, columns) of any strides with zeros round it:
// y[c, p, q, h, w] = x[c, h * SH + p - top, w * SW + q - left]. With SH = SW = 1 it is a padded copy.
template <class E>
struct Place {
    const E* x;
    int64_t x_batch, x_channel, x_row, x_column;  // strides
    int64_t rows, columns, top, left;
    E* y;
    int64_t y_channel, channels, phases_high, phases_wide, high, wide, batch;
};

template <class E, class Ptr, class Col>
struct Products {
    void (*spmm)(const Pattern<Ptr, Col>&, const E* values, Matrix<E> x, Matrix<E> y, Lines, const Epilogue&, int threads);
    // dvalues at the places of dy x^T; dbias = sums of the rows of dy, which are in registers anyway, or null.
    void (*sddmm)(const Pattern<Ptr, Col>&, Matrix<E> dy, Matrix<E> x, int64_t sources, E* dvalues, E* dbias, Lines, int threads);
    // The same over blocks, on one line.
    void (*block_spmm)(const Pattern<Ptr, Col>&, const E* values, Block, Matrix<E> x, Matrix<E> y, int64_t columns, const Epilogue&, int threads);
    void (*block_sddmm)(const Pattern<Ptr, Col>&, int64_t block_rows, int64_t block_columns, Matrix<E> dy, Matrix<E> x, int64_t sources,
                        E* dvalues, E* dbias, int64_t columns, int threads);
};

// Of one element.
template <class E>
struct Code {
    Products<E, int32_t, uint16_t> p32c16;
    Products<E, int32_t, int32_t> p32c32;
    Products<E, int64_t, uint16_t> p64c16;
    Products<E, int64_t, int32_t> p64c32;
    // dz = dy through activation and dropout (dz.data null: only the sums); dbias = sums of the rows, or null.
    void (*epilogue_backward)(Matrix<E> dy, Matrix<E> dz, E* dbias, int64_t rows, int64_t batch, const Epilogue&, int threads);
    // An image with a border of zeros, cut into phases; see `Place`.
    void (*place)(const Place<E>&, int threads);
    // y (columns, rows) = x (rows, columns) transposed.
    void (*transpose)(Matrix<E> x, Matrix<E> y, int64_t rows, int64_t columns, int threads);
    // y = x, row by row.
    void (*copy_rows)(Matrix<E> x, Matrix<E> y, int64_t rows, int64_t columns, int threads);

    const Products<E, int32_t, uint16_t>& products(int32_t, uint16_t) const { return p32c16; }
    const Products<E, int32_t, int32_t>& products(int32_t, int32_t) const { return p32c32; }
    const Products<E, int64_t, uint16_t>& products(int64_t, uint16_t) const { return p64c16; }
    const Products<E, int64_t, int32_t>& products(int64_t, int32_t) const { return p64c32; }
};

struct Kernels {
    Code<float> floats;
    Code<bfloat16> halves;
};

Kernels avx512_kernels();
Kernels avx2_kernels();
Kernels portable_kernels();

}  // namespace noctule
