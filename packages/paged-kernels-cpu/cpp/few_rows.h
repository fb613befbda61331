// Attention of a block with few rows: each key is read once, where it is stored. Decode is limited by this reading.
//
// Keys come in key blocks. For each: the dot products of q and k, the softmax, and the weighted sum of v. The dot
// products fetch V into the cache, and the weighted sum fetches the keys of the next key block.
#pragma once

#include "entries.h"
#include "logits.h"
#include "scratch.h"
#include "softmax.h"
#include "stored.h"
#include "work_list.h"

namespace paged {

// `Reader` is `InPlace` or `Unpacked`.
template <class T, class Reader>
class FewRows {
  using Stored = typename Reader::Stored;
  using Element = typename Stored::Element;
  static constexpr int width = T::width;
  static constexpr int vectors = Stored::vectors;
  static constexpr int lanes = width * vectors;  // of one block of an entry
  static constexpr int sub_rows = 4;             // rows that are computed together

 public:
  FewRows(const AttentionCall& call, const Block& block, SoftmaxState state)
      : call_(call),
        pages_(call.pages),
        block_(block),
        state_(state),
        reader_(call),
        q_stride_(round_up(pages_.k_dim)),
        v_stride_(round_up(pages_.v_dim)) {
    q_ = scratch(ScratchFor::few_rows, block.rows() * (q_stride_ + v_stride_) + sub_rows * key_block);
    values_ = q_ + block.rows() * q_stride_;
    s_ = values_ + block.rows() * v_stride_;
  }

  void run(KeyRange keys) {
    take_q();
    std::fill_n(values_, block_.rows() * v_stride_, 0.f);
    std::fill_n(state_.top, block_.rows(), -INFINITY);
    std::fill_n(state_.total, block_.rows(), 0.f);
    if (!keys.empty()) walk(keys);
    put_values();
  }

 private:
  static int64_t round_up(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

  // Returns the place of element `i` of a row in the order of the stored type's vectors.
  static int64_t place(int64_t i) {
    if (!Stored::even_odd) return i;
    const int64_t lane = i % lanes;
    return i - lane + lane % 2 * width + lane / 2;
  }

  // Reads the block's rows of q, times the softmax scale, in the order of the stored type.
  void take_q() {
    std::fill_n(q_, block_.rows() * q_stride_, 0.f);
    for (int64_t j = 0; j < block_.rows(); ++j) {
      const Row row = row_of(j);
      const int64_t from = (row.row * call_.q_heads + row.head) * pages_.k_dim;
      for (int64_t i = 0; i < pages_.k_dim; ++i) {
        q_[j * q_stride_ + place(i)] = load_row_element(call_.q, call_.row_type, from + i) * call_.spec.softmax_scale;
      }
    }
  }

  void put_values() {
    for (int64_t j = 0; j < block_.rows(); ++j) {
      for (int64_t i = 0; i < pages_.v_dim; ++i)
        state_.values[j * pages_.v_dim + i] = values_[j * v_stride_ + place(i)];
    }
  }

  void walk(KeyRange keys) {
    Entries<Element> both[2];
    Entries<Element>*now = &both[0], *next = &both[1];
    const int64_t step = keys_at_once();
    KeyRange part{keys.begin, std::min(keys.begin + step, keys.end)};
    reader_.find(call_, block_.seq, block_.kv_head, part, *now);
    while (!part.empty()) {
      const KeyRange later{part.end, std::min(part.end + step, keys.end)};
      next->count = 0;
      if (!later.empty()) reader_.find(call_, block_.seq, block_.kv_head, later, *next);
      attend(part, *now, *next);
      std::swap(now, next);
      part = later;
    }
  }

  // Returns the keys of a key block: those that a level-one cache holds.
  int64_t keys_at_once() const { return std::clamp<int64_t>(32768 / pages_.entry_bytes / 16 * 16, 16, key_block); }

  void attend(KeyRange keys, const Entries<Element>& now, const Entries<Element>& next) {
    for (int64_t j = 0; j < block_.rows(); j += sub_rows) {
      switch (std::min<int64_t>(sub_rows, block_.rows() - j)) {
        case 1:
          attend_rows<1>(j, keys, now, next);
          break;
        case 2:
          attend_rows<2>(j, keys, now, next);
          break;
        case 3:
          attend_rows<3>(j, keys, now, next);
          break;
        default:
          attend_rows<4>(j, keys, now, next);
      }
    }
  }

  template <int rows>
  void attend_rows(int64_t j, KeyRange keys, const Entries<Element>& now, const Entries<Element>& next) {
    const int64_t padded = (now.count + width - 1) / width * width;
    dot_products<rows>(j, now);
    for (int row = 0; row < rows; ++row) {
      float* s = s_ + row * key_block;
      make_logits<T>(row_of(j + row), keys, pages_.scales ? now.k_scales : nullptr, s, padded);
      const float decay = make_weights<T>(s, padded, state_.top[j + row], state_.total[j + row]);
      if (pages_.scales) scale_each<T>(s, now.v_scales, now.count);
      if (decay != 1) shrink(values_ + (j + row) * v_stride_, decay);
    }
    weighted_sum<rows>(j, now, next);
  }

  void shrink(float* values, float decay) {
    for (int64_t i = 0; i < v_stride_; i += width) store<T>(values + i, load<T>(values + i) * decay);
  }

  // Puts the dot product of row `j + row` and key `i` into `s_[row * key_block + i]`.
  template <int rows>
  void dot_products(int64_t j, const Entries<Element>& keys) {
    constexpr int padded_rows = rows == 3 ? 4 : rows, tokens = width / padded_rows;
    for (int64_t i = 0; i < keys.count; i += tokens) {
      Floats<T> products[width] = {};
      multiply<rows, tokens>(q_ + j * q_stride_, keys.at + i, products);
      if (j == 0) fetch_values(keys.at + i, tokens);
      float logits[width];
      store<T>(logits, sums<T>(products));
      for (int row = 0; row < rows; ++row) {
        std::memcpy(s_ + row * key_block + i, logits + row * tokens, tokens * sizeof(float));
      }
    }
  }

  // Adds the products of each row and token, lane by lane.
  template <int rows, int tokens>
  [[gnu::always_inline]] inline void multiply(const float* q, const Element* const* entries,
                                              Floats<T>* products) const {
    int64_t lane = 0;
    for (; lane + lanes <= pages_.k_dim; lane += lanes) {
#pragma GCC unroll 16
      for (int token = 0; token < tokens; ++token) {
        Floats<T> k[vectors];
        reader_.stored.read(entries[token], lane, k);
        multiply_block<rows, tokens>(q + lane, k, token, products);
      }
    }
    if (lane == pages_.k_dim) return;
#pragma GCC unroll 16
    for (int token = 0; token < tokens; ++token) {
      Floats<T> k[vectors];
      reader_.stored.read_some(entries[token], lane, pages_.k_dim - lane, k);
      multiply_block<rows, tokens>(q + lane, k, token, products);
    }
  }

  template <int rows, int tokens>
  [[gnu::always_inline]] inline void multiply_block(const float* q, const Floats<T>* k, int token,
                                                    Floats<T>* products) const {
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
      for (int vector = 0; vector < vectors; ++vector) {
        products[row * tokens + token] += load<T>(q + row * q_stride_ + vector * width) * k[vector];
      }
    }
  }

  void fetch_values(const Element* const* entries, int tokens) const {
    if (!reader_.v_is_apart()) return;
    for (int token = 0; token < tokens; ++token) reader_.fetch(entries[token], reader_.v_start, pages_.v_dim);
  }

  // Adds the weighted values of the keys to `values_`.
  template <int rows>
  void weighted_sum(int64_t j, const Entries<Element>& keys, const Entries<Element>& next) {
    constexpr int together = std::max(1, (width == 16 ? 16 : 8) / (rows * vectors));  // accumulators fit in registers
    float* values = values_ + j * v_stride_;
    const Entries<Element>* to_fetch = j == 0 ? &next : nullptr;
    int64_t lane = 0;
    for (; lane + together * lanes <= pages_.v_dim; lane += together * lanes) {
      add_columns<rows, together, false>(values + lane, lane, keys, to_fetch);
    }
    for (; lane + lanes <= pages_.v_dim; lane += lanes)
      add_columns<rows, 1, false>(values + lane, lane, keys, to_fetch);
    if (lane < pages_.v_dim) add_columns<rows, 1, true>(values + lane, lane, keys, to_fetch);
  }

  // The same for `blocks` blocks of lanes from `lane` on; `partial` if V ends within the block.
  //
  // Fetches these lanes of the next keys, a few at a time: the memory is then busy all the while.
  template <int rows, int blocks, bool partial>
  void add_columns(float* values, int64_t lane, const Entries<Element>& keys, const Entries<Element>* next) const {
    const int64_t fetched = next ? next->count : 0;
    constexpr int columns = blocks * vectors;
    Floats<T> sum[rows][columns];
    for (int row = 0; row < rows; ++row) {
      for (int c = 0; c < columns; ++c) sum[row][c] = load<T>(values + row * v_stride_ + c * width);
    }
    for (int64_t i = 0; i < keys.count; ++i) {
      if (i < fetched) reader_.fetch(next->at[i], lane, blocks * lanes);
#pragma GCC unroll 16
      for (int b = 0; b < blocks; ++b) {
        Floats<T> v[vectors];
        const int64_t from = reader_.v_start + lane + b * lanes;
        if constexpr (partial) {
          reader_.stored.read_some(keys.at[i], from, pages_.v_dim - lane, v);
        } else {
          reader_.stored.read(keys.at[i], from, v);
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
          for (int vector = 0; vector < vectors; ++vector)
            sum[row][b * vectors + vector] += s_[row * key_block + i] * v[vector];
        }
      }
    }
    for (int row = 0; row < rows; ++row) {
      for (int c = 0; c < columns; ++c) store<T>(values + row * v_stride_ + c * width, sum[row][c]);
    }
  }

  Row row_of(int64_t j) const { return Row(call_, block_.seq, block_.kv_head, block_.begin + j); }

  const AttentionCall& call_;
  const Pages& pages_;
  const Block& block_;
  const SoftmaxState state_;
  Reader reader_;
  const int64_t q_stride_;
  const int64_t v_stride_;
  float* q_;       // [rows, q_stride]
  float* values_;  // [rows, v_stride], in the order of the stored type
  float* s_;       // [sub_rows, key_block]: logits, then weights
};

template <class T, class Reader>
void attend_few_rows(const AttentionCall& call, const Block& block, KeyRange keys, SoftmaxState state) {
  FewRows<T, Reader>(call, block, state).run(keys);
}

}  // namespace paged
