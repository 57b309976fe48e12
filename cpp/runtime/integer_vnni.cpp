// Sixteen sums of 32 bits in a register; `vpdpbusd` adds four products to each and never saturates.
#ifdef NOCTULE_SIMDE
#include "emulated.h"
#else
#include <immintrin.h>
#endif

#define NOCTULE_ISA vnni
#include "integer.inl"

namespace noctule::runtime::vnni {
namespace {

struct Lanes16 {
    static constexpr int width = 16;
    using Int = __m512i;

    static Int zero() { return _mm512_setzero_si512(); }
    static Int broadcast(int32_t x) { return _mm512_set1_epi32(x); }
    static Int load(const void* p) { return _mm512_loadu_si512(p); }
    static void store(void* p, Int x) { _mm512_storeu_si512(p, x); }
    static Int dot(Int sum, Int x, Int w) { return _mm512_dpbusd_epi32(sum, x, w); }
    // Bytes of x at these places, each below 64.
    static Int look_up(const uint8_t* x, Int places) { return _mm512_permutexvar_epi8(places, load(x)); }
    static Int low_bytes(Int a, Int b) { return _mm512_unpacklo_epi8(a, b); }
    static Int high_bytes(Int a, Int b) { return _mm512_unpackhi_epi8(a, b); }
    static Int low_pairs(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
    static Int high_pairs(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }
};

// For tiles of at most 32 columns.
struct Lanes8 {
    static constexpr int width = 8;
    using Int = __m256i;

    static Int zero() { return _mm256_setzero_si256(); }
    static Int broadcast(int32_t x) { return _mm256_set1_epi32(x); }
    static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
    static void store(void* p, Int x) { _mm256_storeu_si256(static_cast<Int*>(p), x); }
    static Int dot(Int sum, Int x, Int w) { return _mm256_dpbusd_epi32(sum, x, w); }
    static Int low_bytes(Int a, Int b) { return _mm256_unpacklo_epi8(a, b); }
    static Int high_bytes(Int a, Int b) { return _mm256_unpackhi_epi8(a, b); }
    static Int low_pairs(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
    static Int high_pairs(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }
};

// Four places at a time over the bytes of a register, which are columns of one row.
template <class L>
struct Quads {
    using Int = typename L::Int;
    static constexpr int group = 1, words = 5, lanes = L::width, columns = 4 * lanes;
    Int quad[4];

    Quads() {
        UNROLLED for (int i = 0; i < 4; ++i) quad[i] = L::zero();
    }
    void add(const int32_t* record, const uint8_t* x, int64_t ld) {
        const Int a = L::load(x + record[0] * ld), b = L::load(x + record[1] * ld);
        const Int c = L::load(x + record[2] * ld), d = L::load(x + record[3] * ld);
        const Int w = L::broadcast(record[4]);
        const Int low_ab = L::low_bytes(a, b), low_cd = L::low_bytes(c, d), high_ab = L::high_bytes(a, b), high_cd = L::high_bytes(c, d);
        quad[0] = L::dot(quad[0], L::low_pairs(low_ab, low_cd), w);
        quad[1] = L::dot(quad[1], L::high_pairs(low_ab, low_cd), w);
        quad[2] = L::dot(quad[2], L::low_pairs(high_ab, high_cd), w);
        quad[3] = L::dot(quad[3], L::high_pairs(high_ab, high_cd), w);
    }
    // Lane l of 128 bits of register i holds the columns from 16 l + 4 i on.
    void store(int32_t* sums) const {
        alignas(64) int32_t mixed[4][L::width];
        UNROLLED for (int i = 0; i < 4; ++i) L::store(mixed[i], quad[i]);
        UNROLLED for (int i = 0; i < 4; ++i)
            for (int l = 0; l < L::width / 4; ++l) std::memcpy(sums + 16 * l + 4 * i, mixed[i] + 4 * l, 16);
    }
};

struct Set {
    using Lanes = Lanes16;
    static constexpr int terms = 4, window = 64, sparse_columns = 64, dense_rows = 4, dense_vectors = 4;

    template <class F>
    static void with_tile(int n, int, F&& f) {
        if (n > 32) f(Quads<Lanes16>());
        else f(Quads<Lanes8>());
    }
    static void four_dots(const int8_t* w, int64_t ld, const uint8_t* x, int32_t* sums) {
        __m512i sum[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
        for (int64_t k = 0; k < ld; k += 64)
            UNROLLED for (int r = 0; r < 4; ++r) sum[r] = Lanes::dot(sum[r], Lanes::load(x + k), Lanes::load(w + r * ld + k));
        alignas(64) int32_t lanes[16];
        for (int r = 0; r < 4; ++r) {
            Lanes::store(lanes, sum[r]);
            for (const int32_t lane : lanes) sums[r] += lane;
        }
    }
};

}  // namespace
}  // namespace noctule::runtime::vnni

noctule::runtime::Integers noctule::runtime::vnni_integers() { return vnni::table<vnni::Set>(); }
