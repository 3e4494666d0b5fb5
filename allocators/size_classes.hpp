// The sizes that small requests are rounded up to.
//
// 64, 128, 192, 256; then steps of 256 up to 1024; then four steps per doubling (1280, 1536, 1792,
// 2048, 2560, ...) up to 32 KiB. So a class wastes less than a quarter of the request above 1 KiB,
// every class from 256 on is a multiple of 256 and every smaller one of 64: objects that lie back to
// back are aligned to 256, or to 64.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>

namespace glake {

// Requests below this are small: they share ranges ("slabs"). Others get a range of their own, which wastes less.
inline constexpr std::size_t small_limit = std::size_t{32} << 10;

namespace size_classes {

inline constexpr std::size_t fine_count = 4;                             // multiples of 64, up to 256
inline constexpr std::size_t coarse_count = 3;                           // 512, 768, 1024
inline constexpr std::size_t count = fine_count + coarse_count + 4 * 5;  // ... up to 2^15

// The class of a request of 1 to small_limit bytes.
[[nodiscard]] constexpr std::size_t index(std::size_t bytes) noexcept {
  if (bytes <= 256) return (bytes + 63) / 64 - 1;
  if (bytes <= 1024) return fine_count + (bytes + 255) / 256 - 2;
  const std::size_t doubling = static_cast<std::size_t>(std::bit_width(bytes - 1)) - 1;  // 2^d < bytes <= 2^(d+1)
  const std::size_t step = std::size_t{1} << (doubling - 2);
  const std::size_t steps = (bytes - (std::size_t{1} << doubling) + step - 1) / step;  // 1 to 4
  return fine_count + coarse_count + (doubling - 10) * 4 + steps - 1;
}

// The bytes of an object of this class.
[[nodiscard]] constexpr std::size_t bytes(std::size_t index) noexcept {
  if (index < fine_count) return (index + 1) * 64;
  if (index < fine_count + coarse_count) return (index - fine_count + 2) * 256;
  const std::size_t position = index - fine_count - coarse_count;
  const std::size_t base = std::size_t{1024} << (position / 4);
  return base + base / 4 * (position % 4 + 1);
}

static_assert(index(1) == 0 && index(64) == 0 && index(65) == 1 && index(256) == 3);
static_assert(bytes(index(257)) == 512 && bytes(index(1024)) == 1024 && bytes(index(1025)) == 1280);
static_assert(bytes(index(2048)) == 2048 && bytes(index(2049)) == 2560);
static_assert(index(small_limit) == count - 1 && bytes(count - 1) == small_limit);

// How many objects a full-grown slab of this class should have room for.
[[nodiscard]] constexpr std::size_t objects_per_slab(std::size_t object_bytes) noexcept {
  return std::max<std::size_t>(65536 / object_bytes, 8);
}

}  // namespace size_classes
}  // namespace glake
