// What is to be known of a CPU's caches.
#include <stdint.h>
#include <unistd.h>

namespace quire {
namespace {

int64_t first_cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  return sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
  return 0;
#endif
}

}  // namespace

extern const bool kRoomyFirstCache = first_cache_bytes() >= 48 << 10;

}  // namespace quire
