#include "cuda_streams.hpp"

#include <chrono>
#include <thread>

#include "virtual_memory.hpp"

namespace glake {
namespace {

CUstream to_stream(StreamHandle stream) noexcept { return reinterpret_cast<CUstream>(stream); }
CUevent to_event(EventHandle event) noexcept { return reinterpret_cast<CUevent>(event.value); }

// The default streams are those of the current context; every other handle knows its own.
bool is_default(StreamHandle stream) noexcept { return stream <= reinterpret_cast<StreamHandle>(CU_STREAM_PER_THREAD); }

// Makes the context current only where the stream is a default one.
class ContextFor {
 public:
  ContextFor(const CudaContext& context, StreamHandle stream) noexcept {
    if (is_default(stream)) current_.emplace(context);
  }

 private:
  std::optional<CurrentContext> current_;
};

// Lives in a graph; the driver deletes it when that graph, its clones and its executables are gone.
struct GraphWatch {
  std::shared_ptr<std::atomic<bool>> dead;
};

void CUDA_CB graph_is_gone(void* pointer) {
  const std::unique_ptr<GraphWatch> watch(static_cast<GraphWatch*>(pointer));
  if (watch->dead) watch->dead->store(true, std::memory_order_release);
}

}  // namespace

CudaStreams::~CudaStreams() {
  if (own_ == nullptr || process_.is_child()) return;
  context_->report(context_->driver.stream_destroy(own_), "destroying a stream (cuStreamDestroy)", 0);
}

StreamHandle CudaStreams::own_stream() {
  if (own_ == nullptr) {
    const CurrentContext current(*context_);
    context_->check(context_->driver.stream_create(&own_, CU_STREAM_NON_BLOCKING), "making a stream (cuStreamCreate)");
  }
  return reinterpret_cast<StreamHandle>(own_);
}

std::optional<StreamState> CudaStreams::state(StreamHandle stream) noexcept {
  if (stream == no_stream) return std::nullopt;
  const CudaDriver& driver = context_->driver;
  const ContextFor current(*context_, stream);
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  cuuint64_t capture = 0;
  CUresult result = driver.stream_capture_info(to_stream(stream), &status, &capture, nullptr, nullptr, nullptr);
  const bool implicit = result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  if (result != CUDA_SUCCESS && !implicit) return std::nullopt;
  const auto is_ours = [&] {
    CUcontext context = nullptr;
    return is_default(stream) ||
           (driver.stream_get_ctx(to_stream(stream), &context) == CUDA_SUCCESS && context == context_->handle());
  };
  try {
    if (implicit) return StreamState{id_in_capture(implicit_capture, 0), implicit_capture};
    if (status != CU_STREAM_CAPTURE_STATUS_NONE) {
      if (!is_ours()) return std::nullopt;
      return StreamState{id_in_capture(capture, stream), capture};
    }
    unsigned long long id = 0;
    if (driver.stream_get_id(to_stream(stream), &id) != CUDA_SUCCESS) return std::nullopt;
    ++id;  // never 0
    if (!ours_.contains(id)) {
      if (!is_ours()) return std::nullopt;
      if (constexpr std::size_t most = 4096; ours_.size() >= most) ours_.clear();
      ours_.insert(id);
    }
    return StreamState{id, 0};
  } catch (...) {  // out of memory for a table's node
    return std::nullopt;
  }
}

std::uint64_t CudaStreams::id_in_capture(std::uint64_t capture, StreamHandle stream) {
  // Two threads' default streams have one handle.
  static thread_local const char mark = 0;
  if (stream == reinterpret_cast<StreamHandle>(CU_STREAM_PER_THREAD)) stream = reinterpret_cast<StreamHandle>(&mark);
  const auto [found, inserted] = captured_.try_emplace({capture, stream}, 0);
  if (inserted) {
    found->second = (std::uint64_t{1} << 63) | ++made_ids_;  // the driver counts from 1 up
    // The numbers of captures grow: the first entries are of the oldest, which are over.
    if (constexpr std::size_t most = 1024; captured_.size() > most && captured_.begin() != found) {
      captured_.erase(captured_.begin());
    }
    return (std::uint64_t{1} << 63) | made_ids_;
  }
  return found->second;
}

EventHandle CudaStreams::create_event() {
  const CurrentContext current(*context_);
  CUevent event = nullptr;
  context_->check(context_->driver.event_create(&event, CU_EVENT_DISABLE_TIMING), "making an event (cuEventCreate)");
  return {reinterpret_cast<std::uintptr_t>(event)};
}

void CudaStreams::destroy_event(EventHandle event) noexcept {
  if (event.value == 0 || process_.is_child()) return;
  context_->report(context_->driver.event_destroy(to_event(event)), "destroying an event (cuEventDestroy)", 0);
}

void CudaStreams::record(EventHandle event, StreamHandle stream) {
  const ContextFor current(*context_, stream);
  context_->check(context_->driver.event_record(to_event(event), to_stream(stream)),
                  "recording an event on a stream (cuEventRecord)");
}

void CudaStreams::record_all(EventHandle event) {
  const CudaDriver& driver = context_->driver;
  if (driver.ctx_record_event != nullptr) {
    const CUresult result = driver.ctx_record_event(context_->handle(), to_event(event));
    if (result == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) {
      throw CaptureBroken(
          "a stream on " + context_->name() +
          " is being captured into a CUDA graph, and the pool did not know of it: the capture is broken now. For "
          "sessions with enable_cuda_graph: pool.attach(options, cuda_graph=True). For captures by other code: "
          "with pool.foreign_capture(): ...");
    }
    return context_->check(result, "recording an event on all streams (cuCtxRecordEvent)");
  }
  // A driver before CUDA 12.5: wait for what the event would stand for. After that an event that is recorded
  // anywhere is reached as soon as it is recorded; the thread's own default stream waits for no other.
  const CurrentContext current(*context_);
  context_->check(driver.ctx_synchronize(), "waiting for the device (cuCtxSynchronize)");
  context_->check(driver.event_record(to_event(event), CU_STREAM_PER_THREAD), "recording an event (cuEventRecord)");
}

void CudaStreams::wait(StreamHandle stream, EventHandle event) {
  const ContextFor current(*context_, stream);
  context_->check(context_->driver.stream_wait_event(to_stream(stream), to_event(event), 0),
                  "letting a stream wait for an event (cuStreamWaitEvent)");
}

bool CudaStreams::finished(EventHandle event) {
  const RelaxedCapture relaxed(context_->driver);
  const CUresult result = context_->driver.event_query(to_event(event));
  if (result == CUDA_ERROR_NOT_READY) return false;
  context_->check(result, "asking for an event (cuEventQuery)");
  return true;
}

void CudaStreams::synchronize(EventHandle event) {
  const RelaxedCapture relaxed(context_->driver);
  context_->check(context_->driver.event_synchronize(to_event(event)), "waiting for an event (cuEventSynchronize)");
}

void CudaStreams::watch_graph(StreamHandle stream, std::shared_ptr<std::atomic<bool>> dead) {
  const CudaDriver& driver = context_->driver;
  const ContextFor current(*context_, stream);
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  cuuint64_t capture = 0;
  CUgraph graph = nullptr;
  context_->check(driver.stream_capture_info(to_stream(stream), &status, &capture, &graph, nullptr, nullptr),
                  "asking a capturing stream for its graph (cuStreamGetCaptureInfo)");
  if (status != CU_STREAM_CAPTURE_STATUS_ACTIVE || graph == nullptr) {
    throw DriverError("asking a stream on " + context_->name() +
                      " for the graph that it captures failed: it is not capturing, or its capture broke.");
  }
  auto watch = std::make_unique<GraphWatch>(GraphWatch{std::move(dead)});
  CUuserObject object = nullptr;
  context_->check(driver.user_object_create(&object, watch.get(), graph_is_gone, 1, CU_USER_OBJECT_NO_DESTRUCTOR_SYNC),
                  "making a user object for a graph (cuUserObjectCreate)");
  GraphWatch* const held = watch.release();  // by the object
  if (const CUresult result = driver.graph_retain_user_object(graph, object, 1, CU_GRAPH_USER_OBJECT_MOVE);
      result != CUDA_SUCCESS) {
    held->dead.reset();  // nothing died
    driver.user_object_release(object, 1);
    context_->check(result, "giving a user object to a graph (cuGraphRetainUserObject)");
  }
}

void CudaStreams::wait_by_freeing() {
  const CudaDriver& driver = context_->driver;
  CUdeviceptr memory = 0;
  if (const CUresult result = driver.mem_alloc(&memory, 1); result == CUDA_SUCCESS) {
    return context_->check(driver.mem_free(memory), "waiting for the device (cuMemFree)");
  } else if (result != CUDA_ERROR_OUT_OF_MEMORY) {
    context_->check(result, "waiting for the device (cuMemAlloc)");
  }
  void* pinned = nullptr;  // slower, and needs nothing of the device
  context_->check(driver.mem_host_alloc(&pinned, 1, 0), "waiting for the device (cuMemHostAlloc)");
  context_->check(driver.mem_host_free(pinned), "waiting for the device (cuMemFreeHost)");
}

bool CudaStreams::freeing_waits() {
  if (freeing_waits_) return *freeing_waits_;
  const CudaDriver& driver = context_->driver;
  const CUstream stream = to_stream(own_stream());
  std::atomic<bool> done = false;
  const auto work = [](void* flag) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    static_cast<std::atomic<bool>*>(flag)->store(true);
  };
  bool waited = false;
  CUresult result = driver.launch_host_func(stream, work, &done);
  if (result == CUDA_SUCCESS) {
    CUdeviceptr memory = 0;
    const CUresult freed = driver.mem_alloc(&memory, 1) == CUDA_SUCCESS ? driver.mem_free(memory) : CUDA_SUCCESS;
    waited = freed == CUDA_SUCCESS && memory != 0 && done.load();
    if (memory == 0) {  // the device is full
      void* pinned = nullptr;
      waited = driver.mem_host_alloc(&pinned, 1, 0) == CUDA_SUCCESS && !done.load() &&
               driver.mem_host_free(pinned) == CUDA_SUCCESS && done.load();
    }
    result = driver.stream_synchronize(stream);  // `done` must not go before
  }
  context_->check(result, "looking how to wait for the device (cuLaunchHostFunc)");
  freeing_waits_ = waited;
  return waited;
}

bool CudaStreams::synchronize_all() {
  const CudaDriver& driver = context_->driver;
  const CurrentContext current(*context_);
  const RelaxedCapture relaxed(driver);
  if (freeing_waits()) {
    wait_by_freeing();
    return true;
  }
  // Seen without harm: captures on blocking streams. Others end here with an error.
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  if (driver.stream_is_capturing(nullptr, &status) == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return false;
  context_->check(driver.ctx_synchronize(), "waiting for the device (cuCtxSynchronize)");
  return true;
}

}  // namespace glake
