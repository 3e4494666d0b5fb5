// OrtDeviceAllocator: a pool as the allocator of ONNX Runtime's environment.
//
// There is one per device, and it is never destroyed: ONNX Runtime keeps raw pointers to it. Alloc and
// AllocOnStream hand out memory under the tag activations, Reserve (what a session keeps for its life: weights
// that were not injected, prepacked copies) under weights.
//
// A stream whose native handle is null counts as none: ONNX Runtime allocates the buffer of a memory pattern on a
// stand-in stream without a handle (DummyStream in device_stream_collection.cc), and the work that uses it runs on
// the session's real ones. Taking that null for CUDA's legacy default stream would order it by the wrong stream.
//
// A request that fails throws std::bad_alloc, as ONNX Runtime's own CPU allocator does, and leaves a
// record here that says why; the session ends its run with an error that quotes ours. The C API's way
// would be a null pointer, and ONNX Runtime does not look at it where it matters: Tensor's constructor
// (tensor.cc), which makes outputs and feeds, and ExecutionFrame (execution_frame.cc), which makes activations, take
// it as the tensor's address. On the host a kernel then writes through null and the process dies (1.32.0, every
// kernel tried); on CUDA a kernel would be given null, an illegal address that ruins the context for every session
// of the process. (Scratch buffers and initializers are checked, in IAllocator::MakeUniquePtr, but with a message of
// ONNX Runtime's that names no reason.) All callers are C++ that ends a run by catching std::exception, on both
// devices. This is the one exception that crosses our boundary to C. Info, Free, GetStats and Shrink never throw: a
// bad Free is reported on stderr and leaves the memory alone, the others return an OrtStatus.
#pragma once

#include <array>
#include <atomic>
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

struct Device;

// A request of ONNX Runtime's that failed.
struct FailedAllocation {
  std::uint64_t sequence = 0;  // 1 for the first of this process, on any device, then 2, 3, ...; 0 in a forked child
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

  OrtDeviceAllocator(Pool& pool, const Device& device);
  OrtDeviceAllocator(const OrtDeviceAllocator&) = delete;
  OrtDeviceAllocator& operator=(const OrtDeviceAllocator&) = delete;

  // Makes this the allocator of the process's OrtEnv for its device. Does it once; later calls do
  // nothing. `api_version` is the highest that this ONNX Runtime knows. Returns ONNX Runtime's error, or null.
  [[nodiscard]] OrtStatus* register_with(const ort::Api& api, std::uint32_t api_version);
  // What describes this memory to ONNX Runtime; null before register_with() succeeded.
  [[nodiscard]] const OrtMemoryInfo* info() const noexcept { return info_; }

  // The last failures with a sequence number above `since`, oldest first; at most `most_failures`.
  [[nodiscard]] std::vector<FailedAllocation> failures(std::uint64_t since) const;
  // The sequence number of the last failure on any device.
  [[nodiscard]] static std::uint64_t failure_count() noexcept;

  // What every C function that allocates does. Null for 0 bytes. Throws AllocationFailed, which is recorded.
  [[nodiscard]] void* allocate(std::size_t bytes, Tag tag, StreamHandle stream = no_stream);

  [[nodiscard]] OrtAllocator* c_struct() noexcept { return &face_.base; }
  [[nodiscard]] Pool& pool() noexcept { return pool_; }
  // ONNX Runtime's table of functions; null before register_with() succeeded.
  [[nodiscard]] const void* api_table() const noexcept { return api_ ? api_->table() : nullptr; }

 private:
  // What ONNX Runtime's pointer points at.
  struct Face {
    OrtAllocator base;
    OrtDeviceAllocator* owner;
  };

  static void* alloc(OrtAllocator* self, std::size_t bytes);
  static void* alloc_on_stream(OrtAllocator* self, std::size_t bytes, OrtSyncStream* stream);
  static void* reserve(OrtAllocator* self, std::size_t bytes);
  static void free(OrtAllocator* self, void* address) noexcept;
  static const OrtMemoryInfo* get_info(const OrtAllocator* self) noexcept;
  static OrtStatus* get_stats(const OrtAllocator* self, OrtKeyValuePairs** stats) noexcept;
  static OrtStatus* shrink(OrtAllocator* self) noexcept;

  [[noreturn]] void fail(std::size_t bytes);
  void record(FailedAllocation& failure) noexcept;

  Face face_;
  Pool& pool_;
  bool on_cuda_;
  int device_index_;
  std::optional<ort::Api> api_;
  std::atomic<std::size_t> largest_ = 0;     // bytes, of the requests that succeeded
  std::atomic<std::uint64_t> reserves_ = 0;  // count of those that succeeded through Reserve
  std::atomic<std::uint64_t> shrinkages_ = 0;
  OrtMemoryInfo* info_ = nullptr;
  OrtEnv* env_ = nullptr;  // our reference to it keeps the environment, and so the registration, alive
  std::mutex registration_;
  mutable std::mutex failures_mutex_;
  std::deque<FailedAllocation> failures_;
};

}  // namespace glake
