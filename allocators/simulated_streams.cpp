#include "simulated_streams.hpp"

#include <chrono>
#include <cstring>
#include <deque>
#include <string>
#include <thread>

#include "host_memory.hpp"

namespace glake {

// A point in the queue of one stream.
class SimulatedStreams::Mark {
 public:
  void reach() {
    {
      const std::lock_guard lock(mutex_);
      reached_ = true;
    }
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return reached_; });
  }
  [[nodiscard]] bool reached() {
    const std::lock_guard lock(mutex_);
    return reached_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool reached_ = false;
};

// The thread of one stream.
class SimulatedStreams::Worker {
 public:
  Worker() : thread_([this] { run(); }) {}
  ~Worker() {
    finish();
    thread_.join();
  }
  void push(Job job) {
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    changed_.notify_one();
  }
  // No job comes any more.
  void finish() {
    {
      const std::lock_guard lock(mutex_);
      finishing_ = true;
    }
    changed_.notify_one();
  }

 private:
  void run() {
    for (;;) {
      Job job;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return finishing_ || !jobs_.empty(); });
        if (jobs_.empty()) return;
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      job();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  bool finishing_ = false;
  std::thread thread_;  // last: it uses the rest
};

// Captured work. Every queued launch holds it, so that it is gone when the last one is done.
struct SimulatedStreams::Graph {
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    for (const auto& flag : watches) flag->store(true, std::memory_order_release);
  }
  std::vector<Job> jobs;
  std::vector<std::shared_ptr<std::atomic<bool>>> watches;
};

struct SimulatedStreams::Stream {
  std::unique_ptr<Worker> worker;
  std::uint64_t id = 0;
  std::uint64_t id_in_capture = 0;
  std::uint64_t capture = 0;  // 0: not capturing
  bool broken = false;
  std::shared_ptr<Graph> graph;
};

SimulatedStreams::SimulatedStreams() = default;

SimulatedStreams::~SimulatedStreams() {
  // Jobs of one stream may wait for marks of another: no thread is joined before all know that they end.
  for (auto& [handle, stream] : streams_) stream.worker->finish();
  for (auto& worker : retired_) worker->finish();
}

StreamHandle SimulatedStreams::create_stream() {
  const std::lock_guard lock(mutex_);
  Stream stream;
  stream.worker = std::make_unique<Worker>();
  stream.id = ++last_id_;
  StreamHandle handle = 0;
  if (free_handles_.empty()) {
    handle = last_handle_ += 16;  // never 0, 1 or 2, which are CUDA's default streams
  } else {
    handle = free_handles_.back();
    free_handles_.pop_back();
  }
  streams_.emplace(handle, std::move(stream));
  return handle;
}

void SimulatedStreams::destroy_stream(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  Stream& found = find(stream);
  retired_.push_back(std::move(found.worker));  // what is queued is still done
  streams_.erase(stream);
  free_handles_.push_back(stream);
}

void SimulatedStreams::enqueue(StreamHandle stream, Job job) {
  const std::lock_guard lock(mutex_);
  Stream& found = find(stream);
  if (found.capture != 0) {
    found.graph->jobs.push_back(std::move(job));
  } else {
    found.worker->push(std::move(job));
  }
}

void SimulatedStreams::enqueue_fill(StreamHandle stream, Address address, std::size_t bytes, unsigned char value,
                                    std::uint64_t delay_us) {
  enqueue(stream, [=] {
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    std::memset(reinterpret_cast<void*>(address), value, bytes);
  });
}

void SimulatedStreams::enqueue_check(StreamHandle stream, Address address, std::size_t bytes, unsigned char value) {
  enqueue(stream, [this, address, bytes, value] {
    const auto* const data = reinterpret_cast<const unsigned char*>(address);
    std::uint64_t wrong = 0;
    for (std::size_t i = 0; i < bytes; ++i) wrong += data[i] != value;
    // Relaxed: a count must not order the streams' work, or ThreadSanitizer would see no race.
    if (wrong != 0) mismatches_.fetch_add(wrong, std::memory_order_relaxed);
  });
}

void SimulatedStreams::enqueue_delay(StreamHandle stream, std::uint64_t delay_us) {
  enqueue(stream, [=] { std::this_thread::sleep_for(std::chrono::microseconds(delay_us)); });
}

void SimulatedStreams::synchronize_stream(StreamHandle stream) {
  std::shared_ptr<Mark> end;
  {
    const std::lock_guard lock(mutex_);
    end = mark_end(find_not_capturing(stream, "waiting for a stream"));
  }
  end->wait();
}

std::uint64_t SimulatedStreams::begin_capture(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  Stream& found = find_not_capturing(stream, "beginning a capture");
  found.graph = std::make_shared<Graph>();
  found.capture = ++last_capture_;
  found.id_in_capture = ++last_id_;  // not the id outside, as in CudaStreams
  found.broken = false;
  return found.capture;
}

std::uint64_t SimulatedStreams::end_capture(StreamHandle stream) {
  std::shared_ptr<Graph> graph;  // where it is dropped, its flags are set after the lock
  const std::lock_guard lock(mutex_);
  Stream& found = find(stream);
  if (found.capture == 0) misuse("ending a capture on a stream that is not capturing");
  const std::uint64_t number = found.capture;
  graph = std::move(found.graph);
  found.capture = 0;
  if (found.broken) return 0;
  graphs_.emplace(number, std::move(graph));
  return number;
}

void SimulatedStreams::launch_graph(std::uint64_t graph, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  const auto found = graphs_.find(graph);
  if (found == graphs_.end()) misuse("launching what is not a graph");
  find_not_capturing(stream, "launching a graph").worker->push([held = found->second] {
    for (const Job& job : held->jobs) job();
  });
}

void SimulatedStreams::destroy_graph(std::uint64_t graph) {
  const std::lock_guard lock(mutex_);
  if (graphs_.erase(graph) == 0) misuse("destroying what is not a graph");
}

std::optional<StreamState> SimulatedStreams::state(StreamHandle stream) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = streams_.find(stream);
  if (found == streams_.end()) {
    if (stream != no_stream) ++misuses_;  // CUDA crashes
    return std::nullopt;
  }
  const Stream& state = found->second;
  if (state.capture != 0) return StreamState{state.id_in_capture, state.capture};
  return StreamState{state.id, 0};
}

EventHandle SimulatedStreams::create_event() {
  const std::lock_guard lock(mutex_);
  events_.try_emplace(++last_event_);
  return {last_event_};
}

void SimulatedStreams::destroy_event(EventHandle event) noexcept {
  const std::lock_guard lock(mutex_);
  if (event.value != 0 && events_.erase(event.value) == 0) ++misuses_;
}

void SimulatedStreams::record(EventHandle event, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  Marks& marks = find_event(event);
  marks = {mark_end(find_not_capturing(stream, "recording an event"))};
}

void SimulatedStreams::record_all(EventHandle event) {
  const std::lock_guard lock(mutex_);
  if (break_captures()) misuse("recording an event on all streams while one is capturing");
  Marks& marks = find_event(event);
  marks.clear();
  for (auto& [handle, stream] : streams_) marks.push_back(mark_end(stream));
  // Work of destroyed streams may go on.
  for (const auto& worker : retired_) {
    marks.push_back(std::make_shared<Mark>());
    worker->push([mark = marks.back()] { mark->reach(); });
  }
}

void SimulatedStreams::wait(StreamHandle stream, EventHandle event) {
  const std::lock_guard lock(mutex_);
  Stream& found = find_not_capturing(stream, "letting a stream wait for an event");
  found.worker->push([marks = find_event(event)] {
    for (const auto& mark : marks) mark->wait();
  });
}

bool SimulatedStreams::finished(EventHandle event) {
  for (const auto& mark : event_marks(event)) {
    if (!mark->reached()) return false;
  }
  return true;
}

void SimulatedStreams::synchronize(EventHandle event) {
  for (const auto& mark : event_marks(event)) mark->wait();
}

StreamHandle SimulatedStreams::own_stream() {
  if (own_ == 0) own_ = create_stream();
  return own_;
}

bool SimulatedStreams::synchronize_all() {
  Marks marks;
  {
    const std::lock_guard lock(mutex_);
    for (auto& [handle, stream] : streams_) {
      if (stream.capture != 0 && !waits_in_captures_.load()) return false;
    }
    for (auto& [handle, stream] : streams_) marks.push_back(mark_end(stream));
    for (const auto& worker : retired_) {
      marks.push_back(std::make_shared<Mark>());
      worker->push([mark = marks.back()] { mark->reach(); });
    }
  }
  for (const auto& mark : marks) mark->wait();
  return true;
}

void SimulatedStreams::watch_graph(StreamHandle stream, std::shared_ptr<std::atomic<bool>> dead) {
  const std::lock_guard lock(mutex_);
  Stream& found = find(stream);
  if (found.capture == 0 || found.broken) {
    throw DriverError("asking a stream for the graph that it captures failed: it is not capturing");
  }
  found.graph->watches.push_back(std::move(dead));
}

SimulatedStreams::Stream& SimulatedStreams::find(StreamHandle stream) {
  const auto found = streams_.find(stream);
  if (found == streams_.end()) misuse("using the handle " + std::to_string(stream) + ", which is not a stream,");
  return found->second;
}

SimulatedStreams::Stream& SimulatedStreams::find_not_capturing(StreamHandle stream, const char* call) {
  Stream& found = find(stream);
  if (found.capture != 0) {
    found.broken = true;
    misuse(std::string(call) + " on a capturing stream");
  }
  return found;
}

SimulatedStreams::Marks& SimulatedStreams::find_event(EventHandle event) {
  const auto found = events_.find(event.value);
  if (found == events_.end()) misuse("using what is not an event");
  return found->second;
}

SimulatedStreams::Marks SimulatedStreams::event_marks(EventHandle event) {
  const std::lock_guard lock(mutex_);
  return find_event(event);
}

void SimulatedStreams::misuse(const std::string& what) {
  ++misuses_;
  throw DriverError(what + " failed: CUDA would crash or break the capture (simulated device)");
}

bool SimulatedStreams::break_captures() {
  bool any = false;
  for (auto& [handle, stream] : streams_) {
    if (stream.capture == 0) continue;
    stream.broken = true;
    any = true;
  }
  return any;
}

std::shared_ptr<SimulatedStreams::Mark> SimulatedStreams::mark_end(Stream& stream) {
  auto mark = std::make_shared<Mark>();
  stream.worker->push([mark] { mark->reach(); });
  return mark;
}

namespace {

class SimulatedDevice final : public VirtualMemory {
 public:
  explicit SimulatedDevice(std::shared_ptr<SimulatedStreams> streams) : streams_(std::move(streams)) {}
  ~SimulatedDevice() override = default;

  [[nodiscard]] std::size_t granularity() const noexcept override { return host_.granularity(); }
  [[nodiscard]] std::size_t granularity_on_host() const noexcept override { return host_.granularity_on_host(); }
  [[nodiscard]] std::size_t free_bytes() const noexcept override { return host_.free_bytes(); }
  [[nodiscard]] StreamOrder* streams() noexcept override { return streams_.get(); }

 private:
  Address do_reserve(std::size_t bytes) override { return host_.reserve(bytes); }
  void do_release(Address address, std::size_t bytes) noexcept override { host_.release(address, bytes); }
  ChunkHandle do_create(std::size_t bytes) override { return host_.create(bytes); }
  ChunkHandle do_create_shared(std::size_t bytes) override { return host_.create_shared(bytes); }
  ChunkHandle do_create_on_host(std::size_t bytes) override { return host_.create_on_host(bytes); }
  ChunkHandle do_adopt(int descriptor, std::size_t bytes) override { return host_.adopt(descriptor, bytes); }
  void do_destroy(ChunkHandle handle) noexcept override { host_.destroy(handle); }
  void do_map(Address address, ChunkHandle handle, Access access) override { host_.map(address, handle, access); }
  void do_freeze(ChunkHandle handle, std::span<const Address> addresses) override { host_.freeze(handle, addresses); }
  void do_unmap(Address address, std::size_t bytes) noexcept override { host_.unmap(address, bytes); }
  void do_protect(Address address, std::size_t bytes, Access access) override { host_.protect(address, bytes, access); }
  Address do_map_file(int descriptor, std::size_t bytes, Address address) override {
    return host_.map_file(descriptor, bytes, address);
  }
  void do_unmap_file(Address address, std::size_t bytes) noexcept override { host_.unmap_file(address, bytes); }
  void do_fill(Address address, std::size_t bytes, unsigned char value, StreamHandle stream) override {
    if (stream == no_stream) return host_.fill(address, bytes, value, stream);
    streams_->enqueue_fill(stream, address, bytes, value, 0);
  }
  void do_read(void* target, Address source, std::size_t bytes) override { host_.read(target, source, bytes); }

  std::shared_ptr<SimulatedStreams> streams_;
  HostMemory host_;
};

}  // namespace

std::unique_ptr<VirtualMemory> make_simulated_device(std::shared_ptr<SimulatedStreams> streams) {
  return std::make_unique<SimulatedDevice>(std::move(streams));
}

}  // namespace glake
