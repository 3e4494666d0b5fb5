// Replaying recorded allocations, and timing pairs of allocate and free, on our pool and on the
// allocators that it is compared with ("twins"). The loops are native, so that Python is not timed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "ort_api.hpp"
#include "pool.hpp"

namespace glake {

// What a trace is replayed on. `stream` is a handle of the device's, 0 for none.
// allocate() may throw or return null: both end the replay. `reserved`, where it is not null, tells the bytes that the
// allocator holds now; it is called before memory goes back (`sample_every_free`, else only for what was reserved).
struct ReplayAllocator {
  void* (*allocate)(void* self, std::size_t bytes, bool reserve, std::uintptr_t stream) = nullptr;
  void (*free)(void* self, void* address, std::uintptr_t stream) = nullptr;
  std::size_t (*reserved)(void* self) = nullptr;
  void* self = nullptr;
  bool sample_every_free = false;
  std::shared_ptr<void> keep;  // what `self` points at, where nobody else owns it
  // Figures that the allocator counts itself, by name, read after the replay.
  std::function<std::vector<std::pair<std::string, std::size_t>>()> figures;
};

// A line of a trace, ready to run: `slot` numbers the allocation, `stream` indexes the streams, -1 for none.
struct TraceStep {
  char operation = 'a';
  std::uint32_t slot = 0;
  std::uint64_t bytes = 0;
  std::int32_t stream = -1;
};

struct ReplayResult {
  double seconds = 0;            // of the last repetition, without the calls of `reserved`
  double all_seconds = 0;        // of all repetitions
  std::size_t peak_sampled = 0;  // the largest answer of `reserved`; 0 without it
  std::size_t failed_step = 0;   // 1 + the step whose allocation failed; 0: none did
  std::string failure;
};

// Runs the steps `repeat` times; what is left alive is freed after each time. `between` is called before the last one.
// Whatever happens, nothing stays allocated.
[[nodiscard]] ReplayResult replay(std::span<const TraceStep> steps, std::size_t slots, const ReplayAllocator& allocator,
                                  std::span<const std::uintptr_t> streams, int repeat,
                                  const std::function<void()>& between);

[[nodiscard]] ReplayAllocator replay_on(Pool& pool);
[[nodiscard]] ReplayAllocator replay_on_malloc();
[[nodiscard]] ReplayAllocator replay_on(OrtAllocator* allocator);
// The same for one that takes its memory from a memory pool of the CUDA driver's, which is asked for the peaks then.
// Throws std::runtime_error where it does not.
[[nodiscard]] ReplayAllocator replay_on_driver_pool(OrtAllocator* allocator);

// Registers an arena with ONNX Runtime's environment for a device, "Cpu" or "Cuda", with settings by the names of
// CreateArenaCfgV2. (Python's OrtArenaCfg does not know all of them.) Throws std::runtime_error; needs what
// ort_session_allocator() needs.
void ort_register_arena(const std::string& device, int index,
                        const std::vector<std::pair<std::string, std::size_t>>& settings);

// The allocator that a session of ONNX Runtime's has for a device, "Cpu" or "Cuda": the arena of its own, or the
// environment's (`shared`). `model` is any ONNX model; its session stays for ever. Throws std::runtime_error; needs
// ONNX Runtime 1.23 and a call of RegisterCustomOps before (ort_attach.hpp).
[[nodiscard]] OrtAllocator* ort_session_allocator(std::span<const char> model, const std::string& device, int index,
                                                  bool shared);

// The driver's stream-ordered allocator (cudaMallocAsync) with a memory pool of its own on a device, which keeps all
// memory that it ever had (release threshold: none). Throws std::runtime_error where there is no driver or device.
class CudaAsync {
 public:
  explicit CudaAsync(int device);
  CudaAsync(const CudaAsync&) = delete;
  CudaAsync& operator=(const CudaAsync&) = delete;
  ~CudaAsync();

  [[nodiscard]] void* allocate(std::size_t bytes, std::uintptr_t stream);
  void free(void* address, std::uintptr_t stream);
  // Makes a non-blocking stream, which lives as long as this object.
  [[nodiscard]] std::uintptr_t make_stream();
  [[nodiscard]] std::size_t peak_reserved() const;
  [[nodiscard]] std::size_t peak_active() const;
  // Its functions as an OrtAllocator's, on the stream of that number; only Alloc and Free are set.
  [[nodiscard]] OrtAllocator* face(std::uintptr_t stream);

 private:
  struct Driver;
  std::unique_ptr<Driver> driver_;
};

// Nanoseconds of one Alloc and one Free of `bytes`, called through the struct, the median of `rounds` rounds of `pairs`
// pairs; the rounds of the allocators alternate. Throws std::bad_alloc if one gives null.
[[nodiscard]] std::vector<double> time_pairs(std::span<OrtAllocator* const> allocators, std::size_t bytes, int pairs,
                                             int rounds);

}  // namespace glake
