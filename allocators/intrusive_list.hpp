// IntrusiveList: a doubly linked list whose links live in its elements.
//
// An element can be in several lists (one Link member each), leaves one in constant time without
// being searched for, and neither joins nor leaves through an allocation, so neither can fail.
// The list owns nothing. An element that is destroyed must have left its lists.
#pragma once

#include <cassert>
#include <cstddef>

namespace glake {

template <class T>
struct Link {
  T* previous = nullptr;
  T* next = nullptr;
  const void* list = nullptr;  // the list that this link is in, or null
};

template <class T, Link<T> T::* link>
class IntrusiveList {
 public:
  IntrusiveList() = default;
  IntrusiveList(const IntrusiveList&) = delete;
  IntrusiveList& operator=(const IntrusiveList&) = delete;

  [[nodiscard]] bool empty() const noexcept { return first_ == nullptr; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] T* front() const noexcept { return first_; }
  [[nodiscard]] T* back() const noexcept { return last_; }
  [[nodiscard]] static T* next(const T& element) noexcept { return (element.*link).next; }
  [[nodiscard]] static T* previous(const T& element) noexcept { return (element.*link).previous; }
  [[nodiscard]] bool contains(const T& element) const noexcept { return (element.*link).list == this; }

  void push_back(T& element) noexcept {
    Link<T>& own = element.*link;
    assert(own.list == nullptr);
    own = {last_, nullptr, this};
    (last_ != nullptr ? (last_->*link).next : first_) = &element;
    last_ = &element;
    ++size_;
  }

  void remove(T& element) noexcept {
    Link<T>& own = element.*link;
    assert(own.list == this);
    (own.previous != nullptr ? (own.previous->*link).next : first_) = own.next;
    (own.next != nullptr ? (own.next->*link).previous : last_) = own.previous;
    own = {};
    --size_;
  }

 private:
  T* first_ = nullptr;
  T* last_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace glake
