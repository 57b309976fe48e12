// What the parts of noctule.runtime._native share.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

namespace noctule::runtime {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void bind_floats(nanobind::module_& m);
void bind_integers(nanobind::module_& m);
void choose_floats(const std::string& instruction_set);
void choose_integers(const std::string& instruction_set);

}  // namespace noctule::runtime
