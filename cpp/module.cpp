// noctule._native: the kernels for Python, on raw addresses. It needs neither torch nor numpy.
//
// Whoever calls checks types and shapes first: noctule.kernels.native for tensors, noctule.runtime for arrays.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "codecs.h"
#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;
using Address = uintptr_t;

namespace {

using namespace noctule;

struct InstructionSet {
    const char* name;
    Kernels (*kernels)();
    Codecs (*codecs)();
};

// What this machine can run, the fastest first.
std::vector<InstructionSet> available() {
    std::vector<InstructionSet> sets;
#ifdef NOCTULE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
        sets.push_back({"avx512", avx512_kernels, avx512_codecs});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back({"avx2", avx2_kernels, avx2_codecs});
#endif
    sets.push_back({"portable", portable_kernels, portable_codecs});
    return sets;
}

const std::vector<InstructionSet> sets = available();
InstructionSet chosen = sets.front();
Kernels kernels = chosen.kernels();
Codecs codecs = chosen.codecs();

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto& set : sets) names.emplace_back(set.name);
    return names;
}

void use_instruction_set(const std::string& name) {
    for (const auto& set : sets)
        if (name == set.name) {
            chosen = set;
            kernels = set.kernels();
            codecs = set.codecs();
            return;
        }
    throw std::invalid_argument("this machine cannot run the instruction set '" + name + "'; see instruction_sets()");
}

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

template <class E>
Matrix<E> matrix(Address data, int64_t ld, int64_t step = 0) {
    return {pointer<E>(data), ld, step};
}

// Calls f with an element of this width and its kernels.
template <class F>
void with_element(int element_bytes, F&& f) {
    if (element_bytes == 4) f(float{}, kernels.floats);
    else if (element_bytes == 2) f(bfloat16{}, kernels.halves);
    else throw std::invalid_argument("elements have 4 bytes (float32) or 2 (bfloat16)");
}

template <class E, class Ptr, class Col>
const Products<E, Ptr, Col>& products_of(const Code<E>& code, const Pattern<Ptr, Col>&) {
    return code.products(Ptr{}, Col{});
}

// The places of a sparse matrix in memory that Python holds, with the widths of its indices.
struct Places {
    int64_t rows;
    int pointer_bytes, column_bytes;
    Address row_ptr, columns, slots;  // slots: 0 where values are in order
};

// Calls f with the places in the types of their indices.
template <class F>
void with_pattern(const Places& places, F&& f) {
    const auto call = [&](auto p, auto c) {
        using Ptr = decltype(p);
        using Col = decltype(c);
        f(Pattern<Ptr, Col>{places.rows, pointer<const Ptr>(places.row_ptr), pointer<const Col>(places.columns), pointer<const Ptr>(places.slots)});
    };
    if (places.pointer_bytes == 4 && places.column_bytes == 2) call(int32_t{}, uint16_t{});
    else if (places.pointer_bytes == 4 && places.column_bytes == 4) call(int32_t{}, int32_t{});
    else if (places.pointer_bytes == 8 && places.column_bytes == 2) call(int64_t{}, uint16_t{});
    else if (places.pointer_bytes == 8 && places.column_bytes == 4) call(int64_t{}, int32_t{});
    else throw std::invalid_argument("row pointers have 4 or 8 bytes, columns 2 or 4");
}

// The same with an element of this width, and the kernels over both.
template <class F>
void with_types(int element_bytes, const Places& places, F&& f) {
    with_element(element_bytes, [&](auto element, const auto& code) {
        with_pattern(places, [&](const auto& pattern) { f(element, pattern, code, products_of(code, pattern)); });
    });
}

// Bytes of values from which reading them in the order of their slots misses the cache.
constexpr int64_t values_in_cache = 1 << 20;

// Y = W X, over single weights or blocks of `out` rows and `in` columns; the blocks of a transpose lie as those of the matrix do.
template <class E, class Ptr, class Col>
void product(const Products<E, Ptr, Col>& products, const Pattern<Ptr, Col>& pattern, int64_t out, int64_t in, const E* values, Matrix<E> x,
             Matrix<E> y, Lines lines, const Epilogue& epilogue, int threads) {
    const int64_t stored = pattern.row_ptr[pattern.rows];
    if (out == 1 && in == 1 && pattern.slots && stored * static_cast<int64_t>(sizeof(E)) > values_in_cache) {
        const std::unique_ptr<E[]> in_order(new E[static_cast<size_t>(stored)]);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t k = 0; k < stored; ++k) in_order[k] = values[pattern.slots[k]];
        const Pattern<Ptr, Col> plain{pattern.rows, pattern.row_ptr, pattern.columns, nullptr};
        return products.spmm(plain, in_order.get(), x, y, lines, epilogue, threads);
    }
    if (out == 1 && in == 1) return products.spmm(pattern, values, x, y, lines, epilogue, threads);
    const Block block = pattern.slots ? Block{out, in, 1, out} : Block{out, in, in, 1};
    products.block_spmm(pattern, values, block, x, y, lines.columns, epilogue, threads);
}

void spmm(const Places& places, int element_bytes, int64_t out, int64_t in, Address values, Address x, int64_t x_ld, int64_t x_step,
          Address y, int64_t y_ld, int64_t y_step, int64_t columns_of_line, int64_t lines, int threads, Address bias, float slope,
          uint32_t drop_below, float scale, uint64_t seed, Address positive, Address kept, int64_t bits_ld) {
    const Epilogue epilogue{pointer<const float>(bias), slope, scale, drop_below, seed, pointer<uint8_t>(positive),
                            pointer<uint8_t>(kept), bits_ld};
    nb::gil_scoped_release release;
    with_types(element_bytes, places, [&](auto element, const auto& pattern, const auto&, const auto& products) {
        using E = decltype(element);
        product(products, pattern, out, in, pointer<const E>(values), matrix<E>(x, x_ld, x_step), matrix<E>(y, y_ld, y_step),
                Lines{columns_of_line, lines}, epilogue, threads);
    });
}

void sddmm(const Places& places, int element_bytes, int64_t rows, int64_t columns, int64_t sources, Address dy, int64_t dy_ld, int64_t dy_step,
           Address x, int64_t x_ld, int64_t x_step, Address dvalues, Address dbias, int64_t columns_of_line, int64_t lines, int threads) {
    nb::gil_scoped_release release;
    with_types(element_bytes, places, [&](auto element, const auto& pattern, const auto&, const auto& products) {
        using E = decltype(element);
        const Matrix<E> d = matrix<E>(dy, dy_ld, dy_step), from = matrix<E>(x, x_ld, x_step);
        if (rows == 1 && columns == 1) products.sddmm(pattern, d, from, sources, pointer<E>(dvalues), pointer<E>(dbias), Lines{columns_of_line, lines}, threads);
        else products.block_sddmm(pattern, rows, columns, d, from, sources, pointer<E>(dvalues), pointer<E>(dbias), columns_of_line, threads);
    });
}

// How the activations of a layer are given: feature-major rows that lie well, rows of the batch, or feature-major rows that do not.
enum Given { as_they_are, by_batch, misplaced };

// Activations (features, batch) as the products read them, in `scratch` where they are given otherwise.
template <class E>
Matrix<E> read(const Code<E>& code, int given, Matrix<E> x, Matrix<E> scratch, int64_t features, int64_t batch, int threads) {
    if (given == as_they_are) return x;
    if (given == by_batch) code.transpose(x, scratch, batch, features, threads);
    else code.copy_rows(x, scratch, features, batch, threads);
    return scratch;
}

// A forward step of a linear layer: the input as the product reads it, the product, its epilogue.
void forward(const Places& places, int element_bytes, int64_t out, int64_t in, int64_t features, int64_t batch, Address values, Address bias, Address x,
             int64_t x_ld, int given, Address scratch, int64_t scratch_ld, Address y, int64_t y_ld, float slope, uint32_t drop_below, float scale,
             uint64_t seed, Address positive, Address kept, int threads, int64_t parallel_from) {
    const Epilogue epilogue{pointer<const float>(bias), slope, scale, drop_below, seed, pointer<uint8_t>(positive), pointer<uint8_t>(kept), (batch + 7) / 8};
    const auto share = [&](int64_t work) { return work >= parallel_from ? threads : 1; };
    nb::gil_scoped_release release;
    with_types(element_bytes, places, [&](auto element, const auto& pattern, const auto& code, const auto& products) {
        using E = decltype(element);
        const int64_t work = pattern.row_ptr[pattern.rows] * out * in * batch, moved = 2 * features * batch;
        const Matrix<E> from = read(code, given, matrix<E>(x, x_ld), matrix<E>(scratch, scratch_ld), features, batch, share(moved));
        product(products, pattern, out, in, pointer<const E>(values), from, matrix<E>(y, y_ld), Lines{batch, 1}, epilogue, share(work));
    });
}

// Its backward step: through the epilogue, then the gradients of values and bias, and that of the input; addresses of 0 are not
// wanted (those of no values are 0 too). The gradient behind the epilogue stays in dz.
void backward(const Places& places, const Places& back, int element_bytes, int64_t out, int64_t in, int64_t features, int64_t outputs,
              int64_t batch, Address values, Address x, int64_t x_ld, int x_given, Address x_scratch, int64_t x_scratch_ld, Address dy, int64_t dy_ld,
              int dy_given, Address dz, int64_t dz_ld, bool wants_values, Address dvalues, Address dbias, Address dx, int64_t dx_ld, Address dx_by_batch, float slope,
              float scale, Address positive, Address kept, int threads, int64_t parallel_from) {
    const Epilogue epilogue{nullptr, slope, scale, 0, 0, pointer<uint8_t>(positive), pointer<uint8_t>(kept), (batch + 7) / 8};
    const auto share = [&](int64_t work) { return work >= parallel_from ? threads : 1; };
    nb::gil_scoped_release release;
    with_types(element_bytes, places, [&](auto element, const auto& pattern, const auto& code, const auto& products) {
        using E = decltype(element);
        const int64_t work = pattern.row_ptr[pattern.rows] * out * in * batch, moved = 2 * features * batch, given = 2 * outputs * batch;
        Matrix<E> d = read(code, dy_given, matrix<E>(dy, dy_ld), matrix<E>(dz, dz_ld), outputs, batch, share(given));
        const bool changed = positive || kept;
        if (changed || (dbias && !wants_values)) {
            const Matrix<E> to = changed ? matrix<E>(dz, dz_ld) : Matrix<E>{nullptr, 0, 0};
            code.epilogue_backward(d, to, wants_values ? nullptr : pointer<E>(dbias), outputs, batch, epilogue, share(given));
            if (changed) d = to;
        }
        if (wants_values) {
            const Matrix<E> from = read(code, x_given, matrix<E>(x, x_ld), matrix<E>(x_scratch, x_scratch_ld), features, batch, share(moved));
            if (out == 1 && in == 1) products.sddmm(pattern, d, from, features, pointer<E>(dvalues), pointer<E>(dbias), Lines{batch, 1}, share(work));
            else products.block_sddmm(pattern, out, in, d, from, features, pointer<E>(dvalues), pointer<E>(dbias), batch, share(work));
        }
        if (!dx) return;
        with_pattern(back, [&](const auto& columns) {
            product(products_of(code, columns), columns, in, out, pointer<const E>(values), d, matrix<E>(dx, dx_ld), Lines{batch, 1}, Epilogue{nullptr, 1.0f, 1.0f, 0, 0, nullptr, nullptr, 0},
                    share(work));
        });
        if (dx_by_batch) code.transpose(matrix<E>(dx, dx_ld), matrix<E>(dx_by_batch, features), features, batch, share(moved));
    });
}

void epilogue_backward(int element_bytes, Address dy, int64_t dy_ld, Address dz, int64_t dz_ld, Address dbias, int64_t rows, int64_t batch,
                       int threads, float slope, float scale, Address positive, Address kept, int64_t bits_ld) {
    const Epilogue epilogue{nullptr, slope, scale, 0, 0, pointer<uint8_t>(positive), pointer<uint8_t>(kept), bits_ld};
    nb::gil_scoped_release release;
    with_element(element_bytes, [&](auto element, const auto& code) {
        using E = decltype(element);
        code.epilogue_backward(matrix<E>(dy, dy_ld), matrix<E>(dz, dz_ld), pointer<E>(dbias), rows, batch, epilogue, threads);
    });
}

void place(int element_bytes, Address x, int64_t x_batch, int64_t x_channel, int64_t x_row, int64_t x_column, int64_t rows, int64_t columns,
           int64_t top, int64_t left, Address y, int64_t y_channel, int64_t channels, int64_t phases_high, int64_t phases_wide, int64_t high,
           int64_t wide, int64_t batch, int threads) {
    nb::gil_scoped_release release;
    with_element(element_bytes, [&](auto element, const auto& code) {
        using E = decltype(element);
        const Place<E> task{pointer<const E>(x), x_batch, x_channel, x_row, x_column, rows, columns, top, left, pointer<E>(y),
                            y_channel, channels, phases_high, phases_wide, high, wide, batch};
        code.place(task, threads);
    });
}

void transpose(int element_bytes, Address x, int64_t x_ld, Address y, int64_t y_ld, int64_t rows, int64_t columns, int threads) {
    nb::gil_scoped_release release;
    with_element(element_bytes, [&](auto element, const auto& code) {
        using E = decltype(element);
        code.transpose(matrix<E>(x, x_ld), matrix<E>(y, y_ld), rows, columns, threads);
    });
}

void copy_rows(int element_bytes, Address x, int64_t x_ld, Address y, int64_t y_ld, int64_t rows, int64_t columns, int threads) {
    nb::gil_scoped_release release;
    with_element(element_bytes, [&](auto element, const auto& code) {
        using E = decltype(element);
        code.copy_rows(matrix<E>(x, x_ld), matrix<E>(y, y_ld), rows, columns, threads);
    });
}

void natural_encode(Address x, int64_t n, int64_t bucket, uint64_t seed, Address codes, Address floors, int threads) {
    nb::gil_scoped_release release;
    codecs.natural_encode(pointer<const float>(x), n, bucket, seed, pointer<uint8_t>(codes), pointer<uint8_t>(floors), threads);
}

void natural_decode(Address codes, Address floors, int64_t n, int64_t bucket, Address x, int threads) {
    nb::gil_scoped_release release;
    codecs.natural_decode(pointer<const uint8_t>(codes), pointer<const uint8_t>(floors), n, bucket, pointer<float>(x), threads);
}

void uniforms(uint64_t seed, int64_t n, int64_t bucket, Address u, int threads) {
    nb::gil_scoped_release release;
    codecs.uniforms(seed, n, bucket, pointer<float>(u), threads);
}

void pack_bits(Address from, int64_t n, int bits, Address to, int threads) {
    nb::gil_scoped_release release;
    codecs.pack_bits(pointer<const uint8_t>(from), n, bits, pointer<uint8_t>(to), threads);
}

void unpack_bits(Address from, int64_t n, int bits, Address to, int threads) {
    nb::gil_scoped_release release;
    codecs.unpack_bits(pointer<const uint8_t>(from), n, bits, pointer<uint8_t>(to), threads);
}

void largest(Address x, int64_t n, int64_t k, Address positions, int threads) {
    nb::gil_scoped_release release;
    codecs.largest(pointer<const float>(x), n, k, pointer<int64_t>(positions), threads);
}

void saved_ranges(Address x, int64_t n, int64_t group, Address lows, Address highs, Address nonzeros, int threads) {
    nb::gil_scoped_release release;
    codecs.saved_ranges(pointer<const float>(x), n, group, pointer<float>(lows), pointer<float>(highs), pointer<int32_t>(nonzeros), threads);
}

void saved_encode(Address x, int64_t n, int64_t group, Address inverses, Address bases, int bits, Address offsets, Address bitmap,
                  Address packed, int threads) {
    nb::gil_scoped_release release;
    codecs.saved_encode(pointer<const float>(x), n, group, pointer<const float>(inverses), pointer<const float>(bases), bits,
                        pointer<const int64_t>(offsets), pointer<uint8_t>(bitmap), pointer<uint8_t>(packed), threads);
}

void saved_decode(Address packed, int64_t n, int64_t group, Address scales, Address bases, int bits, Address offsets, Address bitmap,
                  Address x, int threads) {
    nb::gil_scoped_release release;
    codecs.saved_decode(pointer<const uint8_t>(packed), n, group, pointer<const float>(scales), pointer<const float>(bases), bits,
                        pointer<const int64_t>(offsets), pointer<const uint8_t>(bitmap), pointer<float>(x), threads);
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // topologies may live until the process ends, and with them their places
    m.doc() = "The compiled kernels of Noctule, on raw addresses; call them through noctule.kernels.";
    m.def("instruction_sets", &instruction_sets, "Names of the instruction sets this machine can run, the fastest first.");
    m.def("instruction_set", [] { return std::string(chosen.name); }, "Name of the instruction set in use.");
    m.def("use_instruction_set", &use_instruction_set, "name"_a, "Chooses the instruction set of all later calls.");
    nb::class_<Places>(m, "Places", "Row pointers, columns and slots of a sparse matrix, in memory that the caller keeps.")
        .def("__init__", [](Places* self, int64_t rows, int pointer_bytes, int column_bytes, Address row_ptr, Address columns, Address slots) {
            new (self) Places{rows, pointer_bytes, column_bytes, row_ptr, columns, slots};
        });
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("spmm", &spmm);
    m.def("sddmm", &sddmm);
    m.def("epilogue_backward", &epilogue_backward);
    m.def("place", &place);
    m.def("transpose", &transpose);
    m.def("copy_rows", &copy_rows);
    m.def("natural_encode", &natural_encode);
    m.def("natural_decode", &natural_decode);
    m.def("uniforms", &uniforms);
    m.def("pack_bits", &pack_bits);
    m.def("unpack_bits", &unpack_bits);
    m.def("largest", &largest);
    m.def("saved_ranges", &saved_ranges);
    m.def("saved_encode", &saved_encode);
    m.def("saved_decode", &saved_decode);
}
