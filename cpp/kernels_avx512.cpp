#include "simd_avx512.h"

#include "kernels.inl"

noctule::Kernels noctule::avx512_kernels() { return avx512::table(); }
