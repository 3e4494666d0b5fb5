// HostMemory: VirtualMemory on any Linux machine.
//
// Physical memory is one memfd, a file that lives in memory; a chunk is an extent of it. Mapping a
// chunk is mmap(MAP_FIXED | MAP_SHARED) of its extent over a reserved range, so the same chunk can
// show at several addresses and stitching is real. Destroying a chunk punches its extent out of the
// file: the pages go back to the system at once, and the extent is used again.
//
// Pages come into being when they are first touched: a chunk that nobody wrote costs no memory yet.
// When the machine is out of memory, the failure therefore shows at the first touch (the kernel ends
// a process), not in create(). The pool's limit is what guards against that.
//
// Mappings of chunks are not inherited by fork() (MADV_DONTFORK): a child that touches them dies of a
// segmentation fault instead of writing into its parent's tensors. Mapped files are inherited: they
// are read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "virtual_memory.hpp"

namespace glake {

class HostMemory final : public VirtualMemory {
 public:
  static constexpr std::size_t granule = 64 * 1024;
  // The name that the memfd shows in /proc/PID/fd and in /proc/PID/smaps ("/memfd:glake-infer").
  static constexpr const char* name = "glake-infer";

  HostMemory();
  ~HostMemory() override;

  [[nodiscard]] std::size_t granularity() const noexcept override { return granule; }
  [[nodiscard]] std::size_t granularity_on_host() const noexcept override { return granule; }
  [[nodiscard]] std::size_t free_bytes() const noexcept override;

 private:
  Address do_reserve(std::size_t bytes) override;
  void do_release(Address address, std::size_t bytes) noexcept override;
  ChunkHandle do_create(std::size_t bytes) override;
  ChunkHandle do_create_shared(std::size_t bytes) override;
  ChunkHandle do_create_on_host(std::size_t bytes) override { return do_create(bytes); }
  ChunkHandle do_adopt(int descriptor, std::size_t bytes) override;
  void do_destroy(ChunkHandle handle) noexcept override;
  void do_map(Address address, ChunkHandle handle, Access access) override;
  void do_freeze(ChunkHandle handle, std::span<const Address> addresses) override;
  void do_unmap(Address address, std::size_t bytes) noexcept override;
  void do_protect(Address address, std::size_t bytes, Access access) override;
  Address do_map_file(int descriptor, std::size_t bytes, Address address) override;
  void do_unmap_file(Address address, std::size_t bytes) noexcept override;
  void do_fill(Address address, std::size_t bytes, unsigned char value, StreamHandle stream) override;
  void do_read(void* target, Address source, std::size_t bytes) override;

  int descriptor_ = -1;
  std::uint64_t file_bytes_ = 0;                  // the memfd's length: it only grows, holes cost nothing
  std::map<std::uint64_t, std::uint64_t> holes_;  // free extents: offset -> bytes; neighbours are merged
};

}  // namespace glake
