#include "torch_face.hpp"

#include <cstddef>
#include <cstdio>
#include <exception>

#include "device_pool.hpp"

namespace {

glake::OrtDeviceAllocator& allocator_of(int device) {
  if (device < 0) return glake::device_allocator({});
  return glake::device_allocator({glake::Device::cuda, device});
}

}  // namespace

void* glake_torch_allocate(ssize_t bytes, int device, void* stream) {
  // A negative number of bytes becomes one that no limit has room for.
  return allocator_of(device).allocate(static_cast<std::size_t>(bytes), glake::Tag::activations,
                                       reinterpret_cast<glake::StreamHandle>(stream));
}

void* glake_torch_try_allocate(ssize_t bytes, int device, void* stream) noexcept {
  try {
    return glake_torch_allocate(bytes, device, stream);
  } catch (const std::exception&) {  // recorded
    return nullptr;
  }
}

void glake_torch_free(void* address, ssize_t, int device, void*) noexcept {
  try {
    allocator_of(device).pool().deallocate(reinterpret_cast<glake::Address>(address));
  } catch (const glake::ForkedProcess&) {
    // A child of fork() that drops its copy of a tensor: the memory is its parent's.
  } catch (const std::exception& error) {
    std::fprintf(stderr, "glake-infer: PyTorch freed memory that the pool did not take back: %s\n", error.what());
  }
}
