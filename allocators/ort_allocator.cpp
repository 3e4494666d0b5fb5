#include "ort_allocator.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <limits>

#include "arithmetic.hpp"
#include "device_pool.hpp"

namespace glake {
namespace {

// Numbers the failures of all devices.
std::atomic<std::uint64_t> failure_number = 0;

// On Arm, ONNX Runtime's quantized kernels read up to 30 bytes past the end of a buffer, and its own
// allocator adds as much (MLAS_SYMM_QGEMM_BUF_OVERRUN).
#if defined(__aarch64__)
constexpr std::size_t read_ahead = 30;
#else
constexpr std::size_t read_ahead = 0;
#endif

// As ONNX Runtime reads it back: a signed number of 64 bits.
std::string decimal(std::uint64_t value) {
  return std::to_string(std::min<std::uint64_t>(value, std::numeric_limits<std::int64_t>::max()));
}

}  // namespace

OrtDeviceAllocator::OrtDeviceAllocator(Pool& pool, const Device& device)
    : face_{{ort::newest_allocator, alloc, free, get_info, reserve, get_stats, alloc_on_stream, shrink}, this},
      pool_(pool),
      on_cuda_(device.kind == Device::cuda),
      device_index_(device.index) {
  static_assert(offsetof(Face, base) == 0, "ONNX Runtime's pointer is cast back to a Face");
}

OrtStatus* OrtDeviceAllocator::register_with(const ort::Api& api, std::uint32_t api_version) {
  const std::scoped_lock lock(registration_);
  if (env_ != nullptr) return nullptr;
  OrtMemoryInfo* info = nullptr;
  if (OrtStatus* error = api.create_memory_info(on_cuda_ ? "Cuda" : "Cpu", ort::device_allocator, device_index_,
                                                ort::default_memory, &info)) {
    return error;
  }
  OrtEnv* env = nullptr;
  // Returns the environment that Python's ONNX Runtime made; its arguments are ignored then.
  if (OrtStatus* error = api.create_env(ort::warning, "glake-infer", &env)) {
    api.release_memory_info(info);
    return error;
  }
  // RegisterAllocator asks for these.
  info_ = info;
  api_.emplace(api);
  face_.base.version = std::min(ort::newest_allocator, api_version);
  if (OrtStatus* error = api.register_allocator(env, c_struct())) {
    info_ = nullptr;
    api_.reset();
    api.release_env(env);
    api.release_memory_info(info);
    return error;
  }
  env_ = env;
  return nullptr;
}

void* OrtDeviceAllocator::alloc(OrtAllocator* self, std::size_t bytes) {
  return reinterpret_cast<Face*>(self)->owner->allocate(bytes, Tag::activations, no_stream);
}

void* OrtDeviceAllocator::alloc_on_stream(OrtAllocator* self, std::size_t bytes, OrtSyncStream* stream) {
  OrtDeviceAllocator& owner = *reinterpret_cast<Face*>(self)->owner;
  StreamHandle handle = no_stream;
  if (stream != nullptr && owner.api_) {
    if (void* native = owner.api_->stream_handle(stream)) handle = reinterpret_cast<StreamHandle>(native);
  }
  return owner.allocate(bytes, Tag::activations, handle);
}

void* OrtDeviceAllocator::reserve(OrtAllocator* self, std::size_t bytes) {
  OrtDeviceAllocator& owner = *reinterpret_cast<Face*>(self)->owner;
  void* const address = owner.allocate(bytes, Tag::weights, no_stream);
  owner.reserves_.fetch_add(1, std::memory_order_relaxed);
  return address;
}

void OrtDeviceAllocator::free(OrtAllocator* self, void* address) noexcept {
  try {
    reinterpret_cast<Face*>(self)->owner->pool_.deallocate(reinterpret_cast<Address>(address));
  } catch (const ForkedProcess&) {
    // A child of fork() that drops its copy of a session: the memory is its parent's.
  } catch (const std::exception& error) {
    std::fprintf(stderr, "glake-infer: ONNX Runtime freed memory that the pool did not take back: %s\n", error.what());
  }
}

const OrtMemoryInfo* OrtDeviceAllocator::get_info(const OrtAllocator* self) noexcept {
  return reinterpret_cast<const Face*>(self)->owner->info_;
}

OrtStatus* OrtDeviceAllocator::get_stats(const OrtAllocator* self, OrtKeyValuePairs** stats) noexcept {
  OrtDeviceAllocator& owner = *reinterpret_cast<const Face*>(self)->owner;
  *stats = nullptr;
  if (!owner.api_) return nullptr;  // nobody can ask before register_with() but a test
  const ort::Api& api = *owner.api_;
  OrtKeyValuePairs* pairs = nullptr;
  try {
    const PoolStats now = owner.pool_.stats();
    api.create_key_value_pairs(&pairs);
    const auto add = [&](const char* key, const std::string& value) {
      api.add_key_value_pair(pairs, key, value.c_str());
    };
    // The keys and their meaning are ONNX Runtime's (OrtAllocator in its header); -1 is for no limit.
    // NumArenaExtensions is left out: the pool does not grow in steps that could be counted as such.
    add("Limit", now.limit == most_bytes ? "-1" : decimal(now.limit));
    add("InUse", decimal(now.active));
    add("TotalAllocated", decimal(now.reserved));
    add("MaxInUse", decimal(now.peak_active));
    add("NumAllocs", decimal(now.allocations));
    add("NumReserves", decimal(owner.reserves_.load(std::memory_order_relaxed)));
    add("NumArenaShrinkages", decimal(owner.shrinkages_.load(std::memory_order_relaxed)));
    add("MaxAllocSize", decimal(owner.largest_.load(std::memory_order_relaxed)));
  } catch (const std::exception& error) {
    if (pairs != nullptr) api.release_key_value_pairs(pairs);
    return api.create_status(ort::fail, error.what());
  }
  *stats = pairs;
  return nullptr;
}

OrtStatus* OrtDeviceAllocator::shrink(OrtAllocator* self) noexcept {
  OrtDeviceAllocator& owner = *reinterpret_cast<Face*>(self)->owner;
  try {
    owner.pool_.trim(0);
    owner.shrinkages_.fetch_add(1, std::memory_order_relaxed);
  } catch (const ForkedProcess&) {  // the memory is the parent's to give back
  } catch (const std::exception& error) {
    if (owner.api_) return owner.api_->create_status(ort::fail, error.what());
    std::fprintf(stderr, "glake-infer: giving idle memory back failed: %s\n", error.what());
  }
  return nullptr;
}

void* OrtDeviceAllocator::allocate(std::size_t bytes, Tag tag, StreamHandle stream) {
  try {
    const std::size_t extra = on_cuda_ || bytes == 0 || bytes > most_bytes - read_ahead ? 0 : read_ahead;
    void* const address = reinterpret_cast<void*>(pool_.allocate(bytes + extra, tag, stream));
    std::size_t largest = largest_.load(std::memory_order_relaxed);
    while (bytes > largest && !largest_.compare_exchange_weak(largest, bytes, std::memory_order_relaxed)) {
    }
    return address;
  } catch (...) {
    fail(bytes);
  }
}

// Records why, and throws what ONNX Runtime quotes. In the handler of an exception.
void OrtDeviceAllocator::fail(std::size_t bytes) {
  FailedAllocation failure;
  failure.requested = bytes;
  failure.thread = gettid();
  try {
    throw;
  } catch (const OutOfMemoryError& error) {
    failure.out_of_memory = error.record;
  } catch (const ForkedProcess&) {
    // No record: its lock may be held by a thread that does not exist in the child.
    failure.message =
        "this session belongs to the parent process, and so does its memory. Start workers with the multiprocessing "
        "method 'spawn' or 'forkserver'";
    throw AllocationFailed(failure);
  } catch (const std::exception& error) {
    try {
      failure.message = error.what();
    } catch (...) {  // out of ordinary memory: the record then only says what was asked
    }
  }
  record(failure);
  throw AllocationFailed(failure);
}

AllocationFailed::AllocationFailed(const FailedAllocation& failure) noexcept {
  const auto number = static_cast<unsigned long long>(failure.sequence);
  if (failure.out_of_memory) {
    const OutOfMemory& record = *failure.out_of_memory;
    std::snprintf(text_.data(), text_.size(),
                  "[glake-infer failure %llu] out of memory: %zu bytes were requested from a pool with a limit of %zu "
                  "bytes, of which %zu are active. A limit of %zu bytes would have sufficed",
                  number, record.requested, record.limit, record.active, record.needed_limit);
  } else {
    std::snprintf(text_.data(), text_.size(), "[glake-infer failure %llu] %s", number, failure.message.c_str());
  }
}

void OrtDeviceAllocator::record(FailedAllocation& failure) noexcept {
  const std::scoped_lock lock(failures_mutex_);
  failure.sequence = failure_number.fetch_add(1, std::memory_order_relaxed) + 1;
  try {
    failures_.push_back(failure);
    if (failures_.size() > most_failures) failures_.pop_front();
  } catch (...) {  // out of ordinary memory: the session still gets its error
  }
}

std::vector<FailedAllocation> OrtDeviceAllocator::failures(std::uint64_t since) const {
  const std::scoped_lock lock(failures_mutex_);
  std::vector<FailedAllocation> found;
  for (const FailedAllocation& failure : failures_) {
    if (failure.sequence > since) found.push_back(failure);
  }
  return found;
}

std::uint64_t OrtDeviceAllocator::failure_count() noexcept { return failure_number.load(std::memory_order_relaxed); }

}  // namespace glake
