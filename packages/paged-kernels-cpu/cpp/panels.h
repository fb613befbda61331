// Panels: keys and values of one sequence and KV head as floats, in the order in which matrix products read them.
//
// A panel holds K in strips of `strip` keys, each transposed, and V in strips of `strip` lanes:
//
//   K   [strips of keys][k_dim][strip]        V   [strips of lanes][keys][strip]
#pragma once

#include "entries.h"

namespace paged {

// The most keys of a panel. K and V of a panel, the rows and their values share a level-two cache.
constexpr int64_t panel_keys = 256;

// Transposes `T::width` vectors. Each step exchanges halves, quarters, ... of pairs of them.
template <class T, int step, int... lane>
PAGED_INLINE void exchange(Floats<T>& a, Floats<T>& b, std::integer_sequence<int, lane...>) {
  const Floats<T> first = a, second = b;
  a = __builtin_shufflevector(first, second, ((lane & step) ? lane - step + T::width : lane)...);
  b = __builtin_shufflevector(first, second, ((lane & step) ? lane + T::width : lane + step)...);
}

template <class T, int step = T::width / 2>
PAGED_INLINE void transpose(Floats<T>* x) {
#pragma GCC unroll 16
  for (int i = 0; i < T::width; ++i) {
    if (!(i & step)) exchange<T, step>(x[i], x[i + step], std::make_integer_sequence<int, T::width>{});
  }
  if constexpr (step > 1) transpose<T, step / 2>(x);
}

template <class T, template <class> class StoredType>
class Panel {
  using Stored = StoredType<T>;
  using Element = typename Stored::Element;

 public:
  static constexpr int64_t strip = T::width * T::tile_vectors;
  static constexpr int64_t strips_of(int64_t n) { return (n + strip - 1) / strip; }

  // The floats of memory that a panel needs.
  static int64_t size(const Pages& pages) {
    const int64_t rows = whole_lines(pages.k_dim) + strip + whole_lines(pages.v_dim) + strip;
    return panel_keys * (pages.k_dim + strips_of(pages.v_dim) * strip) + strip * rows;
  }

  Panel(const AttentionCall& call, float* memory) : call_(call), pages_(call.pages), stored_(call.pages) {
    k_ = memory;
    v_ = k_ + panel_keys * pages_.k_dim;
    rows_ = v_ + panel_keys * strips_of(pages_.v_dim) * strip;
    stride_ = whole_lines(pages_.k_dim) + strip;
  }

  // Takes the keys at positions `keys`, at most `panel_keys`. Keys past the last are zeros up to a whole strip.
  void take(const Sequence& seq, int64_t head, KeyRange keys) {
    keys_ = keys;
    Entries<Element> both[2];
    Entries<Element>*now = &both[0], *next = &both[1];
    find_and_fetch(seq, head, 0, *now);
    for (int64_t first = 0; first < keys.size(); first += strip) {
      find_and_fetch(seq, head, first + strip, *next);
      take_k(*now, first);
      for (int64_t i = 0; i < now->count; ++i) take_v(*now, i, first + i);
      std::swap(now, next);
    }
  }

  // Returns strip `index` of K, `[k_dim, strip]`.
  const float* k(int64_t index) const { return k_ + index * strip * pages_.k_dim; }
  // Returns strip `index` of V from key `key` on, `[keys, strip]`.
  const float* v(int64_t index, int64_t key) const { return v_ + (index * panel_keys + key) * strip; }

  KeyRange keys() const { return keys_; }

 private:
  // Finds a strip of keys from key `first` of the panel on, and starts to bring it into the cache.
  void find_and_fetch(const Sequence& seq, int64_t head, int64_t first, Entries<Element>& found) {
    const KeyRange keys{keys_.begin + first, std::min(keys_.begin + first + strip, keys_.end)};
    if (keys.empty()) return;
    find_entries(call_, seq, head, keys, found);
    for (int64_t i = 0; i < found.count; ++i) {
      const char* entry = reinterpret_cast<const char*>(found.at[i]);
      for (int64_t byte = 0; byte < pages_.entry_bytes; byte += 64) __builtin_prefetch(entry + byte);
    }
  }

  void take_k(const Entries<Element>& entries, int64_t first) {
    for (int64_t i = 0; i < strip; ++i) {
      float* row = rows_ + i * stride_;
      if (i >= entries.count) {
        std::fill_n(row, stride_, 0.f);
        continue;
      }
      unpack<T>(stored_, entries.at[i], 0, pages_.k_dim, row);
      if (pages_.scales) multiply(row, stride_, entries.k_scales[i]);
    }
    for (int64_t i = 0; i < strip; i += T::width) put_transposed(k_ + first * pages_.k_dim + i, rows_ + i * stride_);
  }

  // Writes `T::width` rows as columns.
  void put_transposed(float* to, const float* rows) {
    for (int64_t lane = 0; lane < pages_.k_dim; lane += T::width) {
      Floats<T> x[T::width];
      for (int i = 0; i < T::width; ++i) x[i] = load<T>(rows + i * stride_ + lane);
      transpose<T>(x);
      const int64_t count = std::min<int64_t>(T::width, pages_.k_dim - lane);
      for (int64_t i = 0; i < count; ++i) store<T>(to + (lane + i) * strip, x[i]);
    }
  }

  void take_v(const Entries<Element>& entries, int64_t i, int64_t key) {
    unpack<T>(stored_, entries.at[i], pages_.v_start, pages_.v_dim, rows_);
    const int64_t padded = strips_of(pages_.v_dim) * strip;
    std::fill(rows_ + pages_.v_dim, rows_ + padded, 0.f);
    if (pages_.scales) multiply(rows_, padded, entries.v_scales[i]);
    for (int64_t index = 0; index * strip < padded; ++index) {
      std::memcpy(v_ + (index * panel_keys + key) * strip, rows_ + index * strip, strip * sizeof(float));
    }
  }

  static void multiply(float* row, int64_t size, float scale) {
    for (int64_t i = 0; i < size; i += T::width) store<T>(row + i, load<T>(row + i) * scale);
  }

  const AttentionCall& call_;
  const Pages& pages_;
  const Stored stored_;
  KeyRange keys_{0, 0};
  float* k_;
  float* v_;
  float* rows_;  // entries as they are unpacked: [strip, stride] of keys, then one of values
  int64_t stride_;
};

}  // namespace paged
