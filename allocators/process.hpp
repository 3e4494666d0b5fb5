// ProcessMark: does this object live in the process that made it, or in a child of fork()?
//
// A child inherits the parent's objects but not its right to the memory: the pool's memory is shared
// with the parent by nature (MAP_SHARED), so a child that used it would write into the parent's
// tensors. Whatever belongs to a process keeps a mark and asks it first. (fork in a process that has
// threads also leaves the pool's lock in an unknown state: the mark is asked before the lock.)
#pragma once

#include <cstdint>
#include <stdexcept>

namespace glake {

class ProcessMark {
 public:
  ProcessMark() noexcept : generation_(current()) {}
  // True in a child that was forked after this mark was made.
  [[nodiscard]] bool is_child() const noexcept { return generation_ != current(); }

 private:
  // How many forks lie between the first process and this one.
  [[nodiscard]] static std::uint64_t current() noexcept;
  std::uint64_t generation_;
};

// The pool, or whatever it is, belongs to the parent of this process.
class ForkedProcess : public std::runtime_error {
 public:
  ForkedProcess() : std::runtime_error("the pool belongs to the parent process") {}
};

}  // namespace glake
