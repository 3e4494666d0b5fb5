#include "pool.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "arithmetic.hpp"
#include "invariants.hpp"
#include "labels.hpp"
#include "python_stack.hpp"

namespace glake {
namespace {

constexpr std::size_t page = 4096;
// CU_STREAM_PER_THREAD
constexpr StreamHandle per_thread_stream = 2;
// Who waits for room longer than this is served before all others.
constexpr std::chrono::seconds longest_wait{1};
// How many uses of weights this thread has begun and not ended, of all pools.
thread_local std::size_t uses_of_this_thread = 0;
// Above this, arenas of streams that nothing lives in are dropped.
constexpr std::size_t most_arenas = 64;

std::int64_t this_thread() noexcept {
  static thread_local const std::int64_t id = gettid();
  return id;
}

std::string hexadecimal(Address address) {
  constexpr const char* digits = "0123456789abcdef";
  std::string text;
  do {
    text.insert(text.begin(), digits[address % 16]);
    address /= 16;
  } while (address != 0);
  return "0x" + text;
}

}  // namespace

// What every public function does first and last: refuse the child of a fork, lock, verify.
class Pool::Operation {
 public:
  explicit Operation(const Pool& pool) : lock_(owned(pool).mutex_) {}

 private:
  static const Pool& owned(const Pool& pool) {
    if (pool.process_.is_child()) throw ForkedProcess();
    return pool;
  }
  std::scoped_lock<std::mutex> lock_;
};

Pool::Pool(std::unique_ptr<VirtualMemory> memory, std::size_t limit, PoolOptions options)
    : always_verify_(std::getenv("GLAKE_CHECK_INVARIANTS") != nullptr),
      options_(options),
      limit_(limit),
      memory_(std::move(memory)),
      order_(memory_->streams()),
      fences_(order_),
      chunks_(*memory_, fences_, limit),
      weights_(make_arena(Arena::Mode::streamless, true)),
      streamless_(make_arena(Arena::Mode::streamless, false)),
      resident_(*memory_, fences_, *this) {
#ifndef NDEBUG
  always_verify_ = true;
#endif
  apply_options();
}

void Pool::apply_options() {
  fences_.ignore(options_.ignore_streams);
  debugging_ = options_.debug != PoolOptions::Debug::off;
  if (options_.debug == PoolOptions::Debug::off) {
    debug_.reset();
    return;
  }
  DebugOptions options;
  options.guard_all = options_.debug == PoolOptions::Debug::guard;
  options.wipe = options_.wipe;
  options.limit = chunks_.limit();
  options.label_name = &label_name;
  debug_ = std::make_unique<DebugHeap>(*memory_, options);
}

void Pool::configure(PoolOptions options) {
  const Operation operation(*this);
  if (options.debug != options_.debug || debug_) {
    resident_.drop_unused(most_bytes);
    const std::size_t held = debug_ ? debug_->active() : usage_.active;
    if (held != 0) throw LimitTooLow(0, held);
    collect_graphs();
    flush_all();
    chunks_.give_back(most_bytes, false);
  }
  options_ = options;
  apply_options();
}

Pool::~Pool() {
  memory_->observe(nullptr);
  for (const auto& [address, bytes] : files_) memory_->unmap_file(address, bytes);
}

void Pool::add(Range& range) { table_.emplace(range.address, &range); }
void Pool::remove(Range& range) noexcept {
  table_.erase(range.address);
  if (range.heap.step() == Arena::slab_step) {
    recent_.fill({});  // it may name objects of a slab in the range
  } else if (Recent& known = recent(range.address); known.address == range.address) {
    known = {};
  }
}

Arena& Pool::make_arena(Arena::Mode mode, bool weights) {
  return arenas_.emplace_back(*memory_, chunks_, fences_, static_cast<RangeTable&>(*this), ++arena_serial_, mode,
                              weights);
}

Arena& Pool::arena_for(Tag tag, StreamHandle stream) {
  if (tag == Tag::weights) return weights_;
  if (order_ == nullptr || stream == no_stream) return streamless_;
  const auto state = order_->state(stream);
  if (!state) {
    throw DriverError("stream " + hexadecimal(stream) +
                      " is not one of this device, or was destroyed. Pass a live stream of the pool's device.");
  }
  if (state->capture != 0) {
    const auto note_request = [&](Arena& arena) -> Arena& {
      arena.stream = stream;
      arena.thread = this_thread();
      arena.last_request = allocations_;
      arena.may_be_capturing = true;  // even if somebody said that it was over
      count_captures();
      return arena;
    };
    for (Arena* arena : graphs_) {
      if (arena->capture_id == state->capture && arena->stream_id == state->id) return note_request(*arena);
    }
    prune_arenas();
    auto gone = std::make_shared<std::atomic<bool>>(false);
    graphs_.reserve(graphs_.size() + 1);
    Arena& arena = make_arena(Arena::Mode::capture, false);
    try {
      order_->watch_graph(stream, gone);
    } catch (...) {
      arenas_.pop_back();
      throw;
    }
    arena.stream_id = state->id;
    arena.capture_id = state->capture;
    arena.graph_is_gone = std::move(gone);
    graphs_.push_back(&arena);
    return note_request(arena);
  }
  if (!graphs_.empty()) notice_end_of_capture(stream);
  auto found = by_stream_.find(state->id);
  if (found == by_stream_.end()) {
    prune_arenas();
    Arena& arena = make_arena(Arena::Mode::stream, false);
    arena.stream_id = state->id;
    found = by_stream_.emplace(state->id, &arena).first;
  }
  found->second->stream = stream;
  return *found->second;
}

// A request of this stream that is not being captured: no capture on it is in progress.
void Pool::notice_end_of_capture(StreamHandle stream) noexcept {
  if (stream == per_thread_stream) return;  // another stream for every thread
  for (Arena* arena : graphs_) {
    if (arena->stream == stream) arena->may_be_capturing = false;
  }
  count_captures();
}

void Pool::captures_ended() {
  const Operation operation(*this);
  const std::int64_t thread = this_thread();
  for (Arena* arena : graphs_) {
    if (arena->thread == thread) arena->may_be_capturing = false;
  }
  count_captures();
}

Arena* Pool::capture_on(StreamHandle stream) noexcept {
  for (Arena* arena : graphs_) {
    if (arena->stream == stream && arena->may_be_capturing) return arena;
  }
  return nullptr;
}

void Pool::count_captures() noexcept {
  fences_.captures = expected_captures_;
  for (const Arena* arena : graphs_) fences_.captures += arena->may_be_capturing ? 1 : 0;
}

// What was kept for graphs that are gone serves everybody again.
void Pool::collect_graphs() {
  for (std::size_t i = graphs_.size(); i-- > 0;) {
    Arena& arena = *graphs_[i];
    if (!arena.graph_is_gone->load(std::memory_order_acquire)) continue;
    arena.may_be_capturing = false;
    count_captures();
    arena.flush(slab_table_);
    arena.mode = Arena::Mode::streamless;
    try {
      if (options_.wipe) {
        arena.each_heap([&](const Heap& heap) {
          for (const auto& [address, range] : heap.ranges()) {
            if (range.state == RangeState::free && range.held) wipe(address, range.bytes, arena);
          }
        });
      }
      while (!arena.kept.empty()) {
        const Address address = arena.kept.back();
        take_back(find(address), address, false);
        arena.kept.pop_back();
        kept_.erase(address);
      }
    } catch (const DriverError&) {  // another capture forbids to wait for the device: next time
      arena.mode = Arena::Mode::capture;
      continue;
    }
    arena.last = fences_.now();
    arena.each_heap([](Heap& heap) { heap.publish(); });
    graphs_.erase(graphs_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void Pool::prune_arenas() noexcept {
  if (arenas_.size() < most_arenas) return;
  for (auto arena = arenas_.begin(); arena != arenas_.end();) {
    const bool permanent = &*arena == &weights_ || &*arena == &streamless_ || arena->mode == Arena::Mode::capture;
    if (permanent || arena->in_use()) {
      // A vacant slab is a live range: look again without it.
      if (!permanent) arena->flush(slab_table_);
      if (permanent || arena->in_use()) {
        ++arena;
        continue;
      }
    }
    arena->flush(slab_table_);
    if (!arena->small.clear() || !arena->medium.clear() || !arena->large.clear()) {
      ++arena;
      continue;
    }
    if (arena->mode == Arena::Mode::stream) by_stream_.erase(arena->stream_id);
    arena = arenas_.erase(arena);
  }
}

void Pool::flush_all() noexcept {
  for (Arena& arena : arenas_) arena.flush(slab_table_);
}

// 3 % above the most that was asked for, and 16 MiB more where that does not do.
Budget Pool::budget(std::size_t bytes) const noexcept {
  const std::size_t demand = std::max(usage_.peak_requested, plus(usage_.requested, bytes));
  const std::size_t fresh = plus(demand, demand / 33);
  return {fresh, plus(fresh, std::size_t{16} << 20)};
}

Range* Pool::acquire(Heap& heap, std::size_t bytes) {
  for (;;) {
    try {
      if (Range* range = acquire_once(heap, bytes)) return range;
    } catch (const DeviceFullError&) {
      if (resident_.evict(bytes, Weights::Which::own) == 0) throw;
      continue;
    }
    if (bytes > chunks_.limit()) return nullptr;
    const std::size_t needed = plus(in_use(), heap.needed(bytes));
    const std::size_t missing = needed > chunks_.limit() ? needed - chunks_.limit() : bytes;
    const Weights::Which which = evictable_now();
    if (resident_.evictable(which) < missing || resident_.evict(missing, which) == 0) return nullptr;
  }
}

Range* Pool::acquire_once(Heap& heap, std::size_t bytes) {
  if (Range* range = heap.reuse(bytes, false)) return range;
  if (!heap.stitched()) {
    if (Range* range = heap.fit(bytes, false)) return range;
  }
  if (Range* range = heap.reuse(bytes, true)) return range;
  collect_graphs();
  heap.arena().flush(slab_table_);
  if (Range* range = heap.fit(bytes, true)) return range;
  if (bytes > chunks_.limit()) return nullptr;  // also: sizes that could not be added to anything
  Budget budget = this->budget(bytes);
  try {
    if (Range* range = heap.grow(bytes, budget)) return range;
    flush_all();
    if (Range* range = heap.fit(bytes, true)) return range;
    budget.thrifty = false;
    return heap.grow(bytes, budget);
  } catch (const DriverError&) {
    // The device may have less room than our limit, and the system bounds how many mappings a process has: with
    // nothing idle and nothing spare it may work.
    flush_all();
    chunks_.drop_spare_mappings();
    chunks_.give_back(most_bytes, false);
    if (Range* range = heap.fit(bytes, true)) return range;
    budget.thrifty = false;
    return heap.grow(bytes, budget);
  }
}

// What may be reserved while so much of it is common.
std::size_t Pool::limit_with(std::size_t common) const noexcept {
  return std::min(limit_, quota_ > no_quota - common ? no_quota : quota_ + common);
}

bool Pool::quota_binds(std::size_t common) const noexcept { return limit_with(common_ + common) < limit_; }

// What is of use against the tighter one of limit and quota, with so much more common memory.
Weights::Which Pool::evictable_now(std::size_t common) const noexcept {
  return quota_binds(common) ? Weights::Which::own : Weights::Which::all;
}

// Asks the grower where a request found no room, and tries again.
template <class Request>
auto Pool::with_room(const Request& request) {
  constexpr int most_attempts = 8;  // others may take what was granted
  for (int attempt = 1;; ++attempt) {
    try {
      return request();
    } catch (OutOfMemoryError& error) {
      if (attempt > most_attempts) throw;
      const std::optional<std::string> refusal = grow(error.record);
      if (refusal && refusal->empty()) continue;
      error.record.refusal = refusal.value_or("");
      throw;
    }
  }
}

// Empty, or why there is no more; nothing where there is nobody to ask.
std::optional<std::string> Pool::grow(const OutOfMemory& record) {
  std::shared_ptr<const Grower> grower;
  std::size_t quota = 0;
  {
    const Operation operation(*this);
    if (!grower_) return std::nullopt;
    // What is above the limit has to come from common weights, once the quota does not bind any more.
    const std::size_t above = record.needed_limit > limit_ ? record.needed_limit - limit_ : 0;
    if (above > std::min(common_, resident_.evictable(Weights::Which::all))) return std::nullopt;
    grower = grower_;
    quota = record.needed_limit - std::min(record.needed_limit, common_);
    if (quota <= quota_) quota = plus(quota_, record.requested);  // it was raised meanwhile, or did not do
    if (record.device_full) quota = std::max(quota, chunks_.reserved() - common_ + record.requested);
  }
  return (*grower)(quota, record.device_full);
}

bool Pool::share(Grower grower, int gone_event) {
  auto asked = std::make_shared<const Grower>(std::move(grower));
  const Operation operation(*this);
  if (debug_) throw LimitTooLow(0, debug_->active());
  if (grower_) return false;
  grower_ = std::move(asked);
  resident_.tell_gone(gone_event);
  quota_ = chunks_.reserved() - common_;
  chunks_.set_limit(limit_with(common_));
  return true;
}

void Pool::unshare(int gone_event) {
  std::shared_ptr<const Grower> old;  // destroyed without the lock: it may take the interpreter's
  const Operation operation(*this);
  if (!grower_ || resident_.gone_event() != gone_event) return;
  grower_.swap(old);
  resident_.tell_gone(-1);
  quota_ = no_quota;
  chunks_.set_limit(limit_with(common_));
  resident_changed_.notify_all();
}

std::size_t Pool::set_quota(std::size_t quota) {
  const Operation operation(*this);
  if (!grower_) return quota;
  const auto own = [&] { return chunks_.reserved() - common_; };
  if (own() > quota) {
    collect_graphs();
    flush_all();
    chunks_.give_back(own() - quota, false);
    if (own() > quota) resident_.drop_unused(own() - quota, Weights::Which::own);
  }
  quota_ = std::max(quota, own());
  chunks_.set_limit(limit_with(common_));
  resident_changed_.notify_all();
  verify();
  return quota_;
}

void Pool::unpin(std::size_t bytes) noexcept {
  if (debug_) {
    debug_->unpin(bytes);
  } else {
    chunks_.unpin(bytes);
  }
}

void Pool::hold(std::uint32_t holder, std::size_t bytes) {
  if (holder >= held_.size()) held_.resize(holder + 64);
  held_[holder] += bytes;
}

Address Pool::allocate(std::size_t bytes, Tag tag, StreamHandle stream) {
  if (bytes == 0) return 0;
  return with_room([&] { return allocate_once(bytes, tag, stream); });
}

Address Pool::allocate_once(std::size_t bytes, Tag tag, StreamHandle stream) {
  if (!debugging()) [[likely]] {
    const Operation operation(*this);
    if (!debug_) [[likely]]
      return allocate_now(bytes, tag, stream);
  }
  std::string stack = capture_python_stack();  // before the lock: it takes the interpreter's
  const Operation operation(*this);
  return debug_ ? allocate_in_debug(bytes, tag, stream, std::move(stack)) : allocate_now(bytes, tag, stream);
}

Address Pool::allocate_now(std::size_t bytes, Tag tag, StreamHandle stream) {
  const auto holder = static_cast<std::uint32_t>(thread_label() * tag_count + static_cast<std::size_t>(tag));
  if (holder >= held_.size()) [[unlikely]]
    hold(holder, 0);  // what can fail for want of ordinary memory comes first
  Arena& arena = arena_for(tag, stream);
  Address address = 0;
  try {
    if (bytes < small_limit) {
      const Slabs::Place place = arena.slabs.allocate(bytes, holder, allocations_, *this, slab_table_, usage_);
      if (place.slab == nullptr) {
        throw_out_of_memory(bytes, &arena.small, arena.small.rounded(size_classes::bytes(size_classes::index(bytes))),
                            false);
      }
      address = place.slab->range->address + place.object * place.slab->object_bytes;
      recent(address) = {address, place.slab->range, place.slab};
    } else {
      Heap& heap = arena.heap_for(bytes);
      if (bytes > most_bytes - page) throw_out_of_memory(bytes, nullptr, bytes, false);
      Range* range = acquire(heap, heap.rounded(bytes));
      if (range == nullptr) throw_out_of_memory(bytes, &heap, heap.rounded(bytes), false);
      range->requested = bytes;
      range->holder = holder;
      range->born = allocations_;
      usage_.add(range->bytes);
      address = range->address;
      recent(address) = {address, range, nullptr};
    }
  } catch (const DeviceFullError&) {
    throw_out_of_memory(bytes, nullptr, bytes, true);
  }
  usage_.request(bytes);
  held_[holder] += bytes;
  ++allocations_;
  if (recorder_) {
    recorder_->allocated(address, bytes, static_cast<std::uint8_t>(tag), thread_label(), stream);
  }
  verify();
  return address;
}

Address Pool::allocate_in_debug(std::size_t bytes, Tag tag, StreamHandle stream, std::string stack) {
  Address address = 0;
  try {
    if (bytes <= most_bytes / 2) {
      address = debug_->allocate(bytes, tag, stream, thread_label(), stack);
      if (address == 0 && resident_.evict(bytes, Weights::Which::all) != 0) {
        address = debug_->allocate(bytes, tag, stream, thread_label(), std::move(stack));
      }
    }
  } catch (const DeviceFullError&) {
    throw_out_of_memory(bytes, nullptr, bytes, true);
  }
  if (address == 0) throw_out_of_memory(bytes, nullptr, bytes, false);
  ++allocations_;
  usage_.request(bytes);
  if (recorder_) recorder_->allocated(address, bytes, static_cast<std::uint8_t>(tag), thread_label(), stream);
  usage_.peak_active = std::max(usage_.peak_active, debug_->active());
  return address;
}

void Pool::deallocate_in_debug(Address address, std::string stack) {
  const auto finish = [&] {
    usage_.requested = debug_->requested() + resident_.requested();
    for (const auto& [file, bytes] : files_) usage_.requested += bytes;
    ++deallocations_;
    if (recorder_) recorder_->freed(address);
  };
  try {
    debug_->deallocate(address, std::move(stack));
  } catch (const CorruptionError&) {  // it was taken back
    finish();
    throw;
  }
  finish();
}

std::vector<Corruption> Pool::check() {
  const Operation operation(*this);
  return debug_ ? debug_->check() : std::vector<Corruption>();
}

std::vector<AllocationRecord> Pool::live() const {
  const Operation operation(*this);
  return debug_ ? debug_->live() : std::vector<AllocationRecord>();
}

Pool::Found Pool::find(Address address) {
  Recent known = recent(address);
  if (known.address != address) {
    known = {address, nullptr, nullptr};
    if (const auto step = slab_table_.find(address / Arena::slab_step * Arena::slab_step); step != slab_table_.end()) {
      known.slab = step->second;
    } else if (const auto found = table_.find(address); found != table_.end()) {
      known.range = found->second;
    }
  }
  if (known.slab != nullptr) {
    const std::size_t object = known.slab->live_at(address);
    if (object == Slab::nothing) {
      throw InvalidPointer("address " + hexadecimal(address) +
                           " is inside a slab but is no live object of it: freed twice, or not the address that was "
                           "handed out");
    }
    return {known.slab->range, known.slab, object};
  }
  if (known.range == nullptr) {
    throw InvalidPointer("address " + hexadecimal(address) +
                         " does not belong to this pool: it was never handed out, or freed long ago");
  }
  if (known.range->state != RangeState::live) {
    throw InvalidPointer("address " + hexadecimal(address) + " is not in use: it was freed already");
  }
  return {known.range, nullptr, 0};
}

// Sets what was freed to zero, behind all work that may still use it.
void Pool::wipe(Address address, std::size_t bytes, const Arena& arena) {
  if (arena.mode == Arena::Mode::capture) return;  // the graph's own
  if (order_ == nullptr) {
    memory_->fill(address, bytes, 0, no_stream);
    return;
  }
  const StreamHandle own = order_->own_stream();
  fences_.wait(fences_.now(), own);
  memory_->fill(address, bytes, 0, own);
}

void Pool::take_back(Found found, Address address, bool keep) {
  Range& range = *found.range;
  Arena& arena = range.heap.arena();
  Slab::Object* const object = found.slab != nullptr ? &found.slab->objects[found.object] : nullptr;
  const std::size_t requested = object != nullptr ? object->requested : range.requested;
  const std::uint32_t holder = object != nullptr ? object->holder : range.holder;
  Fence fence = 0;
  if (!keep) {
    if (options_.wipe) {
      wipe(address, object != nullptr ? found.slab->object_bytes : range.bytes, arena);
      arena.wiped = true;
      if (arena.mode != Arena::Mode::capture) fence = fences_.now();
    } else if (arena.mode == Arena::Mode::streamless) {
      fence = fences_.record();
    }
    if (arena.mode == Arena::Mode::stream) arena.last = fences_.now();
  }
  usage_.requested -= requested;
  held_[holder] -= requested;
  if (keep) {
    if (object != nullptr) object->requested = 0;
    range.requested = 0;  // (a slab's is 0)
    return;
  }
  if (object != nullptr) {
    found.slab->arena->slabs.deallocate(*found.slab, found.object, fence, usage_);
  } else {
    usage_.active -= range.bytes;
    range.fence = fence;
    range.heap.release(range);
  }
}

void Pool::deallocate(Address address, StreamHandle stream) {
  if (address == 0) return;
  if (!debugging()) [[likely]] {
    const Operation operation(*this);
    if (!debug_) [[likely]]
      return deallocate_now(address, stream);
  }
  std::string stack = capture_python_stack();
  const Operation operation(*this);
  if (debug_) return deallocate_in_debug(address, std::move(stack));
  deallocate_now(address, stream);
}

void Pool::deallocate_now(Address address, StreamHandle stream) {
  if (!kept_.empty() && kept_.contains(address)) {
    throw InvalidPointer("address " + hexadecimal(address) + " is not in use: it was freed already");
  }
  const Found found = find(address);
  const Arena& arena = found.range->heap.arena();
  Arena* graph = nullptr;
  if (order_ != nullptr && (stream != no_stream || !graphs_.empty())) {
    if (const auto state = stream != no_stream ? order_->state(stream) : std::nullopt; state && state->capture != 0) {
      // Captured work uses it, whoever it was allocated for.
      try {
        graph = &arena_for(Tag::activations, stream);
        if (graph == &arena) graph = nullptr;
      } catch (const DriverError&) {  // the capture is broken: no graph will use the memory
      }
    } else if (state) {
      notice_end_of_capture(stream);
    }
    if (graph == nullptr && arena.mode == Arena::Mode::stream) graph = capture_on(arena.stream);
    if (graph == nullptr && arena.mode == Arena::Mode::streamless && !arena.weights) {
      // What the capturing thread had when it captured, it may have used there, though it named no stream.
      const std::uint64_t born = found.slab != nullptr ? found.slab->objects[found.object].born : found.range->born;
      const std::int64_t thread = graphs_.empty() ? 0 : this_thread();
      for (Arena* each : graphs_) {
        if (each->may_be_capturing && each->thread == thread && born < each->last_request) graph = each;
      }
    }
  }
  if (graph != nullptr) {
    graph->kept.push_back(address);
    kept_.insert(address);
  }
  take_back(found, address, graph != nullptr);
  if (recorder_) recorder_->freed(address);
  ++deallocations_;
  if (!waiters_.empty()) resident_changed_.notify_all();
  verify();
}

Address Pool::map_file(int descriptor, std::size_t bytes) {
  const Operation operation(*this);
  if (bytes == 0) throw DriverError("mapping 0 bytes of a file failed: an empty file cannot be mapped");
  const std::size_t pages = round_up(bytes, page);
  while (!reserve(pages, true)) {
    if (resident_.evict(pages, evictable_now(pages)) == 0) throw_out_of_memory(bytes, nullptr, pages, false);
  }
  Address address = 0;
  try {
    address = memory_->map_file(descriptor, bytes);
    files_.emplace(address, bytes);
  } catch (...) {
    if (address != 0) memory_->unmap_file(address, bytes);
    unreserve(pages, true);
    throw;
  }
  file_bytes_ += pages;
  usage_.add(pages);
  usage_.request(bytes);
  hold(static_cast<std::uint32_t>(Tag::weights), bytes);
  verify();
  return address;
}

void Pool::unmap_file(Address address) {
  const Operation operation(*this);
  const auto found = files_.find(address);
  if (found == files_.end()) {
    throw InvalidPointer("address " + hexadecimal(address) +
                         " is not that of a mapped file of this pool: never mapped, or unmapped already");
  }
  const std::size_t bytes = found->second;
  const std::size_t pages = round_up(bytes, page);
  memory_->unmap_file(address, bytes);
  files_.erase(found);
  unreserve(pages, true);
  file_bytes_ -= pages;
  usage_.active -= pages;
  usage_.requested -= bytes;
  held_[static_cast<std::size_t>(Tag::weights)] -= bytes;
  verify();
}

std::size_t Pool::trim(std::size_t target) {
  const Operation operation(*this);
  if (debug_) return debug_->trim(target) + resident_.drop_unused(most_bytes);
  collect_graphs();
  flush_all();
  const std::size_t reserved = chunks_.reserved();
  std::size_t given_back = reserved > target ? chunks_.give_back(reserved - target, false) : 0;
  if (reserved - given_back > target) given_back += resident_.drop_unused(reserved - given_back - target);
  resident_.drop_unused_on_host();
  verify();
  return given_back;
}

void Pool::set_limit(std::size_t limit) {
  const Operation operation(*this);
  if (debug_) {
    if (debug_->active() > limit) resident_.evict(debug_->active() - limit, Weights::Which::all);
    if (!debug_->set_limit(limit)) throw LimitTooLow(limit, debug_->active());
  }
  collect_graphs();
  if (chunks_.reserved() > limit) {
    flush_all();
    if (in_use() > limit) resident_.evict(in_use() - limit, Weights::Which::all);
    if (in_use() > limit) throw LimitTooLow(limit, in_use());
    chunks_.give_back(chunks_.reserved() - limit, false);
    if (chunks_.reserved() > limit) throw LimitTooLow(limit, chunks_.reserved());
  }
  limit_ = limit;
  chunks_.set_limit(limit_with(common_));
  resident_changed_.notify_all();
  verify();
}

bool Pool::reserve(std::size_t bytes, bool common) {
  if (debug_) return debug_->pin(bytes);
  if (common) chunks_.set_limit(limit_with(common_ + bytes));
  bool fits = chunks_.pin(bytes);
  if (!fits) {
    collect_graphs();
    flush_all();
    fits = chunks_.pin(bytes);
  }
  if (common && fits) common_ += bytes;
  if (common && !fits) chunks_.set_limit(limit_with(common_));
  return fits;
}

void Pool::unreserve(std::size_t bytes, bool common) noexcept {
  unpin(bytes);
  if (!common || debug_) return;
  common_ -= bytes;
  chunks_.set_limit(limit_with(common_));
}

std::size_t Pool::excess(std::size_t bytes, std::size_t common) {
  const std::size_t limit = limit_with(common_ + common);
  const auto over = [&] {
    const std::size_t needed = plus(debug_ ? debug_->active() : in_use(), bytes);
    return needed > limit ? needed - limit : 0;
  };
  if (over() != 0 && !debug_) {
    collect_graphs();
    flush_all();
  }
  return over();
}

Pool::Room Pool::room_for(std::span<const Weights::Id> chunks) {
  const Operation operation(*this);
  if (!debug_) {
    collect_graphs();
    flush_all();
  }
  const Weights::Need need = resident_.need(chunks);
  const std::size_t used = debug_ ? debug_->active() : in_use();
  const std::size_t held = debug_ ? debug_->reserved() : chunks_.reserved();
  const std::size_t stays = used - std::min(used, need.evictable);
  const std::size_t device = plus(memory_->free_bytes(), held - std::min(held, stays));
  return {need.missing, std::min(limit_ - std::min(limit_, stays), device)};
}

void Pool::give_back_idle() {
  if (debug_) return;
  collect_graphs();
  flush_all();
  chunks_.give_back(most_bytes, false);
}

void Pool::activate(std::size_t bytes, std::size_t requested, std::uint32_t holder) {
  hold(holder, requested);
  usage_.add(bytes);
  usage_.request(requested);
}

void Pool::deactivate(std::size_t bytes, std::size_t requested, std::uint32_t holder) noexcept {
  held_[holder] -= requested;
  usage_.active -= bytes;
  usage_.requested -= requested;
}

Weights::Placement Pool::place_weights(std::span<const Weights::Piece> pieces, Weights::Kind kind, Tag tag) {
  const Operation operation(*this);
  const auto holder = static_cast<std::uint32_t>(thread_label() * tag_count + static_cast<std::size_t>(tag));
  Weights::Placement placement = resident_.place(pieces, kind, holder);
  verify();
  return placement;
}

void Pool::remove_region(Weights::Id region) {
  const Operation operation(*this);
  resident_.remove_region(region);
  verify();
}

void Pool::replace(Weights::Id region, std::size_t index, Weights::Id chunk) {
  const Operation operation(*this);
  resident_.replace(region, index, chunk);
  verify();
}

std::size_t Pool::resident_in(Weights::Id region) const {
  const Operation operation(*this);
  return resident_.resident_in(region);
}

Weights::Id Pool::add_user(std::span<const Weights::Id> chunks, bool evictable, int priority) {
  const Operation operation(*this);
  const Weights::Id user = resident_.add_user(chunks, evictable, priority);
  verify();
  return user;
}

void Pool::remove_user(Weights::Id user) {
  const Operation operation(*this);
  resident_.remove_user(user);
  resident_changed_.notify_all();
  verify();
}

void Pool::set_policy(Weights::Id user, bool evictable, int priority) {
  const Operation operation(*this);
  resident_.set_policy(user, evictable, priority);
  resident_changed_.notify_all();
}

Weights::UserView Pool::user(Weights::Id user) const {
  const Operation operation(*this);
  return resident_.view(user);
}

void Pool::wait_for_change(std::unique_lock<std::mutex>& lock, const std::function<void()>& poll) {
  if (resident_changed_.wait_for(lock, std::chrono::milliseconds(100)) == std::cv_status::no_timeout || !poll) return;
  lock.unlock();
  try {
    poll();
  } catch (...) {
    lock.lock();
    throw;
  }
  lock.lock();
}

std::vector<Weights::Id> Pool::begin_use(Weights::Id user, bool later, const std::function<void()>& poll) {
  return with_room([&] { return begin_use_once(user, later, poll); });
}

std::vector<Weights::Id> Pool::begin_use_once(Weights::Id user, bool later, const std::function<void()>& poll) {
  if (process_.is_child()) throw ForkedProcess();
  std::unique_lock lock(mutex_);
  const auto asked = Weights::Clock::now();
  auto mine = waiters_.end();
  const auto leave = [&] {
    if (mine != waiters_.end()) waiters_.erase(mine);
    resident_changed_.notify_all();
  };
  for (;;) {
    // Who has waited long goes first: without that a large model could wait for ever while small ones take turns.
    // But not before what it may wait for itself: a use within another, or one that takes nothing which it could have.
    const auto now = Weights::Clock::now();
    const bool behind = !waiters_.empty() && waiters_.begin() != mine && uses_of_this_thread == 0 &&
                        now - waiters_.front().since > longest_wait && now - asked < 2 * longest_wait &&
                        resident_.matters(user);
    const bool held =
        uses_of_this_thread == 0 && std::find(suspending_.begin(), suspending_.end(), user) != suspending_.end();
    if (!behind && !held) {
      try {
        if (auto chunks = resident_.begin(user, later)) {
          ++uses_of_this_thread;
          if (mine != waiters_.end()) leave();
          verify();
          return std::move(*chunks);
        }
      } catch (const Weights::NoRoom& room) {
        if (mine != waiters_.end()) leave();
        throw_out_of_memory(room.bytes, nullptr, room.bytes, false);
      } catch (const DeviceFullError&) {
        if (mine != waiters_.end()) leave();
        const Weights::UserView view = resident_.view(user);
        const std::size_t missing = view.missing - view.missing_on_host;
        throw_out_of_memory(missing, nullptr, missing, true);
      } catch (...) {
        if (mine != waiters_.end()) leave();
        throw;
      }
      if (mine == waiters_.end()) mine = waiters_.insert(waiters_.end(), {user, Weights::Clock::now()});
    }
    try {
      wait_for_change(lock, poll);
    } catch (...) {
      leave();
      throw;
    }
  }
}

Address Pool::address_of(Weights::Id chunk) const {
  const Operation operation(*this);
  return resident_.address(chunk);
}

std::size_t Pool::size_of(Weights::Id chunk) const {
  const Operation operation(*this);
  return resident_.bytes(chunk);
}

std::uint64_t Pool::handle_of(Weights::Id chunk) const {
  const Operation operation(*this);
  return resident_.handle(chunk);
}

Address Pool::begin_writing(Weights::Id chunk) {
  const Operation operation(*this);
  return resident_.begin_writing(chunk);
}

void Pool::end_writing(Weights::Id chunk, Address address) {
  const Operation operation(*this);
  resident_.end_writing(chunk, address);
}

void Pool::map_weights(Weights::Id chunk, int descriptor, std::size_t bytes) {
  const Operation operation(*this);
  resident_.map_file(chunk, descriptor, bytes);
}

void Pool::make(std::span<const Weights::Id> chunks) {
  const Operation operation(*this);
  try {
    resident_.make(chunks);
  } catch (const DeviceFullError&) {
    std::size_t bytes = 0;
    for (const Weights::Id chunk : chunks) bytes += resident_.bytes(chunk);
    throw_out_of_memory(bytes, nullptr, bytes, true);
  }
  verify();
}

void Pool::unmake(Weights::Id chunk) {
  const Operation operation(*this);
  resident_.unmake(chunk);
  verify();
}

void Pool::freeze(std::span<const Weights::Id> chunks) {
  const Operation operation(*this);
  resident_.freeze(chunks);
}

void Pool::adopt(Weights::Id chunk, int descriptor) {
  const Operation operation(*this);
  resident_.adopt(chunk, descriptor);
  verify();
}

int Pool::descriptor(Weights::Id chunk) const {
  const Operation operation(*this);
  const int copy = fcntl(resident_.descriptor(chunk), F_DUPFD_CLOEXEC, 0);
  if (copy < 0) {
    throw DriverError(std::string("copying a descriptor of shared memory failed: ") + std::strerror(errno) +
                      ". Raise `ulimit -n` where too many files are open.");
  }
  return copy;
}

std::vector<Weights::Gone> Pool::take_gone() {
  const Operation operation(*this);
  return resident_.take_gone();
}

std::vector<Weights::Offer> Pool::offers() const {
  const Operation operation(*this);
  return resident_.offers();
}

std::size_t Pool::shared_busy() const {
  const Operation operation(*this);
  return resident_.shared_busy();
}

std::size_t Pool::running() const {
  const Operation operation(*this);
  return resident_.running();
}

std::vector<Weights::Id> Pool::give_up(std::span<const Weights::Id> chunks) {
  const Operation operation(*this);
  std::vector<Weights::Id> done = resident_.give_up(chunks);
  resident_changed_.notify_all();
  verify();
  return done;
}

void Pool::loaded(Weights::Id user, std::span<const Weights::Id> chunks, bool writable) {
  const Operation operation(*this);
  resident_.loaded(user, chunks, writable);
  resident_changed_.notify_all();
  verify();
}

void Pool::load_failed(Weights::Id user, std::span<const Weights::Id> chunks) {
  const Operation operation(*this);
  resident_.failed(user, chunks);
  uses_of_this_thread -= uses_of_this_thread != 0 ? 1 : 0;
  resident_changed_.notify_all();
  verify();
}

void Pool::end_use(Weights::Id user) {
  const Operation operation(*this);
  resident_.end(user);
  uses_of_this_thread -= uses_of_this_thread != 0 ? 1 : 0;
  if (!waiters_.empty() || !suspending_.empty()) resident_changed_.notify_all();
  verify();
}

std::size_t Pool::absent(std::span<const Weights::Id> chunks) const {
  const Operation operation(*this);
  return resident_.need(chunks).missing;
}

void Pool::touch(Weights::Id user) {
  const Operation operation(*this);
  resident_.touch(user);
}

std::size_t Pool::suspend(Weights::Id user, const std::function<void()>& poll) {
  if (process_.is_child()) throw ForkedProcess();
  std::unique_lock lock(mutex_);
  suspending_.push_back(user);
  const auto leave = [&] {
    suspending_.erase(std::find(suspending_.begin(), suspending_.end(), user));
    resident_changed_.notify_all();
  };
  try {
    while (resident_.busy(user)) wait_for_change(lock, poll);
    const std::size_t bytes = resident_.suspend(user);
    leave();
    verify();
    return bytes;
  } catch (...) {
    leave();
    throw;
  }
}

void Pool::expect_captures(bool on) {
  const Operation operation(*this);
  if (on) {
    ++expected_captures_;
  } else if (expected_captures_ != 0) {
    --expected_captures_;
  }
  count_captures();
}

PoolStats Pool::stats() {
  // A child must not wait for a lock that a thread of the parent held when it forked.
  std::unique_lock lock(mutex_, std::defer_lock);
  if (!process_.is_child()) {
    lock.lock();
    collect_graphs();
  }
  PoolStats stats;
  stats.active = usage_.active;
  stats.idle = chunks_.reserved() - usage_.active;
  stats.reserved = chunks_.reserved();
  stats.peak_active = usage_.peak_active;
  stats.peak_reserved = chunks_.peak_reserved();
  stats.requested = usage_.requested;
  stats.peak_requested = usage_.peak_requested;
  stats.limit = limit_;
  stats.shared = common_;
  stats.weights = file_bytes_;
  stats.mapped_files = file_bytes_ + resident_.files();
  stats.unused_weights = resident_.reserved() - resident_.active();
  stats.offloaded = resident_.offloaded();
  stats.allocations = allocations_;
  stats.deallocations = deallocations_;
  stats.chunks = chunks_.all().size();
  stats.mappings = chunks_.mappings();
  for (const Arena& arena : arenas_) {
    stats.slabs += arena.slabs.count();
    arena.each_heap([&](const Heap& heap) { stats.ranges += heap.ranges().size(); });
  }
  for (std::size_t holder = static_cast<std::size_t>(Tag::weights); holder < held_.size(); holder += tag_count) {
    stats.weights += held_[holder];
  }
  std::size_t files = 0;
  for (const auto& [address, bytes] : files_) files += bytes;
  stats.weights -= files;  // counted in pages already
  if (debug_) {
    stats.active = debug_->active() - stats.unused_weights;
    stats.reserved = debug_->reserved();
    stats.idle = stats.reserved - stats.active;
    stats.peak_reserved = std::max(stats.peak_active, stats.reserved);
    stats.weights += debug_->active(Tag::weights);
    stats.slabs = debug_->slabs();
  }
  stats.arenas = arenas_.size();
  stats.stitches = chunks_.stitches();
  stats.driver_calls = memory_->calls();
  return stats;
}

std::vector<Holder> Pool::holders() const {
  const Operation operation(*this);
  return holders_locked();
}

std::vector<Holder> Pool::holders_locked() const {
  std::vector<Holder> holders;
  if (debug_) {
    for (const AllocationRecord& record : debug_->live()) {
      const std::string label = label_name(record.label);
      const auto known = std::find_if(holders.begin(), holders.end(), [&](const Holder& each) {
        return each.label == label && each.tag == record.tag;
      });
      if (known != holders.end()) {
        known->bytes += record.bytes;
      } else {
        holders.push_back({label, record.tag, record.bytes});
      }
    }
  }
  for (std::size_t holder = 0; holder < held_.size(); ++holder) {
    if (held_[holder] == 0) continue;
    holders.push_back({label_name(static_cast<std::uint32_t>(holder / tag_count)), static_cast<Tag>(holder % tag_count),
                       held_[holder]});
  }
  std::sort(holders.begin(), holders.end(), [](const Holder& a, const Holder& b) { return a.bytes > b.bytes; });
  return holders;
}

void Pool::reset_peaks() {
  const Operation operation(*this);
  chunks_.reset_peak();
  usage_.peak_active = usage_.active;
  usage_.peak_requested = usage_.requested;
}

void Pool::start_recording(std::size_t most_events) {
  const Operation operation(*this);
  recorder_ = std::make_unique<Recorder>(most_events);
  memory_->observe(recorder_.get());
}

std::vector<TraceEvent> Pool::stop_recording() {
  const Operation operation(*this);
  if (!recorder_) return {};
  memory_->observe(nullptr);
  return std::exchange(recorder_, nullptr)->take();
}

std::vector<SegmentView> Pool::snapshot() const {
  const Operation operation(*this);
  std::vector<SegmentView> segments;
  for (const Arena& arena : arenas_) {
    arena.each_heap([&](const Heap& heap) {
      const void* segment = nullptr;
      Address end = 0;
      for (const auto& [address, range] : heap.ranges()) {
        if (segments.empty() || range.segment != segment || address != end) {
          const bool ordered = arena.mode == Arena::Mode::stream;
          segments.push_back({address, 0, heap.kind(), arena.serial, ordered ? arena.stream : no_stream, {}});
        }
        segment = range.segment;
        end = range.end();
        SegmentView& view = segments.back();
        view.bytes += range.bytes;
        const auto show = [&](Address start, std::size_t bytes, std::size_t requested, const char* state,
                              std::uint32_t holder) {
          view.ranges.push_back({start, bytes, requested, state, static_cast<Tag>(holder % tag_count),
                                 label_name(static_cast<std::uint32_t>(holder / tag_count))});
        };
        if (range.slab != nullptr && range.state == RangeState::live) {
          const Slab& slab = *range.slab;
          for (std::size_t object = 0; object < slab.capacity; ++object) {
            const Address start = range.address + object * slab.object_bytes;
            const bool live = (slab.free[object / 64] >> (object % 64) & 1) == 0;
            show(start, slab.object_bytes, live ? slab.objects[object].requested : 0, live ? "active" : "cached",
                 live ? slab.objects[object].holder : 0);
          }
          const std::size_t rest = range.bytes - slab.capacity * slab.object_bytes;
          if (rest != 0) show(range.end() - rest, rest, 0, "cached", 0);
        } else if (range.state == RangeState::live) {
          show(address, range.bytes, range.requested, "active", range.holder);
        } else {
          show(address, range.bytes, 0, range.state == RangeState::cached || range.held ? "cached" : "free", 0);
        }
      }
    });
  }
  return segments;
}

void Pool::inject_failure(std::int64_t n, std::int64_t times) {
  const Operation operation(*this);
  memory_->inject_failure(n, times);
}

void Pool::throw_out_of_memory(std::size_t requested, const Heap* heap, std::size_t range_bytes, bool device_full) {
  flush_all();
  OutOfMemory record;
  record.requested = requested;
  record.active = usage_.active;
  record.idle = chunks_.reserved() - usage_.active;
  record.reserved = chunks_.reserved();
  record.limit = limit_;
  if (debug_) {
    record.active = debug_->active();
    record.reserved = debug_->reserved();
    record.idle = record.reserved - record.active;
    record.needed_limit = requested <= most_bytes / 2 ? debug_->needed_limit(requested, Tag::activations) : most_bytes;
  } else {
    record.needed_limit =
        plus(in_use(), heap != nullptr && range_bytes <= most_bytes / 2 ? heap->needed(range_bytes) : range_bytes);
  }
  record.device_free = memory_->free_bytes();
  record.device_full = device_full;
  record.holders = holders_locked();
  throw OutOfMemoryError(std::move(record));
}

void Pool::check_invariants() const {
  const Operation operation(*this);
  check_locked();
}

void Pool::verify() const {
  if (always_verify_) check_locked();
}

void Pool::check_locked() const {
  if (debug_) return debug_->check_invariants();  // and weights are pinned there
  chunks_.check_invariants();
  resident_.check_invariants();
  require(chunks_.pinned() == file_bytes_ + resident_.reserved(), "files and weights are reserved");
  require(common_ == file_bytes_ + resident_.common() && chunks_.limit() == limit_with(common_),
          "what may be other processes' too is counted");
  std::size_t active = file_bytes_ + resident_.active();
  std::size_t requested = resident_.requested();
  std::size_t steps = 0;
  std::size_t listed = 0;
  for (const auto& [address, bytes] : files_) requested += bytes;
  for (const Arena& arena : arenas_) {
    arena.slabs.check_invariants(slab_table_);
    active += arena.slabs.active();
    arena.each_heap([&](const Heap& heap) {
      heap.check_invariants();
      for (const auto& [address, range] : heap.ranges()) {
        if (range.state == RangeState::free) continue;
        ++listed;
        const auto found = table_.find(address);
        require(found != table_.end() && found->second == &range, "every range in use is found by its address");
        if (range.state != RangeState::live) continue;
        if (range.slab != nullptr) {
          steps += range.bytes / heap.step();
          for (std::size_t object = 0; object < range.slab->capacity; ++object) {
            const bool live = (range.slab->free[object / 64] >> (object % 64) & 1) == 0;
            if (live) requested += range.slab->objects[object].requested;
          }
        } else {
          active += range.bytes;
          requested += range.requested;
        }
      }
    });
  }
  require(listed == table_.size(), "only ranges in use are found by their addresses");
  require(steps == slab_table_.size(), "only slabs are found by their steps");
  require(active == usage_.active && requested == usage_.requested, "active and requested are counted");
  require(usage_.requested <= usage_.active && usage_.active <= chunks_.reserved(), "requested <= active <= reserved");
  std::size_t held = 0;
  for (const std::size_t bytes : held_) held += bytes;
  require(held == usage_.requested, "the bytes that holders asked for add up to requested");
}

}  // namespace glake
