// Eight sums of 32 bits, in vectors of the compiler.
#define NOCTULE_ISA portable
#include "integer.inl"

namespace noctule::runtime::portable {
namespace {

struct Lanes8 {
    static constexpr int width = 8;
    using Int = int32_t __attribute__((vector_size(32)));

    static Int zero() { return Int{}; }
    static Int broadcast(int32_t x) { return Int{} + x; }
    static Int load(const void* p) {
        Int x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static void store(void* p, Int x) { std::memcpy(p, &x, sizeof x); }
    static Int dot(Int sum, Int x, Int w) {
        for (int i = 0; i < 32; i += 8) sum += (x >> i & 255) * (w << (24 - i) >> 24);
        return sum;
    }
};

template <int N>
struct Singles {
    static constexpr int group = 1, words = 2, lanes = 8, columns = N < lanes ? lanes : N;
    int32_t sum[N] = {};

    void add(const int32_t* record, const uint8_t* x, int64_t ld) {
        const auto w = static_cast<int16_t>(record[1]);
        const uint8_t* const from = x + record[0] * ld;
        for (int n = 0; n < N; ++n) sum[n] += static_cast<int16_t>(from[n] * w);  // a product fits in 16 bits
    }
    void store(int32_t* sums) const { std::memcpy(sums, sum, sizeof sum); }
};

struct Set {
    using Lanes = Lanes8;
    static constexpr int terms = 1, window = 0, sparse_columns = 32, dense_rows = 4, dense_vectors = 2;

    template <class F>
    static void with_tile(int n, int, F&& f) {
        if (n == 1) f(Singles<1>());
        else if (n <= 8) f(Singles<8>());
        else f(Singles<32>());
    }
    static void four_dots(const int8_t* w, int64_t ld, const uint8_t* x, int32_t* sums) {
        for (int r = 0; r < 4; ++r)
            for (int64_t k = 0; k < ld; ++k) sums[r] += static_cast<int16_t>(w[r * ld + k] * x[k]);
    }
};

}  // namespace
}  // namespace noctule::runtime::portable

noctule::runtime::Integers noctule::runtime::portable_integers() { return portable::table<portable::Set>(); }
