#include "cuda_memory.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <string>

namespace glake {
namespace {

// By number: headers before CUDA 12.2 do not name them.
constexpr auto maps_host_memory =
    static_cast<CUdevice_attribute>(141);  // HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
constexpr auto host_numa_id = static_cast<CUdevice_attribute>(134);
constexpr auto host_numa = static_cast<CUmemLocationType>(3);

CUmemAccess_flags flags_of(Access access) {
  return access == Access::none        ? CU_MEM_ACCESS_FLAGS_PROT_NONE
         : access == Access::read_only ? CU_MEM_ACCESS_FLAGS_PROT_READ
                                       : CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
}

}  // namespace

CudaMemory::CudaMemory(int device)
    : context_(std::make_shared<const CudaContext>(device)),
      driver_(context_->driver),
      total_(cuda_device_memory(device)),
      streams_(context_) {
  if (!context_->has(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)) {
    throw DriverError("making a pool on " + context_->name() +
                      " failed: the device, or the way in which this machine shows it (vGPU, MPS), does not support "
                      "CUDA's virtual memory management, which glake-infer needs. Use another device.");
  }
  properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties_.location.id = context_->device();
  const CurrentContext current(*context_);
  context_->check(driver_.mem_granularity(&granularity_, &properties_, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                  "asking for the granularity of memory (cuMemGetAllocationGranularity)");
  if (context_->has(maps_host_memory)) {
    properties_on_host_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_on_host_.location.type = host_numa;
    properties_on_host_.location.id = std::max(0, context_->value(host_numa_id, 0));
    if (driver_.mem_granularity(&granularity_on_host_, &properties_on_host_, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) !=
        CUDA_SUCCESS) {
      granularity_on_host_ = 0;
    }
  }
  context_->check(driver_.stream_create(&private_stream_, CU_STREAM_NON_BLOCKING), "making a stream (cuStreamCreate)");
  (void)streams_.own_stream();  // once the device is full there would be no memory for it
}

CudaMemory::~CudaMemory() {
  if (process_.is_child()) return;
  context_->report(driver_.stream_destroy(private_stream_), "destroying a stream (cuStreamDestroy)", 0);
}

std::size_t CudaMemory::free_bytes() const noexcept {
  std::size_t free = 0;
  std::size_t total = 0;
  const CurrentContext current(*context_);
  return driver_.mem_get_info(&free, &total) == CUDA_SUCCESS ? free : 0;
}

Address CudaMemory::do_reserve(std::size_t bytes) {
  const CurrentContext current(*context_);
  CUdeviceptr address = 0;
  context_->check(driver_.mem_address_reserve(&address, bytes, std::max(granularity_, granularity_on_host_), 0, 0),
                  "reserving address space (cuMemAddressReserve)", bytes);
  return address;
}

void CudaMemory::do_release(Address address, std::size_t bytes) noexcept {
  const CurrentContext current(*context_);
  context_->report(driver_.mem_address_free(address, bytes), "releasing address space (cuMemAddressFree)", bytes);
}

ChunkHandle CudaMemory::do_create(std::size_t bytes) { return create(bytes, properties_); }

ChunkHandle CudaMemory::create(std::size_t bytes, const CUmemAllocationProp& properties) {
  const CurrentContext current(*context_);
  CUmemGenericAllocationHandle handle = 0;
  context_->check(driver_.mem_create(&handle, bytes, &properties, 0), "creating device memory (cuMemCreate)", bytes);
  return {handle, bytes};
}

ChunkHandle CudaMemory::do_create_shared(std::size_t bytes) {
  if (!context_->has(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)) {
    throw DriverError("creating memory that processes share on " + context_->name() +
                      " failed: the device does not export memory as POSIX file descriptors. Make the pool without a "
                      "broker.");
  }
  const CurrentContext current(*context_);
  CUmemAllocationProp properties = properties_;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  ChunkHandle made = create(bytes, properties);
  try {
    context_->check(driver_.mem_export(&made.descriptor, made.value, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                    "exporting device memory (cuMemExportToShareableHandle; are too many files open? `ulimit -n`)",
                    bytes);
  } catch (...) {
    do_destroy(made);
    throw;
  }
  return made;
}

ChunkHandle CudaMemory::do_create_on_host(std::size_t bytes) {
  const auto attempt = [&] {
    return "creating " + std::to_string(bytes) + " bytes of host memory for " + context_->name() + " (cuMemCreate)";
  };
  if (granularity_on_host_ == 0) {
    throw DriverError(attempt() +
                      " failed: the device, or its driver, does not map memory of the host by NUMA nodes "
                      "(CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED). Install a newer driver, or "
                      "keep all weights on the device: offload=\"none\".");
  }
  const CurrentContext current(*context_);
  CUmemGenericAllocationHandle handle = 0;
  const CUresult result = driver_.mem_create(&handle, bytes, &properties_on_host_, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {  // not of the device: nothing that the pool gives back would help
    throw DriverError(attempt() + " failed: " + driver_.describe(result) + ". NUMA node " +
                      std::to_string(properties_on_host_.location.id) +
                      " of the machine, or this process's control group, has no memory left that could be page-locked. "
                      "End other processes, raise the group's limit, or keep fewer weights on the host (offload).");
  }
  if (result != CUDA_SUCCESS) driver_.fail(attempt(), result);
  return {handle, bytes, -1, true};
}

ChunkHandle CudaMemory::do_adopt(int descriptor, std::size_t bytes) {
  const CurrentContext current(*context_);
  CUmemGenericAllocationHandle handle = 0;
  context_->check(driver_.mem_import(&handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(descriptor)),
                                     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                  "taking over device memory of another process (cuMemImportFromShareableHandle)", bytes);
  return {handle, bytes, descriptor};  // kept: an imported handle cannot be exported again
}

void CudaMemory::do_destroy(ChunkHandle handle) noexcept {
  if (handle.descriptor >= 0) close(handle.descriptor);
  const CurrentContext current(*context_);
  context_->report(driver_.mem_release(handle.value), "releasing device memory (cuMemRelease)", handle.bytes);
}

void CudaMemory::do_map(Address address, ChunkHandle handle, Access access) {
  const CurrentContext current(*context_);
  context_->check(driver_.mem_map(address, handle.bytes, 0, handle.value, 0), "mapping device memory (cuMemMap)",
                  handle.bytes);
  try {
    set_access(address, handle.bytes, flags_of(access), handle.on_host);
  } catch (...) {
    do_unmap(address, handle.bytes);
    throw;
  }
}

void CudaMemory::do_map_all(Address address, std::span<const ChunkHandle> handles) {
  const CurrentContext current(*context_);
  std::size_t mapped = 0;
  try {
    for (const ChunkHandle& handle : handles) {
      context_->check(driver_.mem_map(address + mapped, handle.bytes, 0, handle.value, 0),
                      "mapping device memory (cuMemMap)", handle.bytes);
      mapped += handle.bytes;
    }
    set_access(address, mapped, CU_MEM_ACCESS_FLAGS_PROT_READWRITE, false);
  } catch (...) {
    if (mapped != 0) do_unmap(address, mapped);
    throw;
  }
}

void CudaMemory::do_unmap(Address address, std::size_t bytes) noexcept {
  const CurrentContext current(*context_);
  context_->report(driver_.mem_unmap(address, bytes), "unmapping device memory (cuMemUnmap)", bytes);
}

void CudaMemory::do_protect(Address address, std::size_t bytes, Access access) {
  const CurrentContext current(*context_);
  set_access(address, bytes, flags_of(access), false);
}

void CudaMemory::do_freeze(ChunkHandle handle, std::span<const Address> addresses) {
  const CurrentContext current(*context_);
  for (const Address address : addresses) {
    set_access(address, handle.bytes, CU_MEM_ACCESS_FLAGS_PROT_READ, handle.on_host);
  }
}

void CudaMemory::set_access(Address address, std::size_t bytes, CUmemAccess_flags access, bool of_host) {
  std::array<CUmemAccessDesc, 2> both{};
  both[0].location = properties_.location;
  both[1].location = properties_on_host_.location;  // the processor's
  for (CUmemAccessDesc& each : both) each.flags = access;
  context_->check(driver_.mem_set_access(address, bytes, both.data(), of_host ? 2 : 1),
                  "setting the access to device memory (cuMemSetAccess)", bytes);
}

Address CudaMemory::do_map_file(int, std::size_t bytes, Address) {
  throw DriverError("mapping " + std::to_string(bytes) + " bytes of a file on " + context_->name() +
                    " failed: files are mapped on the host only. Map it with the pool of 'cpu' and copy.");
}

void CudaMemory::do_unmap_file(Address, std::size_t) noexcept {}

void CudaMemory::do_fill(Address address, std::size_t bytes, unsigned char value, StreamHandle stream) {
  const CurrentContext current(*context_);
  constexpr const char* attempt = "filling device memory (cuMemsetD8Async)";
  if (stream == no_stream) {
    return finish_private(driver_.memset_async(address, value, bytes, private_stream_), attempt, bytes);
  }
  context_->check(driver_.memset_async(address, value, bytes, reinterpret_cast<CUstream>(stream)), attempt, bytes);
}

void CudaMemory::do_read(void* target, Address source, std::size_t bytes) {
  const CurrentContext current(*context_);
  finish_private(driver_.memcpy_dtoh_async(target, source, bytes, private_stream_),
                 "copying device memory to the host (cuMemcpyDtoHAsync)", bytes);
}

void CudaMemory::finish_private(CUresult queued, const char* attempt, std::size_t bytes) {
  context_->check(queued, attempt, bytes);
  const RelaxedCapture relaxed(driver_);
  context_->check(driver_.stream_synchronize(private_stream_), attempt, bytes);
}

}  // namespace glake
