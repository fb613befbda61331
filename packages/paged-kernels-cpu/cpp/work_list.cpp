#include "work_list.h"

namespace paged {
namespace {

constexpr int64_t items_per_thread = 4;
// A chunk of a block with few rows reads this much.
constexpr int64_t least_chunk_bytes = 128 << 10, most_chunk_bytes = 1 << 20;
// A chunk of a block with many rows has at least so many keys, or all.
constexpr int64_t least_chunk_keys = 512;

int64_t round_up_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

KeyRange keys_of_block(const AttentionCall& call, const Block& block) {
  const int64_t group = call.q_per_kv();
  const int64_t first = block.seq.first_position + block.begin / group;
  const int64_t last = block.seq.first_position + (block.end - 1) / group;
  return keys_of_rows(call, block.seq, first, last);
}

// Returns the bytes that a block reads for a key, or would read in the time that it computes.
int64_t cost_of_key(const AttentionCall& call, const Block& block) {
  return call.pages.entry_bytes * round_up_divide(block.rows(), few_rows);
}

int64_t cost(const AttentionCall& call, const Block& block) {
  return cost_of_key(call, block) * keys_of_block(call, block).size();
}

// Returns the keys of a chunk that costs about `share`.
int64_t chunk_keys(const AttentionCall& call, const Block& block, int64_t share) {
  if (call.chunk_keys) return call.chunk_keys;
  const int64_t fair = share / cost_of_key(call, block);
  if (block.rows() > few_rows) return std::max(fair, least_chunk_keys);
  const int64_t least = least_chunk_bytes / call.pages.entry_bytes, most = most_chunk_bytes / call.pages.entry_bytes;
  return std::max<int64_t>(1, std::clamp(fair, least, most));
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

// Adds the items of a block: its keys in chunks of about the same size.
void add_items(const AttentionCall& call, WorkList& work, int64_t index, int64_t share) {
  Block& block = work.blocks[index];
  const KeyRange keys = keys_of_block(call, block);
  block.parts = std::max<int64_t>(1, round_up_divide(keys.size(), chunk_keys(call, block, share)));
  const int64_t chunk = round_up_divide(keys.size(), block.parts);
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
  const int64_t share = threads == 1 ? INT64_MAX : total / (threads * items_per_thread);
  work.items.reserve(work.blocks.size());
  // The last blocks of a prompt see the most keys. They come first, so that no thread waits for one of them at the end.
  for (int64_t i = static_cast<int64_t>(work.blocks.size()) - 1; i >= 0; --i) add_items(call, work, i, share);
  return work;
}

}  // namespace paged
