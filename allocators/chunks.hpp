// Chunks: the physical memory of a pool, its budget, and where it is mapped.
//
// A chunk is one piece of physical memory. It is mapped whole or not at all, so it cannot be split; it may be mapped
// at several addresses, in several heaps, and is in use through at most one of these mappings at any time. An idle
// chunk is free to be used through any of its mappings, to be mapped anywhere else, or to be given back.
//
// Chunk sizes are granule * 2^k, at most 64 MiB. So gathering idle chunks from the largest down wastes nothing:
// whatever set of them fits, the greedy one covers as much as any. Not thread-safe: Pool locks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <vector>

#include "fences.hpp"
#include "intrusive_list.hpp"
#include "virtual_memory.hpp"

namespace glake {

struct Arena;
struct Chunk;
class Heap;

// A chunk at an address, in a segment of a heap. The memory is unmapped with this object.
struct Mapping {
  Mapping(VirtualMemory& virtual_memory, Heap& owner, void* in, Chunk& mapped, Address at);
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();
  [[nodiscard]] std::size_t bytes() const noexcept;
  [[nodiscard]] Address end() const noexcept { return address + bytes(); }

  VirtualMemory& memory;
  Heap& heap;
  void* segment;  // of the heap
  Chunk& chunk;
  Address address;
  Fence fence = 0;     // the last work that used the chunk through this mapping
  bool shown = false;  // ranges of the heap cover it
  Link<Mapping> link;  // in the list of all mappings: oldest first
};

struct Chunk {
  Chunk(VirtualMemory& memory, std::size_t bytes) : physical(memory, bytes) {}
  [[nodiscard]] std::size_t bytes() const noexcept { return physical.handle().bytes; }
  [[nodiscard]] bool idle() const noexcept { return current == nullptr; }

  PhysicalMemory physical;
  Mapping* current = nullptr;    // the mapping that it is used through; null while it is idle
  std::size_t used = 0;          // bytes held by ranges of that mapping's heap
  Fence fence = 0;               // work that may still touch it; while it is in use: of what was freed in it since
  std::uint64_t last_arena = 0;  // whose work that is (Arena::serial)
  std::vector<Mapping*> mappings;
  Link<Chunk> idle_link;  // in the list of idle chunks of this size: longest idle first
  std::list<Chunk>::iterator self;
};

// How much memory a request may take.
struct Budget {
  std::size_t fresh = 0;  // below this, new chunks are preferred to idle ones
  std::size_t soft = 0;   // above this, idle chunks that cannot serve are given back first
  bool thrifty = true;    // nothing new above `fresh`; else up to the limit
};

class Chunks {
 public:
  static constexpr std::size_t largest_chunk = std::size_t{64} << 20;
  // A chunk of more than this is at most a 64th of the pool: a small range can pin all of it.
  static constexpr std::size_t common_chunk = std::size_t{16} << 20;
  static constexpr std::size_t most_share = 64;
  // A request is served from at most this many idle chunks: mapping costs are per chunk, and above this new, larger
  // chunks take the place of small ones.
  static constexpr std::size_t most_gathered = 256;
  // A chunk is kept mapped at this many addresses at most, the least recently used going first: every further place
  // costs time whenever the chunk is taken or becomes idle.
  static constexpr std::size_t most_mappings_of_chunk = 12;

  Chunks(VirtualMemory& memory, Fences& fences, std::size_t limit)
      : memory_(memory), fences_(fences), granule_(memory.granularity()), limit_(limit) {}
  Chunks(const Chunks&) = delete;
  Chunks& operator=(const Chunks&) = delete;

  // Takes `bytes` (a multiple of the granule) of idle and new chunks out of the idle lists. Idle chunks that cannot
  // serve are given back where the soft limit leaves no room for new ones and the device has finished with them, and
  // in any case where the limit leaves none. Empty if the budget does not allow it. Throws DriverError, with nothing
  // taken.
  [[nodiscard]] std::vector<Chunk*> gather(std::size_t bytes, Budget budget);
  template <class Action>
  void each_idle(Action&& action) {
    for (const IdleChunks& idle : idle_) {
      for (Chunk* chunk = idle.front(); chunk != nullptr; chunk = IdleChunks::next(*chunk)) action(*chunk);
    }
  }
  // Takes one out of the idle lists, and returns it.
  void withhold(Chunk& chunk) noexcept { unlist_idle(chunk); }
  void put_back(Chunk& chunk) noexcept { list_idle(chunk); }

  // Whether work of the arena may use this idle chunk, having waited for it if need be: on its stream, or on the host
  // if the arena has none or its stream is capturing.
  void order(Chunk& chunk, Arena& arena);

  // An idle chunk begins to be used through a mapping, or ends to be: then its fence is that of the arena's work.
  void begin_use(Mapping& mapping) noexcept;
  void end_use(Mapping& mapping, std::uint64_t arena) noexcept;

  // Book-keeping of Mapping.
  void add(Mapping& mapping);
  void remove(Mapping& mapping) noexcept;
  // A heap is destroyed with what is in use.
  void abandon(Mapping& mapping) noexcept;
  // Makes room for a further mapping of an idle chunk.
  void bound_mappings(Chunk& chunk) noexcept;
  // Unmaps every mapping that nothing uses, as far as the device allows.
  void drop_spare_mappings() noexcept;

  // Gives at least `bytes` of idle chunks back, if there are as many; returns the bytes given back. Waits for the
  // device, unless `only_finished`.
  std::size_t give_back(std::size_t bytes, bool only_finished) noexcept;

  // Counts memory that is not made of chunks (mapped files). False, and nothing changed, when it does not fit.
  [[nodiscard]] bool pin(std::size_t bytes) noexcept;
  void unpin(std::size_t bytes) noexcept;

  void set_limit(std::size_t limit) noexcept { limit_ = limit; }
  [[nodiscard]] std::size_t limit() const noexcept { return limit_; }
  [[nodiscard]] std::size_t granule() const noexcept { return granule_; }
  [[nodiscard]] std::size_t reserved() const noexcept { return reserved_; }
  [[nodiscard]] std::size_t idle() const noexcept { return idle_bytes_; }
  [[nodiscard]] std::size_t pinned() const noexcept { return pinned_; }
  [[nodiscard]] std::size_t peak_reserved() const noexcept { return peak_reserved_; }
  void reset_peak() noexcept { peak_reserved_ = reserved_; }
  [[nodiscard]] const std::list<Chunk>& all() const noexcept { return chunks_; }
  [[nodiscard]] std::size_t mappings() const noexcept { return mappings_.size(); }
  [[nodiscard]] std::uint64_t stitches() const noexcept { return stitches_; }

  // Throws std::logic_error that names the invariant that does not hold.
  void check_invariants() const;

 private:
  using IdleChunks = IntrusiveList<Chunk, &Chunk::idle_link>;
  using AllMappings = IntrusiveList<Mapping, &Mapping::link>;

  [[nodiscard]] std::size_t rung(std::size_t chunk_bytes) const noexcept;
  void list_idle(Chunk& chunk) noexcept;
  void unlist_idle(Chunk& chunk) noexcept;
  [[nodiscard]] bool settle(Chunk& chunk, bool only_finished) noexcept;
  void destroy(Chunk& chunk) noexcept;
  void consolidate(std::size_t bytes) noexcept;

  VirtualMemory& memory_;
  Fences& fences_;
  const std::size_t granule_;
  std::size_t limit_;
  std::size_t reserved_ = 0;    // bytes of all chunks, and pinned bytes
  std::size_t idle_bytes_ = 0;  // bytes of the chunks in the idle lists
  std::size_t pinned_ = 0;
  std::size_t peak_reserved_ = 0;
  std::uint64_t stitches_ = 0;  // idle chunks that were mapped at a further address, ever
  std::list<Chunk> chunks_;
  std::array<IdleChunks, 48> idle_;  // by rung of the ladder
  AllMappings mappings_;
};

}  // namespace glake
