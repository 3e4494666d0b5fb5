// CudaStreams: StreamOrder on a CUDA device.
//
// What the driver allows decides what is asked here (measured on driver 580, tests/gpu/test_cuda_memory.py repeats
// it):
// - A handle of a destroyed stream crashes the process in every call of the driver, as a dangling pointer does. Nothing
//   here keeps a handle, and callers must not either: a handle is good for the call in which its owner passes it. An
//   event outlives its stream.
// - cuStreamGetId() on a capturing stream ends its capture with an error. So while a stream captures, its id is one
//   that is made up here for that stream in that capture: memory that is used by a graph is not in the order of the
//   stream's other work anyway.
// - cuCtxRecordEvent() and cuCtxSynchronize() end every capture in the context with an error, and nothing tells whether
//   there is one. So record_all() is for callers that know of none. synchronize_all() waits another way: freeing memory
//   of cuMemAlloc() waits for all work of the device and spares captures. The driver's documentation says no more than
//   that it may wait; therefore the first call looks whether it does, and where it does not, cuCtxSynchronize() is
//   used.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <unordered_set>
#include <utility>

#include "cuda_driver.hpp"
#include "process.hpp"
#include "stream_order.hpp"

namespace glake {

class CudaStreams final : public StreamOrder {
 public:
  // The capture of the legacy default stream while a capture is in progress on a blocking stream: it takes no work
  // then, and whoever queues some breaks that capture. watch_graph() throws for it.
  static constexpr std::uint64_t implicit_capture = ~std::uint64_t{0};

  explicit CudaStreams(std::shared_ptr<const CudaContext> context) : context_(std::move(context)) {}
  ~CudaStreams() override;

  // 0 and 1 are the legacy default stream, 2 the calling thread's own default stream. Undefined for the handle of a
  // stream that was destroyed (see above).
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
  [[nodiscard]] std::uint64_t id_in_capture(std::uint64_t capture, StreamHandle stream);

  std::shared_ptr<const CudaContext> context_;
  ProcessMark process_;
  // Frees what it has allocated, which waits for the device (see above).
  void wait_by_freeing();
  [[nodiscard]] bool freeing_waits();

  std::optional<bool> freeing_waits_;                                         // once that was looked at
  std::unordered_set<std::uint64_t> ours_;                                    // ids of streams of this context
  std::map<std::pair<std::uint64_t, StreamHandle>, std::uint64_t> captured_;  // (capture, stream) -> id
  std::uint64_t made_ids_ = 0;
  CUstream own_ = nullptr;  // made at first use
};

}  // namespace glake
