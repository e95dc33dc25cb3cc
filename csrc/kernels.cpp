// Compiled once per instruction set, with QUIRE_ISA naming the namespace. Everything but the table is in an unnamed
// namespace and nothing comes from the C++ library: a template or inline function emitted here could be merged by the
// linker with the same one of another instruction set, and then run on a CPU that lacks it.
#include "attention.h"
#include "commit.h"
#include "convolve.h"
#include "encode.h"
#include "recur.h"
#include "kernels.h"
#if !defined(QUIRE_ATTENTION_ALONE)
#include "linear_table.h"
#include "rows.h"
#include "sampling.h"
#endif

#define QUIRE_STRING2(x) #x
#define QUIRE_STRING(x) QUIRE_STRING2(x)

namespace quire {
namespace QUIRE_ISA {

namespace {
template <bool kVnni>
constexpr Kernels kernels_of(const char* name) {
#if defined(QUIRE_ATTENTION_ALONE)  // for a build that tests attention and nothing else: no other kernel may be called
  return {name, &block_rows, kSplitRows, &attend, &commit, &encode, &convolve, &recur, {}, {}, nullptr};
#else
  return {name, &block_rows, kSplitRows, &attend, &commit, &encode, &convolve, &recur, linear_kernels<kVnni>, sampling_kernels, &run_rows};
#endif
}
}  // namespace

extern const Kernels kernels, kernels_vnni;
#if defined(QUIRE_VECTOR_DOTS)
const Kernels kernels = kernels_of<true>(QUIRE_STRING(QUIRE_ISA));
#else
const Kernels kernels = kernels_of<false>(QUIRE_STRING(QUIRE_ISA));
#endif
#if defined(QUIRE_MAYBE_VNNI)
const Kernels kernels_vnni = kernels_of<true>(QUIRE_STRING(QUIRE_ISA) "vnni");
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
