// Where the entries of some keys are.
#pragma once

#include "mask.h"

namespace paged {

// The most keys that are attended together.
constexpr int64_t key_block = 64;

// The entries and scales of up to `key_block` neighbouring keys of one sequence and KV head.
template <class Element>
struct Entries {
  // A few more than `key_block`: kernels may read the last entry again.
  const Element* at[key_block + 16];
  float k_scales[key_block];
  float v_scales[key_block];
  int64_t count;
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
      if (!pages.scales) continue;
      found.k_scales[found.count] = scales[slot];
      found.v_scales[found.count] = scales[pages.latent ? slot : pages.page_size + slot];
    }
    slot = 0;
    ++index;
  }
  for (int64_t i = 0; i < 16; ++i) found.at[found.count + i] = found.at[found.count - 1];
}

}  // namespace paged
