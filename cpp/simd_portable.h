// Eight floats as two of the compiler's 16-byte vectors: SSE2, NEON or whatever the target's baseline has.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define NOCTULE_ISA portable

namespace noctule::NOCTULE_ISA {
namespace {

struct Floats {
    static constexpr int width = 8;
    static constexpr int spmm_vectors = 4;
    static constexpr int sddmm_vectors = 2;
    static constexpr int block_rows = 4, block_vectors = 1;
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
    // P numbers again and again.
    template <int P>
    static Float repeated(const float* p) {
        if constexpr (P == 2) return {Four{p[0], p[1], p[0], p[1]}, Four{p[0], p[1], p[0], p[1]}};
        else return broadcast(*p);
    }
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
    static float sum(Four a) { return (a[0] + a[2]) + (a[1] + a[3]); }
    static float sum(Float a) { return sum(a.low + a.high); }

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

    static Float as_float(Word a) { return {(Four)a.low, (Four)a.high}; }
    static Word as_word(Float a) { return {(FourWords)a.low, (FourWords)a.high}; }
    static Word words(uint32_t x) { return {FourWords{} + x, FourWords{} + x}; }
    static Word iota() { return {FourWords{0, 1, 2, 3}, FourWords{4, 5, 6, 7}}; }
    static Word add(Word a, Word b) { return {a.low + b.low, a.high + b.high}; }
    static Word mul(Word a, Word b) { return {a.low * b.low, a.high * b.high}; }
    template <int n>
    static Word fold(Word a) {
        return {a.low ^ (a.low >> n), a.high ^ (a.high >> n)};
    }
    static uint32_t at_least(Word a, Word b) { return bits_of(a.low >= b.low, a.high >= b.high); }

    static Float lane_sums(const Float* s) {
        Float p;
        for (int j = 0; j < 4; ++j) p.low[j] = sum(s[j].low), p.high[j] = sum(s[j].high);
        return p;
    }
    static Float sums(const Float* p) { return {p[0].low + p[0].high, p[1].low + p[1].high}; }
    static void four_sums(Float p, float* out) {
        const Four all = p.low + p.high;
        std::memcpy(out, &all, sizeof all);
    }

    static void transpose(Float* r) {
        float x[width][width], y[width][width];
        std::memcpy(x, r, sizeof x);
        for (int i = 0; i < width; ++i)
            for (int j = 0; j < width; ++j) y[j][i] = x[i][j];
        std::memcpy(r, y, sizeof y);
    }
};

struct Halves {
    using Float = Floats::Float;
    using Word = Floats::Word;
    using Tail = int;

    static Tail tail(int n) { return n; }
    static Word load(const bfloat16* p) {
        Word x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static Word load(const bfloat16* p, Tail n) {
        bfloat16 x[2 * Floats::width] = {};
        for (int i = 0; i < n; ++i) x[i] = p[i];
        return load(x);
    }
    static void store(bfloat16* p, Word x) { std::memcpy(p, &x, sizeof x); }
    static void store(bfloat16* p, Word x, Tail n) {
        bfloat16 all[2 * Floats::width];
        store(all, x);
        for (int i = 0; i < n; ++i) p[i] = all[i];
    }

    static Float broadcast(bfloat16 x) { return Floats::as_float(Floats::words(static_cast<uint32_t>(x.bits) << 16)); }
    static Word lows(Word a, Word b) { return {(a.low & 0xFFFFu) | b.low << 16, (a.high & 0xFFFFu) | b.high << 16}; }
    static Word highs(Word a, Word b) { return {a.low >> 16 | (b.low & 0xFFFF0000u), a.high >> 16 | (b.high & 0xFFFF0000u)}; }
    static Float low(Word a) { return Floats::as_float({a.low << 16, a.high << 16}); }
    static Float high(Word a) { return Floats::as_float({a.low & 0xFFFF0000u, a.high & 0xFFFF0000u}); }
    static Word rounded(Float x) { return {rounded(x.low), rounded(x.high)}; }
    static Floats::FourWords rounded(Floats::Four x) {
        const Floats::FourWords bits = (Floats::FourWords)x;
        return x == x ? bits + 0x7FFFu + (bits >> 16 & 1u) : bits | 0x00400000u;
    }
    static void store_highs(bfloat16* p, Word x) {
        for (int i = 0; i < 4; ++i) {
            p[i].bits = static_cast<uint16_t>(x.low[i] >> 16);
            p[i + 4].bits = static_cast<uint16_t>(x.high[i] >> 16);
        }
    }
};

}  // namespace
}  // namespace noctule::NOCTULE_ISA
