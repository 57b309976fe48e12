// Eight floats as two of the compiler's 16-byte vectors: SSE2, NEON or whatever the target's baseline has.
#pragma once
#include <cstdint>
#include <cstring>

#define NOCTULE_ISA portable

namespace noctule::NOCTULE_ISA {
namespace {

struct Lanes {
    static constexpr int width = 8;
    static constexpr int spmm_vectors = 4;
    static constexpr int sddmm_vectors = 2;
    typedef float Four __attribute__((vector_size(16)));
    typedef uint32_t FourWords __attribute__((vector_size(16)));
    struct Float {
        Four low, high;
    };
    struct Word {
        FourWords low, high;
    };
    using Tail = int;

    static Tail tail(int n) { return n; }
    static Float zero() { return {Four{}, Four{}}; }
    static Float broadcast(float x) { return {Four{} + x, Four{} + x}; }
    static Float load(const float* p) {
        Float x;
        std::memcpy(&x.low, p, sizeof x.low);
        std::memcpy(&x.high, p + 4, sizeof x.high);
        return x;
    }
    static Float load(const float* p, Tail n) {
        float x[width] = {};
        for (int i = 0; i < n; ++i) x[i] = p[i];
        return load(x);
    }
    static void store(float* p, Float x) {
        std::memcpy(p, &x.low, sizeof x.low);
        std::memcpy(p + 4, &x.high, sizeof x.high);
    }
    static void store(float* p, Float x, Tail n) {
        float all[width];
        store(all, x);
        for (int i = 0; i < n; ++i) p[i] = all[i];
    }
    static Float fma(Float a, Float b, Float c) { return {a.low * b.low + c.low, a.high * b.high + c.high}; }
    static Float add(Float a, Float b) { return {a.low + b.low, a.high + b.high}; }
    static Float mul(Float a, Float b) { return {a.low * b.low, a.high * b.high}; }
    static float sum(Float a) {
        const Four s = a.low + a.high;
        return (s[0] + s[2]) + (s[1] + s[3]);
    }

    template <class Mask>
    static uint32_t bits_of(Mask low, Mask high) {
        uint32_t bits = 0;
        for (int i = 0; i < 4; ++i) bits |= (low[i] ? 1u : 0u) << i | (high[i] ? 16u : 0u) << i;
        return bits;
    }
    static uint32_t positive(Float a) { return bits_of(a.low > Four{}, a.high > Four{}); }
    static Float select(uint32_t bits, Float yes, Float no) {
        const FourWords low{1, 2, 4, 8}, high{16, 32, 64, 128}, all = FourWords{} + bits;
        return {(all & low) == low ? yes.low : no.low, (all & high) == high ? yes.high : no.high};
    }

    static Word words(uint32_t x) { return {FourWords{} + x, FourWords{} + x}; }
    static Word iota() { return {FourWords{0, 1, 2, 3}, FourWords{4, 5, 6, 7}}; }
    static Word add(Word a, Word b) { return {a.low + b.low, a.high + b.high}; }
    static Word mul(Word a, Word b) { return {a.low * b.low, a.high * b.high}; }
    template <int n>
    static Word fold(Word a) {
        return {a.low ^ (a.low >> n), a.high ^ (a.high >> n)};
    }
    static uint32_t at_least(Word a, Word b) { return bits_of(a.low >= b.low, a.high >= b.high); }

    static Float sums(const Float* s) {
        return {Four{sum(s[0]), sum(s[1]), sum(s[2]), sum(s[3])}, Four{sum(s[4]), sum(s[5]), sum(s[6]), sum(s[7])}};
    }
    static void four_sums(const Float* s, float* out) {
        for (int j = 0; j < 4; ++j) out[j] = sum(s[j]);
    }

    static void transpose(const float* x, int64_t ldx, float* y, int64_t ldy) {
        for (int i = 0; i < width; ++i)
            for (int j = 0; j < width; ++j) y[j * ldy + i] = x[i * ldx + j];
    }
};

}  // namespace
}  // namespace noctule::NOCTULE_ISA
