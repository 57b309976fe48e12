#include "integer_avx2.h"

#include <type_traits>

#include "integer.inl"

namespace noctule::runtime::avx2 {
namespace {

// `vpmaddubsw` adds two products in 16 bits and saturates: weights are packed such that it never does (integer_pack.cpp).
struct Lanes : Lanes256 {
    static Int dot(Int sum, Int x, Int w) {
        return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
    }
    // Bytes of x at these places, each below 32.
    static Int look_up(const uint8_t* x, Int places) {
        const Int low = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        const Int high = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 16)));
        // A set upper bit gives zero: here for places from 16 on, there for those below.
        return either(_mm256_shuffle_epi8(low, _mm256_add_epi8(places, _mm256_set1_epi8(0x70))),
                      _mm256_shuffle_epi8(high, _mm256_sub_epi8(places, _mm256_set1_epi8(16))));
    }
};

// 32 NV columns of one row. G pairs of places are added in 16 bits; their weights are such that this cannot overflow.
template <int NV, int G>
struct Pairs {
    using Lanes = avx2::Lanes;
    using Int = Lanes::Int;
    static constexpr int group = G, words = 3, columns = 32 * NV, vectors = 4 * NV;
    Int even[2 * NV], odd[2 * NV];

    Pairs() {
        UNROLLED for (int i = 0; i < 2 * NV; ++i) even[i] = odd[i] = Lanes::zero();
    }
    void add(const int32_t* record, const uint8_t* x, int64_t ld) {
        Int sum[2 * NV];
        UNROLLED for (int g = 0; g < G; ++g) {
            const uint8_t *const a = x + record[3 * g] * ld, *const b = x + record[3 * g + 1] * ld;
            const Int w = Lanes::broadcast(record[3 * g + 2]);
            UNROLLED for (int v = 0; v < NV; ++v) {
                const Int first = Lanes::load(a + 32 * v), second = Lanes::load(b + 32 * v);
                const Int low = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(first, second), w);
                const Int high = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(first, second), w);
                sum[2 * v] = g ? _mm256_add_epi16(sum[2 * v], low) : low;
                sum[2 * v + 1] = g ? _mm256_add_epi16(sum[2 * v + 1], high) : high;
            }
        }
        const Int evens = Lanes::broadcast(1);
        UNROLLED for (int i = 0; i < 2 * NV; ++i) {
            even[i] = Lanes::add(even[i], _mm256_madd_epi16(sum[i], evens));
            odd[i] = Lanes::add(odd[i], _mm256_srai_epi32(sum[i], 16));
        }
    }
    void finish(Int* sums) const {
        UNROLLED for (int v = 0; v < NV; ++v) UNROLLED for (int half = 0; half < 2; ++half) {
            const Int low = _mm256_unpacklo_epi32(even[2 * v + half], odd[2 * v + half]);
            const Int high = _mm256_unpackhi_epi32(even[2 * v + half], odd[2 * v + half]);
            sums[4 * v + half] = _mm256_permute2x128_si256(low, high, 0x20);
            sums[4 * v + half + 2] = _mm256_permute2x128_si256(low, high, 0x31);
        }
    }
};

struct Set {
    using Lanes = avx2::Lanes;
    static constexpr int terms = 2, window = 32, step = 16, paired = 2;
    static constexpr int sparse_columns = 64, block_vectors = 8, dense_rows = 4, dense_vectors = 2;

    template <class F>
    static void with_tile(int n, int group, F&& f) {
        with_registers<2>(n, 32, [&](auto nv) {
            if (group == 1) f(Pairs<nv, 1>());
            else if (group == 2) f(Pairs<nv, 2>());
            else if (group == 3) f(Pairs<nv, 3>());
            else f(Pairs<nv, 4>());
        });
    }
    static Lanes::Int dense_dot(Lanes::Int sum, Lanes::Int x, Lanes::Int w) { return Lanes::add(sum, _mm256_madd_epi16(x, w)); }
    // Words of two places of 16 bits, whose products need no care.
    static void dense_words(const uint8_t* x, int64_t ld, const int32_t* offsets, int64_t rows, int64_t columns, uint8_t* y) {
        auto* to = reinterpret_cast<uint32_t*>(y);
        for (int64_t row = 0; row < rows; row += 2, to += columns) {
            const bool both = row + 1 < rows;
            const uint8_t* const a = x + (offsets ? offsets[row] : row) * ld;
            const uint8_t* const b = both ? x + (offsets ? offsets[row + 1] : row + 1) * ld : a;
            const uint32_t up = both ? 1u << 16 : 0u;
            for (int64_t n = 0; n < columns; ++n) to[n] = a[n] + b[n] * up;
        }
    }
    static void row_dots(const int8_t* w, int64_t places, int rows, const uint8_t* x, int32_t* sums) {
        __m256i total[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
        const int8_t* from[4];
        for (int r = 0; r < 4; ++r) from[r] = w + (r < rows ? r : 0) * places;
        for (int64_t k = 0; k < places; k += 16) {
            const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k)));
            UNROLLED for (int r = 0; r < 4; ++r) {
                const __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[r] + k)));
                total[r] = Lanes::add(total[r], _mm256_madd_epi16(wide, weights));
            }
        }
        const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(total[0], total[1]), _mm256_hadd_epi32(total[2], total[3]));
        int32_t out[4];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1)));
        for (int r = 0; r < rows; ++r) sums[r] = out[r];
    }
};

}  // namespace
}  // namespace noctule::runtime::avx2

noctule::runtime::Integers noctule::runtime::avx2_integers() { return avx2::table<avx2::Set>(); }
