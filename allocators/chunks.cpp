#include "chunks.hpp"

#include <algorithm>
#include <bit>
#include <cassert>
#include <iterator>
#include <stdexcept>
#include <string>

#include "arena.hpp"
#include "invariants.hpp"

namespace glake {

Mapping::Mapping(VirtualMemory& virtual_memory, Heap& owner, void* in, Chunk& mapped, Address at)
    : memory(virtual_memory), heap(owner), segment(in), chunk(mapped), address(at) {
  memory.map(address, chunk.physical.handle());
}

Mapping::~Mapping() { memory.unmap(address, bytes()); }

std::size_t Mapping::bytes() const noexcept { return chunk.bytes(); }

// The position of a chunk size on the ladder: log2 of its granules.
std::size_t Chunks::rung(std::size_t chunk_bytes) const noexcept {
  return static_cast<std::size_t>(std::bit_width(chunk_bytes / granule_)) - 1;
}

void Chunks::list_idle(Chunk& chunk) noexcept {
  idle_[rung(chunk.bytes())].push_back(chunk);
  idle_bytes_ += chunk.bytes();
}

void Chunks::unlist_idle(Chunk& chunk) noexcept {
  idle_[rung(chunk.bytes())].remove(chunk);
  idle_bytes_ -= chunk.bytes();
}

std::vector<Chunk*> Chunks::gather(std::size_t bytes, Budget budget) {
  assert(bytes != 0 && bytes % granule_ == 0);
  std::vector<Chunk*> taken;
  const std::size_t largest =
      std::max(granule_, std::clamp(std::bit_floor(budget.soft / most_share), common_chunk, largest_chunk));
  taken.reserve(most_gathered + bytes / largest + static_cast<std::size_t>(std::bit_width(largest)));
  try {
    // New memory costs no more than stitching, and leaves others what they have.
    const std::size_t until = std::min(budget.fresh, limit_);
    const bool all_new = until >= reserved_ && until - reserved_ >= bytes;
    std::size_t missing = bytes;
    for (std::size_t level = all_new ? 0 : idle_.size(); level-- > 0;) {
      const std::size_t chunk_bytes = granule_ << level;
      IdleChunks& idle = idle_[level];
      while (chunk_bytes <= missing && !idle.empty() && taken.size() < most_gathered) {
        Chunk& chunk = *idle.front();
        unlist_idle(chunk);
        taken.push_back(&chunk);
        missing -= chunk_bytes;
      }
    }
    if (taken.size() == most_gathered && !budget.thrifty) consolidate(missing);
    if (missing != 0 && budget.thrifty && reserved_ + missing > until) {
      for (Chunk* chunk : taken) put_back(*chunk);
      return {};
    }
    if (missing != 0 && reserved_ + missing > budget.soft) give_back(reserved_ + missing - budget.soft, true);
    if (missing != 0 && reserved_ + missing > limit_) give_back(reserved_ + missing - limit_, false);
    if (missing != 0 && (missing > limit_ || reserved_ > limit_ - missing)) {
      for (Chunk* chunk : taken) put_back(*chunk);
      return {};
    }
    while (missing != 0) {
      const std::size_t chunk_bytes = std::min(std::bit_floor(missing), largest);
      chunks_.emplace_back(memory_, chunk_bytes);
      Chunk& chunk = chunks_.back();
      chunk.self = std::prev(chunks_.end());
      taken.push_back(&chunk);
      reserved_ += chunk_bytes;
      missing -= chunk_bytes;
    }
  } catch (const DeviceFullError&) {
    for (Chunk* chunk : taken) put_back(*chunk);
    if (budget.fresh == 0) throw;
    return gather(bytes, {0, budget.soft, budget.thrifty});  // what is idle may do
  } catch (...) {
    for (Chunk* chunk : taken) put_back(*chunk);
    throw;
  }
  peak_reserved_ = std::max(peak_reserved_, reserved_);
  for (const Chunk* chunk : taken) stitches_ += chunk->mappings.empty() ? 0 : 1;
  return taken;
}

void Chunks::order(Chunk& chunk, Arena& arena) {
  // Work of the same stream is in order by itself; wipes are on another.
  if (arena.mode != Arena::Mode::stream || chunk.last_arena != arena.serial || arena.wiped) arena.order(chunk.fence);
}

void Chunks::begin_use(Mapping& mapping) noexcept {
  Chunk& chunk = mapping.chunk;
  assert(chunk.idle() && chunk.used == 0);
  unlist_idle(chunk);
  chunk.current = &mapping;
  chunk.fence = 0;  // waited for, or of the same stream: work of the arena from now on comes after it
  for (Mapping* other : chunk.mappings) {
    if (other != &mapping && other->shown) other->heap.lose(*other);
  }
  // The most recently used one last.
  const auto place = std::find(chunk.mappings.begin(), chunk.mappings.end(), &mapping);
  std::rotate(place, place + 1, chunk.mappings.end());
}

void Chunks::end_use(Mapping& mapping, std::uint64_t arena) noexcept {
  Chunk& chunk = mapping.chunk;
  assert(chunk.current == &mapping && chunk.used == 0);
  chunk.current = nullptr;
  chunk.last_arena = arena;
  mapping.fence = chunk.fence;
  list_idle(chunk);
}

void Chunks::add(Mapping& mapping) {
  mapping.chunk.mappings.push_back(&mapping);
  mappings_.push_back(mapping);
}

void Chunks::remove(Mapping& mapping) noexcept {
  std::erase(mapping.chunk.mappings, &mapping);
  mappings_.remove(mapping);
}

void Chunks::abandon(Mapping& mapping) noexcept {
  Chunk& chunk = mapping.chunk;
  remove(mapping);
  if (chunk.current != &mapping) return;
  chunk.current = nullptr;
  chunk.used = 0;
  list_idle(chunk);
}

void Chunks::bound_mappings(Chunk& chunk) noexcept {
  // Not the last one, which was just made.
  for (std::size_t i = 0; chunk.mappings.size() >= most_mappings_of_chunk && i + 1 < chunk.mappings.size();) {
    Mapping& mapping = *chunk.mappings[i];
    try {
      if (&mapping != chunk.current && fences_.finished(mapping.fence)) {
        mapping.heap.drop(mapping);
        continue;
      }
    } catch (const DriverError&) {  // the device cannot say: the mapping stays
    }
    ++i;
  }
}

void Chunks::drop_spare_mappings() noexcept {
  for (Mapping* mapping = mappings_.front(); mapping != nullptr;) {
    Mapping* const next = AllMappings::next(*mapping);
    try {
      if (mapping->chunk.current != mapping) {
        fences_.synchronize(mapping->fence);
        mapping->heap.drop(*mapping);
      }
    } catch (const DriverError&) {
    }
    mapping = next;
  }
}

// Whether no queued work can touch the chunk, through any mapping, any more. Its latest fence stands for all before
// it: whoever used the chunk next had waited for it.
bool Chunks::settle(Chunk& chunk, bool only_finished) noexcept {
  try {
    if (only_finished) return fences_.finished(chunk.fence);
    fences_.synchronize(chunk.fence);
    return true;
  } catch (const DriverError&) {
    return false;  // a device that is lost: what it holds goes with the process
  }
}

void Chunks::destroy(Chunk& chunk) noexcept {
  assert(chunk.idle());
  while (!chunk.mappings.empty()) chunk.mappings.back()->heap.drop(*chunk.mappings.back());
  unlist_idle(chunk);
  reserved_ -= chunk.bytes();
  chunks_.erase(chunk.self);
}

std::size_t Chunks::give_back(std::size_t bytes, bool only_finished) noexcept {
  std::size_t done = 0;
  while (done < bytes) {
    // The smallest chunk that suffices, else the largest: few calls, and little more than was asked.
    Chunk* victim = nullptr;
    for (std::size_t level = 0; level < idle_.size(); ++level) {
      for (Chunk* chunk = idle_[level].front(); chunk != nullptr; chunk = IdleChunks::next(*chunk)) {
        if (!settle(*chunk, only_finished)) continue;
        victim = chunk;
        break;
      }
      if (victim != nullptr && victim->bytes() >= bytes - done) break;
    }
    if (victim == nullptr) break;
    done += victim->bytes();
    destroy(*victim);
  }
  return done;
}

// Gives idle chunks of at most `bytes` back, smallest first, up to `bytes` in all: they could have served but are too
// many to be mapped one by one, and a new chunk will take their place. Without this a request that grows a little each
// time (a cache of keys and values) would strand ever more small ones.
void Chunks::consolidate(std::size_t bytes) noexcept {
  std::size_t done = 0;
  for (std::size_t level = 0; level < idle_.size(); ++level) {
    const std::size_t chunk_bytes = granule_ << level;
    while (done + chunk_bytes <= bytes && !idle_[level].empty() && settle(*idle_[level].front(), false)) {
      destroy(*idle_[level].front());
      done += chunk_bytes;
    }
  }
}

bool Chunks::pin(std::size_t bytes) noexcept {
  if (bytes > limit_) return false;
  if (reserved_ > limit_ - bytes) give_back(reserved_ - (limit_ - bytes), false);
  if (reserved_ > limit_ - bytes) return false;
  pinned_ += bytes;
  reserved_ += bytes;
  peak_reserved_ = std::max(peak_reserved_, reserved_);
  return true;
}

void Chunks::unpin(std::size_t bytes) noexcept {
  pinned_ -= bytes;
  reserved_ -= bytes;
}

void Chunks::check_invariants() const {
  std::size_t bytes = 0;
  std::size_t idle = 0;
  std::size_t mappings = 0;
  for (const Chunk& chunk : chunks_) {
    bytes += chunk.bytes();
    if (chunk.idle()) idle += chunk.bytes();
    mappings += chunk.mappings.size();
    require(chunk.idle() == (chunk.used == 0), "a chunk is idle exactly when none of its bytes are held");
    require(chunk.used <= chunk.bytes(), "no byte of a chunk is held twice");
    require(idle_[rung(chunk.bytes())].contains(chunk) == chunk.idle(), "idle lists hold exactly the idle chunks");
    require(chunk.idle() || std::count(chunk.mappings.begin(), chunk.mappings.end(), chunk.current) == 1,
            "a chunk is in use through one of its mappings");
  }
  std::size_t listed = 0;
  for (const IdleChunks& list : idle_) {
    for (const Chunk* chunk = list.front(); chunk != nullptr; chunk = IdleChunks::next(*chunk))
      listed += chunk->bytes();
  }
  require(listed == idle && idle == idle_bytes_, "idle lists hold exactly the idle chunks");
  require(reserved_ == bytes + pinned_, "reserved = bytes of all chunks + mapped files");
  require(reserved_ <= limit_, "reserved <= limit");
  require(mappings == mappings_.size(), "every mapping belongs to a chunk");
}

}  // namespace glake
