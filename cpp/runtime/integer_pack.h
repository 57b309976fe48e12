// Weights into the layouts of the kernels of int8.
#pragma once
#include <cstdint>

namespace noctule::runtime {

struct Places {
    const int64_t* row_ptr;  // (rows + 1)
    const int32_t* offsets;
    const int8_t* values;
    int64_t rows;
};

// Records of `terms` offsets and a word of weights, a multiple of `group` of them for a row; their number. With two terms the
// products of a group with codes up to `highest` are added in 16 bits without overflow.
int64_t pack_records(const Places& p, int terms, int group, int highest, int64_t* starts, int32_t* words);

// Rounds of `lanes` rows with up to four places within a window each; their number. `highest` 0: pairs cannot saturate. The bytes
// are zero before.
int64_t pack_rounds(const Places& p, int lanes, int window, int highest, const int32_t* order, int64_t* starts, int32_t* bases, int8_t* bytes);

}  // namespace noctule::runtime
