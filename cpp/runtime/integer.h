// What every instruction set provides for int8, as plain structs and one table of functions.
//
// Activations are uint8 codes, feature-major: a row is a feature, the columns (batch) lie contiguous within it, `ld` elements lie
// between rows. Rows of x are read up to 64 bytes behind the last of them; results are written at their columns alone.
// "Words" are four neighbouring features of one column in 32 bits: an interleaved array is (features / 4, columns, 4).
#pragma once
#include <cstdint>

namespace noctule::runtime {

enum class Store : int { floats, codes, words };

// y[o, n] = store(activate(float(sum + correction[o]) * scale[o] + bias[o])) for every line of columns, where the sum is that of
// w[o, k] * x[k * ld + line * x_step + n]. Strides count elements; words where x or y is interleaved.
struct Product {
    const uint8_t* x;
    int64_t ld, x_step;
    void* y;
    int64_t y_ld, y_step;
    int64_t rows, columns, lines;
    const int32_t* correction;  // (rows)
    const float* scale;         // (rows)
    const float* bias;          // (rows)
    float slope;                // of the negative side; 1: no activation
    Store store;
    float inverse, zero, highest;  // of the grid of codes: clamp(rint(v * inverse) + zero, 0, highest)
};

// Weights of one or two to four places and their offsets, in the layout of the instruction set; see integer_pack.cpp.
struct Records {
    const int64_t* starts;  // (rows + 1)
    const int32_t* words;
    int group;  // records that are added before they are widened
};

// Rounds of a product of few columns: `lanes` rows, each with up to four places behind a base.
struct Rounds {
    const int64_t* starts;  // (row groups + 1)
    const int32_t* bases;
    const int8_t* bytes;    // (rounds, 2, lanes, 4): places behind the base, weights
    const int32_t* order;   // (row groups * lanes): the row of a lane, or -1
};

// A dense matrix, or a list of places for few columns.
struct Weights {
    const int64_t* starts;   // list: (rows + 1)
    const int32_t* offsets;  // (places): the row of x; null: in order
    const int8_t* values;
    int64_t places;          // dense: of a row; few columns: rows of x in use
    uint8_t* scratch;
};

struct Integers {
    int terms;   // places of a record
    int lanes;   // of 32 bits in a register
    int window;  // bytes that a register looks up; 0: no rounds
    int step;    // places of a dense row are padded to a multiple
    int paired;  // places of a dense word: 4 of one byte or 2 of two
    int dense_rows;  // rows of a dense matrix that are packed together
    void (*sparse)(const Product&, const Records&);
    void (*blocks)(const Product&, const Records&);
    void (*dense)(const Product&, const Weights&);
    void (*few_rounds)(const Product&, const Rounds&, const Weights&);
    void (*few_list)(const Product&, const Weights&);
    void (*few_dense)(const Product&, const Weights&);
    void (*interleave)(const uint8_t* x, int64_t ld, int64_t rows, int64_t columns, uint8_t* y);
    bool (*quantize)(const float* x, int64_t n, float inverse, float zero, float highest, uint8_t* codes);
    void (*dequantize)(const uint8_t* codes, int64_t n, float scale, float zero, float* x);
};

Integers vnni_integers();
Integers avx2_integers();
Integers portable_integers();

}  // namespace noctule::runtime
