// The intrinsics of x86; with NOCTULE_SIMDE those of AVX-512 are emulated, to test that code on machines without it.
#pragma once
#ifdef NOCTULE_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// What SIMDe lacks.
template <class To, class From, class F>
To emulated(const void* from, F f) {
    From in[16];
    typename F::Result out[16];
    std::memcpy(in, from, sizeof in);
    for (int i = 0; i < 16; ++i) out[i] = f(in[i]);
    To to;
    std::memcpy(&to, out, sizeof to);
    return to;
}
struct Low { using Result = uint8_t; uint8_t operator()(int32_t x) const { return static_cast<uint8_t>(x); } };
struct Wide { using Result = int32_t; int32_t operator()(uint8_t x) const { return x; } };
struct Number { using Result = float; float operator()(int32_t x) const { return static_cast<float>(x); } };
struct Whole { using Result = int32_t; int32_t operator()(float x) const { return static_cast<int32_t>(std::nearbyintf(x)); } };
inline __m128i noctule_cvtepi32_epi8(__m512i x) { return emulated<__m128i, int32_t>(&x, Low()); }
inline __m512i noctule_cvtepu8_epi32(__m128i x) { return emulated<__m512i, uint8_t>(&x, Wide()); }
inline __m512 noctule_cvtepi32_ps(__m512i x) { return emulated<__m512, int32_t>(&x, Number()); }
inline __m512i noctule_cvtps_epi32(__m512 x) { return emulated<__m512i, float>(&x, Whole()); }
#define _mm512_cvtepi32_epi8 noctule_cvtepi32_epi8
#define _mm512_cvtepu8_epi32 noctule_cvtepu8_epi32
#define _mm512_cvtepi32_ps noctule_cvtepi32_ps
#define _mm512_cvtps_epi32 noctule_cvtps_epi32
#else
#include <immintrin.h>
#endif
