// The arguments of one attention and of one page write, as plain pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paged {

// The type of the stored keys and values.
enum class KvType : int { f32, bf16, f16, int8, e4m3, e5m2, int4 };
constexpr int num_kv_types = 7;

// The type of the rows of q, k, v and the output.
enum class RowType : int { f32, bf16, f16 };

// The pages of one layer: `data [num_pages, kv_heads, page_size, storage_lanes]`.
struct Pages {
  const void* data;
  const float* scales;  // [num_pages, kv_heads, scale_lanes], or null without scales
  KvType type;
  int64_t num_pages;
  int64_t kv_heads;
  int64_t page_size;
  int64_t storage_lanes;
  int64_t scale_lanes;
  int64_t entry_bytes;
  int64_t k_dim;
  int64_t v_dim;
  int64_t v_start;  // the first lane of V
  bool latent;      // true if V is the first lanes of K; an entry then has one scale
};

// The sequences of one step.
struct Batch {
  const int32_t* page_table;  // [max_seqs, pages_per_seq]
  const int32_t* kv_lens;     // [max_seqs]
  const int32_t* cu_q_lens;   // [max_seqs + 1]
  const int32_t* num_seqs;    // []
  const int32_t* q_starts;    // [max_seqs], or null
  const int32_t* tree_mask;   // [tokens, words], or null
  int64_t max_seqs;
  int64_t pages_per_seq;
  int64_t words;
};

struct Spec {
  float softmax_scale;
  float soft_cap;          // 0 means no cap
  int64_t sliding_window;  // 0 means no window
  bool causal;
};

struct AttentionCall {
  Pages pages;
  Batch batch;
  Spec spec;
  const void* q;  // [tokens, q_heads, k_dim]
  void* out;      // [tokens, q_heads, v_dim]
  float* lse;     // [tokens, q_heads], or null
  RowType row_type;
  int64_t tokens;
  int64_t q_heads;
  const float* sinks;         // [q_heads], or null
  const float* alibi_slopes;  // [q_heads], or null
  int64_t q_rows;             // rows of q that are attended together, or 0 for the default
  int64_t chunk_keys;         // keys that one thread attends at once, or 0 for the default

  int64_t q_per_kv() const { return q_heads / pages.kv_heads; }
};

// Rows of K and V that go to given slots of `pages`.
struct WriteCall {
  Pages pages;
  void* data;     // of the pages
  float* scales;  // of the pages, or null without scales
  const void* k;  // [tokens, kv_heads, k_dim]
  const void* v;  // [tokens, kv_heads, v_dim]; not read for latent pages
  RowType row_type;
  int64_t tokens;
  const int32_t* page_ids;  // [tokens]; 0 means that the row is not stored
  const int32_t* slots;     // [tokens]
};

}  // namespace paged
