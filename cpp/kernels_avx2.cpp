#include "simd_avx2.h"

#include "kernels.inl"

noctule::Kernels noctule::avx2_kernels() {
    using namespace avx2;
    return {code<Float32>(), code<BFloat16>()};
}
