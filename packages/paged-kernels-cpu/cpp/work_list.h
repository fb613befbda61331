// The work list: which rows attend to which keys. Only integers.
#pragma once

#include <vector>

#include "mask.h"

namespace paged {

// Rows of one sequence and KV head that are attended together. Flat row `j` is row `j / q_per_kv` of the sequence, for
// query head `j % q_per_kv` of the KV head.
struct Block {
  Sequence seq;
  int64_t kv_head;
  int64_t begin;  // flat rows
  int64_t end;
  int64_t first_part;  // of the softmax states of its items; meaningless with one item
  int64_t parts;       // its items

  int64_t rows() const { return end - begin; }
};

// What one thread computes at once: a block over a chunk of its keys.
struct Item {
  int64_t block;
  int64_t part;  // of the block's parts
  KeyRange keys;
};

struct WorkList {
  std::vector<Block> blocks;
  std::vector<Item> items;
  int64_t parts = 0;      // of all blocks that have more than one
  int64_t most_rows = 0;  // of a block with more than one part
};

// Blocks of at most this many rows read each key once, as it is stored. Larger ones pay for a copy of their keys.
constexpr int64_t few_rows = 16;
// The most rows of a block.
constexpr int64_t most_rows = 768;

// Returns the step's sequences that have rows and keys, in the order of their rows. No two share a row.
std::vector<Sequence> sequences_of(const Batch& batch, int64_t tokens, int64_t page_size);

// Returns the items for `threads` threads.
WorkList make_work_list(const AttentionCall& call, const std::vector<Sequence>& seqs, int64_t threads);

}  // namespace paged
