// The kernels of float32 that every instruction set provides, on raw addresses.
//
// A value is feature-major, its lanes (the samples of a batch) innermost. What a product reads and writes: row k of the input begins at
// x + starts[k] * ld, line l of it x_step further on each; row r of the result at y + r * y_ld, its lines y_step apart.
#pragma once
#include <cstdint>
#include <string>

namespace noctule::runtime {

using Address = uintptr_t;
using Size = int64_t;

struct FloatKernels {
    Size (*dense_rows)();  // of a block of the packed weight
    // weight (O / R, K, R)
    void (*dense)(Size rows, Size depth, Address weight, Address starts, Address x, Size ld, Size x_step, Address y, Size y_ld, Size y_step,
                  Size columns, Size lines, Address bias, float slope);
    // weight (O, K), one column, lines of K numbers on end
    void (*dots)(Size rows, Size depth, Address weight, Address x, Size ld, Size x_step, Address y, Size y_ld, Size y_step, Size columns,
                 Size lines, Address bias, float slope);
    void (*sparse)(Size rows, Address row_ptr, Address starts, Address values, Address x, Size ld, Size x_step, Address y, Size y_ld,
                   Size y_step, Size columns, Size lines, Address bias, float slope);
    // x (N, T, D), y (N, D, S) or (N, S, D), z (N, T, S), each number of lanes
    void (*matmul)(Address x, Address y, Address z, Size n, Size t, Size d, Size s, Size lanes, bool transposed, float factor);
    void (*frame)(Size bytes, Address x, Size channels, Size rows, Size columns, Size lanes, Size top, Size left, Size down, Size right,
                  Size phases_high, Size phases_wide, Size high, Size wide, Size zero, Address y);
    void (*max_pool)(Size bytes, Address x, Address y, Size channels, Size rows, Size columns, Size high, Size wide, Size lanes, Size kernel_high,
                     Size kernel_wide, Size down, Size right, Size top, Size left);
    void (*mean_pool)(Address x, Address y, Size channels, Size rows, Size columns, Size high, Size wide, Size lanes, Size kernel_high,
                      Size kernel_wide, Size down, Size right, Size top, Size left, bool inside);
    void (*mean)(Address x, Address y, Size outer, Size along, Size inner);
    void (*softmax)(Address x, Address y, Size outer, Size along, Size inner, Size period);
    void (*layer_norm)(Address x, Address y, Size outer, Size along, Size inner, Address weight, Address bias, float epsilon);
    void (*affine)(Address x, Address y, Size rows, Size each, Address scale, Address shift, float slope);
    void (*add)(Address x, Address y, Address z, Size n, float slope);
    void (*multiply)(Address x, Address y, Address z, Size n, float slope);
    void (*clamp)(Address x, Address y, Size n, float slope, float low, float high);
    void (*activate)(Size kind, Address x, Address y, Size n);
    void (*permute)(Size bytes, Address x, Address y, Address sizes, Size lanes);
    void (*copy_lines)(Address x, Size x_line, Address y, Size y_line, Size count, Size bytes);
    void (*spread)(Address numbers, Address y, Size n, Size lanes);
    bool (*embed)(Address tokens, Address y, Size n, Size lanes, Address table, Size rows, Size width);  // whether a token has no row
    bool (*enter)(Address x, Size batch, Size numbers, Address y, Size lanes, bool floats);              // whether one is not finite
    void (*leave)(Address x, Size lanes, Size batch, Size numbers, Address y);
};

FloatKernels vnni_floats();
FloatKernels avx2_floats();
FloatKernels portable_floats();

}  // namespace noctule::runtime
