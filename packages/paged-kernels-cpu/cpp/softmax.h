// The softmax of rows over some of their keys, and how parts of it are merged.
#pragma once

#include "call.h"

namespace paged {

// For each of some rows, with `s` the logits so far: top = max s, total = sum exp(s - top), values = sum exp(s - top)
// v.
struct SoftmaxState {
  float* top;     // [rows]; -inf before the first key
  float* total;   // [rows]
  float* values;  // [rows, v_dim]

  static int64_t size(int64_t rows, int64_t v_dim) { return rows * (v_dim + 2); }
  static SoftmaxState in(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }
};

// Adds the other rows' keys to `state`.
void merge(SoftmaxState state, SoftmaxState other, int64_t rows, int64_t v_dim);

// A block's rows: row `row` of q and query head `head`.
struct OutputRow {
  int64_t row;
  int64_t head;
  bool is_token;
};

// Writes row `index` of `state` to the output: the sink joins, and the values are divided by the total.
void finish_row(const AttentionCall& call, SoftmaxState state, int64_t index, OutputRow to);

// Writes zeros, and a log-sum-exp of -inf, for rows of q from `begin` up to `end`.
void clear_rows(const AttentionCall& call, int64_t begin, int64_t end);

}  // namespace paged
