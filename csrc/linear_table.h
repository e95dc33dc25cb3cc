// Which kernel a product goes to, by its dtype and by how its weight lies, and the table of them all.
#pragma once
#include "linear_amx.h"
#include "linear_amx_few.h"
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
  const auto tiles = [&](auto product) {
    floats = g->m <= kFewTileRows ? few_scratch_floats<decltype(product)>(*g) : tile_scratch_floats<decltype(product)>(*g);
  };
  if (with_tiles(*g, tiles)) return floats;
#endif
  if (g->format == kRowsNK) return scratch_floats_of<false>(*g);
  if (g->format == kRowsKN) return scratch_floats_of<true>(*g);
  with_operand(*g, [&](auto operand) {
    const PackedPlan p = packed_plan<decltype(operand)>(*g);
    floats = p.x_floats + p.threads * p.thread_floats;
  });
  return floats;
}

inline void multiply_one(const LinearArgs* g) {
#if defined(QUIRE_AMX)
  if (with_tiles(*g, [&](auto product) { run_tiles<decltype(product)>(*g); })) return;
#endif
  if (g->format == kRowsNK) return multiply<false>(*g);
  if (g->format == kRowsKN) return multiply<true>(*g);
  with_operand(*g, [&](auto operand) { run_packed<decltype(operand)>(*g); });
}

inline void multiply_all(const LinearArgs* products, int64_t count) {
#if defined(QUIRE_AMX)
  if (products->m <= kFewTileRows && with_tiles(*products, [&](auto product) { run_few<decltype(product)>(products, count); })) return;
#endif
  for (int64_t i = 0; i < count; ++i) multiply_one(products + i);
}

}  // namespace product

constexpr LinearKernels linear_kernels = {&product::scratch_floats_for, &product::multiply_all, &product::pack, &product::rows, &product::packed_bytes};

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
