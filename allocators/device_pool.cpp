#include "device_pool.hpp"

#include <limits>
#include <memory>

#include "host_memory.hpp"

namespace glake {

OrtDeviceAllocator& host_allocator() {
  // Plain pointers: static objects would be destroyed at exit.
  static OrtDeviceAllocator* const allocator = [] {
    auto pool = std::make_unique<Pool>(std::make_unique<HostMemory>(), std::numeric_limits<std::size_t>::max());
    auto* made = new OrtDeviceAllocator(*pool);
    pool.release();  // NOLINT: for ever
    return made;
  }();
  return *allocator;
}

}  // namespace glake
