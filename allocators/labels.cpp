#include "labels.hpp"

#include <deque>
#include <mutex>
#include <unordered_map>

namespace glake {
namespace {

constexpr std::size_t most_labels = 65536;

struct Names {
  std::mutex mutex;
  std::deque<std::string> names{""};
  std::unordered_map<std::string, std::uint32_t> numbers{{"", 0}};
};

Names& names() {
  static Names* const all = new Names;  // never destroyed: sessions may allocate while the process exits
  return *all;
}

thread_local std::uint32_t current = 0;

}  // namespace

std::uint32_t label_of(const std::string& name) {
  Names& all = names();
  const std::scoped_lock lock(all.mutex);
  if (const auto found = all.numbers.find(name); found != all.numbers.end()) return found->second;
  if (all.names.size() == most_labels) return 0;
  const auto number = static_cast<std::uint32_t>(all.names.size());
  all.names.push_back(name);
  all.numbers.emplace(name, number);
  return number;
}

std::string label_name(std::uint32_t label) {
  Names& all = names();
  const std::scoped_lock lock(all.mutex);
  return label < all.names.size() ? all.names[label] : "";
}

void set_thread_label(std::uint32_t label) noexcept { current = label; }
std::uint32_t thread_label() noexcept { return current; }

}  // namespace glake
