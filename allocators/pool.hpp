// Pool: one device's memory, handed out to every session and engine of a process.
//
// Words
//   granule          the smallest range that can be mapped (64 KiB on the host, 2 MiB on CUDA)
//   chunk            one piece of physical memory. It is mapped whole or not at all, so it cannot be
//                    split; it may be mapped at several addresses
//   block            a contiguous range of addresses, backed by a list of chunks
//   stitched block   a block whose chunks, some or all, served other blocks before
//   slab             an active block that is cut into small objects of one size
//   active           handed out. Of bytes: the chunks of all active blocks, and the mapped files. A
//                    slab counts whole from its first live object to its last
//   idle             of a chunk or of bytes: kept for reuse. trim() gives it back
//   reserved         active + idle: the physical memory that the pool holds. (On the host a page
//                    that was never touched costs nothing yet, so reserved is an upper bound.)
//   limit            a hard budget over everything reserved
//
// Invariants (check_invariants() verifies each of them)
//   reserved = active + idle;  reserved <= limit
//   every chunk is in at most one active block, though several blocks may map it
//   every byte of a block is mapped exactly once
//   the idle lists hold exactly the chunks that no active block uses
//   a block can be handed out exactly when it is inactive and all its chunks are idle
//   every slab is an active block with a live object; each of its objects is live or free
//   requested <= active, and the bytes held by the tags add up to active
//
// How a request is served
//   below 1 MiB      from a slab of its size class (size_classes.hpp, slabs.hpp)
//   else             rounded up to a granule, then (block_pool.hpp)
//     1. an idle block of exactly that size: no driver call, no search
//     2. an idle block that is larger by at most 1/8
//     3. idle chunks are gathered and mapped side by side into a new, stitched block. It is kept
//        after its release, so that a steady state makes no driver calls
//     4. chunks that are missing are created. Where the limit (or the device) has no room, idle chunks that
//        could not be used are given back first: idle memory never makes a request fail
//     5. OutOfMemory: active + request > limit
//
// Thread-safe: every function may be called from any thread. After a call that throws, nothing of it
// is left handed out, and the invariants hold.
//
// In a child of fork() every function but stats() throws ForkedProcess, and the destructor leaves the
// memory alone: it is the parent's.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "block_pool.hpp"
#include "process.hpp"
#include "slabs.hpp"
#include "virtual_memory.hpp"

namespace glake {

// In bytes, unless noted.
struct PoolStats {
  std::size_t active = 0;
  std::size_t idle = 0;
  std::size_t reserved = 0;
  std::size_t peak_active = 0;
  std::size_t peak_reserved = 0;
  std::size_t requested = 0;  // as asked for, of what is live; active - requested is lost to rounding
  std::size_t limit = 0;
  std::size_t weights = 0;          // the part of active that is tagged weights, with the mapped files
  std::size_t mapped_files = 0;     // the part of weights that is files
  std::uint64_t allocations = 0;    // calls that succeeded
  std::uint64_t deallocations = 0;  // calls that succeeded
  std::size_t chunks = 0;           // count
  std::size_t blocks = 0;           // count, with the inactive ones in the cache
  std::size_t stitched_blocks = 0;  // count, with the inactive ones in the cache
  std::size_t slabs = 0;            // count
  std::uint64_t driver_calls = 0;   // count
};

// The request does not fit. A snapshot of the pool at that moment.
struct OutOfMemory {
  std::size_t requested = 0;
  std::size_t active = 0;
  std::size_t idle = 0;
  std::size_t reserved = 0;
  std::size_t limit = 0;
  std::size_t needed_limit = 0;                  // the smallest limit with which it would have passed
  std::size_t device_free = 0;                   // bytes that the device could still give
  std::array<std::size_t, tag_count> holders{};  // active bytes by tag
};

class OutOfMemoryError : public std::runtime_error {
 public:
  explicit OutOfMemoryError(const OutOfMemory& snapshot)
      : std::runtime_error("out of memory: the pool's limit is reached"), record(snapshot) {}
  OutOfMemory record;
};

// The address was not handed out, or was taken back already.
class InvalidPointer : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The new limit is below what is active.
class LimitTooLow : public std::runtime_error {
 public:
  LimitTooLow(std::size_t new_limit, std::size_t active_bytes)
      : std::runtime_error("the limit is below the active bytes"), limit(new_limit), active(active_bytes) {}
  std::size_t limit;
  std::size_t active;
};

// The pool belongs to the parent of this process.
class ForkedProcess : public std::runtime_error {
 public:
  ForkedProcess() : std::runtime_error("the pool belongs to the parent process") {}
};

class Pool {
 public:
  Pool(std::unique_ptr<VirtualMemory> memory, std::size_t limit);
  // Gives everything back, active or not. The pool of a device is never destroyed (device_pool.hpp).
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // At least `bytes` of memory, aligned to 64, from 256 bytes on to 256. 0 for 0 bytes.
  // Throws OutOfMemoryError, DriverError, ForkedProcess.
  // `stream` is where the memory will be used first; ignored where work is done when it returns.
  [[nodiscard]] Address allocate(std::size_t bytes, Tag tag = Tag::activations, StreamHandle stream = no_stream);
  // Takes back what allocate() gave; 0 is allowed and does nothing.
  // Throws InvalidPointer, with nothing changed, for any other address.
  void deallocate(Address address);

  // Maps the first `bytes` (> 0) of an open file, read-only, shared with whoever else maps it. Counts as active,
  // under weights, rounded up to a page. The descriptor may be closed afterwards; the file must not be shortened.
  // Throws OutOfMemoryError, DriverError, ForkedProcess.
  [[nodiscard]] Address map_file(int descriptor, std::size_t bytes);
  // Throws InvalidPointer, with nothing changed, for an address that map_file() did not give.
  void unmap_file(Address address);

  // Gives idle chunks back to the system until at most `target` bytes are reserved, or none is idle.
  // Returns the bytes given back.
  std::size_t trim(std::size_t target = 0);
  // Gives idle chunks back as needed. Throws LimitTooLow, with the old limit in force.
  void set_limit(std::size_t limit);

  // In a child of fork(): the parent's figures as they were.
  [[nodiscard]] PoolStats stats() const;
  void reset_peaks();
  // Throws std::logic_error that names the invariant that does not hold. Called after every operation
  // in debug builds, and where the environment has GLAKE_CHECK_INVARIANTS when the pool is made.
  void check_invariants() const;
  // For tests: see VirtualMemory::inject_failure.
  void inject_failure(std::int64_t n, std::int64_t times);

 private:
  class Operation;

  [[nodiscard]] std::size_t held(Tag tag) const noexcept;
  [[noreturn]] void throw_out_of_memory(std::size_t requested, std::size_t block_bytes) const;
  void check_locked() const;
  void verify() const;  // check_locked(), where that was asked for

  ProcessMark process_;
  bool always_verify_;
  mutable std::mutex mutex_;
  std::unique_ptr<VirtualMemory> memory_;
  std::unique_ptr<BlockPool> blocks_;
  std::unique_ptr<Slabs> slabs_;
  std::unordered_map<Address, std::size_t> files_;  // mapped files: address -> bytes as asked for
  std::size_t file_bytes_ = 0;                      // rounded up to pages
  std::array<std::size_t, tag_count> large_{};      // bytes of active blocks that are no slabs, by tag
  std::size_t requested_ = 0;
  std::uint64_t allocations_ = 0;
  std::uint64_t deallocations_ = 0;
};

}  // namespace glake
