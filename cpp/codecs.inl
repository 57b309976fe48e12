// The codecs' kernels, once, as plain loops that the compiler turns into the vectors of the including file's instruction set.
//
// Everything here has internal linkage and uses no template of the standard library: the same code compiled for another
// instruction set must never replace it.
#include <omp.h>
#ifdef __SSSE3__
#include <immintrin.h>
#endif

#include <cstring>

#include "codecs.h"

namespace noctule::NOCTULE_ISA {
namespace {

constexpr uint32_t magnitude_bits = 0x7FFFFFFFu, mantissa_bits = 0x007FFFFFu, infinite_field = 255, quiet_nan = 0x7FC00000u;

// The random words of a bucket (see `Random` in kernels.inl).
struct Words {
    uint32_t first, second;

    Words(uint64_t seed, int64_t bucket) {
        uint64_t z = seed + (static_cast<uint64_t>(bucket) + 1) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        first = static_cast<uint32_t>(z);
        second = static_cast<uint32_t>(z >> 32);
    }
    uint32_t operator()(uint32_t position) const {
        uint32_t x = position + first;
        x = (x ^ x >> 16) * 0x21F0AAADu;
        x = (x ^ x >> 15) + second;
        x = (x ^ x >> 15) * 0xD35A2D97u;
        return x ^ x >> 15;
    }
};

// Calls f with the number of each bucket, where it begins and how many elements it has.
template <class F>
void for_buckets(int64_t n, int64_t bucket, int threads, F&& f) {
    const int64_t buckets = (n + bucket - 1) / bucket;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t b = 0; b < buckets; ++b) f(b, b * bucket, static_cast<int>(n - b * bucket < bucket ? n - b * bucket : bucket));
}

// A float is its exponent's field and the mantissa below it: adding 23 random bits carries into the field with just the chance
// that rounds up without bias.
uint8_t natural_code(uint32_t x, uint32_t rounded, uint32_t floor) {
    return static_cast<uint8_t>(((rounded >> 23) - floor) | (x >> 24 & 0x80u));
}

void natural_encode(const float* data, int64_t n, int64_t bucket, uint64_t seed, uint8_t* all_codes, uint8_t* floors, int threads) {
    const auto* const bits = reinterpret_cast<const uint32_t*>(data);
    for_buckets(n, bucket, threads, [=](int64_t b, int64_t at, int count) {
        const uint32_t* const x = bits + at;
        uint8_t* const codes = all_codes + at;
        uint32_t largest = 0;
        for (int i = 0; i < count; ++i) {
            const uint32_t a = x[i] & magnitude_bits;
            largest = a > largest ? a : largest;
        }
        const uint32_t field = largest >> 23;
        if (field == infinite_field) {
            floors[b] = infinite_field;
            std::memset(codes, 0, static_cast<size_t>(count));
            return;
        }
        const Words words(seed, b);
        const uint32_t floor = field > 126 ? field - 126 : 0;
        floors[b] = static_cast<uint8_t>(floor);
        if (floor == 0) {
            for (int i = 0; i < count; ++i)
                codes[i] = natural_code(x[i], (x[i] & magnitude_bits) + (words(static_cast<uint32_t>(i)) >> 9), 0);
            return;
        }
        for (int i = 0; i < count; ++i) {
            const uint32_t a = x[i] & magnitude_bits, e = a >> 23, up = words(static_cast<uint32_t>(i)) >> 9;
            // below the smallest code, its share of that code takes the place of the mantissa
            const uint32_t shift = floor + 1 - (e > 0 ? e : 1), whole = (a & mantissa_bits) | (e > 0 ? 1u << 23 : 0u);
            const uint32_t below = (floor << 23) + (shift < 24 ? whole >> (shift & 31) : 0);
            codes[i] = natural_code(x[i], (e > floor ? a : below) + up, floor);
        }
    });
}

void natural_decode(const uint8_t* all_codes, const uint8_t* floors, int64_t n, int64_t bucket, float* data, int threads) {
    auto* const bits = reinterpret_cast<uint32_t*>(data);
    for_buckets(n, bucket, threads, [=](int64_t b, int64_t at, int count) {
        const uint8_t* const codes = all_codes + at;
        uint32_t* const x = bits + at;
        const uint32_t floor = floors[b];
        if (floor == infinite_field) {
            for (int i = 0; i < count; ++i) x[i] = quiet_nan;
            return;
        }
        for (int i = 0; i < count; ++i) {
            const uint32_t code = codes[i], field = code & 0x7Fu;
            x[i] = (field ? field + floor : 0) << 23 | (code & 0x80u) << 24;
        }
    });
}

void uniforms(uint64_t seed, int64_t n, int64_t bucket, float* all, int threads) {
    for_buckets(n, bucket, threads, [=](int64_t b, int64_t at, int count) {
        float* const u = all + at;
        const Words words(seed, b);
        for (int i = 0; i < count; ++i)
            u[i] = static_cast<float>(static_cast<int32_t>(words(static_cast<uint32_t>(i)) >> 8)) * 0x1p-24f;
    });
}

// Eight codes of so many bits, one in each byte, to `bits` bytes: neighbours are moved together, then pairs, then fours.
template <int bits>
uint64_t joined(uint64_t x) {
    constexpr uint64_t code = (1u << bits) - 1, pair = (1u << 2 * bits) - 1, four = (uint64_t{1} << 4 * bits) - 1;
    x = (x & 0x0001000100010001u * code) | (x >> (8 - bits) & 0x0001000100010001u * (code << bits));
    x = (x & 0x0000000100000001u * pair) | (x >> (16 - 2 * bits) & 0x0000000100000001u * (pair << 2 * bits));
    return (x & four) | (x >> (32 - 4 * bits) & four << 4 * bits);
}

template <int bits>
uint64_t apart(uint64_t x) {
    constexpr uint64_t code = (1u << bits) - 1, pair = (1u << 2 * bits) - 1, four = (uint64_t{1} << 4 * bits) - 1;
    x = (x & four) | (x & four << 4 * bits) << (32 - 4 * bits);
    x = (x & 0x0000000100000001u * pair) | (x & 0x0000000100000001u * (pair << 2 * bits)) << (16 - 2 * bits);
    return (x & 0x0001000100010001u * code) | (x & 0x0001000100010001u * (code << bits)) << (8 - bits);
}

template <int bits>
void pack_as(const uint8_t* codes, int64_t n, uint8_t* packed, int threads) {
    const int64_t groups = n / 8;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
        uint64_t x;
        std::memcpy(&x, codes + 8 * g, 8);
        x = joined<bits>(x);
        std::memcpy(packed + bits * g, &x, bits);
    }
    if (const int64_t left = n % 8) {
        uint64_t x = 0;
        std::memcpy(&x, codes + 8 * groups, static_cast<size_t>(left));
        x = joined<bits>(x);
        std::memcpy(packed + bits * groups, &x, static_cast<size_t>((left * bits + 7) / 8));
    }
}

template <int bits>
void unpack_as(const uint8_t* packed, int64_t n, uint8_t* codes, int threads) {
    const int64_t groups = n / 8;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
        uint64_t x = 0;
        std::memcpy(&x, packed + bits * g, bits);
        x = apart<bits>(x);
        std::memcpy(codes + 8 * g, &x, 8);
    }
    if (const int64_t left = n % 8) {
        uint64_t x = 0;
        std::memcpy(&x, packed + bits * groups, static_cast<size_t>((left * bits + 7) / 8));
        x = apart<bits>(x);
        std::memcpy(codes + 8 * groups, &x, static_cast<size_t>(left));
    }
}

void pack_bits(const uint8_t* codes, int64_t n, int bits, uint8_t* packed, int threads) {
    using Packer = void (*)(const uint8_t*, int64_t, uint8_t*, int);
    constexpr Packer packers[] = {pack_as<1>, pack_as<2>, pack_as<3>, pack_as<4>, pack_as<5>, pack_as<6>, pack_as<7>};
    packers[bits - 1](codes, n, packed, threads);
}

void unpack_bits(const uint8_t* packed, int64_t n, int bits, uint8_t* codes, int threads) {
    using Unpacker = void (*)(const uint8_t*, int64_t, uint8_t*, int);
    constexpr Unpacker unpackers[] = {unpack_as<1>, unpack_as<2>, unpack_as<3>, unpack_as<4>, unpack_as<5>, unpack_as<6>, unpack_as<7>};
    unpackers[bits - 1](packed, n, codes, threads);
}

constexpr int first_bits = 11, next_bits = 10;  // 31 bits of a magnitude in three digits
constexpr int64_t first_bins = 1 << first_bits, next_bins = 1 << next_bits;

// Goes down from the highest bin until `wanted` are reached; `wanted` becomes what is wanted of the bin where that is.
uint32_t bin_of(const int64_t* bins, int64_t count, int64_t& wanted) {
    int64_t bin = count - 1;
    while (bins[bin] < wanted) wanted -= bins[bin--];
    return static_cast<uint32_t>(bin);
}

// A share of the elements, and what was found in it.
struct Share {
    int64_t begin, end;
    int64_t bins[2 * first_bins];  // twice, so that equal neighbours do not wait for each other
    int64_t candidates, above, equal;
    int64_t* positions;
    uint32_t* keys;
};

void count_first_digits(Share& share, const uint32_t* x) {
    std::memset(share.bins, 0, sizeof share.bins);
    int64_t i = share.begin;
    for (; i + 1 < share.end; i += 2) {
        ++share.bins[(x[i] & magnitude_bits) >> (31 - first_bits)];
        ++share.bins[first_bins + ((x[i + 1] & magnitude_bits) >> (31 - first_bits))];
    }
    if (i < share.end) ++share.bins[(x[i] & magnitude_bits) >> (31 - first_bits)];
    for (int64_t bin = 0; bin < first_bins; ++bin) share.bins[bin] += share.bins[first_bins + bin];
}

void collect_candidates(Share& share, const uint32_t* x, uint32_t bound) {
    int64_t found = 0;
    for (int64_t i = share.begin; i < share.end; ++i) {
        const uint32_t key = x[i] & magnitude_bits;
        share.positions[found] = i;  // kept only if the next one does not take its place
        share.keys[found] = key;
        found += key >= bound;
    }
}

// The magnitude of the k-th largest candidate; `wanted` of the first digit's bin become those wanted of its equals.
uint32_t threshold(const Share* shares, int parts, uint32_t first_digit, int64_t& wanted) {
    uint32_t prefix = first_digit;
    for (int digit = 1; digit >= 0; --digit) {
        int64_t bins[next_bins] = {};
        for (int p = 0; p < parts; ++p)
            for (int64_t c = 0; c < shares[p].candidates; ++c) {
                const uint32_t key = shares[p].keys[c] >> next_bits * digit;
                bins[key & (next_bins - 1)] += key >> next_bits == prefix;
            }
        prefix = prefix << next_bits | bin_of(bins, next_bins, wanted);
    }
    return prefix;
}

void largest(const float* data, int64_t n, int64_t k, int64_t* result, int threads) {
    const auto* const x = reinterpret_cast<const uint32_t*>(data);
    if (k == 0) return;
    const int parts = static_cast<int>(threads < n ? threads : n);
    Share* const shares = new Share[static_cast<size_t>(parts)];
#pragma omp parallel for num_threads(parts) if (parts > 1) schedule(static, 1)
    for (int p = 0; p < parts; ++p) {
        shares[p].begin = n / parts * p;
        shares[p].end = p + 1 < parts ? n / parts * (p + 1) : n;
        count_first_digits(shares[p], x);
    }
    int64_t bins[first_bins] = {}, wanted = k, room = 0;
    for (int p = 0; p < parts; ++p)
        for (int64_t bin = 0; bin < first_bins; ++bin) bins[bin] += shares[p].bins[bin];
    const uint32_t digit = bin_of(bins, first_bins, wanted);
    for (int p = 0; p < parts; ++p) {
        shares[p].candidates = 0;
        for (int64_t bin = digit; bin < first_bins; ++bin) shares[p].candidates += shares[p].bins[bin];
        room += shares[p].candidates + 1;
    }
    int64_t* const positions = new int64_t[static_cast<size_t>(room)];
    uint32_t* const keys = new uint32_t[static_cast<size_t>(room)];
    for (int64_t p = 0, at = 0; p < parts; at += shares[p].candidates + 1, ++p) {
        shares[p].positions = positions + at;
        shares[p].keys = keys + at;
    }
#pragma omp parallel for num_threads(parts) if (parts > 1) schedule(static, 1)
    for (int p = 0; p < parts; ++p) collect_candidates(shares[p], x, digit << (31 - first_bits));
    const uint32_t bound = threshold(shares, parts, digit, wanted);
#pragma omp parallel for num_threads(parts) if (parts > 1) schedule(static, 1)
    for (int p = 0; p < parts; ++p) {
        Share& share = shares[p];
        share.above = share.equal = 0;
        for (int64_t c = 0; c < share.candidates; ++c) {
            share.above += share.keys[c] > bound;
            share.equal += share.keys[c] == bound;
        }
    }
#pragma omp parallel for num_threads(parts) if (parts > 1) schedule(static, 1)
    for (int p = 0; p < parts; ++p) {
        int64_t to = 0, equal = wanted;  // how many of the equal ones are left for this share
        for (int q = 0; q < p; ++q) {
            const int64_t taken = shares[q].equal < equal ? shares[q].equal : equal;
            to += shares[q].above + taken;
            equal -= taken;
        }
        for (int64_t c = 0; c < shares[p].candidates; ++c) {
            const uint32_t key = shares[p].keys[c];
            if (key < bound || (key == bound && equal-- <= 0)) continue;
            result[to++] = shares[p].positions[c];
        }
    }
    delete[] keys;
    delete[] positions;
    delete[] shares;
}

#include "saved.inl"

Codecs table() {
    return {natural_encode, natural_decode, uniforms, pack_bits, unpack_bits, largest, saved_ranges, saved_encode, saved_decode};
}

}  // namespace
}  // namespace noctule::NOCTULE_ISA
