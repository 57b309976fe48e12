// Products of float32 in inference: dense and sparse weights, linear layers and convolutions, matrices of two values.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../kernels.inl"
#include "floats.h"

namespace noctule::NOCTULE_ISA {
namespace {

using runtime::Address;
using Size = int64_t;
using Float = Floats::Float;
constexpr int W = Floats::width;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

float two_slopes(float x, float slope) { return x > 0 ? x : x * slope; }

Float two_slopes(Float x, Float slope) { return Floats::select(Floats::positive(x), x, Floats::mul(x, slope)); }

// Where a product reads and writes: see floats.h.
struct Places {
    const float* x;
    Size ld, x_step;
    float* y;
    Size y_ld, y_step, columns, lines;
    const float* bias;
    float slope;
};

constexpr int block_rows = 6;
constexpr int block_vectors = Floats::spmm_vectors / (W == 16 ? 2 : 4);  // 24 sums of 32 registers, 12 of 16

Size dense_rows() { return block_rows; }

template <int NV, bool Ragged>
void dense_tile(const float* weight, Size rows, Size depth, const int32_t* starts, const float* x, float* y, const float* bias, const Places& p,
                Size n) {
    const Row<Float32, NV, Ragged> tile(n);
    Float sum[block_rows][NV];
    UNROLLED for (int r = 0; r < block_rows; ++r)
        UNROLLED for (int v = 0; v < NV; ++v) sum[r][v] = Floats::zero();
    for (Size k = 0; k < depth; ++k) {
        const float* const row = x + starts[k] * p.ld;
        Float in[NV];
        UNROLLED for (int v = 0; v < NV; ++v) in[v] = tile.load(row, v);
        UNROLLED for (int r = 0; r < block_rows; ++r) {
            const Float w = Floats::broadcast(weight[k * block_rows + r]);
            UNROLLED for (int v = 0; v < NV; ++v) sum[r][v] = Floats::fma(w, in[v], sum[r][v]);
        }
    }
    const Float slope = Floats::broadcast(p.slope);
    UNROLLED for (int r = 0; r < block_rows; ++r) {
        if (r >= rows) break;
        const Float add = Floats::broadcast(bias ? bias[r] : 0.0f);
        UNROLLED for (int v = 0; v < NV; ++v) {
            const Float z = Floats::add(sum[r][v], add);
            tile.store(y + r * p.y_ld, v, p.slope == 1.0f ? z : two_slopes(z, slope));
        }
    }
}

template <int NV>
void dense_last(const float* weight, Size rows, Size depth, const int32_t* starts, const float* x, float* y, const float* bias, const Places& p,
                Size n) {
    if constexpr (NV > 1) {
        if (n <= (NV - 1) * W) return dense_last<NV - 1>(weight, rows, depth, starts, x, y, bias, p, n);
    }
    if (n == NV * W) dense_tile<NV, false>(weight, rows, depth, starts, x, y, bias, p, n);
    else dense_tile<NV, true>(weight, rows, depth, starts, x, y, bias, p, n);
}

void dense(Size rows, Size depth, Address weight, Address starts, Address x, Size ld, Size x_step, Address y, Size y_ld, Size y_step,
           Size columns, Size lines, Address bias, float slope) {
    const Places p{at<float>(x), ld, x_step, at<float>(y), y_ld, y_step, columns, lines, at<float>(bias), slope};
    constexpr Size wide = block_vectors * W;
    for (Size r = 0; r < rows; r += block_rows)
        for (Size line = 0; line < lines; ++line)
            for (Size c = 0; c < columns; c += wide)
                dense_last<block_vectors>(at<float>(weight) + r * depth, rows - r, depth, at<int32_t>(starts), p.x + line * x_step + c,
                                          p.y + r * y_ld + line * y_step + c, p.bias ? p.bias + r : nullptr, p, std::min(columns - c, wide));
}

// R rows of the weight times T lines, in U sums each.
template <int R, int T, int U>
void dots_block(const float* weight, Size depth, const float* x, Size x_step, float* y, Size y_ld, Size y_step, const float* bias, float slope) {
    Float sum[R][T][U];
    UNROLLED for (int r = 0; r < R; ++r)
        UNROLLED for (int t = 0; t < T; ++t)
            UNROLLED for (int u = 0; u < U; ++u) sum[r][t][u] = Floats::zero();
    Size k = 0;
    const auto step = [&](int u, const auto&... tail) {
        Float in[T];
        UNROLLED for (int t = 0; t < T; ++t) in[t] = Floats::load(x + t * x_step + k + u * W, tail...);
        UNROLLED for (int r = 0; r < R; ++r) {
            const Float w = Floats::load(weight + r * depth + k + u * W, tail...);
            UNROLLED for (int t = 0; t < T; ++t) sum[r][t][u] = Floats::fma(w, in[t], sum[r][t][u]);
        }
    };
    for (; k + U * W <= depth; k += U * W)
        UNROLLED for (int u = 0; u < U; ++u) step(u);
    for (; k + W <= depth; k += W) step(0);
    if (k < depth) step(0, Floats::tail(static_cast<int>(depth - k)));
    UNROLLED for (int r = 0; r < R; ++r)
        UNROLLED for (int t = 0; t < T; ++t) {
            Float total = sum[r][t][0];
            UNROLLED for (int u = 1; u < U; ++u) total = Floats::add(total, sum[r][t][u]);
            y[r * y_ld + t * y_step] = two_slopes(Floats::sum(total) + (bias ? bias[r] : 0.0f), slope);
        }
}

void dots(Size rows, Size depth, Address weight, Address x, Size, Size x_step, Address y, Size y_ld, Size y_step, Size, Size lines, Address bias,
          float slope) {
    const float *const w = at<float>(weight), *const in = at<float>(x), *const add = at<float>(bias);
    float* const out = at<float>(y);
    const auto run = [&](auto r_count, auto t_count, auto u_count, Size r, Size t) {
        dots_block<r_count.value, t_count.value, u_count.value>(w + r * depth, depth, in + t * x_step, x_step, out + r * y_ld + t * y_step, y_ld,
                                                                y_step, add ? add + r : nullptr, slope);
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    using Four = std::integral_constant<int, 4>;
    Size t = 0;
    for (; t + 4 <= lines; t += 4) {  // the weight, which is the larger of the two, is read once for four lines
        Size r = 0;
        for (; r + 2 <= rows; r += 2) run(Two{}, Four{}, One{}, r, t);
        if (r < rows) run(One{}, Four{}, Two{}, r, t);
    }
    for (Size step = 1; t < lines; t += step) {
        step = lines - t >= 2 ? 2 : 1;
        Size r = 0;
        for (; r + 4 <= rows; r += 4) step == 2 ? run(Four{}, Two{}, One{}, r, t) : run(Four{}, One{}, Two{}, r, t);
        for (; r < rows; ++r) step == 2 ? run(One{}, Two{}, Two{}, r, t) : run(One{}, One{}, Four{}, r, t);
    }
}

// One column: numbers of x on end are looked up.
void sparse_one(Size rows, const int32_t* row_ptr, const int32_t* starts, const float* values, const Places& p) {
    for (Size line = 0; line < p.lines; ++line) {
        const float* const x = p.x + line * p.x_step;
        for (Size r = 0; r < rows; ++r) {
            float sum[8] = {};
            int32_t k = row_ptr[r];
            const int32_t stop = row_ptr[r + 1];
            for (; k + 8 <= stop; k += 8)
                UNROLLED for (int j = 0; j < 8; ++j) sum[j] += values[k + j] * x[starts[k + j]];
            for (; k < stop; ++k) sum[0] += values[k] * x[starts[k]];
            const float total = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
            p.y[r * p.y_ld + line * p.y_step] = two_slopes(total + (p.bias ? p.bias[r] : 0.0f), p.slope);
        }
    }
}

// Few columns: several sums of each, or each multiplication would wait for the one before it.
template <int NV, int Chains, bool Ragged>
void sparse_few(Size rows, const int32_t* row_ptr, const int32_t* starts, const float* values, const Places& p) {
    const Row<Float32, NV, Ragged> tile(p.columns);
    const Float slope = Floats::broadcast(p.slope);
    for (Size line = 0; line < p.lines; ++line)
        for (Size r = 0; r < rows; ++r) {
            Float sum[Chains][NV];
            UNROLLED for (int c = 0; c < Chains; ++c)
                UNROLLED for (int v = 0; v < NV; ++v) sum[c][v] = Floats::zero();
            const auto step = [&](int32_t k, int c) {
                const float* const row = p.x + line * p.x_step + starts[k] * p.ld;
                const Float w = Floats::broadcast(values[k]);
                UNROLLED for (int v = 0; v < NV; ++v) sum[c][v] = Floats::fma(w, tile.load(row, v), sum[c][v]);
            };
            int32_t k = row_ptr[r];
            const int32_t stop = row_ptr[r + 1];
            for (; k + Chains <= stop; k += Chains)
                UNROLLED for (int c = 0; c < Chains; ++c) step(k + c, c);
            for (; k < stop; ++k) step(k, 0);
            const Float add = Floats::broadcast(p.bias ? p.bias[r] : 0.0f);
            UNROLLED for (int v = 0; v < NV; ++v) {
                Float total = add;
                UNROLLED for (int c = 0; c < Chains; ++c) total = Floats::add(total, sum[c][v]);
                tile.store(p.y + r * p.y_ld + line * p.y_step, v, p.slope == 1.0f ? total : two_slopes(total, slope));
            }
        }
}

void sparse(Size rows, Address row_ptr, Address starts, Address values, Address x, Size ld, Size x_step, Address y, Size y_ld, Size y_step,
            Size columns, Size lines, Address bias, float slope) {
    const Places p{at<float>(x), ld, x_step, at<float>(y), y_ld, y_step, columns, lines, at<float>(bias), slope};
    const int32_t *const ptr = at<int32_t>(row_ptr), *const from = at<int32_t>(starts);
    const float* const v = at<float>(values);
    if (columns == 1 && ld == 1) sparse_one(rows, ptr, from, v, p);
    else if (columns == W) sparse_few<1, 4, false>(rows, ptr, from, v, p);
    else if (columns < W) sparse_few<1, 4, true>(rows, ptr, from, v, p);
    else if (columns == 2 * W) sparse_few<2, 2, false>(rows, ptr, from, v, p);
    else {
        const Pattern<int32_t, int32_t> pattern{rows, ptr, from, nullptr};
        const Epilogue epilogue{p.bias, slope, 1.0f, 0, 0, nullptr, nullptr, 0};
        spmm<Float32>(pattern, v, Matrix<float>{at<float>(x), ld, x_step}, Matrix<float>{p.y, y_ld, y_step}, Lines{columns, lines}, epilogue, 1);
    }
}

// z[t, s] = sum over d of x[t, d] y[d, s], all lanes at once; four of s at a time read x once.
void matmul_lanes(const float* x, const float* y, float* z, Size t, Size d, Size s, Size lanes, Size y_deep, Size y_out, float factor) {
    const Float times = Floats::broadcast(factor);
    for (Size i = 0; i < t; ++i)
        for (Size j = 0; j < s; j += 4) {
            const int n = static_cast<int>(std::min<Size>(4, s - j));
            for (Size lane = 0; lane < lanes; lane += W) {
                const bool ragged = lanes - lane < W;
                const auto tail = Floats::tail(ragged ? static_cast<int>(lanes - lane) : 0);
                const auto load = [&](const float* p) { return ragged ? Floats::load(p, tail) : Floats::load(p); };
                Float sum[4] = {Floats::zero(), Floats::zero(), Floats::zero(), Floats::zero()};
                for (Size k = 0; k < d; ++k) {
                    const Float a = load(x + (i * d + k) * lanes + lane);
                    const float* const b = y + (k * y_deep + j * y_out) * lanes + lane;
                    UNROLLED for (int q = 0; q < 4; ++q) sum[q] = Floats::fma(a, load(b + (q < n ? q : 0) * y_out * lanes), sum[q]);
                }
                UNROLLED for (int q = 0; q < 4; ++q) {
                    if (q >= n) break;
                    float* const to = z + (i * s + j + q) * lanes + lane;
                    if (ragged) Floats::store(to, Floats::mul(sum[q], times), tail);
                    else Floats::store(to, Floats::mul(sum[q], times));
                }
            }
        }
}

void matmul(Address x, Address y, Address z, Size n, Size t, Size d, Size s, Size lanes, bool transposed, float factor) {
    for (Size i = 0; i < n; ++i) {
        const float *const a = at<float>(x) + i * t * d * lanes, *const b = at<float>(y) + i * d * s * lanes;
        float* const c = at<float>(z) + i * t * s * lanes;
        if (lanes > 1) {
            matmul_lanes(a, b, c, t, d, s, lanes, transposed ? 1 : s, transposed ? d : 1, factor);
            continue;
        }
        if (transposed) dots(s, d, reinterpret_cast<Address>(b), reinterpret_cast<Address>(a), 1, d, reinterpret_cast<Address>(c), 1, s, 1, t, 0, 1.0f);
        else
            for (Size j = 0; j < t; ++j) {
                float* const to = c + j * s;
                std::fill(to, to + s, 0.0f);
                for (Size k = 0; k < d; ++k)
                    for (Size q = 0; q < s; ++q) to[q] += a[j * d + k] * b[k * s + q];
            }
        for (Size j = 0; j < t * s; ++j) c[j] *= factor;
    }
}

}  // namespace
}  // namespace noctule::NOCTULE_ISA
