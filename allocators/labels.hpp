// Labels: who asks for memory. A thread carries a label (a session's or a model's name), and every allocation that it
// makes is counted under it.
#pragma once

#include <cstdint>
#include <string>

namespace glake {

// The number of a name, the same for the life of the process. 0 is the empty name, and what comes after 65535 names.
[[nodiscard]] std::uint32_t label_of(const std::string& name);
[[nodiscard]] std::string label_name(std::uint32_t label);

void set_thread_label(std::uint32_t label) noexcept;
[[nodiscard]] std::uint32_t thread_label() noexcept;

}  // namespace glake
