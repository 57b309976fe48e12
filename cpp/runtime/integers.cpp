// Kernels of int8 for Python. A call names the instruction set that its weights were packed for.
#include <nanobind/stl/tuple.h>

#include "integer.h"
#include "integer_pack.h"
#include "module.h"

namespace nb = nanobind;

namespace noctule::runtime {
namespace {

enum : int { portable_set, avx2_set, vnni_set };
int chosen = portable_set;

// The kernels of a set that this machine can run: even their table is made by its instructions.
const Integers& of(int set) {
#ifdef NOCTULE_X86
    if (set == vnni_set) {
        static const Integers vnni = vnni_integers();
        return vnni;
    }
    if (set == avx2_set) {
        static const Integers avx2 = avx2_integers();
        return avx2;
    }
#endif
    static const Integers portable = portable_integers();
    return portable;
}

// (set, places of a record, lanes, window, step of dense rows, places of a dense word, dense rows packed together)
std::tuple<int, int, int, int, int, int, int> layout() {
    const Integers& k = of(chosen);
    return {chosen, k.terms, k.lanes, k.window, k.step, k.paired, k.dense_rows};
}

int64_t records(Address row_ptr, Address offsets, Address values, int64_t rows, int terms, int group, int highest, Address starts, Address words) {
    nb::gil_scoped_release release;
    const Places p{pointer<const int64_t>(row_ptr), pointer<const int32_t>(offsets), pointer<const int8_t>(values), rows};
    return pack_records(p, terms, group, highest, pointer<int64_t>(starts), pointer<int32_t>(words));
}

int64_t rounds(Address row_ptr, Address offsets, Address values, int64_t rows, int lanes, int window, int highest, Address order, Address starts,
               Address bases, Address bytes) {
    nb::gil_scoped_release release;
    const Places p{pointer<const int64_t>(row_ptr), pointer<const int32_t>(offsets), pointer<const int8_t>(values), rows};
    return pack_rounds(p, lanes, window, highest, pointer<const int32_t>(order), pointer<int64_t>(starts), pointer<int32_t>(bases),
                       pointer<int8_t>(bytes));
}

#define PRODUCT                                                                                                                      \
    Address x, int64_t ld, int64_t x_step, Address y, int64_t y_ld, int64_t y_step, int64_t rows, int64_t columns, int64_t lines,     \
        Address correction, Address scale, Address bias, float slope, int store, float inverse, float zero, float highest
#define THE_PRODUCT                                                                                                                  \
    Product {                                                                                                                        \
        pointer<const uint8_t>(x), ld, x_step, pointer<void>(y), y_ld, y_step, rows, columns, lines,                                 \
            pointer<const int32_t>(correction), pointer<const float>(scale), pointer<const float>(bias), slope,                      \
            static_cast<Store>(store), inverse, zero, highest                                                                       \
    }

void sparse(int set, Address starts, Address words, int group, PRODUCT) {
    nb::gil_scoped_release release;
    of(set).sparse(THE_PRODUCT, {pointer<const int64_t>(starts), pointer<const int32_t>(words), group});
}

void blocks(int set, Address starts, Address words, PRODUCT) {
    nb::gil_scoped_release release;
    of(set).blocks(THE_PRODUCT, {pointer<const int64_t>(starts), pointer<const int32_t>(words), 1});
}

Weights weights(Address starts, Address offsets, Address values, int64_t places, Address scratch) {
    return {pointer<const int64_t>(starts), pointer<const int32_t>(offsets), pointer<const int8_t>(values), places, pointer<uint8_t>(scratch)};
}

void dense(int set, Address offsets, Address values, int64_t places, Address scratch, PRODUCT) {
    nb::gil_scoped_release release;
    of(set).dense(THE_PRODUCT, weights(0, offsets, values, places, scratch));
}

void few_dense(int set, Address offsets, Address values, int64_t places, Address scratch, PRODUCT) {
    nb::gil_scoped_release release;
    of(set).few_dense(THE_PRODUCT, weights(0, offsets, values, places, scratch));
}

void few_list(int set, Address starts, Address offsets, Address values, int64_t places, Address scratch, PRODUCT) {
    nb::gil_scoped_release release;
    of(set).few_list(THE_PRODUCT, weights(starts, offsets, values, places, scratch));
}

void few_rounds(int set, Address starts, Address bases, Address bytes, Address order, int64_t places, Address scratch, PRODUCT) {
    nb::gil_scoped_release release;
    const Rounds r{pointer<const int64_t>(starts), pointer<const int32_t>(bases), pointer<const int8_t>(bytes), pointer<const int32_t>(order)};
    of(set).few_rounds(THE_PRODUCT, r, weights(0, 0, 0, places, scratch));
}

void interleave(int set, Address x, int64_t ld, int64_t rows, int64_t columns, Address y) {
    nb::gil_scoped_release release;
    of(set).interleave(pointer<const uint8_t>(x), ld, rows, columns, pointer<uint8_t>(y));
}

bool quantize(Address x, int64_t n, float inverse, float zero, float highest, Address codes) {
    nb::gil_scoped_release release;
    return !of(chosen).quantize(pointer<const float>(x), n, inverse, zero, highest, pointer<uint8_t>(codes));
}

void dequantize(Address codes, int64_t n, float scale, float zero, Address x) {
    nb::gil_scoped_release release;
    of(chosen).dequantize(pointer<const uint8_t>(codes), n, scale, zero, pointer<float>(x));
}

}  // namespace

void choose_integers(const std::string& name) { chosen = name == "vnni" ? vnni_set : name == "avx2" ? avx2_set : portable_set; }

void bind_integers(nb::module_& m) {
    m.def("int8_layout", &layout);
    m.def("int8_pack_records", &records);
    m.def("int8_pack_rounds", &rounds);
    m.def("int8_sparse", &sparse);
    m.def("int8_blocks", &blocks);
    m.def("int8_dense", &dense);
    m.def("int8_few_rounds", &few_rounds);
    m.def("int8_few_list", &few_list);
    m.def("int8_few_dense", &few_dense);
    m.def("int8_interleave", &interleave);
    m.def("int8_quantize", &quantize);
    m.def("int8_dequantize", &dequantize);
}

}  // namespace noctule::runtime
