#include "attention.h"

#include <atomic>
#include <memory>

#include "scratch.h"

namespace paged {
namespace {

class Attention {
 public:
  Attention(const AttentionCall& call, const Kernels& kernels, ThreadPool& pool)
      : call_(call),
        kernels_(kernels),
        pool_(pool),
        seqs_(sequences_of(call.batch, call.tokens, call.pages.page_size)) {
    work_ = make_work_list(call, seqs_, pool.num_threads());
    states_.reset(new float[work_.parts * state_size()]);
    items_left_.reset(new std::atomic<int64_t>[work_.blocks.size()]);
    for (size_t i = 0; i < work_.blocks.size(); ++i) items_left_[i] = work_.blocks[i].parts;
  }

  void run() {
    clear_rows_without_sequence();
    for_each_item(pool_, static_cast<int64_t>(work_.items.size()), [this](int64_t i) { attend_item(work_.items[i]); });
  }

 private:
  void clear_rows_without_sequence() {
    int64_t row = 0;
    for (const Sequence& seq : seqs_) {
      clear_rows(call_, row, seq.first_row);
      row = seq.first_row + seq.num_rows;
    }
    clear_rows(call_, row, call_.tokens);
  }

  void attend_item(const Item& item) {
    const Block& block = work_.blocks[item.block];
    const bool whole = block.parts == 1;
    float* memory = whole ? scratch(ScratchFor::state, state_size_of(block.rows())) : memory_of(block, item.part);
    const SoftmaxState state = SoftmaxState::in(memory, block.rows());
    kernels_.for_block(call_.pages.type, block)(call_, block, item.keys, state);
    if (whole) {
      finish(block, state);
    } else if (items_left_[item.block].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      finish(block, merged(block));
    }
  }

  // Returns the state of a block of which all items are done.
  SoftmaxState merged(const Block& block) {
    const SoftmaxState state = SoftmaxState::in(memory_of(block, 0), block.rows());
    for (int64_t part = 1; part < block.parts; ++part) {
      merge(state, SoftmaxState::in(memory_of(block, part), block.rows()), block.rows(), call_.pages.v_dim);
    }
    return state;
  }

  void finish(const Block& block, SoftmaxState state) {
    const int64_t group = call_.q_per_kv();
    for (int64_t j = block.begin; j < block.end; ++j) {
      const bool token = is_token(call_.batch, block.seq.first_position + j / group);
      finish_row(call_, state, j - block.begin,
                 {block.seq.first_row + j / group, block.kv_head * group + j % group, token});
    }
  }

  int64_t state_size_of(int64_t rows) const { return SoftmaxState::size(rows, call_.pages.v_dim); }
  int64_t state_size() const { return state_size_of(work_.most_rows); }
  float* memory_of(const Block& block, int64_t part) {
    return states_.get() + (block.first_part + part) * state_size();
  }

  const AttentionCall& call_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  std::vector<Sequence> seqs_;
  WorkList work_;
  std::unique_ptr<float[]> states_;
  std::unique_ptr<std::atomic<int64_t>[]> items_left_;
};

}  // namespace

void attend(const AttentionCall& call, const Kernels& kernels, ThreadPool& pool) {
  Attention(call, kernels, pool).run();
}

}  // namespace paged
