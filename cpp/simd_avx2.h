// Eight floats in a register: AVX2 and FMA.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#define NOCTULE_ISA avx2

namespace noctule::NOCTULE_ISA {
namespace {

struct Floats {
    static constexpr int width = 8;
    static constexpr int spmm_vectors = 8;   // 8 sums in 16 registers
    static constexpr int sddmm_vectors = 4;  // 4 of the gradient's row + 8 sums
    static constexpr int block_rows = 4, block_vectors = 2;
    using Float = __m256;
    using Word = __m256i;
    using Tail = __m256i;

    static Tail tail(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), iota()); }
    static Float zero() { return _mm256_setzero_ps(); }
    static Float broadcast(float x) { return _mm256_set1_ps(x); }
    // P numbers again and again.
    template <int P>
    static Float repeated(const float* p) {
        if constexpr (P == 2) return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)));
        else return broadcast(*p);
    }
    static Float load(const float* p) { return _mm256_loadu_ps(p); }
    static Float load(const float* p, Tail t) { return _mm256_maskload_ps(p, t); }
    static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
    static void store(float* p, Float x, Tail t) { _mm256_maskstore_ps(p, t, x); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static float sum(Float a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    static uint32_t positive(Float a) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, zero(), _CMP_GT_OQ))); }
    static Float select(uint32_t bits, Float yes, Float no) {
        const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i hit = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
        return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(hit));
    }

    static Float as_float(Word a) { return _mm256_castsi256_ps(a); }
    static Word as_word(Float a) { return _mm256_castps_si256(a); }
    static Word words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
    static Word iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
    static Word add(Word a, Word b) { return _mm256_add_epi32(a, b); }
    static Word mul(Word a, Word b) { return _mm256_mullo_epi32(a, b); }
    template <int n> static Word fold(Word a) { return _mm256_xor_si256(a, _mm256_srli_epi32(a, n)); }
    static uint32_t at_least(Word a, Word b) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a))));
    }

    static Float lane_sums(const Float* s) { return _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3])); }
    static Float sums(const Float* p) {
        return add(_mm256_permute2f128_ps(p[0], p[1], 0x20), _mm256_permute2f128_ps(p[0], p[1], 0x31));
    }
    static void four_sums(Float p, float* out) {
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(p), _mm256_extractf128_ps(p, 1)));
    }

    static void transpose(Float* r) {
        Float t[8];
        for (int i = 0; i < 4; ++i) {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
            r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
            r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
            r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
        }
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
            t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
        }
        for (int i = 0; i < 8; ++i) r[i] = t[i];
    }
};

struct Halves {
    using Float = Floats::Float;
    using Word = Floats::Word;
    struct Tail {
        Word words, last;  // the whole words, and where a last half lies
        int n;
    };

    static Tail tail(int n) {
        const Word half = _mm256_set1_epi32(n % 2 ? n / 2 : -1);
        return {Floats::tail(n / 2), _mm256_cmpeq_epi32(half, Floats::iota()), n};
    }
    static Word load(const bfloat16* p) {
        Word x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        asm("" : "+x"(x));  // or the compiler loads it twice, for the lower halves and for the upper
        return x;
    }
    static Word load(const bfloat16* p, Tail t) {
        const Word last = _mm256_and_si256(_mm256_set1_epi32(p[t.n - 1].bits), t.last);
        return _mm256_or_si256(_mm256_maskload_epi32(reinterpret_cast<const int*>(p), t.words), last);
    }
    static void store(bfloat16* p, Word x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
    static void store(bfloat16* p, Word x, Tail t) {
        _mm256_maskstore_epi32(reinterpret_cast<int*>(p), t.words, x);
        const Word last = _mm256_permutevar8x32_epi32(x, _mm256_set1_epi32(t.n / 2));
        if (t.n % 2) p[t.n - 1].bits = static_cast<uint16_t>(_mm256_cvtsi256_si32(last));
    }

    static Float broadcast(bfloat16 x) { return Floats::as_float(_mm256_slli_epi32(_mm256_set1_epi16(static_cast<short>(x.bits)), 16)); }
    static Word lows(Word a, Word b) { return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA); }
    static Word highs(Word a, Word b) { return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xAA); }
    static Float low(Word a) { return Floats::as_float(_mm256_slli_epi32(a, 16)); }
    static Float high(Word a) { return Floats::as_float(_mm256_and_si256(a, Floats::words(0xFFFF0000u))); }
    static Word rounded(Float x) {
        const Word bits = Floats::as_word(x), even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), Floats::words(1));
        const Word up = _mm256_add_epi32(bits, _mm256_add_epi32(even, Floats::words(0x7FFF)));
        const Word quiet = _mm256_or_si256(bits, Floats::words(0x00400000));
        return _mm256_blendv_epi8(up, quiet, Floats::as_word(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    }
    static void store_highs(bfloat16* p, Word x) {
        const Word narrow = _mm256_packus_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(narrow, 0x08)));
    }
};

}  // namespace
}  // namespace noctule::NOCTULE_ISA
