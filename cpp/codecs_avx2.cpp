#define NOCTULE_ISA avx2

#include "codecs.inl"

noctule::Codecs noctule::avx2_codecs() { return avx2::table(); }
