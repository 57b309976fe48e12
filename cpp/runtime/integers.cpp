// Kernels of int8 for Python. A call names the instruction set that its weights were packed for.
#include <nanobind/stl/tuple.h>

#include "integer.h"
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

// (set, places of a record, lanes, window, rows of a dense tile)
std::tuple<int, int, int, int, int> layout() {
    const Integers& k = of(chosen);
    return {chosen, k.terms, k.lanes, k.window, k.dense_rows};
}

Places places(Address row_ptr, Address offsets, Address values, int64_t rows) {
    return {pointer<const int64_t>(row_ptr), pointer<const int32_t>(offsets), pointer<const int8_t>(values), rows};
}

int64_t records(Address row_ptr, Address offsets, Address values, int64_t rows, int terms, int group, int highest, Address starts, Address words) {
    nb::gil_scoped_release release;
    return pack_records(places(row_ptr, offsets, values, rows), terms, group, highest, pointer<int64_t>(starts), pointer<int32_t>(words));
}

int64_t rounds(Address row_ptr, Address offsets, Address values, int64_t rows, int lanes, int window, int highest, Address order, Address starts,
               Address bases, Address bytes) {
    nb::gil_scoped_release release;
    return pack_rounds(places(row_ptr, offsets, values, rows), lanes, window, highest, pointer<const int32_t>(order),
                       pointer<int64_t>(starts), pointer<int32_t>(bases), pointer<int8_t>(bytes));
}

template <Integers::Kernel* Integers::*kernel>
void call(int set, Address starts, Address words, int group, Address bases, Address bytes, Address offsets, int64_t places, Address scratch,
          Address x, int64_t ld, int64_t x_step, Address y, int64_t y_ld, int64_t y_step, int64_t rows, int64_t columns, int64_t lines,
          Address correction, Address scale, Address bias, float slope, bool codes, float inverse, float zero, float highest) {
    nb::gil_scoped_release release;
    const Weights weights{pointer<const int64_t>(starts), pointer<const int32_t>(words), group, pointer<const int32_t>(bases),
                          pointer<const int8_t>(bytes), pointer<const int32_t>(offsets), places, pointer<uint8_t>(scratch)};
    const Product product{pointer<const uint8_t>(x), ld, x_step, pointer<void>(y), y_ld, y_step, rows, columns, lines,
                          pointer<const int32_t>(correction), pointer<const float>(scale), pointer<const float>(bias), slope,
                          codes, inverse, zero, highest};
    (of(set).*kernel)(product, weights);
}

void interleave(int set, Address x, int64_t ld, int64_t rows, int64_t columns, Address y) {
    nb::gil_scoped_release release;
    of(set).interleave(pointer<const uint8_t>(x), ld, rows, columns, pointer<uint8_t>(y));
}

bool quantize(int set, Address x, int64_t n, float inverse, float zero, float highest, Address codes) {
    nb::gil_scoped_release release;
    return !of(set).quantize(pointer<const float>(x), n, inverse, zero, highest, pointer<uint8_t>(codes));
}

}  // namespace

void choose_integers(const std::string& name) { chosen = name == "vnni" ? vnni_set : name == "avx2" ? avx2_set : portable_set; }

void bind_integers(nb::module_& m) {
    m.def("int8_layout", &layout);
    m.def("int8_pack_records", &records);
    m.def("int8_pack_rounds", &rounds);
    m.def("int8_sparse", &call<&Integers::sparse>);
    m.def("int8_blocks", &call<&Integers::blocks>);
    m.def("int8_dense", &call<&Integers::dense>);
    m.def("int8_few_rounds", &call<&Integers::few_rounds>);
    m.def("int8_few_dense", &call<&Integers::few_dense>);
    m.def("int8_interleave", &interleave);
    m.def("int8_quantize", &quantize);
}

}  // namespace noctule::runtime
