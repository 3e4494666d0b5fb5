// DebugHeap: memory that finds misuse, in place of the pool's own heaps where Pool was made with debug.
//
// Words
//   region       an address range: a guard granule, mapped memory, a guard granule. Nothing is ever mapped in the
//                guards, so an access to them faults (SIGSEGV; CUDA_ERROR_ILLEGAL_ADDRESS)
//   large        an allocation with a region of its own, at the end of its memory: what lies behind it faults at
//                once (up to 255 bytes later where its size is no multiple of 256)
//   small        an allocation in a slot of a slab. A slab is a region that is cut into slots of one stride
//   zone         the bytes of a slot (of a region) before and behind the allocation. They hold the canary, and are
//                checked when it is freed, when its slot is used again, and by check(). A small allocation has
//                256 bytes before it and at least 64 behind it
//   poison       what a freed small allocation is overwritten with. Checked when the slot is used again (oldest
//                freed first), when the slab is given back, and by check()
//   quarantine   regions whose memory was given back, and whose addresses are kept, so that a use after free
//                faults and a double free can say who freed it first. The oldest leave it
//   pending      freed, but queued work may still use it, and a stream capture in progress forbids to wait for that
//   reserved     the physical memory that is held: large, slabs, pending
//   active       of reserved: large, and slabs with a live or pending allocation in them
//
// Cost: a free waits for the device. A large allocation takes two address space mappings and creates its memory.
//
// Not thread-safe: the pool holds its lock. After a call that throws, nothing has changed, with the exception of
// deallocate() throwing CorruptionError (see there).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arithmetic.hpp"
#include "virtual_memory.hpp"

namespace glake {

enum class Tag : std::uint8_t;

struct DebugOptions {
  bool guard_all = false;  // every allocation is large, however small
  bool wipe = false;       // freed memory is set to zeros before it is given back or poisoned
  std::size_t limit = most_bytes;
  std::size_t small_limit = 0;                         // bytes from which on allocations are large; 0: by the granule
  std::size_t quarantine = 1024;                       // count of regions
  std::string (*label_name)(std::uint32_t) = nullptr;  // null: labels are shown as numbers
};

// One allocation and who made it.
struct AllocationRecord {
  std::uint64_t id = 0;  // never the same for two allocations of a heap; from 1 on
  Address address = 0;
  std::size_t bytes = 0;  // as asked for
  Tag tag{};
  std::uint32_t label = 0;
  StreamHandle stream = no_stream;
  std::uint64_t thread = 0;  // the operating system's id
  std::int64_t time_ns = 0;  // since 1970
  std::string stack;         // where it was allocated
};

// Where an allocation was freed.
struct FreeRecord {
  std::uint64_t thread = 0;
  std::int64_t time_ns = 0;
  std::string stack;
};

// Bytes that something wrote where nothing may be written.
struct Corruption {
  enum class Kind : std::uint8_t {
    overrun,         // behind an allocation
    underrun,        // before an allocation
    use_after_free,  // in an allocation that was freed, or in its zones after it was freed
    stray,           // in a slot that was never used
  };
  enum class Found : std::uint8_t { at_free, at_reuse, at_check, at_release };

  Kind kind = Kind::overrun;
  Found found_at = Found::at_check;
  AllocationRecord allocation;  // for a stray write: only the address and the size of the slot
  std::optional<FreeRecord> freed;
  std::int64_t offset = 0;           // of the first wrong byte from the allocation's beginning; below 0: before it
  std::size_t overwritten = 0;       // count of wrong bytes
  std::size_t extent = 0;            // bytes from the first wrong one to the last
  unsigned char expected = 0;        // what should stand there
  std::vector<unsigned char> found;  // what stands there, from the first wrong byte on; at most 32
};
[[nodiscard]] const char* kind_name(Corruption::Kind kind) noexcept;
[[nodiscard]] const char* found_name(Corruption::Found found) noexcept;

// Memory around or in an allocation was overwritten. Thrown by deallocate() after it took the allocation back.
class CorruptionError : public std::runtime_error {
 public:
  CorruptionError(const std::string& text, std::vector<Corruption> what_was_found)
      : std::runtime_error(text), found(std::move(what_was_found)) {}
  std::vector<Corruption> found;
};

class DebugHeap {
 public:
  static constexpr std::size_t alignment = 256;
  static constexpr std::size_t zone_before = 256;  // of a small allocation
  static constexpr std::size_t least_zone_behind = 64;
  static constexpr unsigned char canary = 0xCA;
  static constexpr unsigned char poison = 0xDD;

  // The memory must outlive the heap.
  explicit DebugHeap(VirtualMemory& memory, DebugOptions options = {});
  // Gives everything back, live or not; nothing may be queued that uses it.
  ~DebugHeap();
  DebugHeap(const DebugHeap&) = delete;
  DebugHeap& operator=(const DebugHeap&) = delete;

  // `bytes` (> 0) of memory, aligned to 256, with unspecified content. 0 where the limit has no room, even after all
  // that can be given back was; needed_limit() then says which limit would do. Ordered on no stream: its zones are
  // written when this returns. `stack`: capture_python_stack(), called before the pool took its lock.
  // Throws DriverError.
  [[nodiscard]] Address allocate(std::size_t bytes, Tag tag, StreamHandle stream, std::uint32_t label,
                                 std::string stack);

  // Checks the zones and takes the allocation back, after waiting for all queued work of the device; where a capture
  // forbids that, it becomes pending until the capture has ended, and the graph is gone if it can hold it.
  // Throws InvalidPointer, with nothing changed, for an address that is not that of a live allocation; it says
  // which allocation the address is of, or in, and where that was allocated and freed.
  // Throws CorruptionError where a zone was overwritten: the allocation has been taken back all the same.
  // Throws DriverError, with the allocation still live, where the device failed (an illegal address of a kernel).
  void deallocate(Address address, std::string stack);

  // What was found since the last call (when something was freed, used again or given back), and what is
  // found now in the zones of all live allocations and in all freed slots. Waits for the device, unless a capture is
  // in progress. Throws DriverError.
  [[nodiscard]] std::vector<Corruption> check();

  // All live allocations, oldest first.
  [[nodiscard]] std::vector<AllocationRecord> live() const;

  // Gives back slabs with nothing in them until at most `target` bytes are reserved. Returns the bytes given back.
  std::size_t trim(std::size_t target = 0);

  // False, with the old limit in force, where more is active.
  [[nodiscard]] bool set_limit(std::size_t limit);
  // Counts memory of somebody else's (mapped files) against the limit. False where the limit has no room.
  [[nodiscard]] bool pin(std::size_t bytes);
  void unpin(std::size_t bytes) noexcept;
  // The limit with which allocate(bytes) would pass now.
  [[nodiscard]] std::size_t needed_limit(std::size_t bytes, Tag tag) const noexcept;

  // In bytes. Those that were pinned are part of the first two.
  [[nodiscard]] std::size_t reserved() const noexcept { return reserved_ + pinned_; }
  [[nodiscard]] std::size_t active() const noexcept { return active_total_ + pinned_; }
  [[nodiscard]] std::size_t active(Tag tag) const noexcept;  // without the pinned bytes
  [[nodiscard]] std::size_t requested() const noexcept { return requested_; }
  [[nodiscard]] std::size_t limit() const noexcept { return options_.limit; }
  // Counts.
  [[nodiscard]] std::size_t live_count() const noexcept { return live_count_; }
  [[nodiscard]] std::size_t slabs() const noexcept { return slab_count_; }
  [[nodiscard]] std::size_t pending() const noexcept { return pending_.size(); }
  [[nodiscard]] std::size_t quarantined() const noexcept { return quarantine_.size(); }

  // Throws std::logic_error that names what does not hold.
  void check_invariants() const;

 private:
  enum class State : std::uint8_t { unused, live, pending, freed };
  // A place for one allocation: a part of a slab, or all memory of a large region.
  struct Slot {
    State state = State::unused;
    Address begin = 0;            // of the zone before the allocation
    Address end = 0;              // of the zone behind it
    std::size_t poisoned = 0;     // while unused or freed: bytes of poison where the allocation began
    AllocationRecord allocation;  // the last one
    std::optional<FreeRecord> freed;
  };
  struct Region {
    Region(VirtualMemory& owner, std::size_t guard, std::size_t bytes);
    ~Region();
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;
    void give_back() noexcept;  // the memory; the addresses stay

    VirtualMemory& memory;
    AddressRange range;
    std::optional<PhysicalMemory> physical;  // none: given back
    Address base;                            // behind the first guard
    std::size_t bytes;                       // without the guards
    std::size_t stride = 0;                  // of a slab's slots; 0: large
    Tag tag{};
    std::size_t used = 0;  // slots that are live or pending
    std::vector<Slot> slots;
  };
  struct Place {
    Region* region = nullptr;
    std::size_t index = 0;
    [[nodiscard]] Slot& slot() const { return region->slots[index]; }
  };
  // Set when a graph that may use the memory is gone.
  using Graphs = std::vector<std::shared_ptr<std::atomic<bool>>>;
  // A capture that a request came from. (Only the handle that a request names can be asked: it may be gone later.)
  struct Watch {
    StreamHandle stream;
    std::uint64_t capture;
    std::shared_ptr<std::atomic<bool>> dead;
    bool may_be_capturing = true;  // until a request of the stream shows otherwise
  };
  struct Pending {
    Place place;
    Graphs graphs;
  };
  class Reader;
  using SlabKind = std::pair<std::size_t, Tag>;  // stride, tag

  [[nodiscard]] std::size_t stride_for(std::size_t bytes) const noexcept;  // 0: large
  [[nodiscard]] std::size_t slab_bytes(std::size_t stride) const noexcept;
  [[nodiscard]] std::size_t region_bytes(std::size_t bytes) const noexcept;
  [[nodiscard]] bool make_room(std::size_t bytes);
  [[nodiscard]] std::unique_ptr<Region> make_region(std::size_t bytes);
  [[nodiscard]] Address allocate_large(AllocationRecord record);
  [[nodiscard]] Address allocate_small(AllocationRecord record, std::size_t stride);
  void add_slab(std::size_t stride, Tag tag);

  [[nodiscard]] Place find_live(Address address, const std::string& stack) const;
  [[noreturn]] void refuse(Address address, const Region* region, const std::string& stack) const;
  [[nodiscard]] bool drain();  // waits for the device; false: a capture is in progress
  [[nodiscard]] std::shared_ptr<std::atomic<bool>> watch(StreamHandle stream);
  [[nodiscard]] Graphs graphs_of(const Slot& slot);
  void settle();                                                                     // pending allocations
  [[nodiscard]] std::vector<Corruption> clear(Place place, Corruption::Found when);  // checks, wipes, poisons
  void finish(Place place) noexcept;                                                 // after clear()
  void use(Region& region) noexcept;
  void quarantine(Region& region) noexcept;
  void retire_slab(Region& region);
  [[nodiscard]] std::vector<Region*> empty_slabs() const;

  void inspect(Reader& reader, const Slot& slot, Corruption::Found when, std::vector<Corruption>& found) const;
  void remember(const std::vector<Corruption>& found, bool print) noexcept;

  VirtualMemory& memory_;
  DebugOptions options_;
  std::size_t granule_;
  std::map<Address, std::unique_ptr<Region>> regions_;  // by the beginning of the first guard
  std::deque<Region*> quarantine_;                      // oldest first
  std::map<SlabKind, std::deque<Place>> free_slots_;    // oldest freed first
  std::deque<Pending> pending_;
  std::vector<Watch> watches_;                                      // of graphs that are not gone
  std::map<Address, std::shared_ptr<std::atomic<bool>>> captured_;  // allocated in a capture: whether its graph is gone
  std::deque<Corruption> found_;                                    // since the last check()
  std::size_t reserved_ = 0;
  std::size_t pinned_ = 0;
  std::size_t active_total_ = 0;
  std::size_t requested_ = 0;
  std::map<Tag, std::size_t> active_;
  std::size_t live_count_ = 0;
  std::size_t slab_count_ = 0;
  std::uint64_t last_id_ = 0;
};

// One paragraph on one corruption: what was overwritten, where, by how much, and both stacks.
[[nodiscard]] std::string describe(const Corruption& corruption, std::string (*label_name)(std::uint32_t) = nullptr);

}  // namespace glake
