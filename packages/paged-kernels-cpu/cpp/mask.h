// Which keys a row sees.
#pragma once

#include <algorithm>

#include "call.h"

namespace paged {

// Positions of keys, from `begin` up to `end`.
struct KeyRange {
  int64_t begin;
  int64_t end;

  bool empty() const { return begin >= end; }
  int64_t size() const { return empty() ? 0 : end - begin; }
};

// One sequence of the step, with lengths that its page table and q can hold, whatever the batch says.
struct Sequence {
  int64_t index;
  int64_t first_row;       // its first row in q
  int64_t num_rows;        // its rows in q
  int64_t first_position;  // the position of `first_row`
  int64_t first_new;       // the position of its first new token, for the tree mask
  int64_t kv_len;
};

// Returns the keys that a row at position `t` sees. With a tree mask, it sees only some of those that are new.
static inline KeyRange keys_of_row(const AttentionCall& call, const Sequence& seq, int64_t t) {
  const Spec& spec = call.spec;
  const int64_t begin = spec.sliding_window ? std::max<int64_t>(0, t - spec.sliding_window + 1) : 0;
  const bool causal = spec.causal && !call.batch.tree_mask;
  return {begin, causal ? std::min(seq.kv_len, t + 1) : seq.kv_len};
}

// Returns a range that holds every key that rows at positions `first` up to `last` (inclusive) see.
static inline KeyRange keys_of_rows(const AttentionCall& call, const Sequence& seq, int64_t first, int64_t last) {
  return {keys_of_row(call, seq, first).begin, keys_of_row(call, seq, last).end};
}

// True if the tree mask shows row `row` of q the key at position `p`.
static inline bool in_tree(const Batch& batch, const Sequence& seq, int64_t row, int64_t p) {
  const int64_t token = p - seq.first_new;
  if (token < 0) return true;
  return token < 32 * batch.words && (batch.tree_mask[row * batch.words + token / 32] >> (token % 32) & 1);
}

// True if a row at position `t` is a token. With `q_starts`, the keys may all lie after the row.
static inline bool is_token(const Batch& batch, int64_t t) { return t >= 0 || batch.q_starts; }

}  // namespace paged
