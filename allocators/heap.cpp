#include "heap.hpp"

#include <algorithm>
#include <bit>
#include <cassert>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "arena.hpp"
#include "arithmetic.hpp"
#include "invariants.hpp"

namespace glake {
namespace {

constexpr std::size_t GiB = std::size_t{1} << 30;
// Address space is plenty (47 bits): a segment that is outgrown leaves the end of its last chunk unused.
constexpr std::size_t segment_bytes = 16 * GiB;
// A heap grows by at least a 32nd of what it has mapped, up to this: many small mappings are slow.
constexpr std::size_t most_quantum = std::size_t{2} << 20;

}  // namespace

Heap::~Heap() {
  for (auto& [address, range] : ranges_) {
    if (range.state != RangeState::free) table_.remove(range);
    if (range.state == RangeState::cached) bin(range.bytes).remove(range);
  }
  // What is still in use goes with its heap: the pool is being destroyed.
  for (auto& [address, mapping] : mappings_) chunks_.abandon(mapping);
}

std::size_t Heap::rounded(std::size_t bytes) const noexcept { return round_up(bytes, step_); }

Heap::Cached& Heap::bin(std::size_t bytes) noexcept { return cache_[(bytes / step_ * 0x9E3779B97F4A7C15U) >> 58]; }

Range* Heap::reuse(std::size_t bytes, bool may_wait) {
  constexpr int most_looked_at = 16;
  Cached& cached = bin(bytes);
  // The most recently used one: what it holds is the likeliest to be in a cache. Without a stream, the one that the
  // device is the likeliest to have finished with.
  const bool newest = arena_.mode == Arena::Mode::stream || !fences_.needed();
  Range* found = newest ? cached.back() : cached.front();
  for (int looked_at = 0; found != nullptr && found->bytes != bytes; ++looked_at) {
    found = looked_at == most_looked_at ? nullptr : newest ? Cached::previous(*found) : Cached::next(*found);
  }
  if (found == nullptr) return nullptr;
  if (!newest && !may_wait && !fences_.finished(found->fence)) return nullptr;
  arena_.order(found->fence);
  cached.remove(*found);
  --cached_;
  ++live_;
  found->state = RangeState::live;
  return found;
}

Range* Heap::fit(std::size_t bytes, bool may_wait) {
  if (Range* range = recall(bytes, may_wait)) return range;
  constexpr int most_looked_at = 8;
  auto best = free_.lower_bound({bytes, 0});
  if (best == free_.end()) {
    show_idle();
    best = free_.lower_bound({bytes, 0});
  }
  auto candidate = best;
  for (int looked_at = 0; looked_at < most_looked_at && candidate != free_.end(); ++looked_at, ++candidate) {
    const auto range = ranges_.find(candidate->second);
    if (ready(range->second, range->first, bytes)) return place(range, range->first, bytes);
  }
  if (best == free_.end() || !may_wait) return nullptr;
  return place(ranges_.find(best->second), best->second, bytes);
}

// Whether a part of a free range can be used without waiting on the host.
bool Heap::ready(const Range& range, Address address, std::size_t bytes) {
  if (arena_.mode == Arena::Mode::stream || !fences_.needed()) return true;
  if (!fences_.finished(range.fence)) return false;
  if (range.held) return true;
  for (auto mapping = first_mapping(address); mapping != mappings_.end() && mapping->first < address + bytes;
       ++mapping) {
    const Chunk& chunk = mapping->second.chunk;
    if (chunk.idle() && !fences_.finished(chunk.fence)) return false;
  }
  return true;
}

// Cuts a range where its size was not before.
Range* Heap::place(Ranges::iterator free, Address address, std::size_t bytes) {
  Range* const range = cut(free, address, bytes);
  if (!arena_.weights) remember(bytes, address);  // what lives long is packed as tightly as it goes
  return range;
}

// A free place where this size was before: of several, the one that was known first. Their order never changes: a load
// that repeats goes through the same places again. (If the one used last came last, a size with two places that lives
// once at a time would go back and forth between them for ever.)
Range* Heap::recall(std::size_t bytes, bool may_wait) {
  constexpr std::size_t most_tried = 32;
  const auto known = places_.find(bytes);
  if (known == places_.end()) return nullptr;
  std::deque<Address>& places = known->second;
  for (std::size_t i = 0; i < places.size() && i < most_tried; ++i) {
    const Address address = places[i];
    if (hidden_ != 0 && !show(address, address + bytes)) continue;
    auto range = ranges_.upper_bound(address);
    if (range == ranges_.begin()) continue;
    --range;
    if (range->second.state != RangeState::free || range->second.end() < address + bytes) continue;
    if (may_wait || ready(range->second, address, bytes)) return cut(range, address, bytes);
  }
  return nullptr;
}

// Shows what idle chunks have between two addresses. False, with nothing done, if somebody uses a part of it.
bool Heap::show(Address start, Address end) {
  const auto first = first_mapping(start);
  bool hidden = false;
  for (auto entry = first; entry != mappings_.end() && entry->first < end; ++entry) {
    if (entry->second.shown || entry->second.end() <= start) continue;
    if (!entry->second.chunk.idle()) return false;
    hidden = true;
  }
  if (!hidden) return true;
  for (auto range = ranges_.lower_bound(start); range != ranges_.end() && range->first < end; ++range) {
    if (range->second.state != RangeState::free) return false;
  }
  for (auto entry = first; entry != mappings_.end() && entry->first < end; ++entry) {
    if (!entry->second.shown && entry->second.end() > start) regain(entry->second);
  }
  return true;
}

// Shows every place of every idle chunk.
void Heap::show_idle() noexcept {
  if (hidden_ == 0) return;  // (most of what is hidden is of chunks in use: those are not looked at)
  chunks_.each_idle([this](Chunk& chunk) {
    for (Mapping* mapping : chunk.mappings) {
      if (&mapping->heap == this && !mapping->shown) regain(*mapping);
    }
  });
}

void Heap::remember(std::size_t bytes, Address address) {
  constexpr std::size_t most_places = 64;        // of one size
  constexpr std::size_t most_remembered = 8192;  // of all
  if (remembered_ >= most_remembered) {
    places_.clear();
    remembered_ = 0;
  }
  std::deque<Address>& places = places_[bytes];
  if (std::find(places.begin(), places.end(), address) != places.end()) return;
  if (places.size() >= most_places) {
    places.pop_front();
    --remembered_;
  }
  places.push_back(address);
  ++remembered_;
}

std::size_t Heap::missing(std::size_t bytes) const noexcept {
  const auto end = const_cast<Heap*>(this)->tail();
  if (end == ranges_.end()) return round_up(bytes, chunks_.granule());
  const std::size_t rest = round_up(bytes - std::min(end->second.bytes, bytes), chunks_.granule());
  return rest <= segments_.back().room() ? rest : round_up(bytes, chunks_.granule());  // in a segment of its own
}

std::size_t Heap::needed(std::size_t bytes) const noexcept {
  auto* const self = const_cast<Heap*>(this);
  self->show_idle();
  const std::size_t rest = missing(bytes);
  std::size_t idle = 0;
  if (const auto end = self->tail(); end != ranges_.end() && rest <= segments_.back().room()) {
    for (auto mapping = self->first_mapping(end->second.address); mapping != mappings_.end(); ++mapping) {
      if (mapping->second.chunk.idle()) idle += mapping->second.bytes();
    }
  }
  return idle + rest;
}

// The free range at the end of what is mapped, which growing makes longer.
Heap::Ranges::iterator Heap::tail() noexcept {
  if (segments_.empty() || ranges_.empty()) return ranges_.end();
  const Segment& segment = segments_.back();
  auto last = ranges_.lower_bound(segment.end);
  if (last == ranges_.begin()) return ranges_.end();
  --last;
  const Range& range = last->second;
  return range.end() == segment.end && range.segment == &segment && range.state == RangeState::free ? last
                                                                                                    : ranges_.end();
}

Heap::Segment& Heap::segment_for(std::size_t bytes) {
  if (segments_.empty() || segments_.back().room() < bytes) {
    const std::size_t granule = chunks_.granule();
    const std::size_t wanted = round_up(std::max(segment_bytes, 2 * bytes), granule);
    try {
      segments_.emplace_back(memory_, wanted);
    } catch (const DriverError&) {  // a process may have little address space (ulimit -v)
      segments_.emplace_back(memory_, round_up(bytes, granule));
    }
  }
  return segments_.back();
}

Range* Heap::grow(std::size_t bytes, Budget budget) {
  const std::size_t granule = chunks_.granule();
  show_idle();
  auto end = tail();
  std::size_t needed = missing(bytes);
  if (needed == 0) needed = granule;
  if (end != ranges_.end() && segments_.back().room() < needed) {
    end = ranges_.end();
    needed = round_up(bytes, granule);
  }
  const Address held = end != ranges_.end() && end->second.held ? end->first : 0;  // of a graph's heap
  if (held != 0 && end->second.bytes >= bytes) return place(end, held, bytes);
  // What the end of the segment has already must not be taken from it.
  std::vector<Chunk*> withheld;
  if (end != ranges_.end() && !end->second.held) {
    for (auto mapping = first_mapping(end->second.address);
         mapping != mappings_.end() && mapping->first < end->second.end(); ++mapping) {
      if (mapping->second.chunk.idle()) withheld.push_back(&mapping->second.chunk);
    }
  }
  for (Chunk* chunk : withheld) chunks_.withhold(*chunk);
  std::vector<Chunk*> gathered;
  try {
    const std::size_t quantum = std::clamp(std::bit_floor(mapped_ / 32 + 1), granule, std::max(granule, most_quantum));
    if (segment_for(needed).room() >= round_up(needed, quantum)) {
      gathered = chunks_.gather(round_up(needed, quantum), {budget.fresh, budget.soft, true});
    }
    if (gathered.empty()) gathered = chunks_.gather(needed, budget);
  } catch (...) {
    for (Chunk* chunk : withheld) chunks_.put_back(*chunk);
    throw;
  }
  for (Chunk* chunk : withheld) chunks_.put_back(*chunk);
  if (gathered.empty()) return nullptr;

  // Large chunks first, as they were gathered: large requests then cross few borders.
  Segment& segment = segments_.back();
  std::size_t done = 0;
  try {
    for (; done < gathered.size(); ++done) {
      Chunk& chunk = *gathered[done];
      chunk.mappings.reserve(chunk.mappings.size() + 1);
      auto [mapping, inserted] = mappings_.try_emplace(segment.end, memory_, *this, &segment, chunk, segment.end);
      chunks_.add(mapping->second);
      ++hidden_;
      ++segment.mappings;
      segment.end += chunk.bytes();
      mapped_ += chunk.bytes();
      chunks_.put_back(chunk);
      regain(mapping->second);
      chunks_.bound_mappings(chunk);
    }
  } catch (...) {
    for (; done < gathered.size(); ++done) chunks_.put_back(*gathered[done]);
    throw;
  }
  if (held != 0) {
    // Neighbours join only if both hold their chunks: what is missing is held too.
    const auto fresh = tail();
    const auto before = ranges_.find(held);
    const std::size_t front = bytes - before->second.bytes;
    if (fresh == ranges_.end() || before->second.end() != fresh->first || fresh->second.bytes < front) {
      throw std::logic_error("a heap that grew has no room at its end");  // cannot be
    }
    order(fresh->second, fresh->first, front);
    if (fresh->second.bytes > front) (void)split(fresh, fresh->first + front);
    hold(fresh->second);
    return place(merge(fresh), held, bytes);
  }
  end = tail();
  if (end == ranges_.end() || end->second.bytes < bytes) {
    throw std::logic_error("a heap that grew has no room at its end");  // cannot be
  }
  return place(end, end->first, bytes);
}

// Makes a live range of a part of a free one.
Range* Heap::cut(Ranges::iterator free, Address address, std::size_t bytes) {
  assert(free->second.state == RangeState::free && free->second.address <= address &&
         free->second.end() >= address + bytes);
  order(free->second, address, bytes);
  if (address != free->second.address) free = split(free, address);
  if (free->second.bytes != bytes) (void)split(free, address + bytes);
  Range& range = free->second;
  table_.add(range);
  free_.erase({range.bytes, range.address});
  if (!range.held) hold(range);
  range.state = RangeState::live;
  range.fence = 0;
  ++live_;
  return &range;
}

// Makes two free ranges of one; returns the second.
Heap::Ranges::iterator Heap::split(Ranges::iterator free, Address at) {
  Range& left = free->second;
  const auto right = insert(at, left.end() - at, left.segment, left.fence);
  right->second.held = left.held;
  free_.erase({left.bytes, left.address});
  left.bytes = at - left.address;
  free_.emplace(left.bytes, left.address);
  return right;
}

// Waits for what may still touch a part of a free range: on the stream, or on the host if there is none.
void Heap::order(const Range& range, Address address, std::size_t bytes) {
  arena_.order(range.fence);
  if (range.held) return;
  for (auto mapping = first_mapping(address); mapping != mappings_.end() && mapping->first < address + bytes;
       ++mapping) {
    if (mapping->second.chunk.idle()) chunks_.order(mapping->second.chunk, arena_);
  }
}

Heap::Mappings::iterator Heap::first_mapping(Address address) noexcept {
  auto mapping = mappings_.upper_bound(address);
  if (mapping == mappings_.begin()) return mappings_.end();
  return --mapping;
}

void Heap::hold(Range& range) noexcept {
  for (auto entry = first_mapping(range.address); entry != mappings_.end() && entry->first < range.end(); ++entry) {
    Mapping& mapping = entry->second;
    if (mapping.chunk.idle()) chunks_.begin_use(mapping);
    assert(mapping.chunk.current == &mapping);
    mapping.chunk.used += std::min(range.end(), mapping.end()) - std::max(range.address, mapping.address);
  }
  range.held = true;
}

void Heap::unhold(Range& range) noexcept {
  const Fence fence = std::max(range.fence, arena_.last);
  for (auto entry = first_mapping(range.address); entry != mappings_.end() && entry->first < range.end(); ++entry) {
    Mapping& mapping = entry->second;
    assert(mapping.chunk.current == &mapping);
    mapping.chunk.used -= std::min(range.end(), mapping.end()) - std::max(range.address, mapping.address);
    mapping.chunk.fence = std::max(mapping.chunk.fence, fence);
    if (mapping.chunk.used == 0) chunks_.end_use(mapping, arena_.serial);
  }
  range.held = false;
}

void Heap::release(Range& range) noexcept {
  assert(range.state == RangeState::live);
  range.state = RangeState::cached;
  range.slab = nullptr;
  range.requested = 0;
  bin(range.bytes).push_back(range);
  --live_;
  ++cached_;
}

void Heap::flush() noexcept {
  if (cached_ == 0) return;
  for (Cached& cached : cache_) {
    while (Range* range = cached.front()) {
      cached.remove(*range);
      table_.remove(*range);
      range->state = RangeState::free;
      if (arena_.mode != Arena::Mode::capture) unhold(*range);
      const auto self = ranges_.find(range->address);
      free_.emplace(range->bytes, range->address);
      merge(self);
    }
  }
  cached_ = 0;
}

void Heap::publish() noexcept {
  for (auto range = ranges_.begin(); range != ranges_.end(); ++range) {
    if (range->second.state != RangeState::free || !range->second.held) continue;
    unhold(range->second);
    range = merge(range);
  }
}

Heap::Ranges::iterator Heap::insert(Address address, std::size_t bytes, const void* segment, Fence fence) {
  const auto range = ranges_.try_emplace(address, *this, address, bytes, segment).first;
  range->second.fence = fence;
  free_.emplace(bytes, address);
  return range;
}

// Whether a chunk shows in both of two neighbouring ranges.
bool Heap::aliased(const Range& left, const Range& right) noexcept {
  const Range& one = left.bytes < right.bytes ? left : right;
  const Range& other = left.bytes < right.bytes ? right : left;
  for (auto entry = first_mapping(one.address); entry != mappings_.end() && entry->first < one.end(); ++entry) {
    for (const Mapping* again : entry->second.chunk.mappings) {
      if (&again->heap == this && again != &entry->second && again->address < other.end() &&
          again->end() > other.address) {
        return true;
      }
    }
  }
  return false;
}

// Joins a free range with its free neighbours.
Heap::Ranges::iterator Heap::merge(Ranges::iterator range) noexcept {
  const auto joins = [this](const Range& left, const Range& right) {
    return left.state == RangeState::free && right.state == RangeState::free && left.end() == right.address &&
           left.segment == right.segment && left.held == right.held && !aliased(left, right);
  };
  const auto join = [this](Ranges::iterator left, Ranges::iterator right) {
    free_.erase({left->second.bytes, left->first});
    free_.erase({right->second.bytes, right->first});
    left->second.bytes += right->second.bytes;
    left->second.fence = std::max(left->second.fence, right->second.fence);
    free_.emplace(left->second.bytes, left->first);
    ranges_.erase(right);
  };
  if (const auto next = std::next(range); next != ranges_.end() && joins(range->second, next->second))
    join(range, next);
  if (range != ranges_.begin()) {
    const auto previous = std::prev(range);
    if (joins(previous->second, range->second)) {
      join(previous, range);
      return previous;
    }
  }
  return range;
}

void Heap::lose(Mapping& mapping) noexcept {
  mapping.shown = false;
  ++hidden_;
  // All of it is free, in one range or in several that were kept apart.
  auto found = ranges_.upper_bound(mapping.address);
  assert(found != ranges_.begin());
  --found;
  while (found != ranges_.end() && found->first < mapping.end()) {
    const auto next = std::next(found);
    Range& range = found->second;
    assert(range.state == RangeState::free && !range.held && range.end() > mapping.address);
    const Address end = range.end();
    free_.erase({range.bytes, range.address});
    if (end > mapping.end()) (void)insert(mapping.end(), end - mapping.end(), range.segment, range.fence);
    if (range.address < mapping.address) {
      range.bytes = mapping.address - range.address;
      free_.emplace(range.bytes, range.address);
    } else {
      ranges_.erase(found);
    }
    found = next;
  }
}

void Heap::regain(Mapping& mapping) noexcept {
  --hidden_;
  mapping.shown = true;
  merge(insert(mapping.address, mapping.bytes(), mapping.segment, 0));
}

bool Heap::clear() noexcept {
  for (auto entry = mappings_.begin(); entry != mappings_.end();) {
    Mapping& mapping = (entry++)->second;
    try {
      if (mapping.chunk.current == &mapping || !fences_.finished(std::max(mapping.fence, mapping.chunk.fence)))
        return false;
    } catch (const DriverError&) {
      return false;
    }
    drop(mapping);
  }
  return true;
}

void Heap::drop(Mapping& mapping) noexcept {
  assert(mapping.chunk.current != &mapping);
  if (mapping.shown) lose(mapping);  // free ranges may cover it
  --hidden_;
  auto* const segment = static_cast<Segment*>(mapping.segment);
  const auto self = mappings_.find(mapping.address);
  if (mapping.end() == segment->end) {  // the address space can be used again
    segment->end = segment->reservation.address();
    if (self != mappings_.begin() && std::prev(self)->second.segment == segment) {
      segment->end = std::prev(self)->second.end();
    }
  }
  mapped_ -= mapping.bytes();
  chunks_.remove(mapping);
  mappings_.erase(self);
  if (--segment->mappings == 0) {
    const auto entry =
        std::find_if(segments_.begin(), segments_.end(), [&](const Segment& each) { return &each == segment; });
    segments_.erase(entry);
  }
}

void Heap::check_invariants() const {
  std::size_t live = 0;
  std::size_t cached = 0;
  std::size_t free = 0;
  std::size_t covered = 0;
  const Range* previous = nullptr;
  for (const auto& [address, range] : ranges_) {
    require(range.address == address && range.bytes != 0 && range.bytes % step_ == 0 && address % step_ == 0,
            "ranges have sizes and addresses of whole steps");
    require(previous == nullptr || previous->end() <= address, "ranges do not overlap");
    previous = &range;
    covered += range.bytes;
    if (range.state == RangeState::live) ++live;
    if (range.state == RangeState::cached) ++cached;
    if (range.state == RangeState::free) {
      ++free;
      require(free_.contains({range.bytes, address}), "every free range is found by its size");
    } else {
      require(range.held, "a range in use holds its chunks");
    }
  }
  require(live == live_ && cached == cached_ && free == free_.size(), "ranges are counted by state");

  std::size_t visible = 0;
  std::size_t mapped = 0;
  std::size_t hidden = 0;
  auto range = ranges_.begin();
  for (const auto& [address, mapping] : mappings_) {
    require(mapping.address == address && &mapping.heap == this, "a mapping knows its place");
    mapped += mapping.bytes();
    const Chunk& chunk = mapping.chunk;
    require(std::count(chunk.mappings.begin(), chunk.mappings.end(), &mapping) == 1, "a chunk knows its mappings");
    while (range != ranges_.end() && range->second.end() <= address) ++range;
    std::size_t held = 0;
    std::size_t seen = 0;
    for (auto over = range; over != ranges_.end() && over->first < mapping.end(); ++over) {
      const std::size_t bytes =
          std::min(over->second.end(), mapping.end()) - std::max(over->second.address, mapping.address);
      seen += bytes;
      if (over->second.held) held += bytes;
    }
    for (const Mapping* again : chunk.mappings) {
      require(again == &mapping || &again->heap != this || range == ranges_.end() ||
                  again->address >= range->second.end() || again->end() <= range->second.address ||
                  range->second.address > address,
              "no range shows a chunk twice");
    }
    require(chunk.idle() || mapping.shown == (chunk.current == &mapping), "a chunk in use shows at one place");
    if (!mapping.shown) ++hidden;
    require(seen == (mapping.shown ? mapping.bytes() : 0), "ranges cover exactly what is mapped and shown");
    require(held == (chunk.current == &mapping ? chunk.used : 0), "a chunk counts the bytes that are held in it");
    visible += seen;
  }
  require(visible == covered, "every byte of a range is mapped exactly once");
  require(mapped == mapped_, "mapped bytes are counted");
  require(hidden == hidden_, "mappings that are not shown are counted");
}

}  // namespace glake
