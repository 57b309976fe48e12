#include "../simd_portable.h"

#include "floats.inl"

noctule::runtime::FloatKernels noctule::runtime::portable_floats() { return noctule::portable::table(); }
