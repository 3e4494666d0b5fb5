#include "block_pool.hpp"

#include <algorithm>
#include <bit>
#include <cassert>
#include <iterator>
#include <stdexcept>
#include <string>

namespace glake {

// Chunks that were taken out of the idle lists for a block that is being made; they return to the
// lists if it is not completed.
class BlockPool::Gathering {
 public:
  explicit Gathering(BlockPool& pool) : pool_(pool) {}
  Gathering(const Gathering&) = delete;
  Gathering& operator=(const Gathering&) = delete;
  ~Gathering() {
    for (Chunk* chunk : chunks) pool_.idle_[pool_.rung(chunk->bytes())].push_back(*chunk);
  }
  std::vector<Chunk*> chunks;

 private:
  BlockPool& pool_;
};

BlockPool::BlockPool(VirtualMemory& memory, std::size_t limit)
    : memory_(memory), granule_(memory.granularity()), limit_(limit) {}

BlockPool::~BlockPool() = default;

// The position of a chunk size on the ladder: log2 of its granules.
std::size_t BlockPool::rung(std::size_t chunk_bytes) const noexcept {
  return static_cast<std::size_t>(std::bit_width(chunk_bytes / granule_)) - 1;
}

Block* BlockPool::acquire(std::size_t bytes) {
  assert(bytes != 0 && bytes % granule_ == 0);
  if (!fits(bytes)) return nullptr;  // an idle block would fit: what is idle is below the limit
  Block* block = find_available(bytes);
  if (block == nullptr) {
    try {
      block = assemble(bytes);
    } catch (const DriverError&) {
      // The device may have less room than our limit, and the system bounds how many mappings a
      // process has: with nothing idle and nothing cached it may work.
      destroy_idle(reserved_);
      while (!inactive_.empty()) destroy_block(*inactive_.front());
      block = assemble(bytes);
    }
  }
  activate(*block);
  return block;
}

Block* BlockPool::find_available(std::size_t bytes) noexcept {
  if (const auto exact = exact_size_.find(bytes); exact != exact_size_.end()) {
    // The most recently used one: its pages are the likeliest to be in a cache.
    if (Block* block = exact->second->available.back()) return block;
  }
  const auto last = by_size_.upper_bound(bytes + bytes / waste_divisor);
  for (auto entry = by_size_.upper_bound(bytes); entry != last; ++entry) {
    if (Block* block = entry->second.available.back()) return block;
  }
  return nullptr;
}

Block* BlockPool::assemble(std::size_t bytes) {
  Gathering gathering(*this);
  gathering.chunks.reserve(most_gathered + bytes / largest_chunk + idle_.size());
  const std::size_t top = rung(std::max(granule_, std::min(std::bit_floor(bytes), largest_chunk)));
  std::size_t missing = bytes;
  for (std::size_t level = top + 1; level-- > 0;) {
    const std::size_t chunk_bytes = granule_ << level;
    IdleChunks& idle = idle_[level];
    while (chunk_bytes <= missing && !idle.empty() && gathering.chunks.size() < most_gathered) {
      Chunk& chunk = *idle.front();
      idle.remove(chunk);
      gathering.chunks.push_back(&chunk);
      missing -= chunk_bytes;
    }
  }
  const bool stitched = !gathering.chunks.empty();
  if (gathering.chunks.size() == most_gathered) consolidate(missing);
  if (reserved_ + missing > limit_) destroy_idle(reserved_ + missing - limit_);
  while (missing != 0) {
    const std::size_t chunk_bytes = std::max(granule_, std::min(std::bit_floor(missing), largest_chunk));
    chunks_.emplace_back(memory_, chunk_bytes);
    Chunk& chunk = chunks_.back();
    chunk.self = std::prev(chunks_.end());
    gathering.chunks.push_back(&chunk);
    reserved_ += chunk_bytes;
    missing -= chunk_bytes;
  }
  peak_reserved_ = std::max(peak_reserved_, reserved_);
  return map_block(bytes, gathering.chunks, stitched);
}

// Makes an inactive block. Its chunks are still in the hands of a Gathering, which puts them into the
// idle lists: from there activate() takes them.
Block* BlockPool::map_block(std::size_t bytes, const std::vector<Chunk*>& chunks, bool stitched) {
  for (Chunk* chunk : chunks) chunk->mapped_in.reserve(chunk->mapped_in.size() + 1);
  MappedRange range(memory_, bytes);
  for (const Chunk* chunk : chunks) range.append(chunk->physical.handle());
  const Address address = range.address();

  Block& block = blocks_.emplace_back(std::move(range));
  block.self = std::prev(blocks_.end());
  try {
    block.chunks = chunks;
    by_address_.emplace(address, &block);
    SizeEntry& entry = by_size_[bytes];
    exact_size_.emplace(bytes, &entry);
    ++entry.blocks;
    entry.available.push_back(block);
  } catch (...) {  // out of memory for the tables
    by_address_.erase(address);
    if (const auto entry = by_size_.find(bytes); entry != by_size_.end() && entry->second.blocks == 0) {
      exact_size_.erase(bytes);
      by_size_.erase(entry);
    }
    blocks_.pop_back();
    throw;
  }
  block.stitched = stitched;
  if (stitched) ++stitched_blocks_;
  for (Chunk* chunk : block.chunks) chunk->mapped_in.push_back(&block);
  inactive_.push_back(block);
  inactive_mappings_ += block.chunks.size();
  return &block;
}

void BlockPool::activate(Block& block) noexcept {
  assert(!block.active && block.active_chunks == 0);
  inactive_.remove(block);
  inactive_mappings_ -= block.chunks.size();
  by_size_.find(block.bytes())->second.available.remove(block);
  for (Chunk* chunk : block.chunks) {
    assert(!chunk->active);
    idle_[rung(chunk->bytes())].remove(*chunk);
    chunk->active = true;
    for (Block* other : chunk->mapped_in) {
      if (other == &block) continue;
      if (other->active_chunks++ == 0) by_size_.find(other->bytes())->second.available.remove(*other);
    }
  }
  block.active = true;
  active_ += block.bytes();
  peak_active_ = std::max(peak_active_, active_);
}

void BlockPool::release(Block& block) noexcept {
  assert(block.active);
  for (Chunk* chunk : block.chunks) {
    for (Block* other : chunk->mapped_in) {
      if (other == &block) continue;
      if (--other->active_chunks == 0) by_size_.find(other->bytes())->second.available.push_back(*other);
    }
    chunk->active = false;
    idle_[rung(chunk->bytes())].push_back(*chunk);
  }
  block.active = false;
  block.slab = nullptr;
  block.requested = 0;
  active_ -= block.bytes();
  by_size_.find(block.bytes())->second.available.push_back(block);
  inactive_.push_back(block);
  inactive_mappings_ += block.chunks.size();
  bound_cache();
}

void BlockPool::bound_cache() noexcept {
  // Never the last one: it is the block that was just released, and one of more mappings than the
  // bound must not be mapped again and again.
  while (inactive_.size() > 1 &&
         (inactive_.size() > most_inactive_blocks || inactive_mappings_ > most_inactive_mappings)) {
    destroy_block(*inactive_.front());
  }
}

void BlockPool::destroy_block(Block& block) noexcept {
  assert(!block.active);
  inactive_.remove(block);
  inactive_mappings_ -= block.chunks.size();
  const auto entry = by_size_.find(block.bytes());
  if (block.active_chunks == 0) entry->second.available.remove(block);
  if (--entry->second.blocks == 0) {
    exact_size_.erase(block.bytes());
    by_size_.erase(entry);
  }
  by_address_.erase(block.address());
  if (block.stitched) --stitched_blocks_;
  for (Chunk* chunk : block.chunks) std::erase(chunk->mapped_in, &block);
  blocks_.erase(block.self);
}

void BlockPool::destroy_chunk(Chunk& chunk) noexcept {
  assert(!chunk.active);
  while (!chunk.mapped_in.empty()) destroy_block(*chunk.mapped_in.back());
  idle_[rung(chunk.bytes())].remove(chunk);
  reserved_ -= chunk.bytes();
  chunks_.erase(chunk.self);
}

// Gives at least `bytes` of idle chunks back, if there are as many; returns the bytes given back.
std::size_t BlockPool::destroy_idle(std::size_t bytes) noexcept {
  std::size_t done = 0;
  while (done < bytes) {
    // The smallest chunk that suffices, else the largest: few calls, and little more than was asked.
    Chunk* victim = nullptr;
    for (std::size_t level = 0; level < idle_.size(); ++level) {
      if (idle_[level].empty()) continue;
      victim = idle_[level].front();
      if (victim->bytes() >= bytes - done) break;
    }
    if (victim == nullptr) break;
    done += victim->bytes();
    destroy_chunk(*victim);
  }
  return done;
}

// Gives idle chunks of at most `bytes` back, smallest first, up to `bytes` in all: they could have served
// but are too many to be mapped one by one, and a new chunk will take their place. Without this a
// request that grows a little each time (a cache of keys and values) would strand ever more small ones.
void BlockPool::consolidate(std::size_t bytes) noexcept {
  std::size_t done = 0;
  for (std::size_t level = 0; level < idle_.size(); ++level) {
    const std::size_t chunk_bytes = granule_ << level;
    while (done + chunk_bytes <= bytes && !idle_[level].empty()) {
      destroy_chunk(*idle_[level].front());
      done += chunk_bytes;
    }
  }
}

bool BlockPool::pin(std::size_t bytes) noexcept {
  if (!fits(bytes)) return false;
  if (reserved_ + bytes > limit_) destroy_idle(reserved_ + bytes - limit_);
  pinned_ += bytes;
  active_ += bytes;
  reserved_ += bytes;
  peak_active_ = std::max(peak_active_, active_);
  peak_reserved_ = std::max(peak_reserved_, reserved_);
  return true;
}

void BlockPool::unpin(std::size_t bytes) noexcept {
  pinned_ -= bytes;
  active_ -= bytes;
  reserved_ -= bytes;
}

Block* BlockPool::find(Address address) const noexcept {
  const auto found = by_address_.find(address);
  return found == by_address_.end() ? nullptr : found->second;
}

std::size_t BlockPool::trim(std::size_t target) noexcept {
  return reserved_ > target ? destroy_idle(reserved_ - target) : 0;
}

bool BlockPool::set_limit(std::size_t limit) noexcept {
  if (active_ > limit) return false;
  trim(limit);
  limit_ = limit;
  return true;
}

void BlockPool::reset_peaks() noexcept {
  peak_active_ = active_;
  peak_reserved_ = reserved_;
}

void BlockPool::check_invariants() const {
  const auto require = [](bool holds, const char* invariant) {
    if (!holds) throw std::logic_error(std::string("pool invariant does not hold: ") + invariant);
  };
  require(reserved_ <= limit_, "reserved <= limit");

  std::size_t chunk_bytes = 0;
  std::size_t active_bytes = 0;
  std::size_t idle_chunks = 0;
  for (const Chunk& chunk : chunks_) {
    chunk_bytes += chunk.bytes();
    const auto holders =
        std::count_if(chunk.mapped_in.begin(), chunk.mapped_in.end(), [](const Block* block) { return block->active; });
    require(holders <= 1, "every chunk is in at most one active block");
    require((holders == 1) == chunk.active, "a chunk is active exactly when a block of it is");
    require(idle_[rung(chunk.bytes())].contains(chunk) == !chunk.active,
            "idle lists hold exactly the non-active chunks");
    if (chunk.active) active_bytes += chunk.bytes();
    if (!chunk.active) ++idle_chunks;
  }
  std::size_t listed = 0;
  for (const IdleChunks& list : idle_) listed += list.size();
  require(listed == idle_chunks, "idle lists hold exactly the non-active chunks");
  require(reserved_ == chunk_bytes + pinned_, "reserved = bytes of all chunks + mapped files");
  require(active_ == active_bytes + pinned_, "active = bytes of active chunks + mapped files");

  std::size_t stitched = 0;
  std::size_t inactive_mappings = 0;
  std::size_t available = 0;
  for (const Block& block : blocks_) {
    std::size_t mapped = 0;
    std::size_t busy = 0;
    for (const Chunk* chunk : block.chunks) {
      mapped += chunk->bytes();
      if (chunk->active && !block.active) ++busy;
      require(std::count(chunk->mapped_in.begin(), chunk->mapped_in.end(), &block) == 1,
              "a chunk is mapped once in each block that lists it");
    }
    require(mapped == block.bytes() && block.range.mapped() == mapped, "every byte of a block is mapped exactly once");
    require(block.active_chunks == busy, "a block knows how many of its chunks others use");
    require(inactive_.contains(block) == !block.active, "the inactive list holds exactly the inactive blocks");
    const auto entry = by_size_.find(block.bytes());
    require(entry != by_size_.end() && exact_size_.at(block.bytes()) == &entry->second, "every size is indexed");
    require(entry->second.available.contains(block) == (!block.active && busy == 0),
            "available lists hold exactly the inactive blocks whose chunks are idle");
    require(find(block.address()) == &block, "every block is found by its address");
    if (block.stitched) ++stitched;
    if (!block.active) inactive_mappings += block.chunks.size();
    if (!block.active && busy == 0) ++available;
  }
  std::size_t listed_available = 0;
  for (const auto& [bytes, entry] : by_size_) {
    listed_available += entry.available.size();
    require(entry.blocks != 0, "no size is indexed without a block");
  }
  require(listed_available == available, "available lists hold exactly the inactive blocks whose chunks are idle");
  require(stitched == stitched_blocks_, "stitched blocks are counted");
  require(inactive_mappings == inactive_mappings_, "mappings of inactive blocks are counted");
  require(by_address_.size() == blocks_.size(), "every block is found by its address");
  require(exact_size_.size() == by_size_.size(), "every size is indexed");
  require(inactive_.size() <= most_inactive_blocks, "the cache of inactive mappings is bounded");
}

}  // namespace glake
