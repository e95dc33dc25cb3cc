// Into which cache lines come that are asked for.
#pragma once
#include "isa.h"

namespace quire {

extern const bool kRoomyFirstCache;  // it has 48 KB or more

namespace QUIRE_ISA {
namespace {

// Into the first cache, where it has room for what is met and for as much that comes: of attention half a tile each, 16 KB with heads of 128 in bf16; of a
// packed weight a block each, as much. Else into the second one. With AVX2, where a tile takes longer, decoding read a twentieth less from the first
// (docs/speed.md).
#if defined(QUIRE_AVX512)
QUIRE_INLINE bool fetch_near() { return kRoomyFirstCache; }
#else
QUIRE_INLINE bool fetch_near() { return false; }
#endif

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
