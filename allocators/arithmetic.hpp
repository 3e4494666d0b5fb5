// Arithmetic on sizes that may be as large as a size can be.
#pragma once

#include <cstddef>
#include <limits>

namespace glake {

inline constexpr std::size_t most_bytes = std::numeric_limits<std::size_t>::max();

// Rounds up to a multiple of `step`; the largest multiple where that would overflow.
[[nodiscard]] constexpr std::size_t round_up(std::size_t bytes, std::size_t step) noexcept {
  return bytes > most_bytes - step ? most_bytes / step * step : (bytes + step - 1) / step * step;
}

[[nodiscard]] constexpr std::size_t plus(std::size_t left, std::size_t right) noexcept {
  return left > most_bytes - right ? most_bytes : left + right;
}

}  // namespace glake
