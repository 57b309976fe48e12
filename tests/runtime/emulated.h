// The intrinsics of AVX-512 without AVX-512: SIMDe.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
