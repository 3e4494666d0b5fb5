// VirtualMemory: what the pool asks of a device's memory.
//
// An address range is reserved without memory behind it; physical memory comes as chunks; a chunk is
// mapped whole at an address of a reserved range, at several addresses at once if the pool wants
// that (the same bytes show at each of them). Implementations: HostMemory (memfd + mmap), CudaMemory (the CUDA
// driver's virtual memory management).
//
// Contract
// - Sizes and addresses are multiples of granularity(); of memory on the host, of granularity_on_host(); of ranges for
//   files, of a page.
// - A call that fails throws DriverError and has changed nothing.
// - The calls that give back (release, destroy, unmap) never throw: they run while errors unwind.
// - Calls come from one thread at a time (the pool holds its lock).
// - No call breaks a CUDA stream capture that is in progress on any thread.
// - In a child of fork() the calls that give back do nothing: the memory is the parent's.
//
// The owners AddressRange and PhysicalMemory below hold one driver object each, so that
// a set-up of several steps undoes itself when a later step fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "process.hpp"
#include "stream_order.hpp"

namespace glake {

using Address = std::uintptr_t;

// One piece of physical memory, as the implementation knows it (host: offset into the memfd).
struct ChunkHandle {
  std::uint64_t value = 0;
  std::size_t bytes = 0;
  int descriptor = -1;   // of memory that processes share: it belongs to the handle (host: a memfd of its own)
  bool on_host = false;  // memory of the host for a device: the process reads and writes it at the device's address too
};

enum class Access { none, read_only, read_write };

// A call to the operating system or the driver that failed: which one, why, and what was attempted.
class DriverError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The device has no memory left for a new chunk: other processes, or this one outside the pool, hold it.
class DeviceFullError : public DriverError {
  using DriverError::DriverError;
};

// A call ended the captures of CUDA graphs that are in progress.
class CaptureBroken : public DriverError {
  using DriverError::DriverError;
};

// Told of every chunk that is mapped and every range that is unmapped.
class MapObserver {
 public:
  virtual void mapped(Address address, std::size_t bytes) noexcept = 0;
  virtual void unmapped(Address address, std::size_t bytes) noexcept = 0;

 protected:
  ~MapObserver() = default;
};

class VirtualMemory {
 public:
  VirtualMemory() = default;
  VirtualMemory(const VirtualMemory&) = delete;
  VirtualMemory& operator=(const VirtualMemory&) = delete;
  virtual ~VirtualMemory() = default;

  // The smallest range that can be mapped, in bytes; a power of two.
  [[nodiscard]] virtual std::size_t granularity() const noexcept = 0;

  // The same of memory on the host (create_on_host()); 0 where the device cannot have any.
  [[nodiscard]] virtual std::size_t granularity_on_host() const noexcept = 0;

  // Bytes that the device could still give, to the best of its knowledge. For error messages.
  [[nodiscard]] virtual std::size_t free_bytes() const noexcept = 0;

  // Reserves an address range, aligned to granularity() and granularity_on_host(), with nothing behind it.
  [[nodiscard]] Address reserve(std::size_t bytes) {
    count("reserve", bytes);
    return do_reserve(bytes);
  }
  // Gives an address range back. Nothing may be mapped in it.
  void release(Address address, std::size_t bytes) noexcept {
    if (begin_give_back()) do_release(address, bytes);
  }

  // Creates physical memory.
  [[nodiscard]] ChunkHandle create(std::size_t bytes) {
    count("create", bytes);
    return do_create(bytes);
  }
  // Creates physical memory that other processes of the same user can map: with the handle's descriptor.
  [[nodiscard]] ChunkHandle create_shared(std::size_t bytes) {
    count("create_shared", bytes);
    return do_create_shared(bytes);
  }
  // Creates physical memory of the machine that the device reads and writes over its link: it takes none of the
  // device's. A multiple of granularity_on_host().
  [[nodiscard]] ChunkHandle create_on_host(std::size_t bytes) {
    count("create_on_host", bytes);
    return do_create_on_host(bytes);
  }
  // Physical memory of exactly that size that another process created and froze. The descriptor becomes the handle's;
  // after an error it is still the caller's.
  [[nodiscard]] ChunkHandle adopt(int descriptor, std::size_t bytes) {
    count("adopt", bytes);
    return do_adopt(descriptor, bytes);
  }
  // Gives physical memory back to the device. It must not be mapped anywhere. (Shared memory lives on while any process
  // has a descriptor of it, or has it mapped.)
  void destroy(ChunkHandle handle) noexcept {
    if (begin_give_back()) do_destroy(handle);
  }

  // Maps a whole chunk at an address inside a reserved range. A frozen one only for reading.
  void map(Address address, ChunkHandle handle, Access access = Access::read_write) {
    count("map", handle.bytes);
    do_map(address, handle, access);
    if (observer_ != nullptr) observer_->mapped(address, handle.bytes);
  }
  // Maps whole chunks one behind the other, faster than one by one. Not of the host for a device.
  void map_all(Address address, std::span<const ChunkHandle> handles) {
    std::size_t bytes = 0;
    for (const ChunkHandle& handle : handles) bytes += handle.bytes;
    count("map", bytes);
    do_map_all(address, handles);
    for (const ChunkHandle& handle : handles) {
      if (observer_ != nullptr) observer_->mapped(address, handle.bytes);
      address += handle.bytes;
    }
  }
  // Makes a chunk read-only at all the addresses at which it is mapped. Of shared memory on the host: for everybody and
  // for good. After an error it may be so at some of them.
  void freeze(ChunkHandle handle, std::span<const Address> addresses) {
    count("freeze", handle.bytes);
    do_freeze(handle, addresses);
  }
  // Removes every mapping in the range; its edges must be edges of mappings. The range stays reserved.
  void unmap(Address address, std::size_t bytes) noexcept {
    if (observer_ != nullptr) observer_->unmapped(address, bytes);
    if (begin_give_back()) do_unmap(address, bytes);
  }
  // Changes the access to mapped memory; edges as for unmap.
  void protect(Address address, std::size_t bytes, Access access) {
    count("protect", bytes);
    do_protect(address, bytes, access);
  }

  // Maps the first `bytes` of an open file, read-only and shared with every other process that maps
  // it; the caller may close the descriptor afterwards. At `address`, a page of a reserved range, to be given back by
  // unmap(); without one anywhere, to be given back by unmap_file().
  [[nodiscard]] Address map_file(int descriptor, std::size_t bytes, Address address = 0) {
    count("map_file", bytes);
    return do_map_file(descriptor, bytes, address);
  }
  void unmap_file(Address address, std::size_t bytes) noexcept {
    if (begin_give_back()) do_unmap_file(address, bytes);
  }

  // Sets mapped memory to a value. Ordered on the stream; for no_stream it is done when this returns.
  void fill(Address address, std::size_t bytes, unsigned char value, StreamHandle stream) {
    count("fill", bytes);
    do_fill(address, bytes, value, stream);
  }
  // Copies mapped memory to the host; done when this returns. What is queued on streams is not waited for.
  void read(void* target, Address source, std::size_t bytes) {
    count("read", bytes);
    do_read(target, source, bytes);
  }

  // The order of the device's queued work; null where work is done when it returns (the host).
  [[nodiscard]] virtual StreamOrder* streams() noexcept { return nullptr; }

  void observe(MapObserver* observer) noexcept { observer_ = observer; }

  // How many calls reached the driver or the operating system so far.
  [[nodiscard]] std::uint64_t calls() const noexcept { return calls_; }

  // For tests: of the coming calls that can fail, `n` pass and the `times` after them throw. A negative
  // `n` disarms.
  void inject_failure(std::int64_t n, std::int64_t times) noexcept {
    until_failure_ = n;
    failures_left_ = n < 0 ? 0 : times;
  }

 protected:
  virtual Address do_reserve(std::size_t bytes) = 0;
  virtual void do_release(Address address, std::size_t bytes) noexcept = 0;
  virtual ChunkHandle do_create(std::size_t bytes) = 0;
  virtual ChunkHandle do_create_shared(std::size_t bytes) = 0;
  virtual ChunkHandle do_create_on_host(std::size_t bytes) = 0;
  virtual ChunkHandle do_adopt(int descriptor, std::size_t bytes) = 0;
  virtual void do_destroy(ChunkHandle handle) noexcept = 0;
  virtual void do_map(Address address, ChunkHandle handle, Access access) = 0;
  virtual void do_map_all(Address address, std::span<const ChunkHandle> handles);
  virtual void do_freeze(ChunkHandle handle, std::span<const Address> addresses) = 0;
  virtual void do_unmap(Address address, std::size_t bytes) noexcept = 0;
  virtual void do_protect(Address address, std::size_t bytes, Access access) = 0;
  virtual Address do_map_file(int descriptor, std::size_t bytes, Address address) = 0;
  virtual void do_unmap_file(Address address, std::size_t bytes) noexcept = 0;
  virtual void do_fill(Address address, std::size_t bytes, unsigned char value, StreamHandle stream) = 0;
  virtual void do_read(void* target, Address source, std::size_t bytes) = 0;

 private:
  void count(const char* call, std::size_t bytes) {
    ++calls_;
    if (failures_left_ == 0 || until_failure_-- > 0) return;
    --failures_left_;
    throw DriverError(std::string(call) + " of " + std::to_string(bytes) + " bytes failed: injected by a test");
  }
  bool begin_give_back() noexcept {
    ++calls_;
    return !process_.is_child();
  }

  ProcessMark process_;
  MapObserver* observer_ = nullptr;
  std::uint64_t calls_ = 0;
  std::int64_t until_failure_ = 0;
  std::int64_t failures_left_ = 0;
};

// Owns physical memory.
class PhysicalMemory {
 public:
  PhysicalMemory(VirtualMemory& memory, std::size_t bytes) : memory_(&memory), handle_(memory.create(bytes)) {}
  PhysicalMemory(VirtualMemory& memory, ChunkHandle handle) noexcept : memory_(&memory), handle_(handle) {}
  PhysicalMemory(PhysicalMemory&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), handle_(other.handle_) {}
  PhysicalMemory& operator=(PhysicalMemory&&) = delete;
  ~PhysicalMemory() {
    if (memory_ != nullptr) memory_->destroy(handle_);
  }
  [[nodiscard]] ChunkHandle handle() const noexcept { return handle_; }

 private:
  VirtualMemory* memory_;
  ChunkHandle handle_;
};

// Owns a reserved range of addresses.
inline void VirtualMemory::do_map_all(Address address, std::span<const ChunkHandle> handles) {
  std::size_t mapped = 0;
  try {
    for (const ChunkHandle& handle : handles) {
      do_map(address + mapped, handle, Access::read_write);
      mapped += handle.bytes;
    }
  } catch (...) {
    if (mapped != 0) do_unmap(address, mapped);
    throw;
  }
}

class AddressRange {
 public:
  AddressRange(VirtualMemory& memory, std::size_t bytes)
      : memory_(&memory), address_(memory.reserve(bytes)), bytes_(bytes) {}
  AddressRange(AddressRange&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), address_(other.address_), bytes_(other.bytes_) {}
  AddressRange& operator=(AddressRange&&) = delete;
  ~AddressRange() {
    if (memory_ != nullptr) memory_->release(address_, bytes_);
  }
  [[nodiscard]] Address address() const noexcept { return address_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  VirtualMemory* memory_;
  Address address_;
  std::size_t bytes_;
};

}  // namespace glake
