// The kernels of float32 beside products, once, for the instruction set of the including file. Loops over lanes are left to the
// compiler's vectors.
#include "float_products.inl"

namespace noctule::NOCTULE_ISA {
namespace {

template <class T>
void frame_of(const T* x, Size channels, Size rows, Size columns, Size lanes, Size top, Size left, Size down, Size right, Size phases_high,
              Size phases_wide, Size high, Size wide, int zero, T* y) {
    for (Size c = 0; c < channels; ++c)
        for (Size p = 0; p < phases_high; ++p)
            for (Size q = 0; q < phases_wide; ++q) {
                // the columns w of the frame whose pixel w * right + q - left lies in the image
                const Size skip = left - q, past = columns - 1 + skip;
                const Size first = std::min(skip > 0 ? (skip + right - 1) / right : 0, wide);
                const Size last = past < 0 ? first : std::max(first, std::min(past / right + 1, wide));
                for (Size h = 0; h < high; ++h, y += wide * lanes) {
                    const Size row = h * down + p - top;
                    if (row < 0 || row >= rows) {
                        std::memset(y, zero, sizeof(T) * wide * lanes);
                        continue;
                    }
                    const T* const from = x + ((c * rows + row) * columns + first * right - skip) * lanes;
                    std::memset(y, zero, sizeof(T) * first * lanes);
                    std::memset(y + last * lanes, zero, sizeof(T) * (wide - last) * lanes);
                    if (right == 1) std::memcpy(y + first * lanes, from, sizeof(T) * (last - first) * lanes);
                    else
                        for (Size w = 0; w < last - first; ++w)
                            for (Size lane = 0; lane < lanes; ++lane) y[(first + w) * lanes + lane] = from[w * right * lanes + lane];
                }
            }
}

void frame(Size bytes, Address x, Size channels, Size rows, Size columns, Size lanes, Size top, Size left, Size down, Size right, Size phases_high,
           Size phases_wide, Size high, Size wide, Size zero, Address y) {
    const auto run = [&](auto* from, auto* to) {
        frame_of(from, channels, rows, columns, lanes, top, left, down, right, phases_high, phases_wide, high, wide, static_cast<int>(zero), to);
    };
    if (bytes == 1) run(at<const uint8_t>(x), at<uint8_t>(y));
    else run(at<const float>(x), at<float>(y));
}

// Calls f(output, first and last row and column of its window, those that lie in the image) for each output of an image.
template <class F>
void windows(Size rows, Size columns, Size high, Size wide, Size kernel_high, Size kernel_wide, Size down, Size right, Size top, Size left, F f) {
    for (Size h = 0; h < high; ++h)
        for (Size w = 0; w < wide; ++w) {
            const Size r = h * down - top, c = w * right - left;
            f(h * wide + w, std::max<Size>(r, 0), std::min(r + kernel_high, rows), std::max<Size>(c, 0), std::min(c + kernel_wide, columns));
        }
}

template <class T>
void max_pool_of(const T* x, T* y, Size channels, Size rows, Size columns, Size high, Size wide, Size lanes, Size kernel_high, Size kernel_wide,
                 Size down, Size right, Size top, Size left) {
    for (Size c = 0; c < channels; ++c, x += rows * columns * lanes, y += high * wide * lanes)
        windows(rows, columns, high, wide, kernel_high, kernel_wide, down, right, top, left, [&](Size o, Size r0, Size r1, Size c0, Size c1) {
            T* const to = y + o * lanes;
            std::memcpy(to, x + (r0 * columns + c0) * lanes, sizeof(T) * lanes);
            for (Size r = r0; r < r1; ++r)
                for (Size k = c0; k < c1; ++k) {
                    const T* const from = x + (r * columns + k) * lanes;
                    for (Size lane = 0; lane < lanes; ++lane) to[lane] = from[lane] > to[lane] ? from[lane] : to[lane];
                }
        });
}

void max_pool(Size bytes, Address x, Address y, Size channels, Size rows, Size columns, Size high, Size wide, Size lanes, Size kernel_high,
              Size kernel_wide, Size down, Size right, Size top, Size left) {
    const auto run = [&](auto* from, auto* to) {
        max_pool_of(from, to, channels, rows, columns, high, wide, lanes, kernel_high, kernel_wide, down, right, top, left);
    };
    if (bytes == 1) run(at<const uint8_t>(x), at<uint8_t>(y));
    else run(at<const float>(x), at<float>(y));
}

void mean_pool(Address from, Address to, Size channels, Size rows, Size columns, Size high, Size wide, Size lanes, Size kernel_high,
               Size kernel_wide, Size down, Size right, Size top, Size left, bool inside) {
    const float* x = at<const float>(from);
    float* y = at<float>(to);
    for (Size c = 0; c < channels; ++c, x += rows * columns * lanes, y += high * wide * lanes)
        windows(rows, columns, high, wide, kernel_high, kernel_wide, down, right, top, left, [&](Size o, Size r0, Size r1, Size c0, Size c1) {
            float* const out = y + o * lanes;
            std::fill(out, out + lanes, 0.0f);
            for (Size r = r0; r < r1; ++r)
                for (Size k = c0; k < c1; ++k)
                    for (Size lane = 0; lane < lanes; ++lane) out[lane] += x[(r * columns + k) * lanes + lane];
            const float share = 1.0f / static_cast<float>(inside ? (r1 - r0) * (c1 - c0) : kernel_high * kernel_wide);
            for (Size lane = 0; lane < lanes; ++lane) out[lane] *= share;
        });
}

// The sum of n numbers on end, in several sums.
template <class F>
float sum_of(Size n, F f) {
    float sums[16] = {};
    Size i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; ++j) sums[j] += f(i + j);
    for (; i < n; ++i) sums[0] += f(i);
    for (int j = 1; j < 16; ++j) sums[0] += sums[j];
    return sums[0];
}

// Calls f(first, count) for pieces of so many lanes at most; their sums fit into registers and the first cache.
constexpr Size piece = 64;

template <class F>
void pieces(Size inner, F f) {
    for (Size i = 0; i < inner; i += piece) f(i, std::min(piece, inner - i));
}

void mean(Address from, Address to, Size outer, Size along, Size inner) {
    const float* x = at<const float>(from);
    float* y = at<float>(to);
    const float share = 1.0f / static_cast<float>(along);
    for (Size o = 0; o < outer; ++o, x += along * inner, y += inner) {
        if (inner == 1) {
            *y = sum_of(along, [&](Size i) { return x[i]; }) * share;
            continue;
        }
        pieces(inner, [&](Size i, Size n) {
            float sum[piece] = {};
            for (Size k = 0; k < along; ++k)
                for (Size j = 0; j < n; ++j) sum[j] += x[k * inner + i + j];
            for (Size j = 0; j < n; ++j) y[i + j] = sum[j] * share;
        });
    }
}

// e^x within two units in the last place, without a branch.
float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // rounded to a whole number
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000u + 127u) << 23;  // the whole number lies in the lowest bits
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return (p * r * r + r + 1.0f) * power;
}

void softmax(Address from, Address to, Size outer, Size along, Size inner, Size period) {
    const float* x = at<const float>(from);
    float* y = at<float>(to);
    for (Size o = 0; o < outer; ++o, x += along * inner, y += along * inner) {
        const Size seen = period ? std::min(o % period + 1, along) : along;
        std::fill(y + seen * inner, y + along * inner, 0.0f);
        if (inner == 1) {
            float most = x[0];
            for (Size k = 1; k < seen; ++k) most = std::max(most, x[k]);
            for (Size k = 0; k < seen; ++k) y[k] = exponential(x[k] - most);
            const float share = 1.0f / sum_of(seen, [&](Size k) { return y[k]; });
            for (Size k = 0; k < seen; ++k) y[k] *= share;
            continue;
        }
        pieces(inner, [&](Size i, Size n) {
            float most[piece], sum[piece] = {};
            std::memcpy(most, x + i, sizeof(float) * n);
            for (Size k = 1; k < seen; ++k)
                for (Size j = 0; j < n; ++j) most[j] = std::max(most[j], x[k * inner + i + j]);
            for (Size k = 0; k < seen; ++k)
                for (Size j = 0; j < n; ++j) {
                    const float e = exponential(x[k * inner + i + j] - most[j]);
                    y[k * inner + i + j] = e, sum[j] += e;
                }
            for (Size j = 0; j < n; ++j) sum[j] = 1.0f / sum[j];
            for (Size k = 0; k < seen; ++k)
                for (Size j = 0; j < n; ++j) y[k * inner + i + j] *= sum[j];
        });
    }
}

void layer_norm(Address from, Address to, Size outer, Size along, Size inner, Address weight, Address bias, float epsilon) {
    const float *x = at<const float>(from), *const w = at<const float>(weight), *const b = at<const float>(bias);
    float* y = at<float>(to);
    const float share = 1.0f / static_cast<float>(along);
    for (Size o = 0; o < outer; ++o, x += along * inner, y += along * inner) {
        if (inner == 1) {
            const float middle = sum_of(along, [&](Size k) { return x[k]; }) * share;
            const float spread = sum_of(along, [&](Size k) { return (x[k] - middle) * (x[k] - middle); }) * share;
            const float scale = 1.0f / std::sqrt(spread + epsilon);
            for (Size k = 0; k < along; ++k) y[k] = (x[k] - middle) * scale * w[k] + b[k];
            continue;
        }
        pieces(inner, [&](Size i, Size n) {
            float middle[piece] = {}, scale[piece] = {};
            for (Size k = 0; k < along; ++k)
                for (Size j = 0; j < n; ++j) middle[j] += x[k * inner + i + j];
            for (Size j = 0; j < n; ++j) middle[j] *= share;
            for (Size k = 0; k < along; ++k)
                for (Size j = 0; j < n; ++j) {
                    const float d = x[k * inner + i + j] - middle[j];
                    scale[j] += d * d;
                }
            for (Size j = 0; j < n; ++j) scale[j] = 1.0f / std::sqrt(scale[j] * share + epsilon);
            for (Size k = 0; k < along; ++k)
                for (Size j = 0; j < n; ++j) y[k * inner + i + j] = (x[k * inner + i + j] - middle[j]) * scale[j] * w[k] + b[k];
        });
    }
}

void affine(Address from, Address to, Size rows, Size each, Address scale, Address shift, float slope) {
    const float *x = at<const float>(from), *const s = at<const float>(scale), *const t = at<const float>(shift);
    float* y = at<float>(to);
    for (Size r = 0; r < rows; ++r, x += each, y += each)
        for (Size i = 0; i < each; ++i) y[i] = two_slopes(x[i] * s[r] + t[r], slope);
}

template <class F>
void pairwise(Address x, Address y, Address z, Size n, F f) {
    const float *const a = at<const float>(x), *const b = at<const float>(y);
    float* const c = at<float>(z);
    for (Size i = 0; i < n; ++i) c[i] = f(a[i], b[i]);
}

void add(Address x, Address y, Address z, Size n, float slope) {
    pairwise(x, y, z, n, [=](float a, float b) { return two_slopes(a + b, slope); });
}

void multiply(Address x, Address y, Address z, Size n, float slope) {
    pairwise(x, y, z, n, [=](float a, float b) { return two_slopes(a * b, slope); });
}

void clamp(Address x, Address y, Size n, float slope, float low, float high) {
    pairwise(x, x, y, n, [=](float a, float) { return std::min(std::max(two_slopes(a, slope), low), high); });
}

float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

// Abramowitz and Stegun 7.1.26, within 1.5e-7.
float error_function(float x) {
    const float size = std::fabs(x), t = 1.0f / (1.0f + 0.3275911f * size);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    return std::copysign(1.0f - p * exponential(-size * size), x);
}

void activate(Size kind, Address x, Address y, Size n) {
    const auto run = [&](auto f) { pairwise(x, x, y, n, [=](float a, float) { return f(a); }); };
    switch (kind) {
        case 0: return run([](float a) { return 0.5f * a * (1.0f + error_function(a * 0.70710678f)); });
        case 1: return run([](float a) { return 0.5f * a * (1.0f + hyperbolic_tangent(0.79788456f * (a + 0.044715f * a * a * a))); });
        case 2: return run([](float a) { return sigmoid(a); });
        case 3: return run([](float a) { return a * sigmoid(a); });
        case 4: return run([](float a) { return hyperbolic_tangent(a); });
        default: return run([](float a) { return a * std::min(std::max(a + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f); });
    }
}

template <class T>
void permute_of(const T* x, T* y, const Size* shape, const Size* steps, Size lanes) {
    Size index[8] = {};
    const Size total = shape[0] * shape[1] * shape[2] * shape[3] * shape[4] * shape[5] * shape[6];
    for (Size n = 0; n < total; ++n) {
        Size from = 0;
        for (int a = 0; a < 7; ++a) from += index[a] * steps[a];
        for (Size i = 0; i < shape[7]; ++i, from += steps[7], y += lanes) {
            if (lanes == 1) *y = x[from];
            else std::memcpy(y, x + from, sizeof(T) * lanes);
        }
        for (int a = 6; a >= 0 && ++index[a] == shape[a]; --a) index[a] = 0;
    }
}

void permute(Size bytes, Address x, Address y, Address sizes, Size lanes) {
    const Size* const s = at<const Size>(sizes);
    if (bytes == 1) permute_of(at<const uint8_t>(x), at<uint8_t>(y), s, s + 8, lanes);
    else permute_of(at<const uint32_t>(x), at<uint32_t>(y), s, s + 8, lanes);
}

void copy_lines(Address x, Size x_line, Address y, Size y_line, Size count, Size bytes) {
    for (Size i = 0; i < count; ++i) std::memcpy(at<char>(y) + i * y_line, at<char>(x) + i * x_line, bytes);
}

void spread(Address numbers, Address y, Size n, Size lanes) {
    for (Size i = 0; i < n; ++i) std::fill_n(at<float>(y) + i * lanes, lanes, at<const float>(numbers)[i]);
}

bool embed(Address tokens, Address y, Size n, Size lanes, Address table, Size rows, Size width) {
    for (Size i = 0; i < n; ++i)
        for (Size lane = 0; lane < lanes; ++lane) {
            const Size token = at<const int32_t>(tokens)[i * lanes + lane];
            if (token >= rows) return true;
            const float* const row = at<const float>(table) + token * width;
            float* const to = at<float>(y) + i * width * lanes + lane;
            for (Size k = 0; k < width; ++k) to[k * lanes] = row[k];
        }
    return false;
}

bool enter(Address from, Size batch, Size numbers, Address to, Size lanes, bool floats) {
    float *const x = at<float>(from), *const y = at<float>(to);
    if (floats) {
        uint32_t bad = 0;
        const auto* const bits = at<const uint32_t>(from);
        for (Size i = 0; i < batch * numbers; ++i) bad |= (bits[i] & 0x7F800000u) == 0x7F800000u;
        if (bad) return true;
    }
    if (lanes == 1) std::memcpy(y, x, sizeof(float) * numbers);
    else transpose<Float32>(Matrix<float>{x, numbers, 0}, Matrix<float>{y, lanes, 0}, batch, numbers, 1);
    for (Size i = 0; lanes > batch && i < numbers; ++i) std::memset(y + i * lanes + batch, 0, sizeof(float) * (lanes - batch));
    return false;
}

void leave(Address from, Size lanes, Size batch, Size numbers, Address to) {
    float *const x = at<float>(from), *const y = at<float>(to);
    if (lanes == 1) std::memcpy(y, x, sizeof(float) * numbers);
    else transpose<Float32>(Matrix<float>{x, lanes, 0}, Matrix<float>{y, numbers, 0}, numbers, batch, 1);
}

runtime::FloatKernels table() {
    return {dense_rows, dense,  dots,       sparse, matmul,   frame, max_pool, mean_pool, mean,       softmax, layer_norm, affine,
            add,        multiply, clamp,    activate, permute, copy_lines, spread, embed, enter, leave};
}

}  // namespace
}  // namespace noctule::NOCTULE_ISA
