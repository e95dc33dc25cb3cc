// Which kernel a product goes to, by its dtype and by how its weight lies, and the table of them all.
#pragma once
#include "linear_amx.h"
#include "linear_amx_int8.h"
#include "linear_few.h"
#include "linear_nibbles.h"
#include "linear_pack.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

// f(P{}) for the struct of a product panel by panel (linear_panels.h); false if it goes another way.
template <bool kVnni, class Function>
bool with_panels(const LinearArgs& g, const Function& f) {
  if (g.dtype != kBF16) return false;
  switch (g.format) {
#if defined(QUIRE_AMX)
    case kRowsNK: f(BrainProduct<AsItLies<false>>{}); return true;
    case kRowsKN: f(BrainProduct<AsItLies<true>>{}); return true;
    case kPackedBF16: f(BrainProduct<Packed>{}); return true;
    case kPackedInt8: f(CodeProduct{}); return true;
    case kPackedInt4: f(BrainProduct<Decoded<PackedInt4>>{}); return true;
#else
    case kPackedBF16:
      if (g.m > kMostPairRows) return false;
      f(DotProduct<PairDots>{});
      return true;
    case kPackedInt8: f(DotProduct<ByteDots<kVnni>>{}); return true;
    case kPackedInt4: f(DotProduct<NibbleDots<kVnni>>{}); return true;
#endif
    default: return false;
  }
}

template <bool kVnni>
int64_t scratch_floats_for(const LinearArgs* g) {
  int64_t floats = 0;
  const auto panels = [&](auto product) {
    floats = g->m <= kFewTileRows ? few_scratch_floats<decltype(product)>(*g) : tile_scratch_floats<decltype(product)>(*g);
  };
  if (with_panels<kVnni>(*g, panels)) return floats;
  if (g->format == kRowsNK) return scratch_floats_of<false>(*g);
  if (g->format == kRowsKN) return scratch_floats_of<true>(*g);
  with_packed(g->format, [&](auto operand) {
    const Plan p = plan_packed<decltype(operand)>(*g);
    floats = p.x_floats + p.threads * p.thread_floats;
  });
  return floats;
}

template <bool kVnni>
void multiply_one(const LinearArgs* g) {
  if (with_panels<kVnni>(*g, [&](auto product) { run_tiles<decltype(product)>(*g); })) return;
  if (g->format == kRowsNK) return multiply<false>(*g);
  if (g->format == kRowsKN) return multiply<true>(*g);
  with_packed(g->format, [&](auto operand) { run_packed<decltype(operand)>(*g); });
}

template <bool kVnni>
void multiply_all(const LinearArgs* products, int64_t count) {
  if (products->m <= kFewTileRows && with_panels<kVnni>(*products, [&](auto product) { run_few<decltype(product)>(products, count); })) return;
  for (int64_t i = 0; i < count; ++i) multiply_one<kVnni>(products + i);
}

}  // namespace product

// `kVnni`: for CPUs that have dot products of bytes; tiles of AMX are another way to them.
template <bool kVnni>
constexpr LinearKernels linear_kernels = {&product::scratch_floats_for<kVnni>, &product::multiply_all<kVnni>,
                                          &product::pack, &product::rows, &product::packed_bytes};

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
