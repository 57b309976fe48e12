// Kernels of int8 for Python.
#include "module.h"

namespace noctule::runtime {

void bind_integers(nanobind::module_&) {}
void choose_integers(const std::string&) {}

}  // namespace noctule::runtime
