// CudaMemory: VirtualMemory on a CUDA device, through the driver's virtual memory management.
//
// reserve = cuMemAddressReserve, create = cuMemCreate, map = cuMemMap and cuMemSetAccess. Memory is for this device
// alone (no peer access) and not for GPUDirect RDMA. Memory on the host is that of the device's NUMA node, page-locked
// by the driver, and read at the rate of the link (55 GB/s, H200 at PCIe 5). Everything lies in the primary context's
// address space, so ONNX Runtime, PyTorch and CuPy use it like any other device memory.
//
// Measured (H100, driver 580): mapping and unmapping wait for no kernel; a mapping costs about 70 us to make and take
// away whatever its size; cuMemSetAccess over several mappings costs as much as one call each; one physical
// chunk may be mapped at many addresses. Unmapping memory that a kernel uses makes that kernel fail with
// CUDA_ERROR_ILLEGAL_ADDRESS, and the context is lost.
#pragma once

#include <cstddef>
#include <memory>

#include "cuda_driver.hpp"
#include "cuda_streams.hpp"
#include "virtual_memory.hpp"

namespace glake {

class CudaMemory final : public VirtualMemory {
 public:
  // The device by its number, as CUDA counts (after CUDA_VISIBLE_DEVICES). Throws DriverError: no driver, a driver or a
  // device that is too old, no such device.
  explicit CudaMemory(int device);
  ~CudaMemory() override;

  [[nodiscard]] std::size_t granularity() const noexcept override { return granularity_; }
  [[nodiscard]] std::size_t granularity_on_host() const noexcept override { return granularity_on_host_; }
  // What cuMemGetInfo says: free to every process. 0 where it fails.
  [[nodiscard]] std::size_t free_bytes() const noexcept override;
  // All of the device's memory.
  [[nodiscard]] std::size_t total_bytes() const noexcept { return total_; }
  [[nodiscard]] const CudaContext& context() const noexcept { return *context_; }
  [[nodiscard]] StreamOrder* streams() noexcept override { return &streams_; }

 private:
  Address do_reserve(std::size_t bytes) override;
  void do_release(Address address, std::size_t bytes) noexcept override;
  ChunkHandle do_create(std::size_t bytes) override;
  ChunkHandle do_create_shared(std::size_t bytes) override;
  ChunkHandle do_create_on_host(std::size_t bytes) override;
  ChunkHandle do_adopt(int descriptor, std::size_t bytes) override;
  void do_destroy(ChunkHandle handle) noexcept override;
  void do_map(Address address, ChunkHandle handle, Access access) override;
  // With one cuMemSetAccess, which waits for copies that are on their way.
  void do_map_all(Address address, std::span<const ChunkHandle> handles) override;
  void do_freeze(ChunkHandle handle, std::span<const Address> addresses) override;
  void do_unmap(Address address, std::size_t bytes) noexcept override;
  // none and read_only hold for kernels: one that breaks them fails with CUDA_ERROR_ILLEGAL_ADDRESS, and the context is
  // lost. Copies and fills by the driver fail without harm for none, and are not held back by read_only.
  void do_protect(Address address, std::size_t bytes, Access access) override;
  Address do_map_file(int descriptor, std::size_t bytes, Address address) override;  // throws: the host's alone
  void do_unmap_file(Address address, std::size_t bytes) noexcept override;
  void do_fill(Address address, std::size_t bytes, unsigned char value, StreamHandle stream) override;
  void do_read(void* target, Address source, std::size_t bytes) override;

  [[nodiscard]] ChunkHandle create(std::size_t bytes, const CUmemAllocationProp& properties);
  void set_access(Address address, std::size_t bytes, CUmemAccess_flags access, bool of_host);
  // Waits for what was queued on private_stream_, and for nothing else.
  void finish_private(CUresult queued, const char* attempt, std::size_t bytes);

  std::shared_ptr<const CudaContext> context_;
  const CudaDriver& driver_;
  ProcessMark process_;
  CUmemAllocationProp properties_{};
  CUmemAllocationProp properties_on_host_{};
  std::size_t granularity_ = 0;
  std::size_t granularity_on_host_ = 0;
  std::size_t total_ = 0;
  CUstream private_stream_ = nullptr;
  CudaStreams streams_;
};

}  // namespace glake
