// Four sums of 32 bits, in vectors of the compiler: as many as the registers of nearly every processor hold.
#define NOCTULE_ISA portable
#include "integer.inl"

namespace noctule::runtime::portable {
namespace {

struct Lanes4 {
    static constexpr int width = 4;
    using Int = int32_t __attribute__((vector_size(16)));
    using Short = int16_t __attribute__((vector_size(16)));

    static Int zero() { return Int{}; }
    static Int broadcast(int32_t x) { return Int{} + x; }
    static Int load(const void* p) {
        Int x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static void store(void* p, Int x) { std::memcpy(p, &x, sizeof x); }
    static Int dot(Int sum, Int x, Int w) {
        const auto bytes = reinterpret_cast<Short>(x), weights = reinterpret_cast<Short>(w);
        const auto even = reinterpret_cast<Int>((bytes & 255) * (weights << 8 >> 8));  // a product fits in 16 bits
        const auto odd = reinterpret_cast<Int>((bytes >> 8 & 255) * (weights >> 8));
        return sum + (even << 16 >> 16) + (even >> 16) + (odd << 16 >> 16) + (odd >> 16);
    }
};

// One column, or N in eights.
template <int N>
struct Singles {
    using Narrow = uint8_t __attribute__((vector_size(8)));
    using Wide = int32_t __attribute__((vector_size(32)));
    static constexpr int group = 1, words = 2, lanes = 4, columns = N < lanes ? lanes : N;
    Wide sum[(N + 7) / 8] = {};

    void add(const int32_t* record, const uint8_t* x, int64_t ld) {
        const auto w = static_cast<int16_t>(record[1]);
        const uint8_t* const from = x + record[0] * ld;
        if constexpr (N == 1) {
            sum[0][0] += from[0] * w;
        } else {
            UNROLLED for (int i = 0; i < N / 8; ++i)
                sum[i] += __builtin_convertvector(__builtin_convertvector(read<Narrow>(from + 8 * i), Lanes4::Short) * w, Wide);
        }
    }
    void store(int32_t* sums) const { std::memcpy(sums, sum, sizeof(int32_t) * columns); }
};

struct Set {
    using Lanes = Lanes4;
    static constexpr int terms = 1, window = 0, sparse_columns = 32, dense_rows = 2, dense_vectors = 4;

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
