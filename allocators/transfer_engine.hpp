// TransferEngine: bytes of files and of host memory to devices, and back, over every path there is.
//
// Words
//   path      one way for bytes between the host and a device: a CopyLink. Paths of a device are ranked, its own link
//   first lane      a path in one direction, with a thread of its own transfer  what one caller wants moved to or from
//   one device piece     what is moved at once slot      a page-locked buffer for a piece of a file; what lies in slots
//   is the memory in flight
//
// How
//   Reader threads take the next piece of a file into a free slot. Lanes take the next piece that is in memory, so
//   links of unequal rates balance themselves (GLake's Multi-path; the pieces of host memory need no slot). Both take
//   from the transfer of the highest priority first, and of equal ones from the oldest. A lane leaves a piece to the
//   others where they would be done earlier with all that is left: a slow link never makes a transfer wait for it.
//
//   A link that fails is not used any more until the device has no transfers left; its pieces are copied over the
//   others, and the transfer tells which failed. Without any link left the transfer fails.
//
// When a transfer has ended, well or not, nothing of it is queued anywhere: its memory may be taken back.
//
// Thread-safe. Threads are started by the first transfers and sleep between them. In a child of fork() everything
// throws ForkedProcess: the threads are the parent's; and it is not destroyed there, as its locks may be taken.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "copy_link.hpp"
#include "host_buffers.hpp"
#include "piece_reader.hpp"
#include "process.hpp"

namespace glake {

class TransferEngine {
 public:
  using Target = int;  // the number of a device

  struct Options {
    unsigned readers = 8;
    std::size_t slot = std::size_t{2} << 20;         // bytes
    std::size_t in_flight = std::size_t{512} << 20;  // the most bytes of all slots
    std::size_t gap = 4096;  // parts that are at most so far apart are copied at once, with zeros between them
  };
  struct Span {  // of host memory that stays as it is until the transfer has ended
    std::byte* host = nullptr;
    Address device = 0;
    std::size_t bytes = 0;
  };
  struct Settings {
    int priority = 0;
    unsigned paths = 1;         // the first so many of the device
    bool around_cache = false;  // see PieceReader::read()
    bool in_place = false;      // the device's addresses are memory of this process: no slots, no links
    std::size_t piece = 0;      // bytes of a piece of host memory; 0: by the size of the transfer
  };
  struct View {
    std::size_t bytes = 0;
    std::size_t done = 0;
    bool ended = false;
    bool cancelled = false;
    std::optional<ReadError> read_error;
    std::string file;                     // of the error
    std::string link_error;               // of the last link that failed, where none is left
    std::vector<std::string> lost_links;  // that failed, and what they said
  };
  struct PathView {
    std::string name;
    std::size_t number = 0;                      // of all paths of the engine
    std::array<double, direction_count> rate{};  // bytes per second, as it was lately; 0 before
    std::array<std::size_t, direction_count> bytes{};
    bool failed = false;
  };
  struct Memory {  // bytes
    std::size_t allocated = 0;
    std::size_t in_use = 0;
    std::size_t peak = 0;  // of in_use
    bool locked = true;    // false where some could not be page-locked
  };
  struct Event {  // for a timeline: nanoseconds of the steady clock
    bool read = false;
    std::size_t who = 0;  // the number of the reader, or of the lane (path * 2 + direction)
    Target target = 0;
    std::uint64_t transfer = 0;
    std::int64_t start = 0;
    std::int64_t end = 0;
    std::size_t bytes = 0;
  };

  class Transfer;
  using Handle = std::shared_ptr<Transfer>;

  TransferEngine(std::shared_ptr<HostBuffers> buffers, Options options);
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;
  // Cancels what goes on, and waits for it.
  ~TransferEngine();

  // Adds the next path of a device. `rate`: what each direction is known to reach; 0 where nothing is.
  void add_path(Target target, std::unique_ptr<CopyLink> link, std::array<double, direction_count> rate = {});
  // Takes away all but the first one, once no transfer uses them.
  void remove_further_paths(Target target);
  [[nodiscard]] std::vector<PathView> paths(Target target) const;
  // For transfers that begin from here on. The size of slots stays, and readers become no fewer.
  void set_options(Options options);

  // Throws std::invalid_argument: a device without paths, a file that is not there by number.
  [[nodiscard]] Handle load(Target target, std::vector<std::string> files, std::vector<FilePart> parts,
                            Settings settings);
  [[nodiscard]] Handle copy(Target target, Direction direction, const std::vector<Span>& spans, Settings settings);
  // Whether it has ended, at the latest after so many seconds.
  bool wait(const Handle& transfer, double seconds);
  // It ends soon; wait for that.
  void cancel(const Handle& transfer);
  [[nodiscard]] View view(const Handle& transfer) const;
  [[nodiscard]] std::uint64_t number(const Handle& transfer) const;

  [[nodiscard]] Memory memory() const;
  // Makes all slots now, rather than with the first large load.
  void prepare();
  // Gives slots back, if none is in use.
  void trim();
  [[nodiscard]] bool is_child() const noexcept { return process_.is_child(); }

  void record(bool on);
  [[nodiscard]] std::vector<Event> take_events();

 private:
  using Clock = std::chrono::steady_clock;
  struct Piece {
    Address address = 0;
    std::size_t bytes = 0;
    std::byte* host = nullptr;
    std::size_t first = 0;  // of its parts
    std::size_t count = 0;
    std::byte* slot = nullptr;
  };
  struct Path;
  struct Lane {
    Path* path = nullptr;
    Direction direction = Direction::to_device;
    std::thread thread;
    std::size_t flying = 0;  // bytes
    double rate = 0;         // bytes per second: the quotient of the two below
    double recent_bytes = 0;
    double recent_seconds = 0;
    std::size_t bytes = 0;
    Clock::time_point last_end;
    bool failed = false;
    bool sleeping = false;
    std::condition_variable wake;
  };
  struct Path {
    Target target = 0;
    std::size_t number = 0;  // of all paths
    unsigned rank = 0;       // of the device's
    std::unique_ptr<CopyLink> link;
    std::array<Lane, direction_count> lanes;
    bool leaving = false;
  };
  struct Flying {
    Handle transfer;
    std::size_t piece = 0;
    unsigned slot = 0;
    Clock::time_point start;
  };

  using Lock = std::unique_lock<std::mutex>;

  // Takes the mutex, which nobody has for long: a thread that sleeps for it costs more than one that tries again, above
  // all in a virtual machine.
  [[nodiscard]] Lock locked() const;
  static void relock(Lock& lock);
  void refuse_child() const;
  // The most bytes of a piece that all links of a transfer can do.
  [[nodiscard]] std::size_t most_of(Target target, const Settings& settings) const;
  void begin(const Handle& transfer);
  void start_lanes(const Transfer& made);
  void start_readers(std::size_t pieces);
  void read_pieces(std::size_t number);
  void run_lane(Lane& lane);
  [[nodiscard]] Handle to_read();
  // Of several devices that wait for slots each has its share: none waits for another's slow link.
  [[nodiscard]] bool has_share(const Transfer& transfer) const;
  void make_slots(std::size_t pieces);
  [[nodiscard]] std::vector<HostBuffer> take_slabs();
  void give(std::byte* slot);
  // Waits a moment for a slot, or for something to copy, without sleeping; false if there was none.
  template <class Found>
  [[nodiscard]] bool spin(Lock& lock, const Found& found);
  [[nodiscard]] std::size_t most_slots() const;
  [[nodiscard]] std::size_t slots_in_use() const { return slots_ - free_.size(); }
  // There may be more of them than there should be now.
  [[nodiscard]] bool has_slot() const { return !free_.empty() && slots_in_use() < most_slots(); }
  // Whether the transfer, while it goes on, is one that the lane copies pieces of.
  [[nodiscard]] static bool serves(const Lane& lane, const Transfer& transfer);
  [[nodiscard]] bool has_next(const Lane& lane) const;
  // What the lane is to copy next. `left`: whether there is something that it leaves to others.
  [[nodiscard]] std::optional<Flying> next(const Lane& lane, bool& left);
  [[nodiscard]] bool worth_it(const Lane& lane, const Transfer& transfer, std::size_t bytes) const;
  [[nodiscard]] static bool is_usable(const Lane& lane);
  [[nodiscard]] bool can_copy(const Transfer& transfer) const;
  // Whether something that goes on may come to have pieces for the lane.
  [[nodiscard]] bool may_get_more(const Lane& lane) const;
  // Those that the transfer may use, or all.
  void wake_lanes(const Transfer* transfer = nullptr);
  void lose(Lane& lane, std::deque<Flying>& flying, const std::string& what);
  void stop(Transfer& transfer);
  void end_if_done(Transfer& transfer);
  void revive(const Transfer& made);
  [[nodiscard]] std::vector<Path*> paths_of(Target target) const;

  std::shared_ptr<HostBuffers> buffers_;
  ProcessMark process_;
  mutable std::mutex mutex_;
  std::condition_variable to_readers_;
  std::condition_variable to_waiters_;
  Options options_;
  bool ending_ = false;
  std::uint64_t last_ = 0;
  std::vector<Handle> active_;  // first the ones that come first
  std::vector<std::unique_ptr<Path>> paths_;
  std::size_t path_numbers_ = 0;
  std::vector<std::thread> readers_;
  std::mutex making_;              // of slots; taken before mutex_
  std::vector<HostBuffer> slabs_;  // each of several slots
  std::vector<std::byte*> free_;
  std::size_t slots_ = 0;
  std::size_t peak_ = 0;                   // of slots in use
  unsigned spinning_ = 0;                  // readers that wait for a slot without sleeping
  std::atomic<std::uint64_t> changes_{0};  // of slots and of pieces that are ready: what who spins looks at
  bool recording_ = false;
  std::vector<Event> events_;
};

}  // namespace glake
