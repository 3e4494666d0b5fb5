// HostBuffers: host memory that devices copy from and to.
//
// Page-locked where the driver can do that. cuMemHostAlloc locks 4 KiB pages one by one (1.8 GB/s, H200, driver 580);
// anonymous memory in huge pages, touched first and then registered, is locked seven times as fast (1 GiB: 34 ms to
// touch with 8 threads and 38 ms to register).
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "cuda_driver.hpp"
#include "virtual_memory.hpp"

namespace glake {

struct HostBuffer {
  std::byte* data = nullptr;
  std::size_t bytes = 0;     // as asked for
  std::size_t reserved = 0;  // of address space, from `base`
  std::byte* base = nullptr;
  bool locked = false;  // page-locked
};

class HostBuffers {
 public:
  HostBuffers() = default;
  HostBuffers(const HostBuffers&) = delete;
  HostBuffers& operator=(const HostBuffers&) = delete;
  virtual ~HostBuffers() = default;

  // Memory of zeros at the beginning of a page; large ones in huge pages where the system has them. Throws DriverError
  // where the system has no memory. What cannot be page-locked comes without being so. Any thread.
  [[nodiscard]] HostBuffer take(std::size_t bytes);
  // Nothing queued may use it any more.
  void give(HostBuffer buffer) noexcept;

 protected:
  // Whether the memory is locked now.
  virtual bool lock(std::byte*, std::size_t) noexcept { return false; }
  virtual void unlock(std::byte*) noexcept {}
};

// For every GPU at once.
class CudaHostBuffers final : public HostBuffers {
 public:
  explicit CudaHostBuffers(std::shared_ptr<const CudaContext> context) : context_(std::move(context)) {}

 private:
  bool lock(std::byte* data, std::size_t bytes) noexcept override;
  void unlock(std::byte* data) noexcept override;

  std::shared_ptr<const CudaContext> context_;
};

}  // namespace glake
