// Arena: the heaps and slabs that serve one stream.
//
// Memory that is freed on a stream can be used on it again at once, so each stream has its own arena, and only whole
// idle chunks move between arenas, behind a fence. Further arenas serve memory without a stream: one for weights (what
// lives long lies together), one for everything else. While a stream is being captured into a CUDA graph, its requests
// come from an arena of that capture, which keeps everything to itself until the graph is gone: the graph's kernels
// write there whenever it is launched.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "heap.hpp"
#include "slabs.hpp"
#include "stream_order.hpp"

namespace glake {

struct Arena {
  enum class Mode : std::uint8_t {
    stream,      // ordered by `stream`
    streamless,  // may be used on any stream; also what is left of a graph that is gone
    capture,     // of a graph that is being captured, or was
  };

  Arena(VirtualMemory& memory, Chunks& chunks, Fences& all_fences, RangeTable& table, std::uint64_t number, Mode how,
        bool for_weights)
      : serial(number),
        mode(how),
        weights(for_weights),
        fences(all_fences),
        small(memory, chunks, fences, table, *this, "small", slab_step),
        medium(memory, chunks, fences, table, *this, "medium", range_step),
        large(memory, chunks, fences, table, *this, for_weights ? "weights" : "large", range_step),
        slabs(*this) {}
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  static constexpr std::size_t range_step = 512;
  static constexpr std::size_t slab_step = std::size_t{64} << 10;
  // Requests from here on are large; from small_limit (size_classes.hpp) to here, medium. Apart, small ones that live
  // long cannot pin chunks that large ones need. All weights live long, and lie together.
  static constexpr std::size_t large_from = std::size_t{1} << 20;

  [[nodiscard]] Heap& heap_for(std::size_t bytes) noexcept { return bytes < large_from && !weights ? medium : large; }
  template <class Action>
  void each_heap(Action&& action) {
    action(small);
    action(medium);
    action(large);
  }
  template <class Action>
  void each_heap(Action&& action) const {
    action(small);
    action(medium);
    action(large);
  }
  // Everything that is cached becomes free.
  void flush(SlabTable& slab_table) noexcept {
    slabs.flush(slab_table);
    each_heap([](Heap& heap) { heap.flush(); });
  }
  // Waits for work that may still touch memory of ours: on the stream that is being served, else on the host.
  void order(Fence fence) {
    if (fence == 0) return;
    if (mode == Mode::stream) {
      fences.wait(fence, stream);
    } else {
      fences.synchronize(fence);
    }
  }
  [[nodiscard]] bool in_use() const noexcept { return small.in_use() || medium.in_use() || large.in_use(); }

  const std::uint64_t serial;
  Mode mode;
  const bool weights;
  Fences& fences;
  StreamHandle stream = no_stream;  // mode stream: as the request that is being served named it (it may be gone later)
  std::uint64_t stream_id = 0;      // StreamState::id of it
  std::uint64_t capture_id = 0;     // mode capture
  std::int64_t thread = 0;          // mode capture: the system's id of the thread that asked last
  std::uint64_t last_request = 0;   // mode capture: how many allocations there had been when it asked last
  bool may_be_capturing = false;    // mode capture: nothing has shown yet that the capture has ended
  Fence last = 0;                   // all work on what was freed here so far, where ranges have no fence of their own
  bool wiped = false;               // some of what was freed here was wiped, on another stream than ours
  std::shared_ptr<std::atomic<bool>> graph_is_gone;  // mode capture
  std::vector<Address> kept;  // mode capture: what was freed during the capture and comes from other arenas
  Heap small;
  Heap medium;
  Heap large;
  Slabs slabs;
};

}  // namespace glake
