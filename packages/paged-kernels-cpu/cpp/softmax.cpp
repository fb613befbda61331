#include "softmax.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "numbers.h"

namespace paged {
namespace {

// Returns exp(top - new_top), where -inf means that there was no key.
float decay(float top, float new_top) { return top == -INFINITY ? 0 : std::exp(top - new_top); }

void merge_row(float* values, float scale, const float* other, float other_scale, int64_t v_dim) {
  for (int64_t i = 0; i < v_dim; ++i) values[i] = values[i] * scale + other[i] * other_scale;
}

void store_row(const AttentionCall& call, const float* values, float scale, int64_t at) {
  const int64_t v_dim = call.pages.v_dim, from = at * v_dim;
  if (call.row_type == RowType::f32) {
    float* out = static_cast<float*>(call.out) + from;
    for (int64_t i = 0; i < v_dim; ++i) out[i] = values[i] * scale;
  } else {
    uint16_t* out = static_cast<uint16_t*>(call.out) + from;
    const bool brain = call.row_type == RowType::bf16;
    for (int64_t i = 0; i < v_dim; ++i)
      out[i] = brain ? float_to_bfloat16(values[i] * scale) : float_to_half(values[i] * scale);
  }
}

}  // namespace

void merge(SoftmaxState state, SoftmaxState other, int64_t rows, int64_t v_dim) {
  for (int64_t row = 0; row < rows; ++row) {
    const float top = std::max(state.top[row], other.top[row]);
    const float scale = decay(state.top[row], top), other_scale = decay(other.top[row], top);
    merge_row(state.values + row * v_dim, scale, other.values + row * v_dim, other_scale, v_dim);
    state.total[row] = state.total[row] * scale + other.total[row] * other_scale;
    state.top[row] = top;
  }
}

void finish_row(const AttentionCall& call, SoftmaxState state, int64_t index, OutputRow to) {
  float top = state.top[index], total = state.total[index], scale = 1;
  if (call.sinks && to.is_token) {
    const float sink = call.sinks[to.head], new_top = std::max(top, sink);
    scale = decay(top, new_top);
    total = total * scale + decay(sink, new_top);
    top = new_top;
  }
  const bool sees = to.is_token && !(total == 0);  // a NaN is not 0
  const int64_t at = to.row * call.q_heads + to.head;
  store_row(call, state.values + index * call.pages.v_dim, sees ? scale / total : 0, at);
  if (call.lse) call.lse[at] = sees ? top + std::log(total) : -INFINITY;
}

void clear_rows(const AttentionCall& call, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t row_bytes = call.q_heads * call.pages.v_dim * (call.row_type == RowType::f32 ? 4 : 2);
  std::memset(static_cast<char*>(call.out) + begin * row_bytes, 0, (end - begin) * row_bytes);
  if (call.lse) std::fill(call.lse + begin * call.q_heads, call.lse + end * call.q_heads, -INFINITY);
}

}  // namespace paged
