// The few declarations of ONNX Runtime's C API that we use.
//
// OrtApi is a struct of function pointers that only ever grows at its end, so a function's index is fixed for good.
// The indices were counted in the published header, include/onnxruntime/core/session/onnxruntime_c_api.h, in the
// order of the struct's fields, in its versions 22 (up to 300, where it has 318 fields), 23 (390 fields) and 24;
// ONNX Runtime pins the counts itself (static_assert in onnxruntime_c_api.cc: version 1 ends at 101 with
// ReleaseCustomOpDomain, 6 at 157 with ReleaseArenaCfg, 7 at 161 with GetCurrentGpuDeviceId, 22 at 317 with GetEpApi,
// 23 at 389 with CreateExternalInitializerInfo). The tests call them in the version that is installed (done
// with 1.24.4, 1.27.0, 1.31.1 and 1.32.0; what makes arenas with 1.32.0). Building needs no copy of that header, and
// one build serves every version of ONNX Runtime from `oldest_api` on.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtEnv;
struct OrtMemoryInfo;
struct OrtValue;
struct OrtSessionOptions;
struct OrtKeyValuePairs;
struct OrtSyncStream;
struct OrtArenaCfg;

struct OrtApiBase {
  const void* (*GetApi)(std::uint32_t version);  // null if this ONNX Runtime is older than `version`
  const char* (*GetVersionString)();
};

// What ONNX Runtime calls. `version` says which fields it may read.
struct OrtAllocator {
  std::uint32_t version;
  void* (*Alloc)(OrtAllocator* self, std::size_t bytes);
  void (*Free)(OrtAllocator* self, void* address);
  const OrtMemoryInfo* (*Info)(const OrtAllocator* self);
  void* (*Reserve)(OrtAllocator* self, std::size_t bytes);  // since 18: what a session keeps for life
  OrtStatus* (*GetStats)(const OrtAllocator* self, OrtKeyValuePairs** stats);            // since 23
  void* (*AllocOnStream)(OrtAllocator* self, std::size_t bytes, OrtSyncStream* stream);  // since 23
  OrtStatus* (*Shrink)(OrtAllocator* self);                                              // since 25
};
}

namespace glake::ort {

// ONNX Runtime 1.N has API version N.
inline constexpr std::uint32_t oldest_api = 24;
// The highest version of OrtAllocator whose fields are all declared above.
inline constexpr std::uint32_t newest_allocator = 25;

enum ErrorCode : int { fail = 1, invalid_argument = 2 };
enum LoggingLevel : int { warning = 2 };
enum AllocatorType : int { device_allocator = 0, arena_allocator = 1 };
enum MemoryType : int { default_memory = 0 };

// The functions, by name, over the table that GetApi() returned.
class Api {
 public:
  explicit Api(const void* table) noexcept : table_(static_cast<void* const*>(table)) {}
  [[nodiscard]] const void* table() const noexcept { return table_; }

  OrtStatus* create_status(ErrorCode code, const char* message) const noexcept {
    return function<OrtStatus*(int, const char*)>(0)(code, message);
  }
  const char* error_message(const OrtStatus* status) const noexcept {
    return function<const char*(const OrtStatus*)>(2)(status);
  }
  OrtStatus* create_env(LoggingLevel level, const char* log_id, OrtEnv** env) const noexcept {
    return function<OrtStatus*(int, const char*, OrtEnv**)>(3)(level, log_id, env);
  }
  OrtStatus* create_tensor(const OrtMemoryInfo* info, void* data, std::size_t bytes, const std::int64_t* shape,
                           std::size_t rank, int element_type, OrtValue** value) const noexcept {
    return function<OrtStatus*(const OrtMemoryInfo*, void*, std::size_t, const std::int64_t*, std::size_t, int,
                               OrtValue**)>(49)(info, data, bytes, shape, rank, element_type, value);
  }
  // For the names "Cpu" and "Cuda" it fills in the device's type, vendor and alignment as the execution providers
  // have them; a session finds an allocator by these, not by the name (read in the source of 1.24; tried with 1.31.1
  // on CUDA and 1.32.0 on the host).
  OrtStatus* create_memory_info(const char* name, AllocatorType type, int device, MemoryType memory,
                                OrtMemoryInfo** info) const noexcept {
    return function<OrtStatus*(const char*, int, int, int, OrtMemoryInfo**)>(68)(name, type, device, memory, info);
  }
  void release_env(OrtEnv* env) const noexcept { function<void(OrtEnv*)>(92)(env); }
  void release_status(OrtStatus* status) const noexcept { function<void(OrtStatus*)>(93)(status); }
  void release_memory_info(OrtMemoryInfo* info) const noexcept { function<void(OrtMemoryInfo*)>(94)(info); }
  void release_value(OrtValue* value) const noexcept { function<void(OrtValue*)>(96)(value); }
  OrtStatus* add_initializer(OrtSessionOptions* options, const char* name, const OrtValue* value) const noexcept {
    return function<OrtStatus*(OrtSessionOptions*, const char*, const OrtValue*)>(150)(options, name, value);
  }
  void release_arena_cfg(OrtArenaCfg* settings) const noexcept { function<void(OrtArenaCfg*)>(157)(settings); }
  // The keys are the members of OrtArenaCfg; one that this ONNX Runtime does not know is an error.
  OrtStatus* create_arena_cfg(const char* const* keys, const std::size_t* values, std::size_t count,
                              OrtArenaCfg** settings) const noexcept {
    return function<OrtStatus*(const char* const*, const std::size_t*, std::size_t, OrtArenaCfg**)>(164)(
        keys, values, count, settings);
  }
  OrtStatus* register_allocator(OrtEnv* env, OrtAllocator* allocator) const noexcept {
    return function<OrtStatus*(OrtEnv*, OrtAllocator*)>(176)(env, allocator);
  }
  // Makes the provider's allocator for the device of `info` and registers it with the environment.
  OrtStatus* create_and_register_allocator(OrtEnv* env, const char* provider, const OrtMemoryInfo* info,
                                           const OrtArenaCfg* settings, const char* const* option_keys,
                                           const char* const* option_values, std::size_t options) const noexcept {
    return function<OrtStatus*(OrtEnv*, const char*, const OrtMemoryInfo*, const OrtArenaCfg*, const char* const*,
                               const char* const*, std::size_t)>(259)(env, provider, info, settings, option_keys,
                                                                      option_values, options);
  }
  // Since 22.
  void create_key_value_pairs(OrtKeyValuePairs** pairs) const { function<void(OrtKeyValuePairs**)>(295)(pairs); }
  void add_key_value_pair(OrtKeyValuePairs* pairs, const char* key, const char* value) const {
    function<void(OrtKeyValuePairs*, const char*, const char*)>(296)(pairs, key, value);
  }
  void release_key_value_pairs(OrtKeyValuePairs* pairs) const noexcept {
    function<void(OrtKeyValuePairs*)>(300)(pairs);
  }
  // Since 23. The device's own stream (CUDA: the CUstream), null where `stream` stands for none.
  void* stream_handle(OrtSyncStream* stream) const noexcept { return function<void*(OrtSyncStream*)>(384)(stream); }

 private:
  template <class Signature>
  [[nodiscard]] Signature* function(std::size_t index) const noexcept {
    return reinterpret_cast<Signature*>(table_[index]);
  }
  void* const* table_;
};

}  // namespace glake::ort
