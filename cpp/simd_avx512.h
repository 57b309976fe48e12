// Sixteen floats in a register: AVX-512 F/DQ/BW/VL, and BMI2.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#define NOCTULE_ISA avx512

namespace noctule::NOCTULE_ISA {
namespace {

struct Floats {
    static constexpr int width = 16;
    static constexpr int spmm_vectors = 8;   // 128 floats of the batch in flight: 8 sums in 32 registers
    static constexpr int sddmm_vectors = 8;  // 8 of the gradient's row + 16 sums
    static constexpr int block_rows = 4, block_vectors = 4;
    using Float = __m512;
    using Word = __m512i;
    using Tail = __mmask16;

    static Tail tail(int n) { return static_cast<Tail>((1u << n) - 1u); }
    static Float zero() { return _mm512_setzero_ps(); }
    static Float broadcast(float x) { return _mm512_set1_ps(x); }
    // P numbers again and again.
    template <int P>
    static Float repeated(const float* p) {
        if constexpr (P == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
        else if constexpr (P == 2) return _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const double*>(p)));
        else return broadcast(*p);
    }
    static Float load(const float* p) { return _mm512_loadu_ps(p); }
    static Float load(const float* p, Tail t) { return _mm512_maskz_loadu_ps(t, p); }
    static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
    static void store(float* p, Float x, Tail t) { _mm512_mask_storeu_ps(p, t, x); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static float sum(Float a) { return _mm512_reduce_add_ps(a); }

    static uint32_t positive(Float a) { return _mm512_cmp_ps_mask(a, zero(), _CMP_GT_OQ); }
    static Float select(uint32_t bits, Float yes, Float no) {
        return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), no, yes);
    }

    static Float as_float(Word a) { return _mm512_castsi512_ps(a); }
    static Word as_word(Float a) { return _mm512_castps_si512(a); }
    static Word words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static Word iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
    static Word add(Word a, Word b) { return _mm512_add_epi32(a, b); }
    static Word mul(Word a, Word b) { return _mm512_mullo_epi32(a, b); }
    template <int n> static Word fold(Word a) { return _mm512_xor_si512(a, _mm512_srli_epi32(a, n)); }
    static uint32_t at_least(Word a, Word b) { return _mm512_cmpge_epu32_mask(a, b); }

    // Four vectors to one, whose 128-bit lanes have the four sums of the same lane.
    static Float lane_sums(const Float* s) {
        const Float a = add(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
        const Float b = add(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
        const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
        return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    // `width / 4` of those to one that has all `width` sums.
    static Float sums(const Float* p) {
        const Float a = add(_mm512_shuffle_f32x4(p[0], p[1], 0x88), _mm512_shuffle_f32x4(p[0], p[1], 0xDD));
        const Float b = add(_mm512_shuffle_f32x4(p[2], p[3], 0x88), _mm512_shuffle_f32x4(p[2], p[3], 0xDD));
        return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    }
    // One of those to the four sums alone.
    static void four_sums(Float p, float* out) {
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(p), _mm512_extractf32x8_ps(p, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }

    // A width x width block in place.
    static void transpose(Float* r) {
        Float t[16];
        for (int i = 0; i < 8; ++i) {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 4; ++i) {
            const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
            const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
            r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
            r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
        }
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 8] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
            t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
        }
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
            r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xDD);
            r[i + 4] = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
            r[i + 12] = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xDD);
        }
    }
};

// Words that hold two bfloat16 each.
struct Halves {
    using Float = Floats::Float;
    using Word = Floats::Word;
    using Tail = __mmask32;
    static constexpr uint32_t odd = 0xAAAAAAAAu;

    static Tail tail(int n) { return static_cast<Tail>((uint64_t{1} << n) - 1u); }
    static Word load(const bfloat16* p) {
        Word x = _mm512_loadu_si512(p);
        asm("" : "+v"(x));  // or the compiler loads it twice, for the lower halves and for the upper
        return x;
    }
    static Word load(const bfloat16* p, Tail t) { return _mm512_maskz_loadu_epi16(t, p); }
    static void store(bfloat16* p, Word x) { _mm512_storeu_si512(p, x); }
    static void store(bfloat16* p, Word x, Tail t) { _mm512_mask_storeu_epi16(p, t, x); }

    static Float broadcast(bfloat16 x) { return _mm512_castsi512_ps(_mm512_maskz_set1_epi16(odd, static_cast<short>(x.bits))); }
    // The lower halves of both, and the upper halves.
    static Word lows(Word a, Word b) { return _mm512_mask_blend_epi16(odd, a, _mm512_slli_epi32(b, 16)); }
    static Word highs(Word a, Word b) { return _mm512_mask_blend_epi16(odd, _mm512_srli_epi32(a, 16), b); }
    static Float low(Word a) { return Floats::as_float(_mm512_slli_epi32(a, 16)); }
    static Float high(Word a) { return Floats::as_float(_mm512_and_si512(a, Floats::words(0xFFFF0000u))); }
    // The nearest bfloat16, the even one of two; it is the upper half.
    static Word rounded(Float x) {
        const Word bits = Floats::as_word(x), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), Floats::words(1));
        const Word up = _mm512_add_epi32(bits, _mm512_add_epi32(even, Floats::words(0x7FFF)));
        return _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, Floats::words(0x00400000));
    }
    // `Floats::width` of them next to each other.
    static void store_highs(bfloat16* p, Word x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
    }
};

}  // namespace
}  // namespace noctule::NOCTULE_ISA
