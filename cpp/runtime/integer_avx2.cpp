// Eight sums of 32 bits in a register. `vpmaddubsw` adds two products in 16 bits and saturates: weights are packed such that it
// never does (integer_pack.cpp).
#include <immintrin.h>

#define NOCTULE_ISA avx2
#include "integer.inl"

namespace noctule::runtime::avx2 {
namespace {

struct Lanes8 {
    static constexpr int width = 8;
    using Int = __m256i;

    static Int zero() { return _mm256_setzero_si256(); }
    static Int broadcast(int32_t x) { return _mm256_set1_epi32(x); }
    static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
    static void store(void* p, Int x) { _mm256_storeu_si256(static_cast<Int*>(p), x); }
    static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Int dot(Int sum, Int x, Int w) { return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1))); }
    // Bytes of x at these places, each below 32.
    static Int look_up(const uint8_t* x, Int places) {
        const Int low = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        const Int high = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 16)));
        // A set upper bit gives zero: here for places from 16 on, there for those below.
        return _mm256_or_si256(_mm256_shuffle_epi8(low, _mm256_add_epi8(places, _mm256_set1_epi8(0x70))),
                               _mm256_shuffle_epi8(high, _mm256_sub_epi8(places, _mm256_set1_epi8(16))));
    }
};

// 32 NV columns of one row. G pairs of places are added in 16 bits, where their weights are such that this cannot overflow; two
// such sums are widened together.
template <int NV, int G>
struct Pairs {
    using L = Lanes8;
    using Int = L::Int;
    static constexpr int group = 2 * G, words = 3, lanes = 8, columns = 32 * NV;
    Int sum[4 * NV];

    Pairs() {
        UNROLLED for (int i = 0; i < 4 * NV; ++i) sum[i] = L::zero();
    }
    void add(const int32_t* record, const uint8_t* x, int64_t ld) {
        UNROLLED for (int v = 0; v < NV; ++v) {
            Int low[2], high[2];
            UNROLLED for (int k = 0; k < 2 * G; ++k) {
                const Int a = L::load(x + record[3 * k] * ld + 32 * v), b = L::load(x + record[3 * k + 1] * ld + 32 * v);
                const Int w = L::broadcast(record[3 * k + 2]);
                const Int products[2] = {_mm256_maddubs_epi16(_mm256_unpacklo_epi8(a, b), w), _mm256_maddubs_epi16(_mm256_unpackhi_epi8(a, b), w)};
                low[k / G] = k % G ? _mm256_add_epi16(low[k / G], products[0]) : products[0];
                high[k / G] = k % G ? _mm256_add_epi16(high[k / G], products[1]) : products[1];
            }
            const Int wide[4] = {_mm256_unpacklo_epi16(low[0], low[1]), _mm256_unpackhi_epi16(low[0], low[1]),
                                 _mm256_unpacklo_epi16(high[0], high[1]), _mm256_unpackhi_epi16(high[0], high[1])};
            UNROLLED for (int i = 0; i < 4; ++i)
                sum[4 * v + i] = L::add(sum[4 * v + i], _mm256_madd_epi16(wide[i], _mm256_set1_epi16(1)));
        }
    }
    void store(int32_t* sums) const {
        UNROLLED for (int i = 0; i < 4 * NV; i += 2) {
            int32_t* const to = sums + 8 * i - 4 * (i % 4);
            L::store(to, _mm256_permute2x128_si256(sum[i], sum[i + 1], 0x20));
            L::store(to + 16, _mm256_permute2x128_si256(sum[i], sum[i + 1], 0x31));
        }
    }
};

struct Set {
    using Lanes = Lanes8;
    static constexpr int terms = 2, window = 32, sparse_columns = 64, dense_rows = 4, dense_vectors = 2;

    template <class F>
    static void with_tile(int n, int group, F&& f) {
        with_registers<2>(n, 32, [&](auto nv) {
            if (group == 1) f(Pairs<nv, 1>());
            else if (group == 2) f(Pairs<nv, 2>());
            else if (group == 3) f(Pairs<nv, 3>());
            else f(Pairs<nv, 4>());
        });
    }
    static void four_dots(const int8_t* w, int64_t ld, const uint8_t* x, int32_t* sums) {
        __m256i sum[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
        for (int64_t k = 0; k < ld; k += 16) {
            const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k)));
            UNROLLED for (int r = 0; r < 4; ++r)
                sum[r] = Lanes::add(sum[r], _mm256_madd_epi16(wide, _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + r * ld + k)))));
        }
        const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
    }
};

}  // namespace
}  // namespace noctule::runtime::avx2

noctule::runtime::Integers noctule::runtime::avx2_integers() { return avx2::table<avx2::Set>(); }
