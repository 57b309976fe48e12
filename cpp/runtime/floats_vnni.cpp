#include "../simd_avx512.h"

#include "floats.inl"

noctule::runtime::FloatKernels noctule::runtime::vnni_floats() { return noctule::avx512::table(); }
