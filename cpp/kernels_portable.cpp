#include "simd_portable.h"

#include "kernels.inl"

noctule::Kernels noctule::portable_kernels() {
    using namespace portable;
    return {code<Float32>(), code<BFloat16>()};
}
