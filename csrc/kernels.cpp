// Compiled once per instruction set, with QUIRE_ISA naming the namespace. Everything but the table is in an unnamed
// namespace and nothing comes from the C++ library: a template or inline function emitted here could be merged by the
// linker with the same one of another instruction set, and then run on a CPU that lacks it.
#include "attention.h"
#include "commit.h"
#include "encode.h"
#include "kernels.h"
#include "linear_table.h"
#include "rows.h"
#include "sampling.h"

#define QUIRE_STRING2(x) #x
#define QUIRE_STRING(x) QUIRE_STRING2(x)

namespace quire {
namespace QUIRE_ISA {

extern const Kernels kernels;
const Kernels kernels = {QUIRE_STRING(QUIRE_ISA), &block_rows, kSplitRows, &attend, &commit, &encode, linear_kernels, sampling_kernels, &run_rows};

}  // namespace QUIRE_ISA
}  // namespace quire
