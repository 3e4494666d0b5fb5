#include <algorithm>
#include <cstring>
#include <thread>

#include "copy_link.hpp"

namespace glake {

void HostLink::start(Direction direction, unsigned slot, std::byte* host, Address device, std::size_t bytes) {
  if (bytes > options_.most) {
    throw DriverError("copying " + std::to_string(bytes) + " bytes over the link " + name_ + " failed: it copies " +
                      std::to_string(options_.most) + " at most.");
  }
  Way& way = ways_[static_cast<std::size_t>(direction)];
  Copy& copy = way.copies[slot];
  auto* memory = reinterpret_cast<std::byte*>(device);
  copy = {
      direction == Direction::to_device ? memory : host, direction == Direction::to_device ? host : memory, bytes, {}};
  if (options_.rate <= 0 && options_.latency <= 0) return;
  const double seconds = options_.rate > 0 ? static_cast<double>(bytes) / options_.rate : 0.0;
  const auto wait = [](double time) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(time));
  };
  way.busy_until = std::max(way.busy_until, Clock::now()) + wait(seconds);
  copy.end = way.busy_until + wait(options_.latency);
}

void HostLink::finish(Direction direction, unsigned slot) {
  Way& way = ways_[static_cast<std::size_t>(direction)];
  Copy& copy = way.copies[slot];
  if (options_.rate > 0 || options_.latency > 0) std::this_thread::sleep_until(copy.end);
  if (options_.fails_after && way.copied + copy.bytes > *options_.fails_after) {
    throw DriverError("copying " + std::to_string(copy.bytes) + " bytes over the link " + name_ +
                      " failed: it is made to fail after " + std::to_string(*options_.fails_after) + " bytes.");
  }
  std::memcpy(copy.target, copy.source, copy.bytes);
  way.copied += copy.bytes;
}

void HostLink::settle(Direction direction) noexcept { ways_[static_cast<std::size_t>(direction)].copies = {}; }

}  // namespace glake
