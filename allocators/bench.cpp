#include "bench.hpp"

#include <dlfcn.h>
#include <malloc.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

#include "ort_attach.hpp"

namespace glake {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Taken {
  void* address = nullptr;
  std::uintptr_t stream = 0;
  bool reserved = false;
};

// The one place that knows how a pool is asked.
Address pool_allocate(Pool& pool, std::size_t bytes, bool reserve, std::uintptr_t stream) {
  return pool.allocate(bytes, reserve ? Tag::weights : Tag::activations,
                       stream == 0 ? no_stream : StreamHandle{stream});
}

// One pass over the steps; fills in the result's sample and failure, returns the seconds.
double pass(std::span<const TraceStep> steps, std::vector<Taken>& taken, const ReplayAllocator& allocator,
            std::span<const std::uintptr_t> streams, ReplayResult& result) {
  double sampling = 0;
  const auto sample = [&] {
    const auto start = Clock::now();
    result.peak_sampled = std::max(result.peak_sampled, allocator.reserved(allocator.self));
    sampling += seconds_since(start);
  };
  const auto start = Clock::now();
  const auto release = [&](Taken& one) {
    if (one.address == nullptr) return;
    if (allocator.reserved != nullptr && (one.reserved || allocator.sample_every_free)) sample();
    allocator.free(allocator.self, std::exchange(one.address, nullptr), one.stream);
  };
  std::size_t number = 0;
  for (const TraceStep& step : steps) {
    ++number;
    Taken& one = taken[step.slot];
    if (step.operation == 'f') {
      release(one);
      continue;
    }
    one.reserved = step.operation == 'r';
    one.stream = step.stream < 0 || streams.empty() ? 0 : streams[static_cast<std::size_t>(step.stream)];
    try {
      one.address = allocator.allocate(allocator.self, step.bytes, one.reserved, one.stream);
      if (one.address == nullptr && step.bytes != 0) result.failure = "the allocator returned no memory";
    } catch (const OutOfMemoryError& error) {
      result.failure = "a limit of " + std::to_string(error.record.needed_limit) + " bytes would have sufficed";
    } catch (const std::exception& error) {
      result.failure = error.what();
    } catch (...) {
      result.failure = "the allocator threw something that is no std::exception";
    }
    if (!result.failure.empty()) {
      result.failed_step = number;
      break;
    }
  }
  if (allocator.reserved != nullptr) sample();
  for (Taken& one : taken) release(one);
  return seconds_since(start) - sampling;
}

}  // namespace

ReplayResult replay(std::span<const TraceStep> steps, std::size_t slots, const ReplayAllocator& allocator,
                    std::span<const std::uintptr_t> streams, int repeat, const std::function<void()>& between) {
  ReplayResult result;
  std::vector<Taken> taken(slots);
  for (int round = 1; round <= repeat && result.failed_step == 0; ++round) {
    if (round == repeat && between) between();
    result.seconds = pass(steps, taken, allocator, streams, result);
    result.all_seconds += result.seconds;
  }
  return result;
}

ReplayAllocator replay_on(Pool& pool) {
  ReplayAllocator made;
  made.allocate = [](void* self, std::size_t bytes, bool reserve, std::uintptr_t stream) {
    return reinterpret_cast<void*>(pool_allocate(*static_cast<Pool*>(self), bytes, reserve, stream));
  };
  made.free = [](void* self, void* address, std::uintptr_t) {
    static_cast<Pool*>(self)->deallocate(reinterpret_cast<Address>(address));
  };
  made.self = &pool;
  return made;
}

ReplayAllocator replay_on_malloc() {
  ReplayAllocator made;
  made.allocate = [](void*, std::size_t bytes, bool, std::uintptr_t) { return std::malloc(bytes); };
  made.free = [](void*, void* address, std::uintptr_t) { std::free(address); };
  // What it took from the system: its heap, and the blocks that it mapped one by one.
  static const auto held = [] {
    const struct mallinfo2 info = mallinfo2();
    return info.arena + info.hblkhd;
  };
  static std::size_t before;
  before = held();
  made.reserved = [](void*) { return held() - std::min(held(), before); };
  made.sample_every_free = true;
  return made;
}

namespace {

// From this version on OrtAllocator has GetStats.
constexpr std::uint32_t stats_version = 23;

// A figure of GetStats; 0 where the allocator does not tell it.
std::size_t ort_figure(OrtAllocator* allocator, const char* name) {
  if (allocator->version < stats_version || allocator->GetStats == nullptr) return 0;
  const auto* table = static_cast<void* const*>(ort_api_base()->GetApi(stats_version));
  OrtKeyValuePairs* pairs = nullptr;
  if (OrtStatus* error = allocator->GetStats(allocator, &pairs)) {
    ort::Api(table).release_status(error);
    return 0;
  }
  const char* text = reinterpret_cast<const char* (*)(const OrtKeyValuePairs*, const char*)>(table[297])(pairs, name);
  const std::size_t value = text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
  reinterpret_cast<void (*)(OrtKeyValuePairs*)>(table[300])(pairs);
  return value;
}

}  // namespace

ReplayAllocator replay_on(OrtAllocator* allocator) {
  ReplayAllocator made;
  made.allocate = [](void* self, std::size_t bytes, bool reserve, std::uintptr_t) {
    auto* face = static_cast<OrtAllocator*>(self);
    return (reserve && face->Reserve != nullptr ? face->Reserve : face->Alloc)(face, bytes);
  };
  made.free = [](void* self, void* address, std::uintptr_t) {
    auto* face = static_cast<OrtAllocator*>(self);
    face->Free(face, address);
  };
  made.self = allocator;
  // An arena only grows, but what was reserved goes back at once.
  made.reserved = [](void* self) { return ort_figure(static_cast<OrtAllocator*>(self), "TotalAllocated"); };
  made.figures = [allocator] {
    std::vector<std::pair<std::string, std::size_t>> figures;
    figures.emplace_back("peak_active", ort_figure(allocator, "MaxInUse"));
    figures.emplace_back("driver_calls", ort_figure(allocator, "NumArenaExtensions") +
                                             ort_figure(allocator, "NumArenaShrinkages") +
                                             2 * ort_figure(allocator, "NumReserves"));
    return figures;
  };
  return made;
}

ReplayAllocator replay_on_driver_pool(OrtAllocator* allocator) {
  // Names and numbers of cuda.h.
  constexpr int pool_of_pointer = 17, reserved_high = 6;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error("there is no CUDA driver (libcuda.so.1) here");
  const auto ask_pointer =
      reinterpret_cast<int (*)(void*, int, std::uintptr_t)>(dlsym(library, "cuPointerGetAttribute"));
  const auto ask_pool = reinterpret_cast<int (*)(void*, int, void*)>(dlsym(library, "cuMemPoolGetAttribute"));
  if (ask_pointer == nullptr || ask_pool == nullptr) throw std::runtime_error("the CUDA driver is too old");
  void* pool = nullptr;
  void* block = allocator->Alloc(allocator, 1);
  const int code = ask_pointer(&pool, pool_of_pointer, reinterpret_cast<std::uintptr_t>(block));
  allocator->Free(allocator, block);
  if (code != 0 || pool == nullptr) {
    throw std::runtime_error(
        "its memory comes from no memory pool of the driver (cuPointerGetAttribute: " + std::to_string(code) + ")");
  }
  ReplayAllocator made = replay_on(allocator);
  made.reserved = nullptr;
  made.figures = [allocator, pool, ask_pool] {
    std::uint64_t most = 0;
    if (const int failed = ask_pool(pool, reserved_high, &most); failed != 0) {
      throw std::runtime_error("cuMemPoolGetAttribute failed: " + std::to_string(failed));
    }
    return std::vector<std::pair<std::string, std::size_t>>{{"peak_reserved", most},
                                                            {"peak_active", ort_figure(allocator, "MaxInUse")}};
  };
  return made;
}

namespace {

// The functions of the ONNX Runtime that called this library.
ort::Api stats_api() {
  const OrtApiBase* base = ort_api_base();
  if (base == nullptr) throw std::runtime_error("ONNX Runtime has not called this library yet");
  const auto* table = static_cast<void* const*>(base->GetApi(stats_version));
  if (table == nullptr) {
    throw std::runtime_error(std::string("ONNX Runtime ") + base->GetVersionString() +
                             " is too old to tell what its arena holds: 1.23 or newer is needed");
  }
  return ort::Api(table);
}

void check(const ort::Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.error_message(status);
  api.release_status(status);
  throw std::runtime_error(message);
}

}  // namespace

void ort_register_arena(const std::string& device, int index,
                        const std::vector<std::pair<std::string, std::size_t>>& settings) {
  const ort::Api api = stats_api();
  std::vector<const char*> keys;
  std::vector<std::size_t> values;
  for (const auto& [key, value] : settings) {
    keys.push_back(key.c_str());
    values.push_back(value);
  }
  OrtEnv* env = nullptr;  // our reference stays, and so does the arena
  check(api, api.create_env(ort::warning, "glake-infer", &env));
  OrtArenaCfg* made = nullptr;
  check(api, api.create_arena_cfg(keys.data(), values.data(), keys.size(), &made));
  const auto release_settings = [&](OrtArenaCfg* one) { api.release_arena_cfg(one); };
  const std::unique_ptr<OrtArenaCfg, decltype(release_settings)> settings_owner(made, release_settings);
  OrtMemoryInfo* info = nullptr;
  check(api, api.create_memory_info(device.c_str(), ort::arena_allocator, index, ort::default_memory, &info));
  const bool cuda = device == "Cuda";
  const std::string number = std::to_string(index);
  const std::array option_keys{"device_id"};
  const std::array option_values{number.c_str()};
  OrtStatus* status =
      api.create_and_register_allocator(env, cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider", info, made,
                                        option_keys.data(), option_values.data(), cuda ? option_keys.size() : 0);
  api.release_memory_info(info);
  check(api, status);
}

OrtAllocator* ort_session_allocator(std::span<const char> model, const std::string& device, int index, bool shared) {
  const ort::Api api = stats_api();
  const auto* table = static_cast<void* const*>(api.table());
  // Functions at their places in OrtApi, counted in the published header; see ort_api.hpp.
  struct Session;
  struct CudaOptions;
  const auto create_session =
      reinterpret_cast<OrtStatus* (*)(const OrtEnv*, const void*, std::size_t, const OrtSessionOptions*, Session**)>(
          table[8]);
  const auto create_options = reinterpret_cast<OrtStatus* (*)(OrtSessionOptions**)>(table[10]);
  const auto release_options = reinterpret_cast<void (*)(OrtSessionOptions*)>(table[100]);
  const auto add_entry = reinterpret_cast<OrtStatus* (*)(OrtSessionOptions*, const char*, const char*)>(table[130]);
  const auto create_allocator =
      reinterpret_cast<OrtStatus* (*)(const Session*, const OrtMemoryInfo*, OrtAllocator**)>(table[131]);
  const auto append_cuda = reinterpret_cast<OrtStatus* (*)(OrtSessionOptions*, const CudaOptions*)>(table[204]);
  const auto create_cuda = reinterpret_cast<OrtStatus* (*)(CudaOptions**)>(table[205]);
  const auto update_cuda =
      reinterpret_cast<OrtStatus* (*)(CudaOptions*, const char* const*, const char* const*, std::size_t)>(table[206]);
  const auto release_cuda = reinterpret_cast<void (*)(CudaOptions*)>(table[208]);

  OrtEnv* env = nullptr;  // our reference stays, and so does the session
  check(api, api.create_env(ort::warning, "glake-infer", &env));
  OrtSessionOptions* options = nullptr;
  check(api, create_options(&options));
  const std::unique_ptr<OrtSessionOptions, decltype(release_options)> options_owner(options, release_options);
  if (shared) check(api, add_entry(options, "session.use_env_allocators", "1"));
  if (device == "Cuda") {
    CudaOptions* cuda = nullptr;
    check(api, create_cuda(&cuda));
    const std::unique_ptr<CudaOptions, decltype(release_cuda)> cuda_owner(cuda, release_cuda);
    const std::string number = std::to_string(index);
    const std::array keys{"device_id"};
    const std::array values{number.c_str()};
    check(api, update_cuda(cuda, keys.data(), values.data(), keys.size()));
    check(api, append_cuda(options, cuda));
  }
  Session* session = nullptr;
  check(api, create_session(env, model.data(), model.size(), options, &session));
  OrtMemoryInfo* info = nullptr;
  check(api, api.create_memory_info(device.c_str(), ort::device_allocator, index, ort::default_memory, &info));
  OrtAllocator* allocator = nullptr;
  OrtStatus* status = create_allocator(session, info, &allocator);
  api.release_memory_info(info);
  check(api, status);
  return allocator;
}

// The driver's functions, by their names in libcuda.so.1 (cuda.h).
struct CudaAsync::Driver {
  struct PoolProperties {  // CUmemPoolProps, 88 bytes
    int allocation_type, handle_types, location_type, location_id;
    void* security;
    std::size_t most_bytes;
    std::array<unsigned char, 56> none;
  };
  static constexpr int pinned = 1, on_device = 1, release_threshold = 4, reserved_high = 6, used_high = 8;

  void* library = nullptr;
  int (*error_name)(int, const char**);
  int (*allocate)(std::uintptr_t*, std::size_t, void* pool, std::uintptr_t stream);
  int (*release)(std::uintptr_t, std::uintptr_t stream);
  int (*get)(void* pool, int attribute, void* value);
  int (*stream_create)(std::uintptr_t*, unsigned flags);
  int (*stream_destroy)(std::uintptr_t);
  int (*stream_synchronize)(std::uintptr_t);
  int (*pool_destroy)(void*);
  int (*context_release)(int);
  void* pool = nullptr;
  int device = 0;
  std::vector<std::uintptr_t> streams;
  struct Face {
    OrtAllocator base;
    CudaAsync* owner;
    std::uintptr_t stream;
  };
  std::vector<std::unique_ptr<Face>> faces;

  void check(int code, const char* what) const {
    if (code == 0) return;
    const char* name = nullptr;
    error_name(code, &name);
    throw std::runtime_error(std::string(what) + " failed: " + (name == nullptr ? std::to_string(code) : name));
  }
  template <class Function>
  void find(Function& function, const char* name) const {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) throw std::runtime_error(std::string("the CUDA driver is too old: it has no ") + name);
  }
};

CudaAsync::CudaAsync(int device) : driver_(std::make_unique<Driver>()) {
  static_assert(sizeof(Driver::PoolProperties) == 88);
  Driver& driver = *driver_;
  driver.library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver.library == nullptr) throw std::runtime_error("there is no CUDA driver (libcuda.so.1) here");
  int (*init)(unsigned);
  int (*device_get)(int*, int);
  int (*retain)(void**, int);
  int (*set_current)(void*);
  int (*pool_create)(void**, const Driver::PoolProperties*);
  int (*set)(void*, int, void*);
  driver.find(driver.error_name, "cuGetErrorName");
  driver.find(init, "cuInit");
  driver.find(device_get, "cuDeviceGet");
  driver.find(retain, "cuDevicePrimaryCtxRetain");
  driver.find(set_current, "cuCtxSetCurrent");
  driver.find(pool_create, "cuMemPoolCreate");
  driver.find(set, "cuMemPoolSetAttribute");
  driver.find(driver.get, "cuMemPoolGetAttribute");
  driver.find(driver.allocate, "cuMemAllocFromPoolAsync");
  driver.find(driver.release, "cuMemFreeAsync");
  driver.find(driver.stream_create, "cuStreamCreate");
  driver.find(driver.stream_destroy, "cuStreamDestroy_v2");
  driver.find(driver.stream_synchronize, "cuStreamSynchronize");
  driver.find(driver.pool_destroy, "cuMemPoolDestroy");
  driver.find(driver.context_release, "cuDevicePrimaryCtxRelease_v2");
  driver.check(init(0), "cuInit");
  driver.check(device_get(&driver.device, device), "cuDeviceGet");
  void* context = nullptr;
  driver.check(retain(&context, driver.device), "cuDevicePrimaryCtxRetain");
  driver.check(set_current(context), "cuCtxSetCurrent");
  const Driver::PoolProperties properties{Driver::pinned, 0, Driver::on_device, driver.device, nullptr, 0, {}};
  driver.check(pool_create(&driver.pool, &properties), "cuMemPoolCreate");
  std::uint64_t keep = std::numeric_limits<std::uint64_t>::max();
  driver.check(set(driver.pool, Driver::release_threshold, &keep), "cuMemPoolSetAttribute");
}

CudaAsync::~CudaAsync() {
  for (const std::uintptr_t stream : driver_->streams) {
    driver_->stream_synchronize(stream);
    driver_->stream_destroy(stream);
  }
  driver_->stream_synchronize(0);
  driver_->pool_destroy(driver_->pool);
  driver_->context_release(driver_->device);
}

void* CudaAsync::allocate(std::size_t bytes, std::uintptr_t stream) {
  if (bytes == 0) return nullptr;
  std::uintptr_t address = 0;
  driver_->check(driver_->allocate(&address, bytes, driver_->pool, stream), "cuMemAllocFromPoolAsync");
  return reinterpret_cast<void*>(address);
}

void CudaAsync::free(void* address, std::uintptr_t stream) {
  driver_->check(driver_->release(reinterpret_cast<std::uintptr_t>(address), stream), "cuMemFreeAsync");
}

std::uintptr_t CudaAsync::make_stream() {
  std::uintptr_t stream = 0;
  driver_->check(driver_->stream_create(&stream, 1), "cuStreamCreate");
  driver_->streams.push_back(stream);
  return stream;
}

std::size_t CudaAsync::peak_reserved() const {
  std::uint64_t bytes = 0;
  driver_->check(driver_->get(driver_->pool, Driver::reserved_high, &bytes), "cuMemPoolGetAttribute");
  return bytes;
}

std::size_t CudaAsync::peak_active() const {
  std::uint64_t bytes = 0;
  driver_->check(driver_->get(driver_->pool, Driver::used_high, &bytes), "cuMemPoolGetAttribute");
  return bytes;
}

OrtAllocator* CudaAsync::face(std::uintptr_t stream) {
  using Face = Driver::Face;
  auto made = std::make_unique<Face>();
  made->base.version = 18;
  made->base.Alloc = [](OrtAllocator* self, std::size_t bytes) {
    const Face& face = *reinterpret_cast<Face*>(self);
    return face.owner->allocate(bytes, face.stream);
  };
  made->base.Free = [](OrtAllocator* self, void* address) {
    const Face& face = *reinterpret_cast<Face*>(self);
    face.owner->free(address, face.stream);
  };
  made->owner = this;
  made->stream = stream;
  driver_->faces.push_back(std::move(made));
  return &driver_->faces.back()->base;
}

std::vector<double> time_pairs(std::span<OrtAllocator* const> allocators, std::size_t bytes, int pairs, int rounds) {
  std::vector<std::vector<double>> all(allocators.size());
  const auto once = [&](OrtAllocator* allocator, int count) {
    const auto start = Clock::now();
    for (int pair = 0; pair < count; ++pair) {
      void* address = allocator->Alloc(allocator, bytes);
      if (address == nullptr) throw std::bad_alloc();
      allocator->Free(allocator, address);
    }
    return seconds_since(start) * 1e9 / count;
  };
  for (OrtAllocator* allocator : allocators) (void)once(allocator, std::max(1, pairs / 10));
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t index = 0; index < allocators.size(); ++index) {
      // Whoever comes first changes from round to round.
      const std::size_t turn = (index + static_cast<std::size_t>(round)) % allocators.size();
      all[turn].push_back(once(allocators[turn], pairs));
    }
  }
  std::vector<double> medians;
  for (auto& times : all) {
    std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
    medians.push_back(times[times.size() / 2]);
  }
  return medians;
}

}  // namespace glake
