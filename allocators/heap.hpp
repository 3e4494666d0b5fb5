// Heap: byte ranges for requests of one stream and one kind, cut from address space that grows.
//
// Address space comes as segments: large reservations in which chunks are mapped one behind the other. A segment only
// ever grows at its end, by chunks that are new or that are idle elsewhere (stitching); so neighbours share granules,
// and nothing is rounded up to one. Inside, ranges are handed out by best fit, split, and merged when they are free.
//
// The same chunk can be mapped in several places. While it is used through one of them, the others are hidden: no range
// covers them. When it is idle, any place of it may be shown as (part of) a free range again. That is done when
// somebody looks for such a place, and not before: most chunks are taken again where they were. (A free range never
// shows a chunk twice: such neighbours stay apart.)
//
// A range that is freed is cached first: it keeps its place and its chunks, and serves the next request of exactly
// its size without a search. In a heap that is not stitched, free ranges serve next, and then the cache is emptied
// (flush). In a stitched one, whatever the cache does not serve empties it first: sizes then go back to the same places
// time and again, and a load that repeats needs no new mappings. Either way nothing is mapped before the cache is
// empty, so caching costs no memory. Not thread-safe: Pool locks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>

#include "chunks.hpp"

namespace glake {

struct Slab;

enum class RangeState : std::uint8_t { free, cached, live };

struct Range {
  Range(Heap& owner, Address start, std::size_t size, const void* in)
      : heap(owner), address(start), bytes(size), segment(in) {}
  [[nodiscard]] Address end() const noexcept { return address + bytes; }

  Heap& heap;
  Address address;
  std::size_t bytes;
  const void* segment;  // ranges of different segments never merge
  RangeState state = RangeState::free;
  bool held = false;          // its chunks are in use because of it: always if live or cached; if free, for a graph
  Slab* slab = nullptr;       // while live: the slab that it serves, if any
  std::size_t requested = 0;  // while live and no slab: bytes as asked for
  std::uint32_t holder = 0;   // while live and no slab: who holds it
  std::uint64_t born = 0;     // while live and no slab: how many allocations there had been
  Fence fence = 0;            // not live, and the arena has no stream: work that may still touch it
  Link<Range> cache_link;
};

// What a heap tells its pool: addresses that can be looked up come and go.
class RangeTable {
 public:
  virtual void add(Range& range) = 0;
  virtual void remove(Range& range) noexcept = 0;

 protected:
  ~RangeTable() = default;
};

class Heap {
 public:
  // Every range is a multiple of `step` bytes, and so is every address.
  Heap(VirtualMemory& memory, Chunks& chunks, Fences& fences, RangeTable& table, Arena& arena, const char* kind,
       std::size_t step)
      : memory_(memory), chunks_(chunks), fences_(fences), table_(table), arena_(arena), kind_(kind), step_(step) {}
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  ~Heap();

  [[nodiscard]] std::size_t rounded(std::size_t bytes) const noexcept;

  // In the following two, `may_wait`: if need be the host waits until the device has finished with what is found.
  // (Where the arena has a stream it never need.)
  //
  // A cached range of exactly `bytes` (rounded): no search, no driver call. Null if there is none.
  [[nodiscard]] Range* reuse(std::size_t bytes, bool may_wait);
  // A place where that size was before, else the smallest free range that holds `bytes`, cut to that size. Null if
  // there is none. Throws DriverError. (Best fit alone leads a repeating load to ever new layouts, each of which needs
  // other mappings; where sizes go back to their places, it settles.)
  [[nodiscard]] Range* fit(std::size_t bytes, bool may_wait);
  // Maps what is missing at the end of a segment. Null if the budget does not allow it. Throws DriverError, with
  // nothing handed out.
  [[nodiscard]] Range* grow(std::size_t bytes, Budget budget);
  // How much grow() would map, to the granule.
  [[nodiscard]] std::size_t missing(std::size_t bytes) const noexcept;
  // The same with what is idle at the end of the segment: what the request adds to the chunks in use.
  [[nodiscard]] std::size_t needed(std::size_t bytes) const noexcept;

  // Takes a live range back: it is cached.
  void release(Range& range) noexcept;
  // Empties the cache: its ranges become free, merge, and their chunks idle where nothing else uses them.
  void flush() noexcept;
  // Free ranges of a heap that is kept for a graph hold their chunks; from now on they do not.
  void publish() noexcept;

  // Unmaps everything. False, with the rest left, if a chunk is in use here or the device has not finished with it.
  [[nodiscard]] bool clear() noexcept;

  // Chunks' side of things: a place of a chunk is lost to another mapping of it, or is unmapped.
  void lose(Mapping& mapping) noexcept;
  void drop(Mapping& mapping) noexcept;

  // Some of its chunks are, or were, used at another place.
  [[nodiscard]] bool stitched() const noexcept { return hidden_ != 0; }
  [[nodiscard]] const char* kind() const noexcept { return kind_; }
  [[nodiscard]] Arena& arena() const noexcept { return arena_; }
  [[nodiscard]] bool in_use() const noexcept { return live_ != 0; }
  [[nodiscard]] std::size_t step() const noexcept { return step_; }
  [[nodiscard]] const std::map<Address, Range>& ranges() const noexcept { return ranges_; }
  [[nodiscard]] const std::map<Address, Mapping>& mappings() const noexcept { return mappings_; }

  // Throws std::logic_error that names the invariant that does not hold.
  void check_invariants() const;

 private:
  struct Segment {
    Segment(VirtualMemory& memory, std::size_t bytes) : reservation(memory, bytes), end(reservation.address()) {}
    [[nodiscard]] std::size_t room() const noexcept { return reservation.address() + reservation.bytes() - end; }
    AddressRange reservation;
    Address end;  // of what was ever mapped
    std::size_t mappings = 0;
  };
  using Ranges = std::map<Address, Range>;
  using Mappings = std::map<Address, Mapping>;
  using Cached = IntrusiveList<Range, &Range::cache_link>;

  [[nodiscard]] Ranges::iterator insert(Address address, std::size_t bytes, const void* segment, Fence fence);
  Ranges::iterator merge(Ranges::iterator range) noexcept;
  [[nodiscard]] bool aliased(const Range& left, const Range& right) noexcept;
  [[nodiscard]] Range* cut(Ranges::iterator free, Address address, std::size_t bytes);
  Ranges::iterator split(Ranges::iterator free, Address at);
  [[nodiscard]] Range* recall(std::size_t bytes, bool may_wait);
  [[nodiscard]] bool ready(const Range& range, Address address, std::size_t bytes);
  [[nodiscard]] Range* place(Ranges::iterator free, Address address, std::size_t bytes);
  void remember(std::size_t bytes, Address address);
  [[nodiscard]] bool show(Address start, Address end);
  void show_idle() noexcept;
  void regain(Mapping& mapping) noexcept;
  void hold(Range& range) noexcept;
  void unhold(Range& range) noexcept;
  void order(const Range& range, Address address, std::size_t bytes);
  [[nodiscard]] Segment& segment_for(std::size_t bytes);
  [[nodiscard]] Mappings::iterator first_mapping(Address address) noexcept;
  [[nodiscard]] Ranges::iterator tail() noexcept;
  [[nodiscard]] Cached& bin(std::size_t bytes) noexcept;

  VirtualMemory& memory_;
  Chunks& chunks_;
  Fences& fences_;
  RangeTable& table_;
  Arena& arena_;
  const char* kind_;
  std::size_t step_;
  std::size_t live_ = 0;                                         // ranges
  std::size_t cached_ = 0;                                       // ranges
  std::size_t mapped_ = 0;                                       // bytes of all mappings
  std::list<Segment> segments_;                                  // the last one grows
  Mappings mappings_;                                            // by address
  std::size_t hidden_ = 0;                                       // mappings that no range covers
  Ranges ranges_;                                                // by address: everything that is mapped and not lost
  std::set<std::pair<std::size_t, Address>> free_;               // free ranges by size
  std::array<Cached, 64> cache_;                                 // by a hash of the size
  std::unordered_map<std::size_t, std::deque<Address>> places_;  // where sizes were, as they became known
  std::size_t remembered_ = 0;                                   // addresses in places_
};

}  // namespace glake
