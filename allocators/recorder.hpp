// Recorder: what a pool was asked for and did, for replay and for pictures.
//
// Not thread-safe: Pool locks.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "virtual_memory.hpp"

namespace glake {

struct TraceEvent {
  char op = 0;  // 'a' allocate, 'r' reserve (weights), 'f' free; 'm' a chunk was mapped, 'u' a range was unmapped
  std::uint8_t tag = 0;
  std::uint32_t label = 0;
  std::int64_t time_ns = 0;  // of the system's clock
  std::uint64_t id = 0;      // of the allocation: 1, 2, ...; 0 for m and u
  Address address = 0;
  std::size_t bytes = 0;  // as asked for
  StreamHandle stream = no_stream;
};

class Recorder final : public MapObserver {
 public:
  explicit Recorder(std::size_t most_events) : most_(most_events) {
    events_.reserve(std::min<std::size_t>(most_, 4096));
  }

  void allocated(Address address, std::size_t bytes, std::uint8_t tag, std::uint32_t label, StreamHandle stream) {
    const TraceEvent event{tag == 1 ? 'r' : 'a', tag, label, now(), ++allocations_, address, bytes, stream};
    live_[address] = event;
    add(event);
  }
  // What was allocated before the recording began is not in it, nor is its end.
  void freed(Address address) {
    const auto found = live_.find(address);
    if (found == live_.end()) return;
    TraceEvent event = found->second;
    event.op = 'f';
    event.time_ns = now();
    add(event);
    live_.erase(found);
  }
  void mapped(Address address, std::size_t bytes) noexcept override { note('m', address, bytes); }
  void unmapped(Address address, std::size_t bytes) noexcept override { note('u', address, bytes); }

  [[nodiscard]] std::vector<TraceEvent> take() noexcept { return std::move(events_); }

 private:
  static std::int64_t now() noexcept {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch())
        .count();
  }
  void add(const TraceEvent& event) {
    if (events_.size() < most_) events_.push_back(event);
  }
  void note(char op, Address address, std::size_t bytes) noexcept {
    try {
      add({op, 0, 0, now(), 0, address, bytes, no_stream});
    } catch (...) {  // out of ordinary memory: the picture misses a mapping
    }
  }

  std::size_t most_;
  std::uint64_t allocations_ = 0;
  std::vector<TraceEvent> events_;
  std::unordered_map<Address, TraceEvent> live_;
};

}  // namespace glake
