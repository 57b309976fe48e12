// The intrinsics of AVX-512 without AVX-512: SIMDe, and by hand what its older versions lack. Included before every source.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstring>

namespace emulated {

template <class Lane, class Vector>
struct Lanes {
    static constexpr int count = sizeof(Vector) / sizeof(Lane);
    Lane lane[count] = {};
    Lanes() = default;
    explicit Lanes(Vector x) { std::memcpy(lane, &x, sizeof x); }
    operator Vector() const {
        Vector x;
        std::memcpy(&x, lane, sizeof x);
        return x;
    }
};
using Floats = Lanes<float, __m512>;
using Halves = Lanes<uint16_t, __m512i>;

inline __m512 load(__mmask16 mask, const void* p) {
    Floats x;
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) x.lane[i] = static_cast<const float*>(p)[i];
    return x;
}
inline void store(void* p, __mmask16 mask, __m512 a) {
    const Floats x(a);
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) static_cast<float*>(p)[i] = x.lane[i];
}
inline __m512i load_halves(__mmask32 mask, const void* p) {
    Halves x;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) x.lane[i] = static_cast<const uint16_t*>(p)[i];
    return x;
}
inline void store_halves(void* p, __mmask32 mask, __m512i a) {
    const Halves x(a);
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) static_cast<uint16_t*>(p)[i] = x.lane[i];
}
inline float sum(__m512 a) {
    Floats x(a);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; ++i) x.lane[i] += x.lane[i + step];
    return x.lane[0];
}
inline __m512 parts(__m512 a, __m512 b, int how) {
    const Floats x(a), y(b);
    Floats z;
    for (int part = 0; part < 4; ++part)
        for (int i = 0; i < 4; ++i) z.lane[4 * part + i] = (part < 2 ? x : y).lane[4 * (how >> 2 * part & 3) + i];
    return z;
}
inline __m256 half(__m512 a, int which) {
    __m256 x;
    std::memcpy(&x, reinterpret_cast<const char*>(&a) + 32 * which, sizeof x);
    return x;
}
inline __m256i narrow(__m512i a) {
    uint32_t words[16];
    uint16_t low[16];
    std::memcpy(words, &a, sizeof words);
    for (int i = 0; i < 16; ++i) low[i] = static_cast<uint16_t>(words[i]);
    __m256i x;
    std::memcpy(&x, low, sizeof x);
    return x;
}

}  // namespace emulated

#define _mm512_maskz_loadu_ps emulated::load
#define _mm512_mask_storeu_ps emulated::store
#define _mm512_maskz_loadu_epi16 emulated::load_halves
#define _mm512_mask_storeu_epi16 emulated::store_halves
#define _mm512_reduce_add_ps emulated::sum
#define _mm512_shuffle_f32x4 emulated::parts
#define _mm512_extractf32x8_ps emulated::half
#define _mm512_cvtepi32_epi16 emulated::narrow
#define __builtin_cpu_supports(feature) 1
#define asm(...)  // hints to the compiler about registers that are not there
