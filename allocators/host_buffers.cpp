#include "host_buffers.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>

namespace glake {

namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;
constexpr std::size_t touched_by_one = std::size_t{32} << 20;  // from here on by several threads
constexpr unsigned most_touching = 8;

std::size_t up(std::size_t bytes, std::size_t step) { return (bytes + step - 1) / step * step; }

void touch(std::byte* data, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const auto some = [&](std::size_t begin, std::size_t end) noexcept {
    for (std::size_t place = begin; place < end; place += page) {
      *reinterpret_cast<volatile std::byte*>(data + place) = std::byte{0};
    }
  };
  const unsigned count = std::clamp(std::thread::hardware_concurrency(), 1U, most_touching);
  if (bytes < touched_by_one || count == 1) return some(0, bytes);
  const std::size_t share = up(bytes / count, huge_page);
  std::vector<std::thread> threads;
  try {
    for (std::size_t begin = share; begin < bytes; begin += share) {
      threads.emplace_back(some, begin, std::min(bytes, begin + share));
    }
  } catch (const std::system_error&) {  // no more threads: what is not touched now is later
  }
  some(0, std::min(bytes, share));
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

HostBuffer HostBuffers::take(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  HostBuffer made;
  made.bytes = bytes;
  const bool large = bytes >= huge_page;
  made.reserved = large ? up(bytes, huge_page) + huge_page : up(std::max<std::size_t>(1, bytes), page);
  errno = ENOMEM;
  void* place = MAP_FAILED;
  if (made.reserved >= bytes) {
    place = mmap(nullptr, made.reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  if (place == MAP_FAILED) {
    throw DriverError("taking " + std::to_string(bytes) +
                      " bytes of host memory for transfers failed (mmap): " + std::strerror(errno) +
                      ". The machine, or this container, has no more: see `free -m`, `ulimit -v`.");
  }
  made.base = static_cast<std::byte*>(place);
  made.data = made.base;
  if (large) {
    made.data = reinterpret_cast<std::byte*>(up(reinterpret_cast<std::uintptr_t>(made.base), huge_page));
    (void)madvise(made.data, up(bytes, huge_page), MADV_HUGEPAGE);
  }
  // A child of fork() must not have it: its pages would be copied when the parent writes, and the device knows the old.
  (void)madvise(made.base, made.reserved, MADV_DONTFORK);
  touch(made.data, bytes);
  made.locked = lock(made.data, bytes);
  return made;
}

void HostBuffers::give(HostBuffer buffer) noexcept {
  if (buffer.locked) unlock(buffer.data);
  munmap(buffer.base, buffer.reserved);
}

bool CudaHostBuffers::lock(std::byte* data, std::size_t bytes) noexcept {
  const CurrentContext current(*context_);
  const RelaxedCapture relaxed(context_->driver);
  return context_->driver.mem_host_register(data, bytes, CU_MEMHOSTREGISTER_PORTABLE) == CUDA_SUCCESS;
}

void CudaHostBuffers::unlock(std::byte* data) noexcept {
  const CurrentContext current(*context_);
  const RelaxedCapture relaxed(context_->driver);
  context_->report(context_->driver.mem_host_unregister(data), "unlocking host memory (cuMemHostUnregister)", 0);
}

}  // namespace glake
