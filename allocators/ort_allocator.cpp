#include "ort_allocator.hpp"

#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <exception>
#include <limits>

namespace glake {
namespace {

constexpr std::size_t most = std::numeric_limits<std::size_t>::max();

// On Arm, ONNX Runtime's quantized kernels read up to 30 bytes past the end of a buffer, and its own
// allocator adds as much (MLAS_SYMM_QGEMM_BUF_OVERRUN).
#if defined(__aarch64__)
constexpr std::size_t read_ahead = 30;
#else
constexpr std::size_t read_ahead = 0;
#endif

}  // namespace

OrtDeviceAllocator::OrtDeviceAllocator(Pool& pool)
    : face_{{ort::allocator_version, alloc, free, get_info, reserve, {}}, this}, pool_(pool) {
  static_assert(offsetof(Face, base) == 0, "ONNX Runtime's pointer is cast back to a Face");
}

OrtStatus* OrtDeviceAllocator::register_with(const ort::Api& api) {
  const std::scoped_lock lock(registration_);
  if (env_ != nullptr) return nullptr;
  OrtMemoryInfo* info = nullptr;
  if (OrtStatus* error = api.create_memory_info("Cpu", ort::device_allocator, 0, ort::default_memory, &info)) {
    return error;
  }
  OrtEnv* env = nullptr;
  // Returns the environment that Python's ONNX Runtime made; its arguments are ignored then.
  if (OrtStatus* error = api.create_env(ort::warning, "glake-infer", &env)) {
    api.release_memory_info(info);
    return error;
  }
  info_ = info;  // RegisterAllocator asks for it
  if (OrtStatus* error = api.register_allocator(env, c_struct())) {
    info_ = nullptr;
    api.release_env(env);
    api.release_memory_info(info);
    return error;
  }
  env_ = env;
  return nullptr;
}

void* OrtDeviceAllocator::alloc(OrtAllocator* self, std::size_t bytes) {
  return reinterpret_cast<Face*>(self)->owner->allocate(bytes, Tag::activations);
}

void* OrtDeviceAllocator::reserve(OrtAllocator* self, std::size_t bytes) {
  return reinterpret_cast<Face*>(self)->owner->allocate(bytes, Tag::weights);
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

void* OrtDeviceAllocator::allocate(std::size_t bytes, Tag tag, [[maybe_unused]] StreamHandle stream) {
  FailedAllocation failure;
  failure.requested = bytes;
  failure.thread = gettid();
  try {
    const std::size_t padded = bytes == 0 || bytes > most - read_ahead ? bytes : bytes + read_ahead;
    return reinterpret_cast<void*>(pool_.allocate(padded, tag));
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
  failure.sequence = ++failure_count_;
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

std::uint64_t OrtDeviceAllocator::failure_count() const {
  const std::scoped_lock lock(failures_mutex_);
  return failure_count_;
}

}  // namespace glake
