// noctule.runtime._native: the kernels of inference for Python, on raw addresses. It needs no OpenMP, and no Python package.
//
// The caller checks shapes, places and lengths first (noctule.runtime.plan).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace noctule::runtime {
namespace {

// What this machine can run, the fastest first.
std::vector<std::string> available() {
    std::vector<std::string> sets;
#ifdef NOCTULE_X86
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
    if (avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")) sets.emplace_back("vnni");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) sets.emplace_back("avx2");
#endif
    sets.emplace_back("portable");
    return sets;
}

const std::vector<std::string> sets = available();
std::string chosen;

void use_instruction_set(const std::string& name) {
    for (const auto& set : sets)
        if (name == set) {
            choose_floats(name);
            choose_integers(name);
            chosen = name;
            return;
        }
    throw std::invalid_argument("this machine cannot run the instruction set '" + name + "'; see instruction_sets()");
}

}  // namespace
}  // namespace noctule::runtime

NB_MODULE(_native, m) {
    using namespace noctule::runtime;
    m.doc() = "The compiled kernels of inference, on raw addresses; call them through noctule.runtime.";
    m.def("instruction_sets", [] { return sets; }, "Names of the instruction sets this machine can run, the fastest first.");
    m.def("instruction_set", [] { return chosen; }, "Name of the instruction set in use.");
    m.def("use_instruction_set", &use_instruction_set, "name"_a, "Chooses the instruction set of all later calls and of what is packed from now on.");
    bind_floats(m);
    bind_integers(m);
    use_instruction_set(sets.front());
}
