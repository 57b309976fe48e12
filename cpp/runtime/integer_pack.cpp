// Weights into the layouts of the kernels, once at load.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "integer.h"

namespace noctule::runtime {
namespace {

// Weights whose products with codes are added in 16 bits: with at most `limit` on either side of zero no part of a sum overflows.
struct Bin {
    int positive = 0, negative = 0, count = 0, capacity = 0;
    bool takes(int w, int limit) const { return count < capacity && (w > 0 ? positive + w : negative - w) <= limit; }
    void take(int w) {
        (w > 0 ? positive : negative) += std::abs(w);
        ++count;
    }
};

std::vector<int64_t> places_of(const Places& p, int64_t row) {
    std::vector<int64_t> places;
    for (int64_t k = p.row_ptr[row]; k < p.row_ptr[row + 1]; ++k)
        if (p.values[k]) places.push_back(k);
    return places;
}

// First fit of decreasing weights into groups of 2 * group places. Only the newest groups are tried: long rows stay quick.
std::vector<std::vector<int64_t>> groups_of(const std::vector<int64_t>& places, const int8_t* values, int group, int limit) {
    constexpr size_t open = 64;
    std::vector<int64_t> sorted = places;
    std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return std::abs(values[a]) > std::abs(values[b]); });
    std::vector<std::vector<int64_t>> groups;
    std::vector<Bin> bins;
    std::vector<size_t> trying;
    for (const int64_t k : sorted) {
        size_t at = 0;
        while (at < trying.size() && !bins[trying[at]].takes(values[k], limit)) ++at;
        if (at == trying.size()) {
            if (at == open) trying.erase(trying.begin()), --at;
            trying.push_back(bins.size());
            bins.push_back({0, 0, 0, 2 * group});
            groups.emplace_back();
        }
        const size_t bin = trying[at];
        bins[bin].take(values[k]);
        groups[bin].push_back(k);
        if (bins[bin].count == 2 * group) trying.erase(trying.begin() + static_cast<std::ptrdiff_t>(at));
    }
    return groups;
}

}  // namespace

int64_t pack_records(const Places& p, int terms, int group, int highest, int64_t* starts, int32_t* words) {
    const auto size = static_cast<size_t>(terms);
    int64_t count = 0;
    for (int64_t row = 0; row < p.rows; ++row) {
        if (starts) starts[row] = count;
        const std::vector<int64_t> places = places_of(p, row);
        std::vector<std::vector<int64_t>> records;
        if (terms == 2) {
            auto groups = groups_of(places, p.values, group, 32767 / highest);
            if (groups.size() % 2) groups.emplace_back();  // two are widened together
            for (const auto& together : groups)
                for (size_t k = 0; k < 2 * static_cast<size_t>(group); k += 2)
                    records.emplace_back(together.begin() + std::min(k, together.size()), together.begin() + std::min(k + 2, together.size()));
        } else {
            for (size_t k = 0; k < places.size(); k += size)
                records.emplace_back(places.begin() + k, places.begin() + std::min(k + size, places.size()));
        }
        count += static_cast<int64_t>(records.size());
        for (size_t k = 0; words && k < records.size(); ++k) {
            int8_t bytes[4] = {};
            for (size_t i = 0; i < size; ++i) *words++ = records[k].empty() ? 0 : p.offsets[records[k][i < records[k].size() ? i : 0]];
            for (size_t i = 0; i < records[k].size(); ++i) bytes[i] = p.values[records[k][i]];
            if (terms == 2) bytes[2] = bytes[0], bytes[3] = bytes[1];
            if (terms == 1) *words = bytes[0];
            else std::memcpy(words, bytes, 4);
            ++words;
        }
    }
    if (starts) starts[p.rows] = count;
    return count;
}

int64_t pack_rounds(const Places& p, int lanes, int window, int highest, const int32_t* order, int64_t* starts, int32_t* bases, int8_t* bytes) {
    struct Lane {
        std::vector<int64_t> places;
        std::vector<char> done;
        size_t head;
    };
    const int limit = highest ? 32767 / highest : 4 * 128;
    std::vector<Lane> group(static_cast<size_t>(lanes));
    int64_t count = 0;
    for (int64_t first = 0; first < p.rows; first += lanes) {
        starts[first / lanes] = count;
        for (int l = 0; l < lanes; ++l) {
            Lane& lane = group[static_cast<size_t>(l)];
            lane.head = 0;
            lane.places = order[first + l] < 0 ? std::vector<int64_t>() : places_of(p, order[first + l]);
            std::sort(lane.places.begin(), lane.places.end(), [&](int64_t a, int64_t b) { return p.offsets[a] < p.offsets[b]; });
            lane.done.assign(lane.places.size(), 0);
        }
        for (;;) {
            bool any = false;
            int32_t base = 0;
            for (const Lane& lane : group)
                if (lane.head < lane.places.size()) {
                    const int32_t offset = p.offsets[lane.places[lane.head]];
                    base = any ? std::min(base, offset) : offset;
                    any = true;
                }
            if (!any) break;
            for (int l = 0; l < lanes; ++l) {
                Lane& lane = group[static_cast<size_t>(l)];
                Bin bins[2] = {{0, 0, 0, 2}, {0, 0, 0, 2}};
                for (size_t i = lane.head; i < lane.places.size(); ++i) {
                    const int64_t k = lane.places[i];
                    if (p.offsets[k] - base >= window || bins[0].count + bins[1].count == 4) break;
                    const int w = p.values[k];
                    const int bin = bins[0].takes(w, limit) ? 0 : 1;
                    if (lane.done[i] || !bins[bin].takes(w, limit)) continue;
                    if (bytes) {
                        int8_t* const to = bytes + count * 8 * lanes + 4 * l + 2 * bin + bins[bin].count;
                        to[0] = static_cast<int8_t>(p.offsets[k] - base);
                        to[4 * lanes] = static_cast<int8_t>(w);
                    }
                    bins[bin].take(w);
                    lane.done[i] = 1;
                }
                while (lane.head < lane.places.size() && lane.done[lane.head]) ++lane.head;
            }
            if (bases) bases[count] = base;
            ++count;
        }
    }
    starts[(p.rows + lanes - 1) / lanes] = count;
    return count;
}

}  // namespace noctule::runtime
