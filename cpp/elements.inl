// What the kernels are written over: rows of float, one vector a load, and rows of bfloat16, two.
#ifdef __BMI2__
#include <immintrin.h>
#endif

#include <cstring>

#include "kernels.h"

namespace noctule::NOCTULE_ISA {
namespace {

struct Float32 : Floats {
    using Element = float;
    using Raw = Floats;  // loads and stores of what is only moved
    using Bits = uint32_t;

    static Float joined(Float a) { return a; }  // to one vector of as many sums
    static uint32_t packed(Bits bits) { return bits; }
    static Bits unpacked(uint32_t bits) { return bits; }
    static void store_sum(float* p, float x) { *p = x; }
    static void store_sums(float* p, Float x) { store(p, x); }

    // A width x width block.
    template <class Load, class Store>
    static void transpose(Load load, Store store) {
        Float r[width];
        for (int i = 0; i < width; ++i) r[i] = load(i);
        Floats::transpose(r);
        for (int j = 0; j < width; ++j) store(j, r[j]);
    }
};

// The even elements of a row in one vector, the odd ones in another, and nothing moves from lane to lane: shifted left, a word of
// two bfloat16 is the float of its even element, and with the lower half cleared that of the odd one.
struct BFloat16 {
    using Element = bfloat16;
    using Raw = Halves;
    using Tail = Halves::Tail;
    struct Float {
        Floats::Float even, odd;
    };
    struct Word {
        Floats::Word even, odd;
    };
    struct Bits {
        uint32_t even, odd;
    };
    static constexpr int width = 2 * Floats::width;
    static constexpr int spmm_vectors = Floats::spmm_vectors / 2;
    static constexpr int sddmm_vectors = Floats::sddmm_vectors / 2;
    static constexpr int block_rows = Floats::block_rows, block_vectors = (Floats::block_vectors + 1) / 2;

    static Tail tail(int n) { return Halves::tail(n); }
    static Float zero() { return broadcast(0.0f); }
    static Float broadcast(float x) { return {Floats::broadcast(x), Floats::broadcast(x)}; }
    static Float broadcast(bfloat16 x) {
        const Floats::Float wide = Halves::broadcast(x);
        return {wide, wide};
    }
    static Float load(const bfloat16* p) { return parted(Halves::load(p)); }
    static Float load(const bfloat16* p, Tail t) { return parted(Halves::load(p, t)); }
    static void store(bfloat16* p, Float x) { Halves::store(p, packed(x)); }
    static void store(bfloat16* p, Float x, Tail t) { Halves::store(p, packed(x), t); }
    static Float fma(Float a, Float b, Float c) { return {Floats::fma(a.even, b.even, c.even), Floats::fma(a.odd, b.odd, c.odd)}; }
    static Float add(Float a, Float b) { return {Floats::add(a.even, b.even), Floats::add(a.odd, b.odd)}; }
    static Float mul(Float a, Float b) { return {Floats::mul(a.even, b.even), Floats::mul(a.odd, b.odd)}; }
    static float sum(Float a) { return Floats::sum(joined(a)); }
    static Floats::Float joined(Float a) { return Floats::add(a.even, a.odd); }

    static Bits positive(Float a) { return {Floats::positive(a.even), Floats::positive(a.odd)}; }
    static Float select(Bits bits, Float yes, Float no) {
        return {Floats::select(bits.even, yes.even, no.even), Floats::select(bits.odd, yes.odd, no.odd)};
    }
    // Bits in the order of the elements.
    static uint32_t packed(Bits bits) {
#ifdef __BMI2__
        return _pdep_u32(bits.even, 0x55555555u) | _pdep_u32(bits.odd, 0xAAAAAAAAu);
#else
        uint64_t x = bits.even | static_cast<uint64_t>(bits.odd) << 32;
        x = (x | x << 8) & 0x00FF00FF00FF00FFull;
        x = (x | x << 4) & 0x0F0F0F0F0F0F0F0Full;
        x = (x | x << 2) & 0x3333333333333333ull;
        x = (x | x << 1) & 0x5555555555555555ull;
        return static_cast<uint32_t>(x | x >> 31);
#endif
    }
    static Bits unpacked(uint32_t bits) {
#ifdef __BMI2__
        return {_pext_u32(bits, 0x55555555u), _pext_u32(bits, 0xAAAAAAAAu)};
#else
        uint64_t x = (bits | static_cast<uint64_t>(bits) << 31) & 0x5555555555555555ull;
        x = (x | x >> 1) & 0x3333333333333333ull;
        x = (x | x >> 2) & 0x0F0F0F0F0F0F0F0Full;
        x = (x | x >> 4) & 0x00FF00FF00FF00FFull;
        x = (x | x >> 8) & 0x0000FFFF0000FFFFull;
        return {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
#endif
    }

    static Word words(uint32_t x) { return {Floats::words(x), Floats::words(x)}; }
    static Word iota() {
        const Floats::Word even = Floats::add(Floats::iota(), Floats::iota());
        return {even, Floats::add(even, Floats::words(1))};
    }
    static Word add(Word a, Word b) { return {Floats::add(a.even, b.even), Floats::add(a.odd, b.odd)}; }
    static Word mul(Word a, Word b) { return {Floats::mul(a.even, b.even), Floats::mul(a.odd, b.odd)}; }
    template <int n> static Word fold(Word a) { return {Floats::fold<n>(a.even), Floats::fold<n>(a.odd)}; }
    static Bits at_least(Word a, Word b) { return {Floats::at_least(a.even, b.even), Floats::at_least(a.odd, b.odd)}; }

    // One float32 sum, or `Floats::width` of them, rounded.
    static void store_sum(bfloat16* p, float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        bits = x == x ? bits + 0x7FFFu + (bits >> 16 & 1u) : bits | 0x00400000u;
        p->bits = static_cast<uint16_t>(bits >> 16);
    }
    static void store_sums(bfloat16* p, Floats::Float x) { Halves::store_highs(p, Halves::rounded(x)); }

    // Even and odd columns one after the other, each a block of words from pairs of rows.
    template <class Load, class Store>
    static void transpose(Load load, Store store) {
        constexpr int half = Floats::width;
        for (int odd = 0; odd < 2; ++odd) {
            Floats::Float r[half];
            for (int i = 0; i < half; ++i) {
                const Floats::Word a = load(2 * i), b = load(2 * i + 1);
                r[i] = Floats::as_float(odd ? Halves::highs(a, b) : Halves::lows(a, b));
            }
            Floats::transpose(r);
            for (int j = 0; j < half; ++j) store(2 * j + odd, Floats::as_word(r[j]));
        }
    }

   private:
    static Float parted(Floats::Word x) { return {Halves::low(x), Halves::high(x)}; }
    static Floats::Word packed(Float x) { return Halves::highs(Halves::rounded(x.even), Halves::rounded(x.odd)); }
};

}  // namespace
}  // namespace noctule::NOCTULE_ISA
