// BlockPool: blocks of whole granules over chunks that are reused, stitched and given back.
//
// The part of the pool that owns physical memory. It serves the large requests, the slabs of the
// small ones, and holds the budget. Not thread-safe: Pool locks. The words and the invariants are in
// pool.hpp.
//
// Chunk sizes are granule * 2^k, at most 64 MiB. So a block of 7.3 MiB is 4 + 2 + 1 + 0.25 + ... and
// gathering idle chunks from the largest down wastes nothing: whatever set of them fits, the greedy
// one covers as much as any.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <unordered_map>
#include <vector>

#include "block.hpp"

namespace glake {

class BlockPool {
 public:
  static constexpr std::size_t largest_chunk = std::size_t{64} << 20;
  // A larger idle block serves a request if it wastes at most 1/8 of the request.
  static constexpr std::size_t waste_divisor = 8;
  // A block is stitched from at most this many idle chunks: mapping costs are per chunk, and above
  // this a new chunk is cheaper. It replaces the small ones.
  static constexpr std::size_t most_gathered = 64;
  // Bounds of the cache of inactive mappings, least recently used out first.
  static constexpr std::size_t most_inactive_blocks = 1024;
  static constexpr std::size_t most_inactive_mappings = 8192;

  // `memory` must outlive this object.
  BlockPool(VirtualMemory& memory, std::size_t limit);
  // Unmaps and gives back everything, active or not.
  ~BlockPool();
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // Hands out a block of at least `bytes`, a multiple of the granule: an exact idle block, a slightly
  // larger one, or one made of idle chunks and of as many new ones as are missing. Gives idle chunks
  // back where the limit or the device leaves no room for the new ones. Returns null when the limit
  // does not allow it: exactly when !fits(bytes). Throws DriverError; then nothing has been handed out.
  [[nodiscard]] Block* acquire(std::size_t bytes);
  // Takes an active block back. Its chunks become idle.
  void release(Block& block) noexcept;

  // Whether the limit allows `bytes` more active bytes.
  [[nodiscard]] bool fits(std::size_t bytes) const noexcept { return bytes <= limit_ && active_ <= limit_ - bytes; }
  // Counts memory that is not made of chunks (mapped files) as active; makes room for it by giving
  // idle chunks back. False, and nothing changed, when it does not fit.
  [[nodiscard]] bool pin(std::size_t bytes) noexcept;
  void unpin(std::size_t bytes) noexcept;

  // The block that begins at this address, active or not; null if there is none.
  [[nodiscard]] Block* find(Address address) const noexcept;

  // Gives idle chunks back until at most `target` bytes are reserved, or none is idle. Returns the
  // bytes given back.
  std::size_t trim(std::size_t target) noexcept;
  // Gives idle chunks back as needed; false, with the old limit in force, if more than `limit` is active.
  [[nodiscard]] bool set_limit(std::size_t limit) noexcept;

  [[nodiscard]] std::size_t limit() const noexcept { return limit_; }
  [[nodiscard]] std::size_t reserved() const noexcept { return reserved_; }
  [[nodiscard]] std::size_t active() const noexcept { return active_; }
  [[nodiscard]] std::size_t idle() const noexcept { return reserved_ - active_; }
  [[nodiscard]] std::size_t peak_reserved() const noexcept { return peak_reserved_; }
  [[nodiscard]] std::size_t peak_active() const noexcept { return peak_active_; }
  void reset_peaks() noexcept;
  [[nodiscard]] std::size_t granule() const noexcept { return granule_; }
  [[nodiscard]] std::size_t chunks() const noexcept { return chunks_.size(); }
  [[nodiscard]] std::size_t blocks() const noexcept { return blocks_.size(); }
  [[nodiscard]] std::size_t stitched_blocks() const noexcept { return stitched_blocks_; }

  // Throws std::logic_error that names the invariant that does not hold.
  void check_invariants() const;
  [[nodiscard]] const std::list<Block>& all_blocks() const noexcept { return blocks_; }

 private:
  using IdleChunks = IntrusiveList<Chunk, &Chunk::idle_link>;
  using AvailableBlocks = IntrusiveList<Block, &Block::available_link>;
  using InactiveBlocks = IntrusiveList<Block, &Block::inactive_link>;
  // The blocks of one size.
  struct SizeEntry {
    AvailableBlocks available;
    std::size_t blocks = 0;  // all of that size, active ones too
  };
  class Gathering;

  [[nodiscard]] std::size_t rung(std::size_t chunk_bytes) const noexcept;
  [[nodiscard]] Block* find_available(std::size_t bytes) noexcept;
  [[nodiscard]] Block* assemble(std::size_t bytes);
  [[nodiscard]] Block* map_block(std::size_t bytes, const std::vector<Chunk*>& chunks, bool stitched);
  void activate(Block& block) noexcept;
  void destroy_block(Block& block) noexcept;
  void destroy_chunk(Chunk& chunk) noexcept;
  std::size_t destroy_idle(std::size_t bytes) noexcept;
  void consolidate(std::size_t bytes) noexcept;
  void bound_cache() noexcept;

  VirtualMemory& memory_;
  const std::size_t granule_;
  std::size_t limit_;
  std::size_t reserved_ = 0;  // bytes of all chunks, and pinned bytes
  std::size_t active_ = 0;    // bytes of the chunks in active blocks, and pinned bytes
  std::size_t pinned_ = 0;
  std::size_t peak_reserved_ = 0;
  std::size_t peak_active_ = 0;
  std::size_t stitched_blocks_ = 0;
  std::size_t inactive_mappings_ = 0;  // chunks of all inactive blocks together

  std::list<Chunk> chunks_;
  std::list<Block> blocks_;  // after chunks_: unmapped before the memory is given back
  std::unordered_map<Address, Block*> by_address_;
  std::map<std::size_t, SizeEntry> by_size_;
  std::unordered_map<std::size_t, SizeEntry*> exact_size_;  // the same entries, without the search
  std::array<IdleChunks, 48> idle_;                         // by rung of the ladder
  InactiveBlocks inactive_;
};

}  // namespace glake
