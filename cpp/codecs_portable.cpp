#define NOCTULE_ISA portable

#include "codecs.inl"

noctule::Codecs noctule::portable_codecs() { return portable::table(); }
