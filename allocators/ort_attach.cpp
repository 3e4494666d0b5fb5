#include "ort_attach.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <utility>

namespace glake {
namespace {

struct Request {
  OrtDeviceAllocator* allocator = nullptr;
  std::vector<Initializer> initializers;
  std::unique_ptr<InitializerValues> result;
};

thread_local std::optional<Request> pending;
std::atomic<const OrtApiBase*> known_base = nullptr;

// ONNX Runtime's own message, with what we were doing in front of it.
OrtStatus* explain(const ort::Api& api, const std::string& what, OrtStatus* status) {
  const std::string message = "glake-infer: " + what + ": " + api.error_message(status);
  api.release_status(status);
  return api.create_status(ort::fail, message.c_str());
}

// "1.32.0" has API 32. (Asking GetApi for a version that is too high prints an error.)
std::uint32_t api_version_of(const char* version) noexcept {
  const char* const point = std::strchr(version, '.');
  const unsigned long minor = point == nullptr ? 0 : std::strtoul(point + 1, nullptr, 10);
  const bool known = std::strtoul(version, nullptr, 10) == 1 && minor >= ort::oldest_api && minor < 10'000;
  return known ? static_cast<std::uint32_t>(minor) : ort::oldest_api;
}

}  // namespace

OrtStatus* attach(const ort::Api& api, std::uint32_t api_version, OrtSessionOptions* options) {
  if (!pending || pending->allocator == nullptr) {
    return api.create_status(ort::invalid_argument,
                             "glake-infer: this library is not registered by hand. Use "
                             "glake_infer.Pool(...).attach(session_options), which does that for you.");
  }
  if (OrtStatus* error = pending->allocator->register_with(api, api_version)) {
    return explain(api, "the pool could not be made ONNX Runtime's allocator", error);
  }
  auto result = std::make_unique<InitializerValues>(api);
  result->values_.reserve(pending->initializers.size());
  for (const Initializer& initializer : pending->initializers) {
    OrtValue* value = nullptr;
    if (OrtStatus* error = api.create_tensor(pending->allocator->info(), reinterpret_cast<void*>(initializer.address),
                                             initializer.bytes, initializer.shape.data(), initializer.shape.size(),
                                             initializer.element_type, &value)) {
      return explain(api, "weight '" + initializer.name + "' could not be described to ONNX Runtime", error);
    }
    result->values_.push_back(value);
    if (OrtStatus* error = api.add_initializer(options, initializer.name.c_str(), value)) {
      return explain(api, "weight '" + initializer.name + "' could not be injected", error);
    }
  }
  pending->result = std::move(result);
  return nullptr;
}

void InitializerValues::release() noexcept {
  for (OrtValue* value : values_) api_.release_value(value);
  values_.clear();
}

void begin_attach(OrtDeviceAllocator& allocator, std::vector<Initializer> initializers) {
  pending.emplace(Request{&allocator, std::move(initializers), nullptr});
}

std::unique_ptr<InitializerValues> finish_attach() {
  if (!pending) return nullptr;
  auto result = std::move(pending->result);
  pending.reset();
  return result;
}

const OrtApiBase* ort_api_base() noexcept { return known_base; }

}  // namespace glake

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  glake::known_base = base;
  const void* table = base->GetApi(glake::ort::oldest_api);
  if (table == nullptr) {
    // Any version has CreateStatus, at the same place.
    const glake::ort::Api oldest(base->GetApi(1));
    const std::string message = std::string("glake-infer: ONNX Runtime ") + base->GetVersionString() +
                                " is too old: 1." + std::to_string(glake::ort::oldest_api) +
                                " or newer is needed. Install it with: pip install -U 'glake-infer[cpu]'";
    return oldest.create_status(glake::ort::fail, message.c_str());
  }
  const glake::ort::Api api(table);
  try {
    return glake::attach(api, glake::api_version_of(base->GetVersionString()), options);
  } catch (const std::exception& error) {
    return api.create_status(glake::ort::fail, error.what());
  }
}
