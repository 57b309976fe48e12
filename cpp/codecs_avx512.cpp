#define NOCTULE_ISA avx512

#include "codecs.inl"

noctule::Codecs noctule::avx512_codecs() { return avx512::table(); }
