// Fences: when may memory that was freed on one stream be used on another?
//
// ONNX Runtime's free says no stream, and a stream that is gone cannot even be asked (any driver call with its handle
// ends the process). So a free leaves a time: a Fence is the number of a moment, and stands for all work that was
// queued on the device before it. Moments become events when somebody has to wait: an event over all streams
// (cuCtxRecordEvent) that is recorded later than a moment covers it, so one event serves every fence before it, and
// once it is reached they are all known to be passed without a further driver call.
//
// Such an event must not be recorded while a stream is being captured into a graph: it would break the capture. While
// that is possible (`captures`), the host waits for the device instead.
//
// Not thread-safe: Pool locks.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "stream_order.hpp"

namespace glake {

// 0: nothing to wait for.
using Fence = std::uint64_t;

class Fences {
 public:
  // `order` may be null (the host): then there is nothing to wait for, ever.
  explicit Fences(StreamOrder* order) : order_(order) {}
  Fences(const Fences&) = delete;
  Fences& operator=(const Fences&) = delete;
  ~Fences();

  // For a test that has to show that it can fail: from now on (or not any more) nothing is waited for.
  void ignore(bool on) noexcept { ignored_ = on; }

  // Whether there is ever anything to wait for.
  [[nodiscard]] bool needed() const noexcept { return order_ != nullptr && !ignored_; }
  // All work queued so far. No driver call.
  [[nodiscard]] Fence now() noexcept { return needed() ? ++clock_ : 0; }
  // The same, with an event recorded at once if possible: whoever will have to wait on the host then waits least.
  [[nodiscard]] Fence record();

  // Whether the work is done.
  [[nodiscard]] bool finished(Fence fence);
  // Orders the work before what is queued on the stream from now on. The host does not wait, unless a capture may be
  // in progress. Throws DriverError.
  void wait(Fence fence, StreamHandle stream);
  // Waits on the host for the work. Throws DriverError.
  void synchronize(Fence fence);

  // How many captures may be in progress.
  std::size_t captures = 0;

 private:
  struct Event {
    Fence moment;
    EventHandle handle;
  };
  static constexpr std::size_t most_events = 128;

  void record_event();
  void retire() noexcept;
  [[nodiscard]] const Event* covering(Fence fence);

  StreamOrder* order_;
  bool ignored_ = false;
  Fence clock_ = 0;
  Fence done_ = 0;            // everything up to here is done
  std::deque<Event> events_;  // recorded and not known to be reached, by moment
  std::vector<EventHandle> spare_;
};

}  // namespace glake
