#include "work_list.h"

namespace paged {
namespace {

constexpr int64_t least_chunk_bytes = 128 << 10, most_chunk_bytes = 1 << 20;
constexpr int64_t items_per_thread = 4;

int64_t round_up_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

KeyRange keys_of_block(const AttentionCall& call, const Block& block) {
  const int64_t group = call.q_per_kv();
  const int64_t first = block.seq.first_position + block.begin / group;
  const int64_t last = block.seq.first_position + (block.end - 1) / group;
  return keys_of_rows(call, block.seq, first, last);
}

// Returns the bytes that a block reads, or would read in the time that it computes.
int64_t cost(const AttentionCall& call, const Block& block) {
  const int64_t per_key = call.pages.entry_bytes * round_up_divide(block.rows(), few_rows);
  return per_key * keys_of_block(call, block).size();
}

std::vector<Block> blocks_of(const AttentionCall& call, const std::vector<Sequence>& seqs) {
  std::vector<Block> blocks;
  const int64_t step = call.q_rows ? call.q_rows * call.q_per_kv() : most_rows;
  for (const Sequence& seq : seqs) {
    const int64_t rows = seq.num_rows * call.q_per_kv();
    for (int64_t begin = 0; begin < rows; begin += step) {
      for (int64_t head = 0; head < call.pages.kv_heads; ++head) {
        blocks.push_back({seq, head, begin, std::min(rows, begin + step), 0, 1});
      }
    }
  }
  return blocks;
}

// Adds the items of a block: its keys in chunks of at most `chunk_bytes`.
void add_items(const AttentionCall& call, WorkList& work, int64_t index, int64_t chunk_bytes) {
  Block& block = work.blocks[index];
  const KeyRange keys = keys_of_block(call, block);
  const int64_t chunks = std::max<int64_t>(1, round_up_divide(cost(call, block), chunk_bytes));
  const int64_t chunk = call.chunk_keys ? call.chunk_keys : std::max<int64_t>(1, round_up_divide(keys.size(), chunks));
  block.parts = std::max<int64_t>(1, round_up_divide(keys.size(), chunk));
  for (int64_t part = 0; part < block.parts; ++part) {
    const int64_t begin = keys.begin + part * chunk;
    work.items.push_back({index, part, {begin, std::min(keys.end, begin + chunk)}});
  }
  if (block.parts == 1) return;
  block.first_part = work.parts;
  work.parts += block.parts;
  work.most_rows = std::max(work.most_rows, block.rows());
}

}  // namespace

std::vector<Sequence> sequences_of(const Batch& batch, int64_t tokens, int64_t page_size) {
  std::vector<Sequence> seqs;
  int64_t free_row = 0;  // no earlier sequence has it or a later one
  const int64_t count = std::min<int64_t>(batch.num_seqs[0], batch.max_seqs);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = batch.cu_q_lens[i], end = batch.cu_q_lens[i + 1], kv_len = batch.kv_lens[i];
    const int64_t first_new = batch.q_starts ? batch.q_starts[i] : kv_len - (end - start);
    const int64_t first_row = std::max(start, free_row), end_row = std::min(end, tokens);
    if (kv_len <= 0 || first_row >= end_row) continue;
    const int64_t held = std::min(kv_len, batch.pages_per_seq * page_size);
    seqs.push_back({i, first_row, end_row - first_row, first_new + first_row - start, first_new, held});
    free_row = end_row;
  }
  return seqs;
}

WorkList make_work_list(const AttentionCall& call, const std::vector<Sequence>& seqs, int64_t threads) {
  WorkList work;
  work.blocks = blocks_of(call, seqs);
  int64_t total = 0;
  for (const Block& block : work.blocks) total += cost(call, block);
  const int64_t share = total / (threads * items_per_thread);
  const int64_t chunk_bytes = threads == 1 ? INT64_MAX : std::clamp(share, least_chunk_bytes, most_chunk_bytes);
  work.items.reserve(work.blocks.size());
  for (size_t i = 0; i < work.blocks.size(); ++i) add_items(call, work, static_cast<int64_t>(i), chunk_bytes);
  return work;
}

}  // namespace paged
