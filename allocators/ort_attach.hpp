// Attaching session options to a pool, through the one door that ONNX Runtime's Python package leaves.
//
// The package exports no C API. But `SessionOptions.register_custom_ops_library(path)` loads a library
// and calls its RegisterCustomOps(options, api): called with the path of our own module, it hands us
// the API of the very copy of ONNX Runtime that Python uses, and the options. What is to be done with
// them waits in a thread-local request, which Python sets right before that call, on the same thread:
//
// Options can be attached to the pools of several devices, one call each: a session that runs on CUDA may take its
// host memory from the host's pool.
//
//   begin_attach(allocator, initializers);  options.register_custom_ops_library(our path);  finish_attach();
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ort_allocator.hpp"

namespace glake {

// A weight that lies in our memory, to be used instead of the graph's initializer of that name.
struct Initializer {
  std::string name;
  Address address = 0;
  std::size_t bytes = 0;
  int element_type = 0;  // ONNX's TensorProto.DataType
  std::vector<std::int64_t> shape;
};

// The OrtValues over injected weights. Options point at them, so they must outlive every creation of
// a session from these options; what they point at must outlive the sessions. Releases them at its end.
class InitializerValues {
 public:
  explicit InitializerValues(const ort::Api& api) : api_(api) {}
  InitializerValues(const InitializerValues&) = delete;
  InitializerValues& operator=(const InitializerValues&) = delete;
  ~InitializerValues() { release(); }
  void release() noexcept;
  [[nodiscard]] std::size_t size() const noexcept { return values_.size(); }

 private:
  friend OrtStatus* attach(const ort::Api& api, std::uint32_t api_version, OrtSessionOptions* options);
  ort::Api api_;
  std::vector<OrtValue*> values_;
};

// Sets this thread's request. `allocator` must live for ever.
void begin_attach(OrtDeviceAllocator& allocator, std::vector<Initializer> initializers);
// Ends this thread's request and returns what it made: null if RegisterCustomOps was not called, or failed.
[[nodiscard]] std::unique_ptr<InitializerValues> finish_attach();

// ONNX Runtime's entry point, from its last call of RegisterCustomOps (also of one that failed); null before.
[[nodiscard]] const OrtApiBase* ort_api_base() noexcept;

}  // namespace glake

// Called by ONNX Runtime. An error leaves nothing registered with the options beyond the initializers
// that were added before it: throw such options away.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) noexcept;
