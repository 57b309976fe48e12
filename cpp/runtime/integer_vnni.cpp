#define NOCTULE_ISA vnni
#include "integer_avx2.h"

#include <type_traits>

#include "integer.inl"

namespace noctule::runtime::vnni {
namespace {

// Sixteen sums of 32 bits in a register; `vpdpbusd` adds four products to each and never saturates.
struct Lanes512 {
    static constexpr int width = 16;
    using Int = __m512i;
    using Float = __m512;

    static Int zero() { return _mm512_setzero_si512(); }
    static Int broadcast(int32_t x) { return _mm512_set1_epi32(x); }
    static Int load(const void* p) { return _mm512_loadu_si512(p); }
    static Int load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static void store(void* p, Int x) { _mm512_storeu_si512(p, x); }
    static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Int either(Int a, Int b) { return _mm512_or_si512(a, b); }
    static Int up(Int a, int bits) { return _mm512_slli_epi32(a, static_cast<unsigned>(bits)); }
    static Int dot(Int sum, Int x, Int w) { return _mm512_dpbusd_epi32(sum, x, w); }
    // Bytes of x at these places, each below 64.
    static Int look_up(const uint8_t* x, Int places) { return _mm512_permutexvar_epi8(places, load(x)); }

    static Float number(float x) { return _mm512_set1_ps(x); }
    static Float numbers(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
    static Float convert(Int a) { return _mm512_cvtepi32_ps(a); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static Float negative_times(Float v, Float slope) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_mul_ps(v, slope), v);
    }
    static Float nearest(Float v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Int clamp(Float v, Float highest) {  // NaN becomes 0
        return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(v, _mm512_setzero_ps()), highest));
    }
    static bool finite(Float v) {
        const Float difference = _mm512_sub_ps(v, v);  // NaN for an infinity too
        return _mm512_cmp_ps_mask(difference, difference, _CMP_UNORD_Q) == 0;
    }
    static void narrow(uint8_t* to, const Int* c) {
        for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), _mm512_cvtepi32_epi8(c[i]));
    }
    static void interleave(const uint8_t* const* rows, uint8_t* to) {
        for (int half = 0; half < 2; ++half) {
            const uint8_t* const from[4] = {rows[0] + 32 * half, rows[1] + 32 * half, rows[2] + 32 * half, rows[3] + 32 * half};
            Lanes256::interleave(from, to + 128 * half);
        }
    }

    static Int low_bytes(Int a, Int b) { return _mm512_unpacklo_epi8(a, b); }
    static Int high_bytes(Int a, Int b) { return _mm512_unpackhi_epi8(a, b); }
    static Int low_pairs(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
    static Int high_pairs(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }
    // Four registers, whose lanes of 128 bits hold columns 16 l + 4 i, in order.
    static void in_order(const Int* q, Int* sums) {
        const Int even[2] = {_mm512_shuffle_i32x4(q[0], q[1], 0x88), _mm512_shuffle_i32x4(q[2], q[3], 0x88)};
        const Int odd[2] = {_mm512_shuffle_i32x4(q[0], q[1], 0xDD), _mm512_shuffle_i32x4(q[2], q[3], 0xDD)};
        sums[0] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        sums[1] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        sums[2] = _mm512_shuffle_i32x4(even[0], even[1], 0xDD);
        sums[3] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xDD);
    }
};

// The same for tiles of at most 32 columns.
struct Half : Lanes256 {
    static Int dot(Int sum, Int x, Int w) { return _mm256_dpbusd_epi32(sum, x, w); }
    static Int low_bytes(Int a, Int b) { return _mm256_unpacklo_epi8(a, b); }
    static Int high_bytes(Int a, Int b) { return _mm256_unpackhi_epi8(a, b); }
    static Int low_pairs(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
    static Int high_pairs(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }
    static void in_order(const Int* q, Int* sums) {
        sums[0] = _mm256_permute2x128_si256(q[0], q[1], 0x20);
        sums[1] = _mm256_permute2x128_si256(q[2], q[3], 0x20);
        sums[2] = _mm256_permute2x128_si256(q[0], q[1], 0x31);
        sums[3] = _mm256_permute2x128_si256(q[2], q[3], 0x31);
    }
};

// Four places at a time over 4 * width columns of one row.
template <class L>
struct Quads {
    using Lanes = L;
    using Int = typename L::Int;
    static constexpr int group = 1, words = 5, columns = 4 * L::width, vectors = 4;
    Int quad[4];

    Quads() {
        UNROLLED for (int i = 0; i < 4; ++i) quad[i] = L::zero();
    }
    void add(const int32_t* record, const uint8_t* x, int64_t ld) {
        const Int a = L::load(x + record[0] * ld), b = L::load(x + record[1] * ld);
        const Int c = L::load(x + record[2] * ld), d = L::load(x + record[3] * ld);
        const Int w = L::broadcast(record[4]);
        const Int lows[2] = {L::low_bytes(a, b), L::low_bytes(c, d)}, highs[2] = {L::high_bytes(a, b), L::high_bytes(c, d)};
        quad[0] = L::dot(quad[0], L::low_pairs(lows[0], lows[1]), w);
        quad[1] = L::dot(quad[1], L::high_pairs(lows[0], lows[1]), w);
        quad[2] = L::dot(quad[2], L::low_pairs(highs[0], highs[1]), w);
        quad[3] = L::dot(quad[3], L::high_pairs(highs[0], highs[1]), w);
    }
    void finish(Int* sums) const { L::in_order(quad, sums); }
};

struct Set {
    using Lanes = Lanes512;
    static constexpr int terms = 4, window = 64, step = 64, paired = 4;
    static constexpr int sparse_columns = 64, block_vectors = 4, dense_rows = 4, dense_vectors = 4;

    template <class F>
    static void with_tile(int n, int, F&& f) {
        if (n > 32) f(Quads<Lanes512>());
        else f(Quads<Half>());
    }
    static Lanes::Int dense_dot(Lanes::Int sum, Lanes::Int x, Lanes::Int w) { return Lanes::dot(sum, x, w); }
    static void dense_words(const uint8_t* x, int64_t ld, const int32_t* offsets, int64_t rows, int64_t columns, uint8_t* y) {
        as_words<Set>(x, ld, offsets, rows, columns, y);
    }
    static void row_dots(const int8_t* w, int64_t places, int rows, const uint8_t* x, int32_t* sums) {
        __m512i total[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
        const int8_t* from[4];
        for (int r = 0; r < 4; ++r) from[r] = w + (r < rows ? r : 0) * places;
        for (int64_t k = 0; k < places; k += 64) {
            const __m512i bytes = Lanes::load(x + k);
            UNROLLED for (int r = 0; r < 4; ++r) total[r] = Lanes::dot(total[r], bytes, Lanes::load(from[r] + k));
        }
        for (int r = 0; r < rows; ++r) {
            int32_t lanes[16];
            Lanes::store(lanes, total[r]);
            sums[r] = 0;
            for (int i = 0; i < 16; ++i) sums[r] += lanes[i];
        }
    }
};

}  // namespace
}  // namespace noctule::runtime::vnni

noctule::runtime::Integers noctule::runtime::vnni_integers() { return vnni::table<vnni::Set>(); }
