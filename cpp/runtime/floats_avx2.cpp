#include "../simd_avx2.h"

#include "floats.inl"

noctule::runtime::FloatKernels noctule::runtime::avx2_floats() { return noctule::avx2::table(); }
