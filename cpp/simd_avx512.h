// Sixteen floats in a register: AVX-512 F/DQ/BW/VL.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define NOCTULE_ISA avx512

namespace noctule::NOCTULE_ISA {
namespace {

struct Lanes {
    static constexpr int width = 16;
    static constexpr int spmm_vectors = 8;   // 128 floats of the batch in flight: 8 sums in 32 registers
    static constexpr int sddmm_vectors = 8;  // 8 of the gradient's row + 16 sums
    using Float = __m512;
    using Word = __m512i;
    using Tail = __mmask16;

    static Tail tail(int n) { return static_cast<Tail>((1u << n) - 1u); }
    static Float zero() { return _mm512_setzero_ps(); }
    static Float broadcast(float x) { return _mm512_set1_ps(x); }
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

    static Word words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static Word iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
    static Word add(Word a, Word b) { return _mm512_add_epi32(a, b); }
    static Word mul(Word a, Word b) { return _mm512_mullo_epi32(a, b); }
    template <int n> static Word fold(Word a) { return _mm512_xor_si512(a, _mm512_srli_epi32(a, n)); }
    static uint32_t at_least(Word a, Word b) { return _mm512_cmpge_epu32_mask(a, b); }

    // Four vectors to one: in each 128-bit lane the four lane sums.
    static Float lane_sums(Float a, Float b, Float c, Float d) {
        const Float ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const Float cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
        return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    // out[j] = sum of s[j], for `width` vectors.
    static Float sums(const Float* s) {
        const Float p = lane_sums(s[0], s[1], s[2], s[3]), q = lane_sums(s[4], s[5], s[6], s[7]);
        const Float r = lane_sums(s[8], s[9], s[10], s[11]), t = lane_sums(s[12], s[13], s[14], s[15]);
        const Float pq = add(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xDD));
        const Float rt = add(_mm512_shuffle_f32x4(r, t, 0x88), _mm512_shuffle_f32x4(r, t, 0xDD));
        return add(_mm512_shuffle_f32x4(pq, rt, 0x88), _mm512_shuffle_f32x4(pq, rt, 0xDD));
    }
    static void four_sums(const Float* s, float* out) {
        const Float p = lane_sums(s[0], s[1], s[2], s[3]);
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(p), _mm512_extractf32x8_ps(p, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }

    // Transposes a width x width block.
    static void transpose(const float* x, int64_t ldx, float* y, int64_t ldy) {
        __m512 r[16], t[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(x + i * ldx);
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
            _mm512_storeu_ps(y + i * ldy, _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88));
            _mm512_storeu_ps(y + (i + 8) * ldy, _mm512_shuffle_f32x4(t[i], t[i + 4], 0xDD));
            _mm512_storeu_ps(y + (i + 4) * ldy, _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88));
            _mm512_storeu_ps(y + (i + 12) * ldy, _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xDD));
        }
    }
};

}  // namespace
}  // namespace noctule::NOCTULE_ISA
