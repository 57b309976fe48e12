#include "simd_avx512.h"

#include "kernels.inl"

noctule::Kernels noctule::avx512_kernels() {
    using namespace avx512;
    return {code<Float32>(), code<BFloat16>()};
}
