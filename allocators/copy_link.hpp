// CopyLink: one way for bytes between the host and a device, as TransferEngine uses it.
//
// Contract
// - A copy is started in one of `depth` slots and finished later; copies of one direction finish in the order in which
//   they were started. The caller finishes a slot before it starts another copy there.
// - Calls of one direction come from one thread at a time; the two directions do not wait for each other.
// - start() and finish() throw DriverError. Afterwards the direction is unusable until settle() has returned, which
//   waits for whatever may still be under way: then nothing of it reads or writes the host's memory any more.
// - No call breaks a CUDA stream capture that is in progress on any thread.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "virtual_memory.hpp"

namespace glake {

enum class Direction : std::uint8_t { to_device, to_host };
inline constexpr std::size_t direction_count = 2;

class CopyLink {
 public:
  static constexpr unsigned depth = 3;

  CopyLink() = default;
  CopyLink(const CopyLink&) = delete;
  CopyLink& operator=(const CopyLink&) = delete;
  virtual ~CopyLink() = default;

  // What people call it: "cuda:0", "cuda:0 by cuda:1".
  [[nodiscard]] virtual const std::string& name() const noexcept = 0;
  // The most bytes of one copy.
  [[nodiscard]] virtual std::size_t most() const noexcept { return SIZE_MAX; }
  virtual void start(Direction direction, unsigned slot, std::byte* host, Address device, std::size_t bytes) = 0;
  virtual void finish(Direction direction, unsigned slot) = 0;
  virtual void settle(Direction direction) noexcept = 0;
};

// Memory of the process itself as a device, at a rate of its own if that is wanted: what tests use for unequal links,
// and links that fail.
class HostLink final : public CopyLink {
 public:
  struct Options {
    double rate = 0;                         // bytes per second of one direction; 0: as fast as memory is
    double latency = 0;                      // seconds of every copy
    std::optional<std::size_t> fails_after;  // bytes after which every copy fails
    std::size_t most = SIZE_MAX;
  };

  HostLink(std::string name, Options options) : name_(std::move(name)), options_(options) {}

  [[nodiscard]] const std::string& name() const noexcept override { return name_; }
  [[nodiscard]] std::size_t most() const noexcept override { return options_.most; }
  void start(Direction direction, unsigned slot, std::byte* host, Address device, std::size_t bytes) override;
  void finish(Direction direction, unsigned slot) override;
  void settle(Direction direction) noexcept override;

 private:
  using Clock = std::chrono::steady_clock;
  struct Copy {
    std::byte* target = nullptr;
    const std::byte* source = nullptr;
    std::size_t bytes = 0;
    Clock::time_point end;
  };
  struct Way {
    std::array<Copy, depth> copies;
    Clock::time_point busy_until;
    std::size_t copied = 0;
  };

  std::string name_;
  Options options_;
  std::array<Way, direction_count> ways_;
};

}  // namespace glake
