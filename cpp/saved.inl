// Saved activations in fewer bits: included by codecs.inl, in its namespace, for each instruction set.
//
// A tensor is n floats in groups of so many, a multiple of 8 and at most 4096; the last group is shorter. An element's code is
// round(x * inverse - base), within 0 ... 2^bits - 1, with `inverse` and `base` of its group; it decodes to (code + base) * scale.
// The arithmetic is that of noctule.memory.reference, to the bit: no multiply-add is fused (-ffp-contract=off).

constexpr int longest_group = 4096, slack = 64;

// Bytes of a word that move together when those of a mask are taken out of it, or are put back in their places.
struct Moves {
    uint8_t taken[256][8], back[256][8];

    constexpr Moves() : taken{}, back{} {
        for (int mask = 0; mask < 256; ++mask) {
            int filled = 0;
            for (int j = 0; j < 8; ++j) {
                back[mask][j] = 0x80;  // a zero byte
                if (mask >> j & 1) {
                    back[mask][j] = static_cast<uint8_t>(filled);
                    taken[mask][filled++] = static_cast<uint8_t>(j);
                }
            }
            for (; filled < 8; ++filled) taken[mask][filled] = 0x80;
        }
    }
};
constexpr Moves moves;

// Lowest and highest element of each group (of a group with NaN or infinity, NaN), and how many are not zero.
void saved_ranges(const float* x, int64_t n, int64_t group, float* lows, float* highs, int32_t* nonzeros, int threads) {
    for_buckets(n, group, threads, [=](int64_t b, int64_t at, int count) {
        const auto* const bits = reinterpret_cast<const int32_t*>(x + at);
        int32_t low = 0x7FFFFFFF, high = -0x7FFFFFFF - 1, found = 0;  // of keys, whole numbers in the order of the floats
        for (int i = 0; i < count; ++i) {
            const int32_t key = bits[i] ^ (bits[i] >> 31 & 0x7FFFFFFF);
            low = key < low ? key : low;
            high = key > high ? key : high;
            found += (bits[i] & 0x7FFFFFFF) != 0;
        }
        const bool finite = high < 0x7F800000 && low >= -0x7F800000;
        const int32_t ends[] = {low ^ (low >> 31 & 0x7FFFFFFF), high ^ (high >> 31 & 0x7FFFFFFF)};
        const auto nan = static_cast<int32_t>(quiet_nan);
        std::memcpy(lows + b, finite ? &ends[0] : &nan, 4);
        std::memcpy(highs + b, finite ? &ends[1] : &nan, 4);
        nonzeros[b] = found;
    });
}

template <int bits>
void write_codes(const uint8_t* codes, int count, uint8_t* to) {
    for (int g = 0; g < count / 8; ++g) {
        uint64_t word;
        std::memcpy(&word, codes + 8 * g, 8);
        if constexpr (bits < 8) word = joined<bits>(word);
        std::memcpy(to + bits * g, &word, bits);
    }
    if (const int left = count % 8) {
        uint64_t word = 0;
        std::memcpy(&word, codes + count - left, static_cast<size_t>(left));
        if constexpr (bits < 8) word = joined<bits>(word);
        std::memcpy(to + count / 8 * bits, &word, static_cast<size_t>((left * bits + 7) / 8));
    }
}

template <int bits>
void read_codes(const uint8_t* from, int count, uint8_t* codes) {
    for (int g = 0; g < count / 8; ++g) {
        uint64_t word = 0;
        std::memcpy(&word, from + bits * g, bits);
        if constexpr (bits < 8) word = apart<bits>(word);
        std::memcpy(codes + 8 * g, &word, 8);
    }
    if (const int left = count % 8) {
        uint64_t word = 0;
        std::memcpy(&word, from + count / 8 * bits, static_cast<size_t>((left * bits + 7) / 8));
        if constexpr (bits < 8) word = apart<bits>(word);
        std::memcpy(codes + count - left, &word, 8);
    }
}

// Moves the codes of elements that are not zero together, in place; writes a bit for each element. Returns how many there are.
int take_out(const uint8_t* there, int count, uint8_t* codes, uint8_t* bitmap) {
    int filled = 0;
    for (int i = 0; i < count; i += 8) {
        uint64_t word;
        std::memcpy(&word, there + i, 8);
        const auto mask = static_cast<uint8_t>(joined<1>(word));
        bitmap[i / 8] = mask;
#ifdef __SSSE3__
        const __m128i move = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(moves.taken[mask]));
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + filled), _mm_shuffle_epi8(eight, move));
#else
        uint8_t eight[8];
        std::memcpy(eight, codes + i, 8);
        for (int j = 0; j < 8; ++j) codes[filled + j] = eight[moves.taken[mask][j] & 7];
#endif
        filled += __builtin_popcount(mask);
    }
    return filled;
}

// The other way: from codes side by side to codes and a byte, 0 or 1, for each element.
void put_back(const uint8_t* bitmap, const uint8_t* packed, int count, uint8_t* codes, uint8_t* there) {
    int filled = 0;
    for (int i = 0; i < count; i += 8) {
        const uint8_t mask = bitmap[i / 8];
        const uint64_t word = apart<1>(mask);
        std::memcpy(there + i, &word, 8);
#ifdef __SSSE3__
        const __m128i move = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(moves.back[mask]));
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + filled));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_shuffle_epi8(eight, move));
#else
        for (int j = 0; j < 8; ++j) codes[i + j] = packed[filled + (moves.back[mask][j] & 7)];
#endif
        filled += __builtin_popcount(mask);
    }
}

// Codes of all elements, or with a bitmap (one bit an element, a row of bytes a group) of those that are not zero; the codes of
// a group begin at its offset in bytes.
template <int bits>
void encode_as(const float* x, int64_t n, int64_t group, const float* inverses, const float* bases, const int64_t* offsets,
               uint8_t* bitmap, uint8_t* packed, int threads) {
    for_buckets(n, group, threads, [=](int64_t b, int64_t at, int count) {
        constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, half to even
        constexpr float top = (1 << bits) - 1;
        uint8_t codes[longest_group + slack], there[longest_group + slack];
        int32_t wide[longest_group];
        const float inverse = inverses[b], base = bases[b];
        const float* const v = x + at;
        for (int i = 0; i < count; ++i) {
            float code = (v[i] * inverse - base + magic) - magic;
            code = code < 0.0f ? 0.0f : code;
            wide[i] = static_cast<int32_t>(code > top ? top : code);
        }
        for (int i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
        int coded = count;
        if (bitmap) {
            const auto* const words = reinterpret_cast<const uint32_t*>(v);
            for (int i = 0; i < count; ++i) there[i] = (words[i] & magnitude_bits) != 0;
            std::memset(there + count, 0, 8);
            coded = take_out(there, count, codes, bitmap + b * (group / 8));
        }
        write_codes<bits>(codes, coded, packed + offsets[b]);
    });
}

template <int bits>
void decode_as(const uint8_t* packed, int64_t n, int64_t group, const float* scales, const float* bases, const int64_t* offsets,
               const uint8_t* bitmap, float* x, int threads) {
    for_buckets(n, group, threads, [=](int64_t b, int64_t at, int count) {
        uint8_t codes[longest_group + slack], there[longest_group + slack], together[longest_group + slack];
        const float scale = scales[b], base = bases[b];
        float* const v = x + at;
        if (!bitmap) {
            const uint8_t* from = packed + offsets[b];
            if constexpr (bits < 8) read_codes<bits>(from, count, codes), from = codes;
            for (int i = 0; i < count; ++i) v[i] = (static_cast<float>(static_cast<int32_t>(from[i])) + base) * scale;
            return;
        }
        const uint8_t* const row = bitmap + b * (group / 8);
        int coded = 0;
        for (int j = 0; j < (count + 7) / 8; ++j) coded += __builtin_popcount(row[j]);
        read_codes<bits>(packed + offsets[b], coded, together);
        put_back(row, together, count, codes, there);
        for (int i = 0; i < count; ++i) {
            const auto code = static_cast<float>(static_cast<int32_t>(codes[i]));
            v[i] = (code + base) * scale * static_cast<float>(static_cast<int32_t>(there[i])) + 0.0f;  // no negative zero
        }
    });
}

void saved_encode(const float* x, int64_t n, int64_t group, const float* inverses, const float* bases, int bits, const int64_t* offsets,
                  uint8_t* bitmap, uint8_t* packed, int threads) {
    constexpr decltype(&encode_as<1>) codes[] = {encode_as<1>, encode_as<2>, encode_as<3>, encode_as<4>,
                                                 encode_as<5>, encode_as<6>, encode_as<7>, encode_as<8>};
    codes[bits - 1](x, n, group, inverses, bases, offsets, bitmap, packed, threads);
}

void saved_decode(const uint8_t* packed, int64_t n, int64_t group, const float* scales, const float* bases, int bits,
                  const int64_t* offsets, const uint8_t* bitmap, float* x, int threads) {
    constexpr decltype(&decode_as<1>) codes[] = {decode_as<1>, decode_as<2>, decode_as<3>, decode_as<4>,
                                                 decode_as<5>, decode_as<6>, decode_as<7>, decode_as<8>};
    codes[bits - 1](packed, n, group, scales, bases, offsets, bitmap, x, threads);
}
