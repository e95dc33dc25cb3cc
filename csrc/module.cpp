// The Python module: which instruction sets were compiled, which can run here, and which one is in use.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#if defined(QUIRE_HAVE_avx2) && defined(QUIRE_AVX_VNNI)
#include <cpuid.h>
#endif
#ifdef QUIRE_HAVE_amx
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"

namespace nb = nanobind;

namespace quire {

#define QUIRE_DECLARE(isa) \
  namespace isa {          \
  extern const Kernels kernels, kernels_vnni; \
  }
QUIRE_DECLARE(plain)
QUIRE_DECLARE(avx2)
QUIRE_DECLARE(avx512)
QUIRE_DECLARE(avx512bf16)
QUIRE_DECLARE(amx)

namespace {

#if defined(QUIRE_HAVE_avx2) && defined(QUIRE_AVX_VNNI)
// Which not every compiler's __builtin_cpu_supports knows.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  constexpr unsigned kAvxVnni = 1u << 4;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni) != 0;
}
#endif

#ifdef QUIRE_HAVE_amx
// Whether the CPU has tiles of bf16 and the system lets this process use them: their state is large, so Linux wants to be asked once.
bool tiles_allowed() {
#ifdef QUIRE_EMULATED_TILES
  return true;
#endif
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kBrain = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBrain) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Slowest first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#ifdef QUIRE_HAVE_plain
  found.push_back(&plain::kernels);
#endif
#ifdef __x86_64__
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2_fits = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512_fits = avx2_fits && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#ifdef QUIRE_HAVE_avx2
  if (avx2_fits) found.push_back(&avx2::kernels);
#endif
#if defined(QUIRE_HAVE_avx2) && defined(QUIRE_AVX_VNNI)
  if (avx2_fits && has_avx_vnni()) found.push_back(&avx2::kernels_vnni);
#endif
#ifdef QUIRE_HAVE_avx512
  if (avx512_fits) found.push_back(&avx512::kernels);
  if (avx512_fits && __builtin_cpu_supports("avx512vnni")) found.push_back(&avx512::kernels_vnni);
#endif
#ifdef QUIRE_HAVE_avx512bf16
  if (avx512_fits && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) found.push_back(&avx512bf16::kernels);
#endif
#ifdef QUIRE_HAVE_amx
  if (avx512_fits && __builtin_cpu_supports("avx512bf16") && tiles_allowed()) found.push_back(&amx::kernels);
#endif
  return found;
}

const Kernels* active = nullptr;

void set_isa(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : runnable()) {
    if (name == kernels->isa) {
      active = kernels;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + kernels->isa;
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here; known: " + known);
}

}  // namespace

const Kernels& active_kernels() { return *active; }

}  // namespace quire

NB_MODULE(_native, m) {
  using namespace quire;
  const auto known = runnable();
  if (known.empty()) throw nb::import_error("quire._native was compiled for none of this CPU's instruction sets (see QUIRE_ISAS)");
  active = known.back();
  m.doc() = "Quire's native CPU kernels. Use quire.tensors.native, which loads this module after torch.";
#ifdef QUIRE_DEBUG
  m.attr("debug") = true;
#else
  m.attr("debug") = false;
#endif
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : runnable()) names.emplace_back(kernels->isa);
    return names;
  });
  m.def("isa", [] { return std::string(active->isa); });
  m.def("set_isa", &set_isa, nb::arg("name"));
  bind_attention(m);
  bind_linear(m);
  bind_rows(m);
  bind_sampling(m);
}
