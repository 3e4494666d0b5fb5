// The check of one invariant of the pool.
#pragma once

#include <stdexcept>
#include <string>

namespace glake {

// Throws std::logic_error that names the invariant, if it does not hold.
inline void require(bool holds, const char* invariant) {
  if (!holds) throw std::logic_error(std::string("pool invariant does not hold: ") + invariant);
}

}  // namespace glake
