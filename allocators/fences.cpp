#include "fences.hpp"

#include <algorithm>
#include <cstdio>

#include "virtual_memory.hpp"

namespace glake {

Fences::~Fences() {
  for (const Event& event : events_) order_->destroy_event(event.handle);
  for (const EventHandle handle : spare_) order_->destroy_event(handle);
}

void Fences::record_event() {
  if (events_.size() >= most_events) {
    order_->record_all(events_.back().handle);
    events_.back().moment = clock_;
    return;
  }
  const bool fresh = spare_.empty();
  const EventHandle handle = fresh ? order_->create_event() : spare_.back();
  try {
    if (fresh) spare_.reserve(most_events);
    order_->record_all(handle);
    events_.push_back({clock_, handle});
  } catch (...) {
    if (fresh) order_->destroy_event(handle);
    throw;
  }
  if (!fresh) spare_.pop_back();
}

// Forgets the events up to `done_`.
void Fences::retire() noexcept {
  while (!events_.empty() && events_.front().moment <= done_) {
    spare_.push_back(events_.front().handle);  // reserved: at most most_events
    events_.pop_front();
  }
}

Fence Fences::record() {
  const Fence fence = now();
  try {
    if (fence != 0 && captures == 0) record_event();
  } catch (const CaptureBroken& error) {  // a free must not fail, and who captures should hear of it
    std::fprintf(stderr, "glake-infer: %s\n", error.what());
  } catch (const DriverError&) {  // who waits tries again
  }
  return fence;
}

// The first event that was recorded at or after the moment; null if there is none and none can be recorded.
const Fences::Event* Fences::covering(Fence fence) {
  if (events_.empty() || events_.back().moment < fence) {
    if (captures != 0) return nullptr;
    record_event();
  }
  return &*std::lower_bound(events_.begin(), events_.end(), fence,
                            [](const Event& event, Fence moment) { return event.moment < moment; });
}

bool Fences::finished(Fence fence) {
  if (fence <= done_) return true;
  const Event* event = covering(fence);
  if (event == nullptr || !order_->finished(event->handle)) return false;
  done_ = event->moment;
  retire();
  return true;
}

void Fences::wait(Fence fence, StreamHandle stream) {
  if (finished(fence)) return;
  if (const Event* event = covering(fence)) {
    order_->wait(stream, event->handle);
  } else {
    synchronize(fence);
  }
}

void Fences::synchronize(Fence fence) {
  if (fence <= done_) return;
  if (const Event* event = covering(fence)) {
    order_->synchronize(event->handle);
    done_ = event->moment;
  } else {
    const Fence moment = clock_;
    if (!order_->synchronize_all()) {
      throw DriverError(
          "memory that was freed on another stream is needed, and the device cannot be waited for: a stream is being "
          "captured into a CUDA graph. Capture while no other session runs, or raise the pool's limit.");
    }
    done_ = moment;
  }
  retire();
}

}  // namespace glake
