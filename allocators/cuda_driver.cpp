#include "cuda_driver.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <iterator>

#include "virtual_memory.hpp"

namespace glake {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The name of the first candidate that opens is enough: the loader keeps the library for good.
void* open_library() {
  std::string reasons;
  // WSL keeps the library where the loader does not look by itself.
  for (const char* path : {"libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"}) {
    if (void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL)) return library;
    const char* reason = dlerror();
    if (reasons.empty()) reasons = reason != nullptr ? reason : "no reason given";
  }
  throw DriverError(
      "the CUDA driver's library libcuda.so.1 cannot be opened (" + reasons +
      "). Install NVIDIA's driver for Linux (version 525 or newer; it brings the library); in a container, "
      "start it with access to the GPU (docker run --gpus all).");
}

CudaDriver open() {
  void* library = open_library();
  CudaDriver driver;
  // The version first: of an older driver it is known, and symbols are missing.
  driver.driver_get_version =
      reinterpret_cast<decltype(driver.driver_get_version)>(dlsym(library, "cuDriverGetVersion"));
  if (driver.driver_get_version == nullptr || driver.driver_get_version(&driver.version) != CUDA_SUCCESS) {
    throw DriverError(
        "libcuda.so.1 does not tell its version (cuDriverGetVersion): it is not NVIDIA's CUDA driver. Reinstall the "
        "driver, and look for a stub library on LD_LIBRARY_PATH.");
  }
  if (driver.version < CudaDriver::oldest_version) {
    throw DriverError("the CUDA driver is too old: it has version " + version_text(driver.version) +
                      " of the driver API, and glake-infer needs " + version_text(CudaDriver::oldest_version) +
                      " or newer. Install NVIDIA driver 525 or newer.");
  }
  const auto find = [&](auto& member, const char* symbol) {
    member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(dlsym(library, symbol));
    if (member == nullptr) {
      throw DriverError("the CUDA driver (version " + version_text(driver.version) + " of the driver API) has no " +
                        symbol +
                        ", which glake-infer calls. Install NVIDIA driver 525 or newer, and look for a stub library on "
                        "LD_LIBRARY_PATH.");
    }
  };
#define GLAKE_FIND(member, symbol, ...) find(driver.member, symbol);
  GLAKE_CUDA_FUNCTIONS(GLAKE_FIND)
#undef GLAKE_FIND
  driver.ctx_record_event = reinterpret_cast<decltype(driver.ctx_record_event)>(dlsym(library, "cuCtxRecordEvent"));
  return driver;
}

std::string visible_devices() {
  const char* value = std::getenv("CUDA_VISIBLE_DEVICES");
  return value == nullptr
             ? std::string{}
             : " CUDA_VISIBLE_DEVICES is set to '" + std::string(value) + "': check that it names a device.";
}

// After these the context is lost for good: every later call fails (CUDA driver API, "sticky" errors).
bool is_sticky(CUresult result) {
  static constexpr CUresult sticky[] = {
      CUDA_ERROR_ECC_UNCORRECTABLE,     CUDA_ERROR_NVLINK_UNCORRECTABLE, CUDA_ERROR_ILLEGAL_ADDRESS,
      CUDA_ERROR_LAUNCH_TIMEOUT,        CUDA_ERROR_CONTEXT_IS_DESTROYED, CUDA_ERROR_ASSERT,
      CUDA_ERROR_HARDWARE_STACK_ERROR,  CUDA_ERROR_ILLEGAL_INSTRUCTION,  CUDA_ERROR_MISALIGNED_ADDRESS,
      CUDA_ERROR_INVALID_ADDRESS_SPACE, CUDA_ERROR_INVALID_PC,           CUDA_ERROR_LAUNCH_FAILED,
  };
  return std::find(std::begin(sticky), std::end(sticky), result) != std::end(sticky);
}

CUdevice find_device(const CudaDriver& driver, int index) {
  CUdevice device = 0;
  if (const CUresult result = driver.device_get(&device, index); result != CUDA_SUCCESS) {
    driver.fail("looking for CUDA device " + std::to_string(index) + " (cuDeviceGet)", result);
  }
  return device;
}

}  // namespace

const CudaDriver& CudaDriver::opened() {
  static const CudaDriver driver = open();  // an exception leaves it unmade: the next call tries again
  return driver;
}

const CudaDriver& CudaDriver::get() {
  const CudaDriver& driver = opened();
  static std::atomic<bool> initialised = false;
  if (!initialised.load(std::memory_order_acquire)) {
    if (const CUresult result = driver.init(0); result != CUDA_SUCCESS) {
      driver.fail("starting the CUDA driver (cuInit)", result);
    }
    initialised.store(true, std::memory_order_release);
  }
  return driver;
}

std::string CudaDriver::describe(CUresult result) const {
  const char* name = nullptr;
  const char* meaning = nullptr;
  if (get_error_name(result, &name) != CUDA_SUCCESS || name == nullptr) name = "an unknown error";
  if (get_error_string(result, &meaning) != CUDA_SUCCESS || meaning == nullptr) meaning = "no description";
  return std::string(name) + " (" + std::to_string(static_cast<int>(result)) + ": " + meaning + ")";
}

void CudaDriver::fail(const std::string& attempt, CUresult result) const {
  std::string message = attempt + " failed: " + describe(result) + ".";
  if (is_sticky(result)) {
    message +=
        " Work on the GPU failed, not necessarily this process's use of the pool, and the driver gave up the CUDA "
        "context: nothing on this device works in this process any more. Restart the process.";
  } else if (result == CUDA_ERROR_NO_DEVICE) {
    message += " The driver is there and shows no CUDA device: `nvidia-smi -L` lists the GPUs." + visible_devices();
  } else if (result == CUDA_ERROR_INVALID_DEVICE) {
    message += " There is no device of that number." + visible_devices();
  } else if (result == CUDA_ERROR_SYSTEM_DRIVER_MISMATCH) {
    message +=
        " The driver's kernel module and its libraries are of different versions, as after an update: reboot, or "
        "reload the module; in a container, the image must not bring a libcuda.so.1 of its own.";
  } else if (result == CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE) {
    message +=
        " The forward compatibility package (cuda-compat) does not support this GPU: take it off "
        "LD_LIBRARY_PATH.";
  } else if (result == CUDA_ERROR_STUB_LIBRARY) {
    message += " This libcuda.so.1 is the stub for linking: take the folder 'stubs' off LD_LIBRARY_PATH.";
  } else if (result == CUDA_ERROR_NOT_INITIALIZED) {
    message +=
        " CUDA does not work in a child of fork() whose parent has used it: start workers with the "
        "multiprocessing method 'spawn' or 'forkserver'.";
  } else if (result == CUDA_ERROR_DEVICE_UNAVAILABLE) {
    message +=
        " Another process has the GPU to itself (compute mode EXCLUSIVE_PROCESS): `nvidia-smi -q -d COMPUTE` "
        "shows the mode.";
  } else if (result == CUDA_ERROR_UNKNOWN) {
    message += " Look for the reason in the kernel's log (dmesg, lines with NVRM or Xid).";
  }
  throw DriverError(message);
}

int cuda_driver_version() { return CudaDriver::opened().version; }

int cuda_device_count() {
  const CudaDriver& driver = CudaDriver::opened();
  const CUresult started = driver.init(0);
  if (started == CUDA_ERROR_NO_DEVICE) return 0;
  if (started != CUDA_SUCCESS) driver.fail("starting the CUDA driver (cuInit)", started);
  int count = 0;
  if (const CUresult result = driver.device_get_count(&count); result != CUDA_SUCCESS) {
    driver.fail("counting the CUDA devices (cuDeviceGetCount)", result);
  }
  return count;
}

std::string cuda_device_name(int index) {
  const CudaDriver& driver = CudaDriver::get();
  std::array<char, 256> name{};
  const CUdevice device = find_device(driver, index);
  if (const CUresult result = driver.device_get_name(name.data(), static_cast<int>(name.size()), device);
      result != CUDA_SUCCESS) {
    driver.fail("asking CUDA device " + std::to_string(index) + " for its name (cuDeviceGetName)", result);
  }
  return name.data();
}

std::size_t cuda_device_memory(int index) {
  const CudaDriver& driver = CudaDriver::get();
  std::size_t bytes = 0;
  const CUdevice device = find_device(driver, index);
  if (const CUresult result = driver.device_total_mem(&bytes, device); result != CUDA_SUCCESS) {
    driver.fail("asking CUDA device " + std::to_string(index) + " for its memory (cuDeviceTotalMem)", result);
  }
  return bytes;
}

CudaContext::CudaContext(int index)
    : driver(CudaDriver::get()),
      index_(index),
      device_(find_device(driver, index)),
      name_("cuda:" + std::to_string(index) + " (" + cuda_device_name(index) + ")") {
  check(driver.primary_ctx_retain(&context_, device_), "taking hold of the primary context (cuDevicePrimaryCtxRetain)");
}

CudaContext::~CudaContext() {
  report(driver.primary_ctx_release(device_), "letting go of the primary context (cuDevicePrimaryCtxRelease)", 0);
}

int CudaContext::value(CUdevice_attribute attribute, int otherwise) const noexcept {
  int value = 0;
  return driver.device_get_attribute(&value, attribute, device_) == CUDA_SUCCESS ? value : otherwise;
}

void CudaContext::fail(CUresult result, const char* attempt, std::size_t bytes) const {
  std::string what = attempt;
  if (bytes != 0) what += " of " + std::to_string(bytes) + " bytes";
  what += " on " + name_;
  if (result != CUDA_ERROR_OUT_OF_MEMORY) driver.fail(what, result);
  std::size_t free = 0;
  std::size_t total = 0;
  const CurrentContext current(*this);
  std::string message = what + " failed: " + driver.describe(result) + ".";
  if (driver.mem_get_info(&free, &total) == CUDA_SUCCESS) {
    message += " The device has " + std::to_string(free) + " of " + std::to_string(total) + " bytes free.";
  }
  throw DeviceFullError(
      message +
      " Other processes, and memory of this process outside the pool, hold the rest: `nvidia-smi` lists "
      "the processes. End them, or lower the pool's limit.");
}

void CudaContext::report(CUresult result, const char* attempt, std::size_t bytes) const noexcept {
  if (result == CUDA_SUCCESS || result == CUDA_ERROR_DEINITIALIZED || result == CUDA_ERROR_NOT_INITIALIZED) return;
  static std::atomic<bool> said = false;  // a lost context makes every such call fail: once is enough
  if (said.exchange(true)) return;
  const char* name = nullptr;
  if (driver.get_error_name(result, &name) != CUDA_SUCCESS || name == nullptr) name = "an unknown error";
  char amount[32] = "";
  if (bytes != 0) std::snprintf(amount, sizeof amount, " of %zu bytes", bytes);
  std::fprintf(stderr,
               "glake-infer: %s%s on %s failed: %s. What it was to give back stays held by this process; further "
               "failures of this kind are not shown.\n",
               attempt, amount, name_.c_str(), name);
}

}  // namespace glake
