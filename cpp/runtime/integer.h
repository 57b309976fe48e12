// What every instruction set provides for int8, as plain structs and one table of functions.
//
// Activations are uint8 codes, feature-major: a row is a feature, the columns (batch) lie contiguous within it, `ld` elements lie
// between rows. x is read up to 64 bytes behind its end; results are written at their columns alone. An interleaved x is
// (features / 4, columns, 4): a word is four neighbouring features of one column.
#pragma once
#include <cstdint>

namespace noctule::runtime {

// y[o, n] = store(activate(float(sum + correction[o]) * scale[o] + bias[o])) for every line of columns, where the sum is that of
// w[o, k] * x[k * ld + line * x_step + n]. Strides count elements; words where x is interleaved.
struct Product {
    const uint8_t* x;
    int64_t ld, x_step;
    void* y;
    int64_t y_ld, y_step;
    int64_t rows, columns, lines;
    const int32_t* correction;  // (rows), as the next two
    const float *scale, *bias;
    float slope;  // of the negative side; 1: no activation
    bool codes;   // results are rounded to a grid and stored as uint8, not as float32
    float inverse, zero, highest;  // of the grid of codes: clamp(rint(v * inverse) + zero, 0, highest)
};

// Packed weights; see integer_pack.cpp and noctule.runtime.integers.
struct Weights {
    const int64_t* starts;   // of the records of a row, or of the rounds of as many rows as a register has lanes
    const int32_t* words;    // records; dense: what the tiles leave out, as records of a word
    int group;               // records that are added before they are widened
    const int32_t* bases;    // of rounds: the first place
    const int8_t* bytes;     // rounds (., 2, lanes, 4): places behind the base, weights; dense tiles (., words, rows, 4) or rows
    const int32_t* offsets;  // rounds: the rows of the lanes, or -1; dense: the row of x of a place. Null: in order
    int64_t places;          // of a dense row; or the rows of x in use
    uint8_t* scratch;
};

struct Integers {
    int terms;       // places of a record
    int lanes;       // of 32 bits in a register
    int window;      // bytes that a register looks up; 0: no rounds
    int dense_rows;  // of a tile
    using Kernel = void(const Product&, const Weights&);
    Kernel *sparse, *blocks, *dense, *few_rounds, *few_dense;
    // y (ceil(rows / 4), columns, 4) of rows ld apart.
    void (*interleave)(const uint8_t* x, int64_t ld, int64_t rows, int64_t columns, uint8_t* y);
    bool (*quantize)(const float* x, int64_t n, float inverse, float zero, float highest, uint8_t* codes);  // whether all are finite
};

Integers vnni_integers();
Integers avx2_integers();
Integers portable_integers();

// The non-zeros of a matrix.
struct Places {
    const int64_t* row_ptr;  // (rows + 1)
    const int32_t* offsets;
    const int8_t* values;
    int64_t rows;
};

// Records of `terms` offsets and a word of weights, their number. With two terms they come in pairs of groups, and the products of
// a group with codes up to `highest` are added in 16 bits without overflow. A null place is not written.
int64_t pack_records(const Places& p, int terms, int group, int highest, int64_t* starts, int32_t* words);

// Rounds of `lanes` rows with up to four places within a window each; their number. `highest` 0: pairs cannot saturate. The bytes
// are zero before.
int64_t pack_rounds(const Places& p, int lanes, int window, int highest, const int32_t* order, int64_t* starts, int32_t* bases, int8_t* bytes);

}  // namespace noctule::runtime
