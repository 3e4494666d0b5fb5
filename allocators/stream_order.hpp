// StreamOrder: what the pool asks of a device whose work is queued on streams.
//
// Implementations: CudaStreams (cuda_streams.hpp), and SimulatedStreams for tests without a device. The host has
// none (VirtualMemory::streams() is null): its work is done when it returns.
//
// Contract
// - Calls come from one thread at a time (the pool holds its lock), from any thread.
// - A call that fails throws DriverError and has changed nothing, unless it is noexcept.
// - No call breaks a stream capture that is in progress on any thread (an implementation runs its driver calls
//   with the capture mode of the thread relaxed), with the exception of record_all(), as said there.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

namespace glake {

// A stream as its owner names it (CUDA: the CUstream, with 0 the legacy default stream).
using StreamHandle = std::uintptr_t;
// Memory that was allocated for no stream in particular may be used on any.
inline constexpr StreamHandle no_stream = ~StreamHandle{0};

// A point in the work of a stream, or of all streams of the device (a CUevent).
struct EventHandle {
  std::uintptr_t value = 0;
};

// What a stream is at this moment.
struct StreamState {
  std::uint64_t id = 0;       // never the same for two streams, even where a handle is used again; never 0
  std::uint64_t capture = 0;  // the id of the capture that the stream is part of, or 0
};

class StreamOrder {
 public:
  StreamOrder() = default;
  StreamOrder(const StreamOrder&) = delete;
  StreamOrder& operator=(const StreamOrder&) = delete;
  virtual ~StreamOrder() = default;

  // Nothing if the handle is not (or no longer) that of a stream of this device.
  [[nodiscard]] virtual std::optional<StreamState> state(StreamHandle stream) noexcept = 0;

  [[nodiscard]] virtual EventHandle create_event() = 0;
  virtual void destroy_event(EventHandle event) noexcept = 0;
  // The event stands for all work that was queued on the stream before this call. The stream must not be capturing.
  virtual void record(EventHandle event, StreamHandle stream) = 0;
  // The event stands for all work of the device that was queued before this call, on any stream. Must not be called
  // while any stream of the device is capturing: it would end that capture with an error.
  virtual void record_all(EventHandle event) = 0;
  // Work queued on the stream from now on waits for the event, on the device. The stream must not be capturing.
  virtual void wait(StreamHandle stream, EventHandle event) = 0;
  // Whether the event has been reached. (An event that was never recorded has.)
  [[nodiscard]] virtual bool finished(EventHandle event) = 0;
  // Waits on the host until the event has been reached.
  virtual void synchronize(EventHandle event) = 0;
  // Waits on the host until all work that was queued so far on the device is done. False where a capture in
  // progress forbids that: then nothing was waited for, and the capture is intact.
  [[nodiscard]] virtual bool synchronize_all() = 0;

  // A stream of our own, that nobody else queues work on and that waits for nothing by itself.
  [[nodiscard]] virtual StreamHandle own_stream() = 0;

  // The stream must be capturing. Sets `*dead` when the graph that is being captured and everything that was made
  // from it is gone (cuGraphRetainUserObject). The flag is kept alive until then.
  virtual void watch_graph(StreamHandle stream, std::shared_ptr<std::atomic<bool>> dead) = 0;
};

}  // namespace glake
