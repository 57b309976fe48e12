#include "simd_avx2.h"

#include "kernels.inl"

noctule::Kernels noctule::avx2_kernels() { return avx2::table(); }
