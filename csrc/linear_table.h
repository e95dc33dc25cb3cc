// Which kernel a product goes to, by its dtype and by how its weight lies, and the table of them all.
#pragma once
#include "linear_amx.h"
#include "linear_amx_int8.h"
#include "linear_pack.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

#if defined(QUIRE_AMX)
// f(P{}) for the struct of a product on tiles (linear_amx_plan.h); false if tiles do not serve it.
template <class Function>
bool with_tiles(const LinearArgs& g, const Function& f) {
  if (g.dtype != kBF16) return false;
  switch (g.format) {
    case kRowsNK: f(BrainProduct<AsItLies<false>>{}); return true;
    case kRowsKN: f(BrainProduct<AsItLies<true>>{}); return true;
    case kPackedBF16: f(BrainProduct<Packed>{}); return true;
    case kPackedInt8: f(CodeProduct{}); return true;
    case kPackedInt4: f(BrainProduct<Decoded<PackedInt4>>{}); return true;
    default: return false;
  }
}
#endif

inline int64_t scratch_floats_for(const LinearArgs* g) {
  int64_t floats = 0;
#if defined(QUIRE_AMX)
  if (with_tiles(*g, [&](auto product) { floats = tile_scratch_floats<decltype(product)>(*g); })) return floats;
#endif
  if (g->format == kRowsNK) return scratch_floats_of<false>(*g);
  if (g->format == kRowsKN) return scratch_floats_of<true>(*g);
  with_operand(*g, [&](auto operand) {
    const PackedPlan p = packed_plan<decltype(operand)>(*g);
    floats = p.x_floats + p.threads * p.thread_floats;
  });
  return floats;
}

inline void multiply_any(const LinearArgs* g) {
#if defined(QUIRE_AMX)
  if (with_tiles(*g, [&](auto product) { run_tiles<decltype(product)>(*g); })) return;
#endif
  if (g->format == kRowsNK) return multiply<false>(*g);
  if (g->format == kRowsKN) return multiply<true>(*g);
  with_operand(*g, [&](auto operand) { run_packed<decltype(operand)>(*g); });
}

}  // namespace product

constexpr LinearKernels linear_kernels = {&product::scratch_floats_for, &product::multiply_any, &product::pack, &product::rows, &product::packed_bytes};

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
