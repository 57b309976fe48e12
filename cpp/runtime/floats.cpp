// Kernels of float32 for Python.
#include "module.h"

namespace noctule::runtime {

void bind_floats(nanobind::module_&) {}
void choose_floats(const std::string&) {}

}  // namespace noctule::runtime
