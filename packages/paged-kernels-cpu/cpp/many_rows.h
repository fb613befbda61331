// Attention of a block with many rows, as matrix products. Prefill is limited by these.
//
// Keys come in panels, and rows in bands. For each: the logits q k^T, the softmax of each row, and the sum of the
// weighted values. A band computes only the strips of keys that its rows see.
#pragma once

#include "logits.h"
#include "panels.h"
#include "softmax.h"
#include "work_list.h"

namespace paged {

template <class T, template <class> class StoredType>
class ManyRows {
  using Panels = Panel<T, StoredType>;
  static constexpr int64_t strip = Panels::strip;
  static constexpr int tile_rows = T::tile_rows;
  static constexpr int64_t band_rows = 48;  // a multiple of `tile_rows`; their logits fit in a cache
  static constexpr int64_t s_stride = panel_keys + 16;

 public:
  ManyRows(const AttentionCall& call, const Block& block, SoftmaxState state)
      : call_(call),
        block_(block),
        state_(state),
        rows_((block.rows() + band_rows - 1) / band_rows * band_rows),
        q_stride_(whole_lines(call.pages.k_dim)),
        v_stride_(Panels::strips_of(call.pages.v_dim) * strip),
        q_(scratch(ScratchFor::many_rows,
                   rows_ * (q_stride_ + v_stride_) + band_rows * s_stride + Panels::size(call.pages))),
        values_(q_ + rows_ * q_stride_),
        s_(values_ + rows_ * v_stride_),
        panel_(call, s_ + band_rows * s_stride) {}

  void run(KeyRange keys) {
    take_q();
    std::fill_n(values_, rows_ * v_stride_, 0.f);
    std::fill_n(state_.top, block_.rows(), -INFINITY);
    std::fill_n(state_.total, block_.rows(), 0.f);
    for (int64_t begin = keys.begin; begin < keys.end; begin += panel_keys) {
      panel_.take(block_.seq, block_.kv_head, {begin, std::min(begin + panel_keys, keys.end)});
      for (int64_t j = 0; j < block_.rows(); j += band_rows) attend_band(j);
    }
    put_values();
  }

 private:
  // Reads the block's rows of q, times the softmax scale. Rows past the last are zeros.
  void take_q() {
    std::fill_n(q_, rows_ * q_stride_, 0.f);
    const int64_t dim = call_.pages.k_dim;
    for (int64_t j = 0; j < block_.rows(); ++j) {
      const Row row = row_of(j);
      load_row(call_.q, call_.row_type, (row.row * call_.q_heads + row.head) * dim, dim, q_ + j * q_stride_);
      for (int64_t i = 0; i < dim; ++i) q_[j * q_stride_ + i] *= call_.spec.softmax_scale;
    }
  }

  void put_values() {
    const int64_t dim = call_.pages.v_dim;
    for (int64_t j = 0; j < block_.rows(); ++j)
      std::memcpy(state_.values + j * dim, values_ + j * v_stride_, dim * sizeof(float));
  }

  // Attends rows from `j` on to the keys of the panel that one of them sees.
  void attend_band(int64_t j) {
    const int64_t count = std::min(band_rows, block_.rows() - j);
    const KeyRange seen = keys_of_rows(call_, block_.seq, row_of(j).position, row_of(j + count - 1).position);
    const KeyRange all = panel_.keys();
    const int64_t begin = std::max<int64_t>(0, seen.begin - all.begin) / strip * strip;
    const int64_t end = std::min(seen.end, all.end) - all.begin;
    if (begin >= end) return;
    const int64_t tiles = (count + tile_rows - 1) / tile_rows;
    make_products(j, tiles, begin, end);
    for (int64_t row = 0; row < count; ++row) make_row_weights(j + row, s_ + row * s_stride, {begin, end});
    for (int64_t row = count; row < tiles * tile_rows; ++row)
      std::fill(s_ + row * s_stride + begin, s_ + row * s_stride + end, 0.f);
    add_values(j, tiles, begin, end);
  }

  void make_products(int64_t j, int64_t tiles, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += strip) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* q = q_ + (j + tile * tile_rows) * q_stride_;
        multiply_tile<false>(q, q_stride_, panel_.k(first / strip), call_.pages.k_dim,
                             s_ + tile * tile_rows * s_stride + first, s_stride);
      }
    }
  }

  // Turns the products of a row with the keys `part` of the panel into weights.
  void make_row_weights(int64_t j, float* s, KeyRange part) {
    const KeyRange keys{panel_.keys().begin + part.begin, panel_.keys().begin + part.end};
    const int64_t padded = (part.size() + T::width - 1) / T::width * T::width;
    make_logits<T>(row_of(j), keys, nullptr, s + part.begin, padded);
    const float decay = make_weights<T>(s + part.begin, padded, state_.top[j], state_.total[j]);
    if (decay == 1) return;
    float* values = values_ + j * v_stride_;
    for (int64_t i = 0; i < v_stride_; i += T::width) store<T>(values + i, load<T>(values + i) * decay);
  }

  void add_values(int64_t j, int64_t tiles, int64_t begin, int64_t end) {
    for (int64_t lane = 0; lane < v_stride_; lane += strip) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* weights = s_ + tile * tile_rows * s_stride + begin;
        float* values = values_ + (j + tile * tile_rows) * v_stride_ + lane;
        multiply_tile<true>(weights, s_stride, panel_.v(lane / strip, begin), end - begin, values, v_stride_);
      }
    }
  }

  // Writes `a b` to `c`, or adds it: `a [tile_rows, depth]`, `b [depth, strip]`. All of `c` is in registers meanwhile.
  template <bool add>
  static void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                            int64_t c_stride) {
    constexpr int vectors = T::tile_vectors;
    Floats<T> sum[tile_rows][vectors];
#pragma GCC unroll 16
    for (int row = 0; row < tile_rows; ++row) {
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) sum[row][i] = add ? load<T>(c + row * c_stride + i * T::width) : Floats<T>{};
    }
    for (int64_t k = 0; k < depth; ++k, b += strip) {
      Floats<T> column[vectors];
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) column[i] = load<T>(b + i * T::width);
#pragma GCC unroll 16
      for (int row = 0; row < tile_rows; ++row) {
        const float factor = a[row * a_stride + k];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) sum[row][i] += factor * column[i];
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < tile_rows; ++row) {
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) store<T>(c + row * c_stride + i * T::width, sum[row][i]);
    }
  }

  Row row_of(int64_t j) const { return Row(call_, block_.seq, block_.kv_head, block_.begin + j); }

  const AttentionCall& call_;
  const Block& block_;
  const SoftmaxState state_;
  const int64_t rows_;  // of the block, in whole bands
  const int64_t q_stride_;
  const int64_t v_stride_;
  float* const q_;       // [rows, q_stride]
  float* const values_;  // [rows, v_stride]
  float* const s_;       // [band_rows, s_stride]: logits, then weights
  Panels panel_;
};

template <class T, template <class> class StoredType>
void attend_many_rows(const AttentionCall& call, const Block& block, KeyRange keys, SoftmaxState state) {
  ManyRows<T, StoredType>(call, block, state).run(keys);
}

}  // namespace paged
