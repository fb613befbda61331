// From dot products to weights: scales, cap, ALiBi, mask, and the online softmax of one row.
#pragma once

#include <cmath>

#include "mask.h"
#include "vector.h"

namespace paged {

// One row of a block.
struct Row {
  const AttentionCall* call;
  const Sequence* seq;
  int64_t row;       // in q
  int64_t head;      // query head
  int64_t position;  // of the row

  Row(const AttentionCall& call, const Sequence& seq, int64_t kv_head, int64_t flat_row)
      : call(&call),
        seq(&seq),
        row(seq.first_row + flat_row / call.q_per_kv()),
        head(kv_head * call.q_per_kv() + flat_row % call.q_per_kv()),
        position(seq.first_position + flat_row / call.q_per_kv()) {}
};

// Multiplies `count` floats of `x` by those of `scales`. May touch up to a vector more of `x`.
template <class T>
PAGED_INLINE void scale_each(float* x, const float* scales, int64_t count) {
  int64_t i = 0;
  for (; i + T::width <= count; i += T::width) store<T>(x + i, load<T>(x + i) * load<T>(scales + i));
  for (; i < count; ++i) x[i] *= scales[i];
}

template <class T>
PAGED_INLINE void cap(float* s, int64_t padded, float soft_cap) {
  for (int64_t i = 0; i < padded; i += T::width) {
    store<T>(s + i, soft_cap * tanh<T>(load<T>(s + i) * (1 / soft_cap)));
  }
}

// Subtracts `slope` per position between the row and each key. `p` is the position of the first key.
template <class T>
PAGED_INLINE void add_alibi(float* s, int64_t padded, float slope, int64_t t, int64_t p) {
  for (int64_t i = 0; i < padded; i += T::width) {
    const Ints<T> difference = lane_numbers<T>() + static_cast<int32_t>(p + i - t);
    const Ints<T> distance = difference < 0 ? -difference : difference;
    store<T>(s + i, load<T>(s + i) - slope * T::to_floats(distance));
  }
}

// Sets the logits of keys that the row does not see to -inf, and those of the padding. `keys` are the keys of `s`.
PAGED_INLINE void hide(const Row& row, KeyRange keys, float* s, int64_t padded) {
  const KeyRange seen = keys_of_row(*row.call, *row.seq, row.position);
  const int64_t begin = std::clamp<int64_t>(seen.begin - keys.begin, 0, keys.size());
  const int64_t end = std::clamp<int64_t>(seen.end - keys.begin, begin, keys.size());
  for (int64_t i = 0; i < begin; ++i) s[i] = -INFINITY;
  for (int64_t i = end; i < padded; ++i) s[i] = -INFINITY;
  if (!row.call->batch.tree_mask) return;
  for (int64_t i = std::max(begin, row.seq->first_new - keys.begin); i < end; ++i) {
    if (!in_tree(row.call->batch, *row.seq, row.row, keys.begin + i)) s[i] = -INFINITY;
  }
}

// Turns the dot products `s` of a row with `keys` into logits. `k_scales` is null if keys have no scales.
//
// `s` is padded to whole vectors. The softmax scale is already part of q.
template <class T>
PAGED_INLINE void make_logits(const Row& row, KeyRange keys, const float* k_scales, float* s, int64_t padded) {
  const AttentionCall& call = *row.call;
  if (k_scales) scale_each<T>(s, k_scales, keys.size());
  if (call.spec.soft_cap != 0) cap<T>(s, padded, call.spec.soft_cap);
  if (call.alibi_slopes) add_alibi<T>(s, padded, call.alibi_slopes[row.head], row.position, keys.begin);
  hide(row, keys, s, padded);
}

// Turns logits into weights, and counts them in `top` and `total`. Returns the factor for what was summed before.
template <class T>
PAGED_INLINE float make_weights(float* s, int64_t padded, float& top, float& total) {
  Floats<T> most = load<T>(s);
  for (int64_t i = T::width; i < padded; i += T::width) most = larger<T>(load<T>(s + i), most);
  const float new_top = std::max(largest<T>(most), top);
  const float shift = new_top == -INFINITY ? 0 : new_top;  // -inf - -inf would be NaN
  Floats<T> added{};
  for (int64_t i = 0; i < padded; i += T::width) {
    const Floats<T> weights = exp<T>(load<T>(s + i) - shift);
    added += weights;
    store<T>(s + i, weights);
  }
  const float decay = top == new_top ? 1 : std::exp(top - shift);
  total = total * decay + sum<T>(added);
  top = new_top;
  return decay;
}

}  // namespace paged
