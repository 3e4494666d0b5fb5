// OrtDeviceAllocator: a pool as the allocator of ONNX Runtime's environment.
//
// There is one per device, and it is never destroyed: ONNX Runtime keeps raw pointers to it. Alloc
// hands out memory under the tag activations, Reserve (what a session keeps for its life: weights
// that were not injected, prepacked copies) under weights.
//
// A request that fails throws std::bad_alloc, as ONNX Runtime's own CPU allocator does, and leaves a
// record here that says why; the session ends its run with an error that quotes ours. The C API's way
// would be a null pointer, but ONNX Runtime's CPU kernels do not look: they write through it and the
// process dies (1.32.0, every kernel tried). This is the one exception that crosses our boundary to C, and
// is for the host only. Info and Free never throw: a bad Free is reported on stderr and leaves the
// memory alone.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "ort_api.hpp"
#include "pool.hpp"

namespace glake {

// A request of ONNX Runtime's that failed.
struct FailedAllocation {
  std::uint64_t sequence = 0;  // 1 for the first of this process, then 2, 3, ...
  std::int64_t thread = 0;     // gettid() of the thread that asked
  std::size_t requested = 0;
  std::optional<OutOfMemory> out_of_memory;  // if that is why
  std::string message;                       // else: why
};

// What ONNX Runtime catches and quotes. Its text has "[glake-infer failure N]", where N is the sequence
// number of the record.
class AllocationFailed : public std::bad_alloc {
 public:
  explicit AllocationFailed(const FailedAllocation& failure) noexcept;
  [[nodiscard]] const char* what() const noexcept override { return text_.data(); }

 private:
  std::array<char, 512> text_;  // no allocation: copying an exception must not throw
};

class OrtDeviceAllocator {
 public:
  static constexpr std::size_t most_failures = 32;

  explicit OrtDeviceAllocator(Pool& pool);
  OrtDeviceAllocator(const OrtDeviceAllocator&) = delete;
  OrtDeviceAllocator& operator=(const OrtDeviceAllocator&) = delete;

  // Makes this the allocator of the process's OrtEnv for its device. Does it once; later calls do
  // nothing. Returns ONNX Runtime's error, or null.
  [[nodiscard]] OrtStatus* register_with(const ort::Api& api);
  // What describes this memory to ONNX Runtime; null before register_with() succeeded.
  [[nodiscard]] const OrtMemoryInfo* info() const noexcept { return info_; }

  // The last failures with a sequence number above `since`, oldest first; at most `most_failures`.
  [[nodiscard]] std::vector<FailedAllocation> failures(std::uint64_t since) const;
  [[nodiscard]] std::uint64_t failure_count() const;

  // What every C function that allocates does. Null for 0 bytes. Throws AllocationFailed, which is recorded.
  [[nodiscard]] void* allocate(std::size_t bytes, Tag tag, StreamHandle stream = no_stream);

  [[nodiscard]] OrtAllocator* c_struct() noexcept { return &face_.base; }
  [[nodiscard]] Pool& pool() noexcept { return pool_; }

 private:
  // What ONNX Runtime's pointer points at.
  struct Face {
    OrtAllocator base;
    OrtDeviceAllocator* owner;
  };

  static void* alloc(OrtAllocator* self, std::size_t bytes);
  static void* reserve(OrtAllocator* self, std::size_t bytes);
  static void free(OrtAllocator* self, void* address) noexcept;
  static const OrtMemoryInfo* get_info(const OrtAllocator* self) noexcept;

  void record(FailedAllocation& failure) noexcept;

  Face face_;
  Pool& pool_;
  OrtMemoryInfo* info_ = nullptr;
  OrtEnv* env_ = nullptr;  // our reference to it keeps the environment, and so the registration, alive
  std::mutex registration_;
  mutable std::mutex failures_mutex_;
  std::deque<FailedAllocation> failures_;
  std::uint64_t failure_count_ = 0;
};

}  // namespace glake
