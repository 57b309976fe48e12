// Eight sums of 32 bits in a register: AVX2. Also the narrow tiles of VNNI.
#pragma once
#include "integer_intrinsics.h"

#include <cstdint>

#ifndef NOCTULE_ISA
#define NOCTULE_ISA avx2
#endif

namespace noctule::runtime::NOCTULE_ISA {
namespace {

struct Lanes256 {
    static constexpr int width = 8;
    using Int = __m256i;
    using Float = __m256;

    static Int zero() { return _mm256_setzero_si256(); }
    static Int broadcast(int32_t x) { return _mm256_set1_epi32(x); }
    static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
    static Int load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
    static void store(void* p, Int x) { _mm256_storeu_si256(static_cast<Int*>(p), x); }
    static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Int either(Int a, Int b) { return _mm256_or_si256(a, b); }
    static Int up(Int a, int bits) { return _mm256_slli_epi32(a, bits); }

    static Float number(float x) { return _mm256_set1_ps(x); }
    static Float numbers(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
    static Float convert(Int a) { return _mm256_cvtepi32_ps(a); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
    static Float negative_times(Float v, Float slope) {
        return _mm256_blendv_ps(_mm256_mul_ps(v, slope), v, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ));
    }
    static Float nearest(Float v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Int clamp(Float v, Float highest) {  // NaN becomes 0
        return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, _mm256_setzero_ps()), highest));
    }
    static bool finite(Float v) {
        const Float difference = _mm256_sub_ps(v, v);  // NaN for an infinity too
        return _mm256_movemask_ps(_mm256_cmp_ps(difference, difference, _CMP_UNORD_Q)) == 0;
    }
    // The low bytes of four registers, in order.
    static void narrow(uint8_t* to, const Int* c) {
        const Int mixed = _mm256_packus_epi16(_mm256_packus_epi32(c[0], c[1]), _mm256_packus_epi32(c[2], c[3]));
        store(to, _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    }
    // Four rows of bytes, 32 columns, as words.
    static void interleave(const uint8_t* const* rows, uint8_t* to) {
        const Int a = load(rows[0]), b = load(rows[1]), c = load(rows[2]), d = load(rows[3]);
        const Int lows[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpacklo_epi8(c, d)};
        const Int highs[2] = {_mm256_unpackhi_epi8(a, b), _mm256_unpackhi_epi8(c, d)};
        const Int q[4] = {_mm256_unpacklo_epi16(lows[0], lows[1]), _mm256_unpackhi_epi16(lows[0], lows[1]),
                          _mm256_unpacklo_epi16(highs[0], highs[1]), _mm256_unpackhi_epi16(highs[0], highs[1])};
        for (int i = 0; i < 2; ++i) {
            store(to + 32 * i, _mm256_permute2x128_si256(q[2 * i], q[2 * i + 1], 0x20));
            store(to + 64 + 32 * i, _mm256_permute2x128_si256(q[2 * i], q[2 * i + 1], 0x31));
        }
    }
};

}  // namespace
}  // namespace noctule::runtime::NOCTULE_ISA
