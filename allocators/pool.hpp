// Pool: one device's memory, handed out to every session and engine of a process.
//
// Words
//   granule    the smallest range that can be mapped (64 KiB on the host, 2 MiB on CUDA)
//   chunk      one piece of physical memory (chunks.hpp). It is mapped whole or not at all; it may be mapped at
//              several addresses, and is used through one of them at a time
//   range      contiguous addresses that are handed out, kept for reuse, or free (heap.hpp)
//   segment    a reservation of addresses in which a heap maps chunks one behind the other
//   stitching  mapping an idle chunk at a further address, where it makes a free range longer
//   heap       the ranges of one stream and one kind: small (what slabs are made of), medium, large, weights
//   slab       a range that is cut into small objects of one size (slabs.hpp)
//   arena      the heaps of one stream (arena.hpp)
//   active     handed out. Of bytes: the ranges in use, slabs that have a live object, and the mapped files
//   idle       reserved - active: kept for reuse. Of a chunk: that no range in use or cached lies in it. trim() gives
//              idle chunks back
//   reserved   the physical memory that the pool holds. (On the host a page that was never touched costs nothing
//              yet, so reserved is an upper bound.)
//   limit      a hard budget over everything reserved
//   common     memory that other processes may have too, and that is there once for all of them: weights of a broker
//              (weights.hpp), and mapped files
//   quota      what other processes leave to this one: a budget over what is reserved and not common. There is none
//              unless a grower asks for more when it is used up (share())
//
// Invariants (check_invariants() verifies each of them)
//   reserved <= limit;  reserved - common <= quota;  requested <= active <= reserved
//   every chunk is used through at most one of its mappings; the idle lists hold exactly the chunks that are not used
//   every byte of a range is mapped exactly once, and no two ranges overlap
//   a chunk counts exactly the bytes that ranges in use (and cached ones) hold in it
//   every slab is a live range; each of its objects is live or free
//   the bytes that holders asked for add up to requested
//
// How a request is served
//   below 32 KiB     from a slab of its size class (size_classes.hpp)
//   else, rounded up to 512 bytes:
//     1. a cached range of exactly that size: no driver call, no search
//     2. a place where that size was before, else the smallest free range that holds it, cut to size: in a heap that is
//        not stitched of what is free already, then of everything that was cached in the arena
//     3. the end of a segment, made longer by new chunks while reserved stays within 3 % of the most that was ever
//        asked for, else by idle ones (stitching) and by as many new ones as are missing. Where that would take
//        reserved more than 3 % and 16 MiB above that demand, idle chunks that cannot serve are given back; where it
//        would exceed the limit, too
//     4. weights that may go make room (weights.hpp), and it is tried again
//     5. where the quota is in the way, or the device is full: the grower is asked, without the lock, and it is tried
//     again
//     6. OutOfMemory: the chunks in use and those that are missing exceed the limit
//
// Streams. Memory of a stream's arena is used on that stream alone, so it is reused there without waiting. Whole idle
// chunks move to other arenas, behind a fence (fences.hpp). Memory without a stream is reused when the device has
// finished all work that was queued before its free.
//
// CUDA graphs. Requests of a stream that is being captured come from an arena of that capture; what is freed there, and
// what the stream's own arena gets back meanwhile, serves nobody else until the graph and all its copies are gone.
//
// Thread-safe: every function may be called from any thread. After a call that throws, nothing of it
// is left handed out, and the invariants hold.
//
// In a child of fork() every function but stats() throws ForkedProcess, and the destructor leaves the
// memory alone: it is the parent's.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "arena.hpp"
#include "debug_heap.hpp"
#include "process.hpp"
#include "recorder.hpp"
#include "virtual_memory.hpp"
#include "weights.hpp"

namespace glake {

// What memory is for.
enum class Tag : std::uint8_t { activations, weights, workspace, context, scratch, outputs };
inline constexpr std::size_t tag_count = 6;
[[nodiscard]] constexpr const char* tag_name(Tag tag) noexcept {
  switch (tag) {
    case Tag::weights:
      return "weights";
    case Tag::workspace:
      return "workspace";
    case Tag::context:
      return "context";
    case Tag::scratch:
      return "scratch";
    case Tag::outputs:
      return "outputs";
    default:
      return "activations";
  }
}

struct PoolOptions {
  enum class Debug : std::uint8_t { off, on, guard };  // debug_heap.hpp; guard: every allocation alone between guards
  Debug debug = Debug::off;
  // Freed memory is set to zero before anybody else can have it.
  bool wipe = false;
  // For a test that has to show that it can fail: memory is used across streams without waiting.
  bool ignore_streams = false;
};

// In bytes, unless noted.
struct PoolStats {
  std::size_t active = 0;
  std::size_t idle = 0;
  std::size_t reserved = 0;
  std::size_t peak_active = 0;
  std::size_t peak_reserved = 0;
  std::size_t requested = 0;  // as asked for, of what is live; active - requested is lost to rounding
  std::size_t peak_requested = 0;
  std::size_t limit = 0;
  std::size_t weights = 0;          // weights as asked for, and the mapped files
  std::size_t mapped_files = 0;     // the part of weights that is files
  std::size_t unused_weights = 0;   // the part of idle that is weights which no model has any more
  std::size_t shared = 0;           // the part of reserved that is common
  std::size_t offloaded = 0;        // weights in memory of the host: not part of reserved
  std::uint64_t allocations = 0;    // calls that succeeded
  std::uint64_t deallocations = 0;  // calls that succeeded
  std::size_t chunks = 0;           // count
  std::size_t mappings = 0;         // count: chunks at addresses
  std::size_t ranges = 0;           // count: in use, cached and free
  std::size_t slabs = 0;            // count, with a live object
  std::size_t arenas = 0;           // count
  std::uint64_t stitches = 0;       // count: idle chunks that were mapped at a further address, ever
  std::uint64_t driver_calls = 0;   // count: for memory (not for streams and events)
};

// Who holds memory.
struct Holder {
  std::string label;
  Tag tag = Tag::activations;
  std::size_t bytes = 0;  // as asked for
};

// The request does not fit. A snapshot of the pool at that moment.
struct OutOfMemory {
  std::size_t requested = 0;
  std::size_t active = 0;
  std::size_t idle = 0;
  std::size_t reserved = 0;
  std::size_t limit = 0;
  std::size_t needed_limit = 0;  // the smallest limit with which it would have passed
  std::size_t device_free = 0;   // bytes that the device could still give
  bool device_full = false;      // the limit has room, but the device has none
  std::string refusal;           // why the grower gave no more
  std::vector<Holder> holders;   // largest first
};

class OutOfMemoryError : public std::runtime_error {
 public:
  explicit OutOfMemoryError(OutOfMemory snapshot)
      : std::runtime_error("out of memory: the pool's limit is reached"), record(std::move(snapshot)) {}
  OutOfMemory record;
};

// The address was not handed out, or was taken back already.
class InvalidPointer : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The new limit is below what is in use.
class LimitTooLow : public std::runtime_error {
 public:
  LimitTooLow(std::size_t new_limit, std::size_t active_bytes)
      : std::runtime_error("the limit is below what is in use"), limit(new_limit), active(active_bytes) {}
  std::size_t limit;
  std::size_t active;
};

// A picture of the address space.
struct RangeView {
  Address address = 0;
  std::size_t bytes = 0;
  std::size_t requested = 0;
  const char* state = "";  // "active", "cached", "free"
  Tag tag = Tag::activations;
  std::string label;
};
struct SegmentView {  // a stretch of neighbouring ranges
  Address address = 0;
  std::size_t bytes = 0;
  const char* kind = "";
  std::uint64_t arena = 0;
  StreamHandle stream = no_stream;
  std::vector<RangeView> ranges;
};

class Pool final : private RangeTable, private RangeSource, private WeightBudget {
 public:
  Pool(std::unique_ptr<VirtualMemory> memory, std::size_t limit, PoolOptions options = {});
  // Gives everything back, active or not. The pool of a device is never destroyed (device_pool.hpp).
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // At least `bytes` of memory, aligned to 64, from 256 bytes on to 256. 0 for 0 bytes. With a stream (of this device,
  // alive): to be used by work that is queued on that stream, or behind it. Without one: to be used anywhere.
  // Counted under the calling thread's label. Throws OutOfMemoryError, DriverError, ForkedProcess.
  [[nodiscard]] Address allocate(std::size_t bytes, Tag tag = Tag::activations, StreamHandle stream = no_stream);
  // Takes back what allocate() gave; 0 is allowed and does nothing. Work that uses the memory may still be queued. The
  // stream that it is on is needed for nothing but to notice a capture, and must be alive if it is given.
  // Throws InvalidPointer, with nothing changed, for any other address.
  void deallocate(Address address, StreamHandle stream = no_stream);

  // Maps the first `bytes` (> 0) of an open file, read-only, shared with whoever else maps it. Counts as active,
  // under weights, rounded up to a page. The descriptor may be closed afterwards; the file must not be shortened.
  // Throws OutOfMemoryError, DriverError, ForkedProcess.
  [[nodiscard]] Address map_file(int descriptor, std::size_t bytes);
  // Throws InvalidPointer, with nothing changed, for an address that map_file() did not give.
  void unmap_file(Address address);

  // Weights that come and go at addresses that stay: see weights.hpp, whose functions these are. A use begins when
  // begin_use() returns, and it waits for room, and for chunks that other threads load. Besides what is said there they
  // throw ForkedProcess, and begin_use() and make() OutOfMemoryError.
  [[nodiscard]] Weights::Placement place_weights(std::span<const Weights::Piece> pieces, Weights::Kind kind,
                                                 Tag tag = Tag::weights);
  void remove_region(Weights::Id region);
  void replace(Weights::Id region, std::size_t index, Weights::Id chunk);
  [[nodiscard]] std::size_t resident_in(Weights::Id region) const;
  [[nodiscard]] Weights::Id add_user(std::span<const Weights::Id> chunks, bool evictable, int priority);
  void remove_user(Weights::Id user);
  void set_policy(Weights::Id user, bool evictable, int priority);
  [[nodiscard]] Weights::UserView user(Weights::Id user) const;
  // `poll` is called now and then while it waits, without the lock; if it throws, the wait ends so.
  [[nodiscard]] std::vector<Weights::Id> begin_use(Weights::Id user, bool later = false,
                                                   const std::function<void()>& poll = {});
  [[nodiscard]] Address address_of(Weights::Id chunk) const;
  [[nodiscard]] std::size_t size_of(Weights::Id chunk) const;
  [[nodiscard]] std::uint64_t handle_of(Weights::Id chunk) const;
  [[nodiscard]] Address begin_writing(Weights::Id chunk);
  void end_writing(Weights::Id chunk, Address address);
  void map_weights(Weights::Id chunk, int descriptor, std::size_t bytes);
  void make(std::span<const Weights::Id> chunks);
  void unmake(Weights::Id chunk);
  void freeze(std::span<const Weights::Id> chunks);
  void adopt(Weights::Id chunk, int descriptor);
  [[nodiscard]] int descriptor(Weights::Id chunk) const;  // a duplicate, which is the caller's
  [[nodiscard]] std::vector<Weights::Gone> take_gone();
  [[nodiscard]] std::vector<Weights::Offer> offers() const;
  [[nodiscard]] std::size_t shared_busy() const;
  [[nodiscard]] std::size_t running() const;
  [[nodiscard]] std::vector<Weights::Id> give_up(std::span<const Weights::Id> chunks);
  void loaded(Weights::Id user, std::span<const Weights::Id> chunks, bool writable = false);
  void load_failed(Weights::Id user, std::span<const Weights::Id> chunks);
  void end_use(Weights::Id user);
  void touch(Weights::Id user);
  // Bytes of the device that those of these chunks take which are absent, each once.
  [[nodiscard]] std::size_t absent(std::span<const Weights::Id> chunks) const;
  // Waits until the user is not busy; uses that begin meanwhile wait until it is suspended, and then load it again.
  std::size_t suspend(Weights::Id user, const std::function<void()>& poll = {});
  [[nodiscard]] std::size_t granularity() const noexcept { return chunks_.granule(); }
  [[nodiscard]] std::size_t granularity_on_host() const noexcept { return memory_->granularity_on_host(); }
  // Bytes of the device that a use of these chunks would add to what the pool holds, and how many it could: below the
  // limit (a quota does not bind weights of a broker), and of what the device has, with all given back that is idle or
  // may go, and is none of these.
  struct Room {
    std::size_t missing = 0;
    std::size_t room = 0;
  };
  [[nodiscard]] Room room_for(std::span<const Weights::Id> chunks);

  // Gives idle chunks back to the system until at most `target` bytes are reserved, or none is idle, and then weights
  // that no model has any more. Waits for the device where work may still touch them. Returns the bytes given back.
  std::size_t trim(std::size_t target = 0);
  // Gives idle chunks back as needed, and weights that may go. Throws LimitTooLow, with the old limit in force.
  void set_limit(std::size_t limit);
  // From now on the pool has a quota, at first of what it has reserved itself. `grower` is called, without the lock,
  // from any thread, when a request needs a quota of so many bytes (set_quota), or more room on the device (full); it
  // returns why not, or nothing. `gone_event`: see Weights::tell_gone. False, and nothing changed, where the pool has a
  // grower. Throws LimitTooLow in debug mode.
  using Grower = std::function<std::string(std::size_t quota, bool full)>;
  [[nodiscard]] bool share(Grower grower, int gone_event);
  // No grower and no quota any more, if that event belongs to the present ones.
  void unshare(int gone_event);
  // Gives idle memory back as far as needed; returns the quota then, which is not below what is in use. Nothing changes
  // where there is no grower.
  std::size_t set_quota(std::size_t quota);
  // Changes the options. Throws LimitTooLow, with nothing changed, where memory is in use and debug would change.
  void configure(PoolOptions options);
  // While this is on, another library may be capturing a CUDA graph on a stream that the pool has never seen: the
  // pool then does nothing that could break that, and waits on the host instead. Calls nest.
  void expect_captures(bool on);
  // No stream that the calling thread asked for is being captured any more.
  void captures_ended();

  // In a child of fork(): the parent's figures as they were.
  [[nodiscard]] PoolStats stats();
  // Who holds memory, largest first; all of it adds up to `requested`.
  [[nodiscard]] std::vector<Holder> holders() const;
  void reset_peaks();

  // Debug mode: what was overwritten (throws DriverError), and what is live. Empty without debug.
  [[nodiscard]] std::vector<Corruption> check();
  [[nodiscard]] std::vector<AllocationRecord> live() const;

  // Records up to `most_events` of what happens from now on; a recording in progress is dropped.
  void start_recording(std::size_t most_events);
  [[nodiscard]] std::vector<TraceEvent> stop_recording();
  [[nodiscard]] std::vector<SegmentView> snapshot() const;

  // Throws std::logic_error that names the invariant that does not hold. Called after every operation
  // in debug builds, and where the environment has GLAKE_CHECK_INVARIANTS when the pool is made.
  void check_invariants() const;
  // For tests: see VirtualMemory::inject_failure.
  void inject_failure(std::int64_t n, std::int64_t times);

 private:
  class Operation;

  // RangeTable, RangeSource
  void add(Range& range) override;
  void remove(Range& range) noexcept override;
  [[nodiscard]] Range* acquire(Heap& heap, std::size_t bytes) override;
  [[nodiscard]] Range* acquire_once(Heap& heap, std::size_t bytes);

  // WeightBudget
  [[nodiscard]] bool reserve(std::size_t bytes, bool common) override;
  void unreserve(std::size_t bytes, bool common) noexcept override;
  [[nodiscard]] std::size_t excess(std::size_t bytes, std::size_t common) override;
  [[nodiscard]] bool quota_binds(std::size_t common) const noexcept override;
  [[nodiscard]] Weights::Which evictable_now(std::size_t common = 0) const noexcept;
  void give_back_idle() override;
  void activate(std::size_t bytes, std::size_t requested, std::uint32_t holder) override;
  void deactivate(std::size_t bytes, std::size_t requested, std::uint32_t holder) noexcept override;

  [[nodiscard]] Arena& arena_for(Tag tag, StreamHandle stream);
  [[nodiscard]] Arena& make_arena(Arena::Mode mode, bool weights);
  void notice_end_of_capture(StreamHandle stream) noexcept;
  [[nodiscard]] Arena* capture_on(StreamHandle stream) noexcept;
  void count_captures() noexcept;
  void collect_graphs();
  void prune_arenas() noexcept;
  void flush_all() noexcept;
  [[nodiscard]] Budget budget(std::size_t bytes) const noexcept;
  [[nodiscard]] std::size_t in_use() const noexcept { return chunks_.reserved() - chunks_.idle(); }
  [[nodiscard]] std::size_t limit_with(std::size_t common) const noexcept;
  template <class Request>
  auto with_room(const Request& request);
  [[nodiscard]] std::optional<std::string> grow(const OutOfMemory& record);
  [[nodiscard]] std::vector<Weights::Id> begin_use_once(Weights::Id user, bool later,
                                                        const std::function<void()>& poll);

  struct Found {
    Range* range = nullptr;  // that was handed out, or the slab's
    Slab* slab = nullptr;
    std::size_t object = 0;  // of the slab
  };
  // What was allocated lately: most of it is freed soon, and found here without a search.
  struct Recent {
    Address address = 0;
    Range* range = nullptr;
    Slab* slab = nullptr;
  };
  [[nodiscard]] Recent& recent(Address address) noexcept { return recent_[address * 0x9E3779B97F4A7C15U >> 57]; }
  [[nodiscard]] Found find(Address address);
  [[nodiscard]] Address allocate_once(std::size_t bytes, Tag tag, StreamHandle stream);
  [[nodiscard]] Address allocate_now(std::size_t bytes, Tag tag, StreamHandle stream);
  [[nodiscard]] Address allocate_in_debug(std::size_t bytes, Tag tag, StreamHandle stream, std::string stack);
  void deallocate_now(Address address, StreamHandle stream);
  void deallocate_in_debug(Address address, std::string stack);
  void apply_options();
  [[nodiscard]] bool debugging() const noexcept { return debugging_.load(std::memory_order_relaxed); }
  void unpin(std::size_t bytes) noexcept;
  void take_back(Found found, Address address, bool keep);
  void hold(std::uint32_t holder, std::size_t bytes);
  void wipe(Address address, std::size_t bytes, const Arena& arena);
  [[noreturn]] void throw_out_of_memory(std::size_t requested, const Heap* heap, std::size_t range_bytes,
                                        bool device_full);
  [[nodiscard]] std::vector<Holder> holders_locked() const;
  void check_locked() const;
  void verify() const;  // check_locked(), where that was asked for

  ProcessMark process_;
  bool always_verify_;
  PoolOptions options_;
  std::atomic<bool> debugging_ = false;  // options_.debug, for who does not hold the lock
  mutable std::mutex mutex_;
  std::size_t limit_;  // chunks_ has the smaller one of this, and of what quota and common memory allow
  std::size_t quota_ = no_quota;
  std::size_t common_ = 0;
  std::shared_ptr<const Grower> grower_;
  static constexpr std::size_t no_quota = ~std::size_t{0};
  std::unique_ptr<VirtualMemory> memory_;
  StreamOrder* const order_;  // null where there are no streams
  Fences fences_;
  Chunks chunks_;
  std::unordered_map<Address, Range*> table_;  // live and cached ranges by address
  SlabTable slab_table_;
  std::array<Recent, 128> recent_{};
  Usage usage_;
  std::uint64_t arena_serial_ = 0;
  std::list<Arena> arenas_;
  Arena& weights_;
  Arena& streamless_;
  std::unordered_map<std::uint64_t, Arena*> by_stream_;  // mode stream, by the stream's id
  std::vector<Arena*> graphs_;                           // mode capture
  std::unordered_set<Address> kept_;                     // freed, and kept for a graph
  std::size_t expected_captures_ = 0;
  std::unordered_map<Address, std::size_t> files_;  // mapped files: address -> bytes as asked for
  std::size_t file_bytes_ = 0;                      // rounded up to pages
  std::vector<std::size_t> held_;                   // bytes as asked for, by holder: label * tag_count + tag
  Weights resident_;
  std::condition_variable resident_changed_;  // a use ended, or chunks were loaded, or came or went
  void wait_for_change(std::unique_lock<std::mutex>& lock, const std::function<void()>& poll);
  struct Waiter {
    Weights::Id user;
    Weights::Clock::time_point since;
  };
  std::list<Waiter> waiters_;            // for room, in the order in which they came
  std::vector<Weights::Id> suspending_;  // users that somebody is about to suspend
  std::unique_ptr<Recorder> recorder_;
  std::unique_ptr<DebugHeap> debug_;  // in place of the arenas
  std::uint64_t allocations_ = 0;
  std::uint64_t deallocations_ = 0;
};

}  // namespace glake
