// What every instruction set provides for the codecs, as one table of functions.
//
// Tensors are flat: n elements in buckets of so many, the last one shorter. Random words are those of kernels.inl, one hash for
// each (seed, bucket, position), so that results depend on neither threads nor instruction set.
#pragma once
#include <cstdint>

namespace noctule {

struct Codecs {
    // Codes of sign and 7 bits: magnitude 2^(floor + code - 127), or zero. A bucket's floor is 255 where something is not finite.
    void (*natural_encode)(const float* x, int64_t n, int64_t bucket, uint64_t seed, uint8_t* codes, uint8_t* floors, int threads);
    void (*natural_decode)(const uint8_t* codes, const uint8_t* floors, int64_t n, int64_t bucket, float* x, int threads);
    // Numbers in [0, 1), 24 bits each: u[i] for position i % bucket of bucket i / bucket.
    void (*uniforms)(uint64_t seed, int64_t n, int64_t bucket, float* u, int threads);
    // Codes below 2^bits side by side, the first in the lowest bits; (n * bits + 7) / 8 bytes.
    void (*pack_bits)(const uint8_t* codes, int64_t n, int bits, uint8_t* packed, int threads);
    void (*unpack_bits)(const uint8_t* packed, int64_t n, int bits, uint8_t* codes, int threads);
    // The positions of the k largest magnitudes (NaN above inf), of equal ones the first; in ascending order.
    void (*largest)(const float* x, int64_t n, int64_t k, int64_t* positions, int threads);
    // Saved activations: see saved.inl.
    void (*saved_ranges)(const float* x, int64_t n, int64_t group, float* lows, float* highs, int32_t* nonzeros, int threads);
    void (*saved_encode)(const float* x, int64_t n, int64_t group, const float* inverses, const float* bases, int bits,
                         const int64_t* offsets, uint8_t* bitmap, uint8_t* packed, int threads);
    void (*saved_decode)(const uint8_t* packed, int64_t n, int64_t group, const float* scales, const float* bases, int bits,
                         const int64_t* offsets, const uint8_t* bitmap, float* x, int threads);
};

Codecs avx512_codecs();
Codecs avx2_codecs();
Codecs portable_codecs();

}  // namespace noctule
