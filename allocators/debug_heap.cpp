#include "debug_heap.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <iterator>

#include "pool.hpp"

namespace glake {
namespace {

constexpr std::size_t most_found = 1000;
constexpr std::size_t most_shown = 32;
constexpr std::size_t half = most_bytes / 2;

std::string hexadecimal(Address address) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<std::size_t>(address));
  return text;
}

std::string count(std::size_t number, const char* noun) {
  return std::to_string(number) + " " + noun + (number == 1 ? "" : "s");
}

std::int64_t now_ns() {
  using std::chrono::duration_cast;
  return duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// "22:15:14.123 UTC by thread 7 at", and the stack below it.
std::string whence(std::int64_t time_ns, std::uint64_t thread, const std::string& stack) {
  const std::time_t seconds = time_ns / 1'000'000'000;
  std::tm parts{};
  gmtime_r(&seconds, &parts);
  char text[64];
  std::snprintf(text, sizeof text, "%02d:%02d:%02d.%03d UTC by thread %llu at", parts.tm_hour, parts.tm_min,
                parts.tm_sec, static_cast<int>(time_ns / 1'000'000 % 1000), static_cast<unsigned long long>(thread));
  std::string out = text;
  std::size_t begin = 0;
  while (begin < stack.size()) {
    const std::size_t end = std::min(stack.find('\n', begin), stack.size());
    out += "\n    " + stack.substr(begin, end - begin);
    begin = end + 1;
  }
  return stack.empty() ? out + "\n    [no stack was captured]" : out;
}

std::string history(const AllocationRecord& allocation, const std::optional<FreeRecord>& freed) {
  std::string text = "\nAllocated " + whence(allocation.time_ns, allocation.thread, allocation.stack);
  if (freed) text += "\nFreed " + whence(freed->time_ns, freed->thread, freed->stack);
  return text;
}

std::string name(const AllocationRecord& record, std::string (*label_name)(std::uint32_t)) {
  std::string text =
      "block of " + count(record.bytes, "byte") + " at " + hexadecimal(record.address) + " (" + tag_name(record.tag);
  if (const std::string label = label_name != nullptr ? label_name(record.label)
                                : record.label != 0   ? std::to_string(record.label)
                                                      : std::string();
      !label.empty()) {
    text += ", label '" + label + "'";
  }
  return text + ")";
}

// Where an offset from the beginning of an allocation is.
std::string where(std::int64_t offset, std::size_t bytes) {
  const auto size = static_cast<std::int64_t>(bytes);
  if (offset < 0) return count(static_cast<std::size_t>(-offset), "byte") + " before the beginning of";
  if (offset >= size) {
    return offset == size ? "at the end of"
                          : count(static_cast<std::size_t>(offset - size), "byte") + " behind the end of";
  }
  return "at offset " + std::to_string(offset) + " in";
}

}  // namespace

const char* kind_name(Corruption::Kind kind) noexcept {
  switch (kind) {
    case Corruption::Kind::overrun:
      return "overrun";
    case Corruption::Kind::underrun:
      return "underrun";
    case Corruption::Kind::use_after_free:
      return "use after free";
    case Corruption::Kind::stray:
      return "stray write";
  }
  return "unknown";
}

const char* found_name(Corruption::Found found) noexcept {
  switch (found) {
    case Corruption::Found::at_free:
      return "when it was freed";
    case Corruption::Found::at_reuse:
      return "when its slot was used again";
    case Corruption::Found::at_check:
      return "by check()";
    case Corruption::Found::at_release:
      return "when its slab was given back";
  }
  return "unknown";
}

std::string describe(const Corruption& corruption, std::string (*label_name)(std::uint32_t)) {
  const AllocationRecord& allocation = corruption.allocation;
  std::string text = std::string(kind_name(corruption.kind)) + ": " + count(corruption.overwritten, "byte");
  if (corruption.extent != corruption.overwritten) text += " of " + std::to_string(corruption.extent) + " in a row";
  text += corruption.overwritten == 1 ? " was overwritten, " : " were overwritten, beginning ";
  text += where(corruption.offset, allocation.bytes) + " ";
  if (corruption.kind == Corruption::Kind::stray) {
    text += "a slot at " + hexadecimal(allocation.address) + " that was never handed out";
  } else {
    text += std::string(corruption.freed ? "the freed " : "the ") + name(allocation, label_name);
  }
  char byte[8];
  text += ". Found " + std::string(found_name(corruption.found_at)) + ": the bytes are";
  for (const unsigned char value : corruption.found) {
    std::snprintf(byte, sizeof byte, " %02x", value);
    text += byte;
  }
  if (corruption.found.size() < corruption.extent) text += " ...";
  std::snprintf(byte, sizeof byte, "%02x", corruption.expected);
  text += std::string(", and each should be ") + byte + ".";
  if (corruption.kind == Corruption::Kind::stray) return text;
  return text + history(allocation, corruption.freed);
}

// Reads zones, from a copy of a whole slab where there is one.
class DebugHeap::Reader {
 public:
  explicit Reader(VirtualMemory& memory) : memory_(memory) {}
  void copy(const Region& region) {
    whole_.resize(region.bytes);
    memory_.read(whole_.data(), region.base, region.bytes);
    base_ = region.base;
  }
  [[nodiscard]] const unsigned char* bytes(Address address, std::size_t bytes) {
    if (!whole_.empty() && address >= base_ && address + bytes <= base_ + whole_.size()) {
      return whole_.data() + (address - base_);
    }
    part_.resize(bytes);
    memory_.read(part_.data(), address, bytes);
    return part_.data();
  }

 private:
  VirtualMemory& memory_;
  Address base_ = 0;
  std::vector<unsigned char> whole_;
  std::vector<unsigned char> part_;
};

DebugHeap::Region::Region(VirtualMemory& owner, std::size_t guard, std::size_t size)
    : memory(owner), range(owner, size + 2 * guard), physical(), base(range.address() + guard), bytes(size) {
  physical.emplace(owner, size);
  memory.map(base, physical->handle());
}

DebugHeap::Region::~Region() { give_back(); }

void DebugHeap::Region::give_back() noexcept {
  if (!physical) return;
  memory.unmap(base, bytes);
  physical.reset();
}

DebugHeap::DebugHeap(VirtualMemory& memory, DebugOptions options)
    : memory_(memory), options_(options), granule_(memory.granularity()) {
  constexpr std::size_t device_granule = std::size_t{1} << 20;  // a device's granule is at least that
  if (options_.small_limit == 0) options_.small_limit = granule_ >= device_granule ? granule_ / 2 : 4096;
}

DebugHeap::~DebugHeap() = default;

// 0: large
std::size_t DebugHeap::stride_for(std::size_t bytes) const noexcept {
  if (options_.guard_all || bytes >= options_.small_limit) return 0;
  const std::size_t stride = zone_before + round_up(bytes + least_zone_behind, alignment);
  return round_up(stride, std::max(alignment, std::bit_floor(stride) / 4));  // four classes per doubling
}

std::size_t DebugHeap::slab_bytes(std::size_t stride) const noexcept { return round_up(4 * stride, granule_); }

// Saturates: nobody has as much.
std::size_t DebugHeap::region_bytes(std::size_t bytes) const noexcept {
  return round_up(std::min(bytes, half), granule_);
}

bool DebugHeap::make_room(std::size_t bytes) {
  if (active() + bytes > options_.limit) return false;
  if (reserved() + bytes > options_.limit) trim(options_.limit - bytes);
  return true;
}

std::unique_ptr<DebugHeap::Region> DebugHeap::make_region(std::size_t bytes) {
  for (;;) {
    try {
      return std::make_unique<Region>(memory_, granule_, bytes);
    } catch (const DriverError&) {
      // Empty slabs hold memory, and the quarantine holds addresses.
      if (trim(0) == 0 && quarantine_.empty()) throw;
      while (!quarantine_.empty()) {
        Region* oldest = quarantine_.front();
        quarantine_.pop_front();
        regions_.erase(oldest->range.address());
      }
    }
  }
}

Address DebugHeap::allocate(std::size_t bytes, Tag tag, StreamHandle stream, std::uint32_t label, std::string stack) {
  if (!pending_.empty() && drain()) settle();
  AllocationRecord record{last_id_ + 1,    0, bytes, tag, label, stream, static_cast<std::uint64_t>(gettid()), now_ns(),
                          std::move(stack)};
  auto graph = watch(stream);
  const std::size_t stride = stride_for(bytes);
  const Address address = stride == 0 ? allocate_large(std::move(record)) : allocate_small(std::move(record), stride);
  if (address == 0) return 0;
  if (graph) captured_.insert_or_assign(address, std::move(graph));
  ++last_id_;
  ++live_count_;
  requested_ += bytes;
  return address;
}

Address DebugHeap::allocate_large(AllocationRecord record) {
  const std::size_t bytes = region_bytes(record.bytes);
  if (!make_room(bytes)) return 0;
  std::unique_ptr<Region> region = make_region(bytes);
  const Address end = region->base + bytes;
  record.address = (end - record.bytes) / alignment * alignment;
  const Address behind = record.address + record.bytes;
  if (record.address != region->base) memory_.fill(region->base, record.address - region->base, canary, no_stream);
  if (behind != end) memory_.fill(behind, end - behind, canary, no_stream);
  region->tag = record.tag;
  Region& kept = *region;
  const Address address = record.address;
  kept.slots.push_back({State::live, kept.base, end, 0, std::move(record), std::nullopt});
  active_.try_emplace(kept.tag);
  regions_.emplace(kept.range.address(), std::move(region));
  reserved_ += bytes;
  use(kept);
  return address;
}

Address DebugHeap::allocate_small(AllocationRecord record, std::size_t stride) {
  const SlabKind kind{stride, record.tag};
  std::deque<Place>& places = free_slots_[kind];
  if (places.empty()) {
    if (!make_room(slab_bytes(stride))) return 0;
    add_slab(stride, record.tag);
  }
  const Place place = places.front();
  Slot& slot = place.slot();
  record.address = slot.begin + zone_before;
  std::vector<Corruption> found;
  Reader reader(memory_);
  inspect(reader, slot, Corruption::Found::at_reuse, found);
  if (!found.empty()) {
    memory_.fill(slot.begin, slot.end - slot.begin, canary, no_stream);
    remember(found, true);
  } else if (record.bytes < slot.poisoned) {
    memory_.fill(record.address + record.bytes, slot.poisoned - record.bytes, canary, no_stream);
  }
  places.pop_front();
  const Address address = record.address;
  slot.state = State::live;
  slot.poisoned = 0;
  slot.allocation = std::move(record);
  slot.freed.reset();
  use(*place.region);
  return address;
}

void DebugHeap::add_slab(std::size_t stride, Tag tag) {
  std::unique_ptr<Region> region = make_region(slab_bytes(stride));
  memory_.fill(region->base, region->bytes, canary, no_stream);
  region->stride = stride;
  region->tag = tag;
  region->slots.resize(region->bytes / stride);
  Address begin = region->base;
  std::deque<Place> places;
  for (std::size_t index = 0; index < region->slots.size(); ++index) {
    Slot& slot = region->slots[index];
    slot.begin = begin;
    slot.end = begin += stride;
    slot.allocation.address = slot.begin + zone_before;
    slot.allocation.tag = tag;
    places.push_back({region.get(), index});
  }
  region->slots.back().end = region->base + region->bytes;  // what is left over is zone
  active_.try_emplace(tag);
  reserved_ += region->bytes;
  ++slab_count_;
  free_slots_[{stride, tag}].swap(places);  // was empty
  regions_.emplace(region->range.address(), std::move(region));
}

void DebugHeap::use(Region& region) noexcept {
  if (region.used++ != 0) return;
  active_[region.tag] += region.bytes;
  active_total_ += region.bytes;
}

DebugHeap::Place DebugHeap::find_live(Address address, const std::string& stack) const {
  auto after = regions_.upper_bound(address);
  Region* region = after == regions_.begin() ? nullptr : std::prev(after)->second.get();
  if (region != nullptr && address >= region->range.address() + region->range.bytes()) region = nullptr;
  if (region != nullptr && address >= region->base && address < region->base + region->bytes) {
    const std::size_t index =
        region->stride == 0 ? 0 : std::min((address - region->base) / region->stride, region->slots.size() - 1);
    const Slot& slot = region->slots[index];
    if (slot.state == State::live && slot.allocation.address == address) return {region, index};
  }
  refuse(address, region, stack);
}

void DebugHeap::refuse(Address address, const Region* region, const std::string& stack) const {
  const std::string caller = "\nThis free: " + whence(now_ns(), static_cast<std::uint64_t>(gettid()), stack);
  const std::string received = "address " + hexadecimal(address);
  if (region == nullptr) {
    throw InvalidPointer("foreign free: " + received +
                         " was never handed out by this pool, or its block was freed so long ago that it left the "
                         "quarantine of " +
                         count(options_.quarantine, "region") + ". Free what allocate() returned, once." + caller);
  }
  const std::size_t index = region->stride == 0 || address < region->base
                                ? 0
                                : std::min((address - region->base) / region->stride, region->slots.size() - 1);
  const Slot& slot = region->slots[index];
  const AllocationRecord& allocation = slot.allocation;
  const std::string block = name(allocation, options_.label_name);
  if (slot.state == State::unused) {
    throw InvalidPointer("foreign free: " + received +
                         " is in a slab of this pool, in a slot that was never handed out. Free what allocate() "
                         "returned, once." +
                         caller);
  }
  if (address == allocation.address) {
    throw InvalidPointer("double free: " + received + " is that of a " + block +
                         " that was freed already. Each block may be freed once: remove one of the two frees." +
                         history(allocation, slot.freed) + caller);
  }
  const auto offset = static_cast<std::int64_t>(address - allocation.address);
  throw InvalidPointer("interior pointer: " + received + " is " + where(offset, allocation.bytes) + " a " +
                       (slot.state == State::live ? "live " : "freed ") + block + ". Free the block's own address, " +
                       hexadecimal(allocation.address) + "." + history(allocation, slot.freed) + caller);
}

bool DebugHeap::drain() {
  StreamOrder* streams = memory_.streams();
  return streams == nullptr || streams->synchronize_all();
}

// The captures that may have recorded work on the allocation: that of its stream, and any where it has none.
// Notices that a stream is being captured, or is not any more. Returns the flag of the graph, if there will be one.
std::shared_ptr<std::atomic<bool>> DebugHeap::watch(StreamHandle stream) {
  StreamOrder* const order = memory_.streams();
  if (order == nullptr || stream == no_stream) return nullptr;
  const std::optional<StreamState> state = order->state(stream);
  if (!state) return nullptr;
  for (Watch& known : watches_) {
    if (known.stream != stream) continue;
    known.may_be_capturing = known.capture == state->capture;
    if (known.may_be_capturing) return known.dead;
  }
  if (state->capture == 0) return nullptr;
  auto dead = std::make_shared<std::atomic<bool>>(false);
  watches_.push_back({stream, state->capture, dead});
  try {
    order->watch_graph(stream, dead);
  } catch (...) {
    watches_.pop_back();
    throw;
  }
  return dead;
}

// The graphs that may use an allocation: the one in whose capture it was made, and those that are being captured on
// its stream, or on any if it was made for none.
DebugHeap::Graphs DebugHeap::graphs_of(const Slot& slot) {
  std::erase_if(watches_, [](const Watch& watch) { return watch.dead->load(); });
  Graphs graphs;
  if (const auto own = captured_.find(slot.allocation.address); own != captured_.end()) {
    if (!own->second->load()) graphs.push_back(own->second);
    captured_.erase(own);
  }
  for (const Watch& known : watches_) {
    if (!known.may_be_capturing) continue;
    if (slot.allocation.stream == no_stream || slot.allocation.stream == known.stream) graphs.push_back(known.dead);
  }
  return graphs;
}

void DebugHeap::deallocate(Address address, std::string stack) {
  const Place place = find_live(address, stack);
  Slot& slot = place.slot();
  FreeRecord freed{static_cast<std::uint64_t>(gettid()), now_ns(), std::move(stack)};
  std::vector<Corruption> found;
  Graphs graphs = graphs_of(slot);
  const bool drained = graphs.empty() && drain();
  if (drained) {
    settle();
    found = clear(place, Corruption::Found::at_free);
  } else {
    pending_.push_back({place, std::move(graphs)});
  }
  slot.state = drained ? State::freed : State::pending;
  slot.freed = std::move(freed);
  requested_ -= slot.allocation.bytes;
  --live_count_;
  if (drained) finish(place);  // the slot may be gone after this
  if (found.empty()) return;
  remember(found, false);
  std::string text;
  for (const Corruption& corruption : found) {
    text += (text.empty() ? "" : "\n") + describe(corruption, options_.label_name);
  }
  throw CorruptionError(text, std::move(found));
}

void DebugHeap::settle() {
  for (auto next = pending_.begin(); next != pending_.end();) {
    const bool gone =
        std::all_of(next->graphs.begin(), next->graphs.end(), [](const auto& dead) { return dead->load(); });
    if (!gone) {
      ++next;
      continue;
    }
    const Place place = next->place;
    remember(clear(place, Corruption::Found::at_free), true);
    next = pending_.erase(next);
    place.slot().state = State::freed;
    finish(place);
  }
}

std::vector<Corruption> DebugHeap::clear(Place place, Corruption::Found when) {
  const Slot& slot = place.slot();
  const AllocationRecord& allocation = slot.allocation;
  std::vector<Corruption> found;
  Reader reader(memory_);
  inspect(reader, slot, when, found);
  if (place.region->stride == 0) {
    if (options_.wipe) memory_.fill(allocation.address, allocation.bytes, 0, no_stream);
    return found;
  }
  // The poison comes last: where a call fails, the zones are whole and the allocation is still live.
  if (!found.empty()) {
    memory_.fill(slot.begin, zone_before, canary, no_stream);
    memory_.fill(allocation.address + allocation.bytes, slot.end - allocation.address - allocation.bytes, canary,
                 no_stream);
  }
  memory_.fill(allocation.address, allocation.bytes, poison, no_stream);
  return found;
}

void DebugHeap::finish(Place place) noexcept {
  Region& region = *place.region;
  if (--region.used == 0) {
    active_[region.tag] -= region.bytes;
    active_total_ -= region.bytes;
  }
  if (region.stride == 0) {
    quarantine(region);
  } else {
    Slot& slot = place.slot();
    slot.poisoned = slot.allocation.bytes;
    try {
      free_slots_[{region.stride, region.tag}].push_back(place);
    } catch (...) {  // out of ordinary memory: the slot is not used again
    }
  }
}

void DebugHeap::quarantine(Region& region) noexcept {
  region.give_back();
  reserved_ -= region.bytes;
  try {
    quarantine_.push_back(&region);
  } catch (...) {  // out of ordinary memory: the addresses go at once
    regions_.erase(region.range.address());
    return;
  }
  while (quarantine_.size() > options_.quarantine) {
    Region* oldest = quarantine_.front();
    quarantine_.pop_front();
    regions_.erase(oldest->range.address());
  }
}

void DebugHeap::retire_slab(Region& region) {
  Reader reader(memory_);
  reader.copy(region);
  std::vector<Corruption> found;
  for (const Slot& slot : region.slots) inspect(reader, slot, Corruption::Found::at_release, found);
  remember(found, true);
  std::erase_if(free_slots_[{region.stride, region.tag}], [&](const Place& place) { return place.region == &region; });
  --slab_count_;
  quarantine(region);
}

std::vector<DebugHeap::Region*> DebugHeap::empty_slabs() const {
  std::vector<Region*> empty;
  for (const auto& [address, region] : regions_) {
    if (region->stride != 0 && region->used == 0 && region->physical) empty.push_back(region.get());
  }
  return empty;
}

std::size_t DebugHeap::trim(std::size_t target) {
  const std::size_t before = reserved();
  if (before <= target) return 0;
  if (!pending_.empty() && drain()) settle();
  for (Region* slab : empty_slabs()) {
    if (reserved() <= target) break;
    retire_slab(*slab);
  }
  return before - reserved();
}

bool DebugHeap::set_limit(std::size_t limit) {
  if (active() > limit) return false;
  trim(limit);
  options_.limit = limit;
  return true;
}

bool DebugHeap::pin(std::size_t bytes) {
  if (bytes > options_.limit || !make_room(bytes)) return false;
  pinned_ += bytes;
  return true;
}

void DebugHeap::unpin(std::size_t bytes) noexcept { pinned_ -= bytes; }

std::size_t DebugHeap::needed_limit(std::size_t bytes, Tag tag) const noexcept {
  const std::size_t stride = stride_for(bytes);
  if (stride == 0) return active() + region_bytes(bytes);
  if (const auto places = free_slots_.find({stride, tag}); places != free_slots_.end()) {
    for (const Place& place : places->second) {
      if (place.region->used != 0) return active();
    }
  }
  return active() + slab_bytes(stride);
}

std::size_t DebugHeap::active(Tag tag) const noexcept {
  const auto found = active_.find(tag);
  return found == active_.end() ? 0 : found->second;
}

std::vector<AllocationRecord> DebugHeap::live() const {
  std::vector<AllocationRecord> records;
  records.reserve(live_count_);
  for (const auto& [address, region] : regions_) {
    for (const Slot& slot : region->slots) {
      if (slot.state == State::live) records.push_back(slot.allocation);
    }
  }
  std::sort(records.begin(), records.end(), [](const auto& one, const auto& other) { return one.id < other.id; });
  return records;
}

std::vector<Corruption> DebugHeap::check() {
  if (drain()) settle();
  std::vector<Corruption> now;
  for (const auto& [address, region] : regions_) {
    if (!region->physical) continue;
    Reader reader(memory_);
    if (region->stride != 0) reader.copy(*region);
    for (const Slot& slot : region->slots) inspect(reader, slot, Corruption::Found::at_check, now);
  }
  std::vector<Corruption> found(found_.begin(), found_.end());
  found.insert(found.end(), std::make_move_iterator(now.begin()), std::make_move_iterator(now.end()));
  found_.clear();
  return found;
}

void DebugHeap::inspect(Reader& reader, const Slot& slot, Corruption::Found when,
                        std::vector<Corruption>& found) const {
  using Kind = Corruption::Kind;
  const AllocationRecord& allocation = slot.allocation;
  const bool in_use = slot.state == State::live || slot.state == State::pending;
  const Address behind = allocation.address + (in_use ? allocation.bytes : slot.poisoned);

  const auto compare = [&](Address begin, Address end, unsigned char expected, Kind kind) {
    if (begin == end) return;
    const unsigned char* bytes = reader.bytes(begin, end - begin);
    const unsigned char* const last = bytes + (end - begin);
    const auto wrong = [&](unsigned char byte) { return byte != expected; };
    const unsigned char* first = std::find_if(bytes, last, wrong);
    if (first == last) return;
    Corruption corruption;
    corruption.kind = in_use ? kind : slot.state == State::freed ? Kind::use_after_free : Kind::stray;
    corruption.found_at = when;
    corruption.allocation = allocation;
    corruption.freed = slot.freed;
    corruption.offset = static_cast<std::int64_t>(begin + static_cast<std::size_t>(first - bytes) - allocation.address);
    corruption.overwritten = static_cast<std::size_t>(std::count_if(first, last, wrong));
    const unsigned char* back = last;
    while (!wrong(back[-1])) --back;
    corruption.extent = static_cast<std::size_t>(back - first);
    corruption.expected = expected;
    corruption.found.assign(first, first + std::min(corruption.extent, most_shown));
    found.push_back(std::move(corruption));
  };
  compare(slot.begin, allocation.address, canary, Kind::underrun);
  if (!in_use) compare(allocation.address, behind, poison, Kind::use_after_free);
  compare(behind, slot.end, canary, Kind::overrun);
}

void DebugHeap::remember(const std::vector<Corruption>& found, bool print) noexcept {
  try {
    for (const Corruption& corruption : found) {
      if (print) std::fprintf(stderr, "glake-infer: %s\n", describe(corruption, options_.label_name).c_str());
      if (found_.size() == most_found) found_.pop_front();
      found_.push_back(corruption);
    }
  } catch (...) {  // out of ordinary memory: the program has other troubles
  }
}

void DebugHeap::check_invariants() const {
  const auto require = [](bool holds, const char* invariant) {
    if (!holds) throw std::logic_error(std::string("the debug heap's invariant does not hold: ") + invariant);
  };
  std::size_t mapped = 0, used = 0, bytes_live = 0, live_slots = 0, pending_slots = 0, gone = 0, slab_regions = 0;
  std::size_t reusable = 0, unused_or_freed = 0;
  for (const auto& [address, region] : regions_) {
    std::size_t in_use = 0;
    for (const Slot& slot : region->slots) {
      live_slots += slot.state == State::live;
      pending_slots += slot.state == State::pending;
      in_use += slot.state == State::live || slot.state == State::pending;
      if (slot.state == State::live) bytes_live += slot.allocation.bytes;
      require(slot.begin <= slot.allocation.address, "an allocation begins in its slot");
      require(slot.allocation.address + slot.allocation.bytes <= slot.end, "an allocation ends in its slot");
      require(slot.allocation.address % alignment == 0, "an allocation is aligned");
    }
    require(in_use == region->used, "a region counts its live and pending slots");
    if (region->physical) mapped += region->bytes;
    if (region->used != 0) used += region->bytes;
    require(region->used == 0 || region->physical, "what is in use has memory");
    gone += !region->physical;
    if (region->physical && region->stride != 0) {
      ++slab_regions;
      unused_or_freed += region->slots.size() - in_use;
    }
  }
  for (const auto& [kind, places] : free_slots_) reusable += places.size();
  require(mapped == reserved_, "reserved is what is mapped");
  require(used == active_total_, "active is what is in use");
  require(reserved() <= options_.limit, "reserved <= limit");
  require(bytes_live == requested_, "requested is what is live");
  require(live_slots == live_count_, "the live allocations are counted");
  require(pending_slots == pending_.size(), "each pending slot is in the list");
  require(gone == quarantine_.size(), "the quarantine holds the regions without memory");
  require(slab_regions == slab_count_, "the slabs are counted");
  require(reusable == unused_or_freed, "each slot that is not in use can be used again");
  require(quarantine_.size() <= options_.quarantine, "the quarantine is bounded");
}

}  // namespace glake
