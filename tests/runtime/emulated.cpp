// noctule.runtime._native with the int8 code of VNNI alone, over emulated intrinsics: for test_integers_emulated.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "module.h"

NB_MODULE(_native, m) {
    using namespace noctule::runtime;
    m.def("instruction_sets", [] { return std::vector<std::string>{"vnni", "avx2", "portable"}; });
    m.def("instruction_set", [] { return std::string("vnni"); });
    m.def("use_instruction_set", &choose_integers);
    bind_integers(m);
    choose_integers("vnni");
}
