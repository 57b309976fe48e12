#include "simd_portable.h"

#include "kernels.inl"

noctule::Kernels noctule::portable_kernels() { return portable::table(); }
