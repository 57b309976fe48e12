// Eight sums of 32 bits, in vectors of the compiler.
#define NOCTULE_ISA portable
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "integer.inl"

namespace noctule::runtime::portable {
namespace {

struct Lanes {
    static constexpr int width = 8;
    using Int = int32_t __attribute__((vector_size(32)));
    using Float = float __attribute__((vector_size(32)));
    using Bytes = uint8_t __attribute__((vector_size(8)));

    static Int zero() { return Int{}; }
    static Int broadcast(int32_t x) { return Int{} + x; }
    template <class T>
    static T read(const void* p) {
        T x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static Int load(const void* p) { return read<Int>(p); }
    static Int load_bytes(const uint8_t* p) { return __builtin_convertvector(read<Bytes>(p), Int); }
    static void store(void* p, Int x) { std::memcpy(p, &x, sizeof x); }
    static Int add(Int a, Int b) { return a + b; }
    static Int either(Int a, Int b) { return a | b; }
    static Int up(Int a, int bits) { return a << bits; }
    static Int dot(Int sum, Int x, Int w) {
        for (int i = 0; i < 32; i += 8) sum += (x >> i & 255) * (w << (24 - i) >> 24);
        return sum;
    }

    static Float number(float x) { return Float{} + x; }
    static Float numbers(const float* p) { return read<Float>(p); }
    static void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
    static Float convert(Int a) { return __builtin_convertvector(a, Float); }
    static Float mul(Float a, Float b) { return a * b; }
    static Float add(Float a, Float b) { return a + b; }
    static Float sub(Float a, Float b) { return a - b; }
    static Float negative_times(Float v, Float slope) { return v > 0.0f ? v : v * slope; }
    static Float nearest(Float v) {  // numbers beyond 2^21 are beyond every code
        const Float limit = number(2097152.0f), shift = number(12582912.0f);
        v = v > limit ? limit : v;
        v = v < -limit ? -limit : v;
        return (v + shift) - shift;
    }
    static Int clamp(Float v, Float highest) {  // NaN becomes 0
        v = v > 0.0f ? v : number(0.0f);
        return __builtin_convertvector(v < highest ? v : highest, Int);
    }
    static bool finite(Float v) {
        const Float difference = v - v;  // NaN for an infinity too
        const Int same = difference == difference;
        bool all = true;
        for (int i = 0; i < width; ++i) all &= same[i] != 0;
        return all;
    }
    static void narrow(uint8_t* to, const Int* c) {
        for (int i = 0; i < 4; ++i) {
            const Bytes bytes = __builtin_convertvector(c[i], Bytes);
            std::memcpy(to + width * i, &bytes, sizeof bytes);
        }
    }
    static void interleave(const uint8_t* const* rows, uint8_t* to) {
        for (int n = 0; n < 4 * width; ++n)
            for (int i = 0; i < 4; ++i) to[4 * n + i] = rows[i][n];
    }
};

template <int NV>
struct Singles {
    using Lanes = portable::Lanes;
    using Int = Lanes::Int;
    using Short = int16_t __attribute__((vector_size(16)));
    static constexpr int group = 1, words = 2, columns = 8 * NV, vectors = NV;
    Int sum[NV];

    Singles() {
        for (int i = 0; i < NV; ++i) sum[i] = Lanes::zero();
    }
    void add(const int32_t* record, const uint8_t* x, int64_t ld) {
        const uint8_t* const from = x + record[0] * ld;
        const auto w = Short{} + static_cast<int16_t>(record[1]);
        UNROLLED for (int i = 0; i < NV; ++i)  // a product fits in 16 bits
            sum[i] += __builtin_convertvector(__builtin_convertvector(Lanes::read<Lanes::Bytes>(from + 8 * i), Short) * w, Int);
    }
    void finish(Int* sums) const {
        for (int i = 0; i < NV; ++i) sums[i] = sum[i];
    }
};

struct Set {
    using Lanes = portable::Lanes;
    static constexpr int terms = 1, window = 0, step = 1, paired = 4;
    static constexpr int sparse_columns = 32, block_vectors = 4, dense_rows = 4, dense_vectors = 2;

    template <class F>
    static void with_tile(int n, int, F&& f) {
        with_registers<4>(n, 8, [&](auto nv) { f(Singles<nv>()); });
    }
    static Lanes::Int dense_dot(Lanes::Int sum, Lanes::Int x, Lanes::Int w) { return Lanes::dot(sum, x, w); }
    static void dense_words(const uint8_t* x, int64_t ld, const int32_t* offsets, int64_t rows, int64_t columns, uint8_t* y) {
        as_words<Set>(x, ld, offsets, rows, columns, y);
    }
    static void row_dots(const int8_t* w, int64_t places, int rows, const uint8_t* x, int32_t* sums) {
        for (int r = 0; r < rows; ++r, w += places) {
            int32_t sum = 0;
            for (int64_t k = 0; k < places; ++k) sum += w[k] * x[k];
            sums[r] = sum;
        }
    }
};

}  // namespace
}  // namespace noctule::runtime::portable

noctule::runtime::Integers noctule::runtime::portable_integers() { return portable::table<portable::Set>(); }
