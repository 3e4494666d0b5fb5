// SimulatedStreams and SimulatedDevice: a device with queued work, made of threads and host memory, for tests.
//
// Every stream is a thread that does its jobs in order, late if the job says so; events are real. Memory that is
// used again too early therefore shows what it would show on a device: wrong bytes (check()), and a data race to
// ThreadSanitizer. Captures, graphs and the rules for calls during a capture follow the CUDA driver as it was measured
// (cuda_streams.hpp); where the driver crashes or breaks a capture, this counts (misuses()).
//
// Not for production: the allocators never make one by themselves.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "virtual_memory.hpp"

namespace glake {

// All member functions may be called from any thread.
class SimulatedStreams final : public StreamOrder {
 public:
  using Job = std::function<void()>;

  SimulatedStreams();
  ~SimulatedStreams() override;  // does all jobs first

  // A stream with a thread of its own. The handle of a destroyed stream is used again, as CUDA does.
  [[nodiscard]] StreamHandle create_stream();
  // What is queued is still done; a capture in progress is lost. Throws DriverError for what is not a stream.
  void destroy_stream(StreamHandle stream);

  // Queues work on a stream, or captures it where the stream is capturing. Each throws DriverError for what is not a
  // stream.
  void enqueue(StreamHandle stream, Job job);
  // Waits `delay_us` microseconds, then sets the bytes to a value.
  void enqueue_fill(StreamHandle stream, Address address, std::size_t bytes, unsigned char value,
                    std::uint64_t delay_us);
  // Counts in mismatches() every byte that is not the value.
  void enqueue_check(StreamHandle stream, Address address, std::size_t bytes, unsigned char value);
  void enqueue_delay(StreamHandle stream, std::uint64_t delay_us);
  // Waits until all that was queued on the stream is done.
  void synchronize_stream(StreamHandle stream);

  // From now on the stream's work is recorded and not done. Returns the capture's id, never used again.
  std::uint64_t begin_capture(StreamHandle stream);
  // Ends it and returns the graph, or 0 where the capture was broken meanwhile.
  [[nodiscard]] std::uint64_t end_capture(StreamHandle stream);
  // Queues a graph's work on a stream. Throws DriverError for what is not a graph.
  void launch_graph(std::uint64_t graph, StreamHandle stream);
  // The flags of watch_graph() are set once the last launch is done.
  void destroy_graph(std::uint64_t graph);

  // Whether synchronize_all() can wait during captures and leave them intact, as it was measured of drivers whose frees
  // wait (CudaStreams). Off at first.
  void wait_in_captures(bool on) noexcept { waits_in_captures_ = on; }

  // Bytes that a check found wrong so far.
  [[nodiscard]] std::uint64_t mismatches() const noexcept { return mismatches_.load(); }
  // Calls so far that would have crashed the process or broken a capture on CUDA.
  [[nodiscard]] std::uint64_t misuses() const noexcept { return misuses_.load(); }

  [[nodiscard]] std::optional<StreamState> state(StreamHandle stream) noexcept override;
  [[nodiscard]] EventHandle create_event() override;
  void destroy_event(EventHandle event) noexcept override;
  void record(EventHandle event, StreamHandle stream) override;
  void record_all(EventHandle event) override;
  void wait(StreamHandle stream, EventHandle event) override;
  [[nodiscard]] bool finished(EventHandle event) override;
  void synchronize(EventHandle event) override;
  [[nodiscard]] bool synchronize_all() override;
  [[nodiscard]] StreamHandle own_stream() override;
  void watch_graph(StreamHandle stream, std::shared_ptr<std::atomic<bool>> dead) override;

 private:
  class Mark;
  class Worker;
  struct Graph;
  struct Stream;
  using Marks = std::vector<std::shared_ptr<Mark>>;

  // The lock is held.
  Stream& find(StreamHandle stream);
  Stream& find_not_capturing(StreamHandle stream, const char* call);
  Marks& find_event(EventHandle event);
  [[noreturn]] void misuse(const std::string& what);
  [[nodiscard]] bool break_captures();
  static std::shared_ptr<Mark> mark_end(Stream& stream);
  [[nodiscard]] Marks event_marks(EventHandle event);

  std::mutex mutex_;  // of the tables below; never held while a job runs or is waited for
  std::map<StreamHandle, Stream> streams_;
  std::map<std::uintptr_t, Marks> events_;
  std::map<std::uint64_t, std::shared_ptr<Graph>> graphs_;
  std::vector<std::unique_ptr<Worker>> retired_;  // threads of destroyed streams, which end their queues
  std::vector<StreamHandle> free_handles_;
  std::uintptr_t last_event_ = 0;
  StreamHandle last_handle_ = 0;
  StreamHandle own_ = 0;  // made at first use
  std::uint64_t last_id_ = 0;
  std::uint64_t last_capture_ = 0;
  std::atomic<bool> waits_in_captures_ = false;
  std::atomic<std::uint64_t> mismatches_ = 0;
  std::atomic<std::uint64_t> misuses_ = 0;
};

// The memory of a simulated device: HostMemory's, with fills on simulated streams. As on a device, memory that is
// unmapped while a job uses it ends the process.
[[nodiscard]] std::unique_ptr<VirtualMemory> make_simulated_device(std::shared_ptr<SimulatedStreams> streams);

}  // namespace glake
