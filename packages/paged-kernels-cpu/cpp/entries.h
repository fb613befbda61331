// Where the entries of some keys are.
#pragma once

#include "mask.h"
#include "scratch.h"
#include "stored.h"

namespace paged {

// The most keys that are attended together.
constexpr int64_t key_block = 64;

// The entries and scales of up to `key_block` neighbouring keys of one sequence and KV head.
template <class Element>
struct Entries {
  static constexpr int64_t padding = 16;
  // A few more than `key_block`: kernels may read the last entry again.
  const Element* at[key_block + padding];
  float k_scales[key_block];
  float v_scales[key_block];
  int64_t count;

  void pad() {
    for (int64_t i = 0; i < padding; ++i) at[count + i] = at[count - 1];
  }
};

// Returns the page at `index` of the sequence's row of the page table, or the nearest one that exists.
static inline int64_t page_of(const AttentionCall& call, const Sequence& seq, int64_t index) {
  const int64_t page = call.batch.page_table[seq.index * call.batch.pages_per_seq + index];
  return std::clamp<int64_t>(page, 0, call.pages.num_pages - 1);
}

// Finds the entries of the keys at positions `keys`.
template <class Element>
static inline void find_entries(const AttentionCall& call, const Sequence& seq, int64_t head, KeyRange keys,
                                Entries<Element>& found) {
  const Pages& pages = call.pages;
  int64_t index = keys.begin / pages.page_size, slot = keys.begin % pages.page_size;
  found.count = 0;
  while (found.count < keys.size()) {
    const int64_t place = page_of(call, seq, index) * pages.kv_heads + head;
    const Element* page = static_cast<const Element*>(pages.data) + place * pages.page_size * pages.storage_lanes;
    const float* scales = pages.scales + place * pages.scale_lanes;
    const int64_t end = std::min(pages.page_size, slot + keys.size() - found.count);
    for (; slot < end; ++slot, ++found.count) {
      found.at[found.count] = page + slot * pages.storage_lanes;
      found.k_scales[found.count] = pages.scales ? scales[slot] : 1;
      found.v_scales[found.count] = pages.scales ? scales[pages.latent ? slot : pages.page_size + slot] : 1;
    }
    slot = 0;
    ++index;
  }
  found.pad();
}

// Reads entries where they are stored.
template <class T, template <class> class StoredType>
class InPlace {
 public:
  using Stored = StoredType<T>;
  using Element = typename Stored::Element;

  explicit InPlace(const AttentionCall& call) : stored(call.pages), v_start(call.pages.v_start), pages_(call.pages) {}

  void find(const AttentionCall& call, const Sequence& seq, int64_t head, KeyRange keys, Entries<Element>& found) {
    find_entries(call, seq, head, keys, found);
  }

  // Starts to bring lanes of an entry into the cache.
  void fetch(const Element* entry, int64_t lane, int64_t count) const {
    const char* bytes = reinterpret_cast<const char*>(entry + lane);
    for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof *entry); at += 64) __builtin_prefetch(bytes + at);
  }

  bool v_is_apart() const { return !pages_.latent; }

  const Stored stored;
  const int64_t v_start;

 private:
  const Pages& pages_;
};

// Reads entries through a copy of them as floats, for types that are slow to widen.
template <class T, template <class> class StoredType>
class Unpacked {
  using Source = StoredType<T>;

 public:
  using Stored = Float32<T>;
  using Element = float;

  explicit Unpacked(const AttentionCall& call)
      : stored(call.pages), v_start(whole_lines(call.pages.k_dim)), source_(call.pages) {
    stride_ = v_start + whole_lines(call.pages.v_dim);
    copies_ = scratch(ScratchFor::unpacked, 2 * key_block * stride_);
  }

  // Two calls in a row give entries that can be used together.
  void find(const AttentionCall& call, const Sequence& seq, int64_t head, KeyRange keys, Entries<float>& found) {
    const Pages& pages = call.pages;
    Entries<typename Source::Element> from;
    find_entries(call, seq, head, keys, from);
    second_ = !second_;
    for (int64_t i = 0; i < from.count; ++i) {
      float* copy = copies_ + (second_ * key_block + i) * stride_;
      unpack<T>(source_, from.at[i], 0, pages.k_dim, copy);
      unpack<T>(source_, from.at[i], pages.v_start, pages.v_dim, copy + v_start);
      found.at[i] = copy;
      found.k_scales[i] = from.k_scales[i];
      found.v_scales[i] = from.v_scales[i];
    }
    found.count = from.count;
    found.pad();
  }

  void fetch(const float*, int64_t, int64_t) const {}
  bool v_is_apart() const { return false; }

  const Stored stored;
  const int64_t v_start;

 private:
  const Source source_;
  int64_t stride_;
  float* copies_;  // [2, key_block, stride]
  bool second_ = false;
};

}  // namespace paged
