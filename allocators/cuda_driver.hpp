// The CUDA driver: libcuda.so.1, opened when it is first needed, so that this module loads on machines without it.
//
// CudaDriver is the table of its functions. CudaContext is the primary context of one device, the context that the
// CUDA runtime uses too, and therefore ONNX Runtime, PyTorch and CuPy.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>

namespace glake {

// Every function that is called, as member, exported symbol and type. Where a header newer than CUDA 12.0 means
// another version of a function by its plain name, both are written out.
#define GLAKE_CUDA_FUNCTIONS(F)                                                                                    \
  F(init, "cuInit", CUresult (*)(unsigned))                                                                        \
  F(get_error_name, "cuGetErrorName", CUresult (*)(CUresult, const char**))                                        \
  F(get_error_string, "cuGetErrorString", CUresult (*)(CUresult, const char**))                                    \
  F(driver_get_version, "cuDriverGetVersion", CUresult (*)(int*))                                                  \
  F(device_get_count, "cuDeviceGetCount", CUresult (*)(int*))                                                      \
  F(device_get, "cuDeviceGet", CUresult (*)(CUdevice*, int))                                                       \
  F(device_get_name, "cuDeviceGetName", CUresult (*)(char*, int, CUdevice))                                        \
  F(device_total_mem, "cuDeviceTotalMem_v2", CUresult (*)(std::size_t*, CUdevice))                                 \
  F(device_get_attribute, "cuDeviceGetAttribute", CUresult (*)(int*, CUdevice_attribute, CUdevice))                \
  F(primary_ctx_retain, "cuDevicePrimaryCtxRetain", CUresult (*)(CUcontext*, CUdevice))                            \
  F(primary_ctx_release, "cuDevicePrimaryCtxRelease_v2", CUresult (*)(CUdevice))                                   \
  F(ctx_get_current, "cuCtxGetCurrent", CUresult (*)(CUcontext*))                                                  \
  F(ctx_push, "cuCtxPushCurrent_v2", CUresult (*)(CUcontext))                                                      \
  F(ctx_pop, "cuCtxPopCurrent_v2", CUresult (*)(CUcontext*))                                                       \
  F(ctx_synchronize, "cuCtxSynchronize", CUresult (*)())                                                           \
  F(mem_get_info, "cuMemGetInfo_v2", CUresult (*)(std::size_t*, std::size_t*))                                     \
  F(mem_granularity, "cuMemGetAllocationGranularity",                                                              \
    CUresult (*)(std::size_t*, const CUmemAllocationProp*, CUmemAllocationGranularity_flags))                      \
  F(mem_address_reserve, "cuMemAddressReserve",                                                                    \
    CUresult (*)(CUdeviceptr*, std::size_t, std::size_t, CUdeviceptr, unsigned long long))                         \
  F(mem_address_free, "cuMemAddressFree", CUresult (*)(CUdeviceptr, std::size_t))                                  \
  F(mem_create, "cuMemCreate",                                                                                     \
    CUresult (*)(CUmemGenericAllocationHandle*, std::size_t, const CUmemAllocationProp*, unsigned long long))      \
  F(mem_release, "cuMemRelease", CUresult (*)(CUmemGenericAllocationHandle))                                       \
  F(mem_map, "cuMemMap",                                                                                           \
    CUresult (*)(CUdeviceptr, std::size_t, std::size_t, CUmemGenericAllocationHandle, unsigned long long))         \
  F(mem_unmap, "cuMemUnmap", CUresult (*)(CUdeviceptr, std::size_t))                                               \
  F(mem_set_access, "cuMemSetAccess", CUresult (*)(CUdeviceptr, std::size_t, const CUmemAccessDesc*, std::size_t)) \
  F(mem_export, "cuMemExportToShareableHandle",                                                                    \
    CUresult (*)(void*, CUmemGenericAllocationHandle, CUmemAllocationHandleType, unsigned long long))              \
  F(mem_import, "cuMemImportFromShareableHandle",                                                                  \
    CUresult (*)(CUmemGenericAllocationHandle*, void*, CUmemAllocationHandleType))                                 \
  F(mem_alloc, "cuMemAlloc_v2", CUresult (*)(CUdeviceptr*, std::size_t))                                           \
  F(mem_free, "cuMemFree_v2", CUresult (*)(CUdeviceptr))                                                           \
  F(mem_host_alloc, "cuMemHostAlloc", CUresult (*)(void**, std::size_t, unsigned))                                 \
  F(mem_host_free, "cuMemFreeHost", CUresult (*)(void*))                                                           \
  F(mem_host_register, "cuMemHostRegister_v2", CUresult (*)(void*, std::size_t, unsigned))                         \
  F(mem_host_unregister, "cuMemHostUnregister", CUresult (*)(void*))                                               \
  F(mem_address_range, "cuMemGetAddressRange_v2", CUresult (*)(CUdeviceptr*, std::size_t*, CUdeviceptr))           \
  F(stream_query, "cuStreamQuery", CUresult (*)(CUstream))                                                         \
  F(can_access_peer, "cuDeviceCanAccessPeer", CUresult (*)(int*, CUdevice, CUdevice))                              \
  F(launch_host_func, "cuLaunchHostFunc", CUresult (*)(CUstream, CUhostFn, void*))                                 \
  F(memset_async, "cuMemsetD8Async", CUresult (*)(CUdeviceptr, unsigned char, std::size_t, CUstream))              \
  F(memcpy_dtoh_async, "cuMemcpyDtoHAsync_v2", CUresult (*)(void*, CUdeviceptr, std::size_t, CUstream))            \
  F(memcpy_htod_async, "cuMemcpyHtoDAsync_v2", CUresult (*)(CUdeviceptr, const void*, std::size_t, CUstream))      \
  F(memcpy_dtod_async, "cuMemcpyDtoDAsync_v2", CUresult (*)(CUdeviceptr, CUdeviceptr, std::size_t, CUstream))      \
  F(stream_create, "cuStreamCreate", CUresult (*)(CUstream*, unsigned))                                            \
  F(stream_destroy, "cuStreamDestroy_v2", CUresult (*)(CUstream))                                                  \
  F(stream_synchronize, "cuStreamSynchronize", CUresult (*)(CUstream))                                             \
  F(stream_get_id, "cuStreamGetId", CUresult (*)(CUstream, unsigned long long*))                                   \
  F(stream_get_ctx, "cuStreamGetCtx", CUresult (*)(CUstream, CUcontext*))                                          \
  F(stream_is_capturing, "cuStreamIsCapturing", CUresult (*)(CUstream, CUstreamCaptureStatus*))                    \
  F(stream_capture_info, "cuStreamGetCaptureInfo_v2",                                                              \
    CUresult (*)(CUstream, CUstreamCaptureStatus*, cuuint64_t*, CUgraph*, const CUgraphNode**, std::size_t*))      \
  F(stream_wait_event, "cuStreamWaitEvent", CUresult (*)(CUstream, CUevent, unsigned))                             \
  F(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", CUresult (*)(CUstreamCaptureMode*))                \
  F(event_create, "cuEventCreate", CUresult (*)(CUevent*, unsigned))                                               \
  F(event_destroy, "cuEventDestroy_v2", CUresult (*)(CUevent))                                                     \
  F(event_record, "cuEventRecord", CUresult (*)(CUevent, CUstream))                                                \
  F(event_query, "cuEventQuery", CUresult (*)(CUevent))                                                            \
  F(event_synchronize, "cuEventSynchronize", CUresult (*)(CUevent))                                                \
  F(user_object_create, "cuUserObjectCreate", CUresult (*)(CUuserObject*, void*, CUhostFn, unsigned, unsigned))    \
  F(user_object_release, "cuUserObjectRelease", CUresult (*)(CUuserObject, unsigned))                              \
  F(graph_retain_user_object, "cuGraphRetainUserObject", CUresult (*)(CUgraph, CUuserObject, unsigned, unsigned))

struct CudaDriver {
  // A driver of an older API is refused. 12.0 is the first with cuStreamGetId, which tells a stream from an earlier
  // one at the same handle.
  static constexpr int oldest_version = 12000;

  // The driver, opened and not yet initialised; one table per process. Throws DriverError that says what is missing
  // and what to do. A failure is tried again by the next call.
  [[nodiscard]] static const CudaDriver& opened();
  // The driver after cuInit(). Throws DriverError as above; a machine without a CUDA device is one of the reasons.
  [[nodiscard]] static const CudaDriver& get();

  // Throws the DriverError "`attempt` failed: NAME (meaning). Advice."
  [[noreturn]] void fail(const std::string& attempt, CUresult result) const;
  // "CUDA_ERROR_X (meaning)".
  [[nodiscard]] std::string describe(CUresult result) const;

  int version = 0;  // of the API, as 1000 * major + 10 * minor
#define GLAKE_MEMBER(member, symbol, ...) std::type_identity_t<__VA_ARGS__> member = nullptr;
  GLAKE_CUDA_FUNCTIONS(GLAKE_MEMBER)
#undef GLAKE_MEMBER
  // Since CUDA 12.5; null in older drivers.
  CUresult (*ctx_record_event)(CUcontext, CUevent) = nullptr;
};

// For glake_infer.allocators.devices; each throws DriverError.
[[nodiscard]] int cuda_driver_version();                  // as CudaDriver::version; works without a device
[[nodiscard]] int cuda_device_count();                    // 0 where the driver is there and shows no device
[[nodiscard]] std::string cuda_device_name(int index);    // "NVIDIA H100 80GB HBM3"
[[nodiscard]] std::size_t cuda_device_memory(int index);  // bytes

// The primary context of a device, kept alive by this object. All calls may come from any thread.
class CudaContext {
 public:
  explicit CudaContext(int index);
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;
  ~CudaContext();

  [[nodiscard]] int index() const noexcept { return index_; }
  [[nodiscard]] CUdevice device() const noexcept { return device_; }
  [[nodiscard]] CUcontext handle() const noexcept { return context_; }
  // "cuda:0 (NVIDIA H100 80GB HBM3)".
  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  [[nodiscard]] bool has(CUdevice_attribute attribute) const noexcept { return value(attribute, 0) != 0; }
  // `otherwise` where the driver does not know it.
  [[nodiscard]] int value(CUdevice_attribute attribute, int otherwise) const noexcept;

  // Throws DriverError for a result that is not success, with this device, and its memory if that ran out.
  void check(CUresult result, const char* attempt, std::size_t bytes = 0) const {
    if (result != CUDA_SUCCESS) [[unlikely]]
      fail(result, attempt, bytes);
  }
  // For calls that must not fail and must not throw: says it on stderr, the first time. Silent where the driver
  // has been shut down (the process is ending) or belongs to the parent of a fork.
  void report(CUresult result, const char* attempt, std::size_t bytes) const noexcept;

  const CudaDriver& driver;

 private:
  [[noreturn]] void fail(CUresult result, const char* attempt, std::size_t bytes) const;

  int index_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  std::string name_;
};

// Makes the context current for this thread while it lives. Cheap where it is current already, as in threads that use
// the CUDA runtime on this device.
class CurrentContext {
 public:
  explicit CurrentContext(const CudaContext& context) noexcept : driver_(context.driver) {
    CUcontext current = nullptr;
    if (driver_.ctx_get_current(&current) == CUDA_SUCCESS && current == context.handle()) return;
    pushed_ = driver_.ctx_push(context.handle()) == CUDA_SUCCESS;  // if not, the calls that follow say why
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
  ~CurrentContext() {
    CUcontext popped = nullptr;
    if (pushed_) driver_.ctx_pop(&popped);
  }

 private:
  const CudaDriver& driver_;
  bool pushed_ = false;
};

// While it lives, calls of this thread that wait or ask (cuEventQuery, cuStreamSynchronize) leave stream captures in
// progress intact; without it they end such a capture with an error (cuThreadExchangeStreamCaptureMode).
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const CudaDriver& driver) noexcept : driver_(driver) {
    exchanged_ = driver_.exchange_capture_mode(&mode_) == CUDA_SUCCESS;
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() {
    if (exchanged_) driver_.exchange_capture_mode(&mode_);
  }

 private:
  const CudaDriver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
  bool exchanged_ = false;
};

}  // namespace glake
