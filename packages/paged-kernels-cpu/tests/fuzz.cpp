// Random calls of every kernel, for the sanitizers: ragged batches, nonsense in lengths, page tables and tree masks.
//
// Each array is a heap block of exactly its size, so that AddressSanitizer sees a read or write outside. All targets
// must agree on sensible batches. Exits with 1 at the first difference. Usage: fuzz [rounds] [seed]

#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

#include "../cpp/attention.h"
#include "../cpp/numbers.h"
#include "../cpp/write.h"

namespace paged {
namespace {

// A pool like XLA's: a queue and some threads. Tasks may run after the call that scheduled them.
class Threads : public ThreadPool {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { serve(); });
  }

  ~Threads() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int64_t num_threads() const override { return static_cast<int64_t>(threads_.size()) + 1; }

  void schedule(std::function<void()> task) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    wake_.notify_one();
  }

 private:
  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

struct TypeFacts {
  int64_t bytes;
  bool scaled;
};

TypeFacts facts_of(KvType type) {
  switch (type) {
    case KvType::f32:
      return {4, false};
    case KvType::bf16:
    case KvType::f16:
      return {2, false};
    default:
      return {1, true};
  }
}

// Random numbers, and heap blocks full of them.
class Random {
 public:
  explicit Random(uint32_t seed) : generator_(seed) {}

  int64_t below(int64_t end) { return static_cast<int64_t>(generator_() % static_cast<uint64_t>(end)); }
  int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool chance(int64_t one_in) { return below(one_in) == 0; }
  float number() { return static_cast<float>(between(-500, 500)) / 250; }

  std::unique_ptr<float[]> floats(int64_t size) {
    std::unique_ptr<float[]> made(new float[size]);
    for (int64_t i = 0; i < size; ++i) made[i] = number();
    return made;
  }

  std::unique_ptr<uint8_t[]> rows(int64_t size, RowType type) {
    std::unique_ptr<uint8_t[]> made(new uint8_t[size * (type == RowType::f32 ? 4 : 2)]);
    for (int64_t i = 0; i < size; ++i) {
      const float value = number();
      const uint16_t half = type == RowType::bf16 ? float_to_bfloat16(value) : float_to_half(value);
      if (type == RowType::f32) {
        std::memcpy(made.get() + 4 * i, &value, 4);
      } else {
        std::memcpy(made.get() + 2 * i, &half, 2);
      }
    }
    return made;
  }

 private:
  std::mt19937 generator_;
};

// One call, with the arrays that it points to.
class Case {
 public:
  explicit Case(Random& random) : random_(random), nonsense_(random.chance(3)) {
    make_pages();
    make_batch();
    make_rows();
  }

  bool is_nonsense() const { return nonsense_; }

  // Writes the new rows into the pages.
  void write(ThreadPool& pool) {
    WriteCall call{};
    call.pages = pages_;
    call.data = data_.get();
    call.scales = scales_.get();
    call.k = k_.get();
    call.v = v_.get();
    call.row_type = row_type_;
    call.tokens = tokens_;
    call.page_ids = page_ids_.get();
    call.slots = slots_.get();
    paged::write(call, pool);
  }

  // Returns the output and the log-sum-exp, as floats.
  std::vector<float> attend(const Kernels& kernels, ThreadPool& pool) {
    const int64_t size = tokens_ * q_heads_ * pages_.v_dim;
    std::unique_ptr<uint8_t[]> out(new uint8_t[size * (row_type_ == RowType::f32 ? 4 : 2)]);
    std::unique_ptr<float[]> lse(new float[tokens_ * q_heads_]);
    AttentionCall call = call_;
    call.out = out.get();
    call.lse = lse.get();
    paged::attend(call, kernels, pool);
    std::vector<float> result(size);
    load_row(out.get(), row_type_, 0, size, result.data());
    result.insert(result.end(), lse.get(), lse.get() + tokens_ * q_heads_);
    return result;
  }

  float tolerance() const { return row_type_ == RowType::f32 ? 1e-4f : 3e-2f; }

 private:
  void make_pages() {
    pages_.type = static_cast<KvType>(random_.below(num_kv_types));
    const TypeFacts facts = facts_of(pages_.type);
    pages_.num_pages = random_.between(2, 20);
    pages_.kv_heads = random_.between(1, 3);
    pages_.page_size = random_.between(1, 40);
    pages_.k_dim = random_.between(1, 140);
    pages_.latent = random_.chance(4);
    pages_.v_dim = random_.between(1, pages_.latent ? pages_.k_dim : 140);
    pages_.v_start = pages_.latent ? 0 : pages_.k_dim;
    const int64_t lanes = (std::max(pages_.k_dim, pages_.v_start + pages_.v_dim) + 255) / 256 * 256;
    pages_.storage_lanes =
        pages_.type == KvType::int4 ? lanes / 2 : std::max(pages_.k_dim, pages_.v_start + pages_.v_dim);
    pages_.entry_bytes = pages_.storage_lanes * facts.bytes;
    pages_.scale_lanes = facts.scaled ? 2 * pages_.page_size : 0;
    const int64_t places = pages_.num_pages * pages_.kv_heads;
    data_ = numbers(places * pages_.page_size * pages_.storage_lanes);
    if (facts.scaled) scales_ = random_.floats(places * pages_.scale_lanes);
    for (int64_t i = 0; i < places * pages_.scale_lanes; ++i) scales_[i] /= 50;  // moderate logits
    pages_.data = data_.get();
    pages_.scales = scales_.get();
  }

  // Returns finite numbers of the pages' type.
  std::unique_ptr<uint8_t[]> numbers(int64_t size) {
    if (pages_.type == KvType::f32) return random_.rows(size, RowType::f32);
    if (pages_.type == KvType::bf16) return random_.rows(size, RowType::bf16);
    if (pages_.type == KvType::f16) return random_.rows(size, RowType::f16);
    std::unique_ptr<uint8_t[]> made(new uint8_t[size]);
    for (int64_t i = 0; i < size; ++i) made[i] = static_cast<uint8_t>(random_.below(256) & 0xbf);
    return made;
  }

  void make_batch() {
    Batch& batch = call_.batch;
    batch.max_seqs = random_.between(1, 6);
    batch.pages_per_seq = random_.between(1, 12);
    tokens_ = random_.between(1, 60);
    table_.reset(new int32_t[batch.max_seqs * batch.pages_per_seq]);
    for (int64_t i = 0; i < batch.max_seqs * batch.pages_per_seq; ++i) table_[i] = page_id();
    kv_lens_.reset(new int32_t[batch.max_seqs]);
    q_starts_.reset(new int32_t[batch.max_seqs]);
    starts_.reset(new int32_t[batch.max_seqs + 1]);
    starts_[0] = 0;
    for (int64_t i = 0; i < batch.max_seqs; ++i) make_sequence(i);
    count_.reset(new int32_t[1]);
    count_[0] = nonsense_ && random_.chance(4) ? any() : static_cast<int32_t>(random_.between(0, batch.max_seqs));
    batch.page_table = table_.get();
    batch.kv_lens = kv_lens_.get();
    batch.cu_q_lens = starts_.get();
    batch.num_seqs = count_.get();
    if (random_.chance(4)) batch.q_starts = q_starts_.get();
    if (random_.chance(4)) make_tree();
  }

  void make_sequence(int64_t i) {
    const Batch& batch = call_.batch;
    const int64_t kv_len = random_.chance(6) ? 0 : random_.between(0, batch.pages_per_seq * pages_.page_size);
    const int64_t q_len = random_.between(0, std::min(std::max<int64_t>(0, tokens_ - starts_[i]), kv_len ? kv_len : 3));
    kv_lens_[i] = nonsense_ && random_.chance(4) ? any() : static_cast<int32_t>(kv_len);
    starts_[i + 1] = nonsense_ && random_.chance(4) ? any() : static_cast<int32_t>(starts_[i] + q_len);
    q_starts_[i] = static_cast<int32_t>(random_.between(-50, 200));
  }

  void make_tree() {
    Batch& batch = call_.batch;
    batch.words = random_.between(1, 3);
    tree_.reset(new int32_t[tokens_ * batch.words]);
    for (int64_t i = 0; i < tokens_ * batch.words; ++i) tree_[i] = any();
    batch.tree_mask = tree_.get();
  }

  void make_rows() {
    row_type_ = static_cast<RowType>(random_.below(3));
    q_heads_ = pages_.kv_heads * random_.between(1, 9);
    q_ = random_.rows(tokens_ * q_heads_ * pages_.k_dim, row_type_);
    k_ = random_.rows(tokens_ * pages_.kv_heads * pages_.k_dim, row_type_);
    v_ = random_.rows(tokens_ * pages_.kv_heads * pages_.v_dim, row_type_);
    sinks_ = random_.floats(q_heads_);
    slopes_ = random_.floats(q_heads_);
    for (int64_t i = 0; i < q_heads_; ++i) slopes_[i] = std::fabs(slopes_[i]) / 10;
    page_ids_.reset(new int32_t[tokens_]);
    slots_.reset(new int32_t[tokens_]);
    for (int64_t i = 0; i < tokens_; ++i) page_ids_[i] = page_id();
    // No two rows have the same slot, but for nonsense, which is not written.
    for (int64_t i = 0; i < tokens_; ++i) slots_[i] = static_cast<int32_t>(i % pages_.page_size);
    for (int64_t i = pages_.page_size; i < tokens_; ++i) page_ids_[i] = 0;
    call_.pages = pages_;
    call_.q = q_.get();
    call_.row_type = row_type_;
    call_.tokens = tokens_;
    call_.q_heads = q_heads_;
    call_.sinks = random_.chance(2) ? sinks_.get() : nullptr;
    call_.alibi_slopes = random_.chance(3) ? slopes_.get() : nullptr;
    call_.spec = {0.1f, random_.chance(3) ? 2.f : 0.f, random_.chance(2) ? random_.between(1, 90) : 0,
                  !random_.chance(3)};
    call_.q_rows = random_.chance(2) ? random_.between(1, 40) : 0;
    call_.chunk_keys = random_.chance(2) ? random_.between(1, 100) : 0;
  }

  int32_t any() { return static_cast<int32_t>(random_.below(int64_t{1} << 32)); }

  int32_t page_id() {
    return nonsense_ && random_.chance(5) ? any() : static_cast<int32_t>(random_.below(pages_.num_pages));
  }

  Random& random_;
  bool nonsense_;
  Pages pages_{};
  AttentionCall call_{};
  RowType row_type_{};
  int64_t tokens_ = 0, q_heads_ = 0;
  std::unique_ptr<uint8_t[]> data_, q_, k_, v_;
  std::unique_ptr<float[]> scales_, sinks_, slopes_;
  std::unique_ptr<int32_t[]> table_, kv_lens_, starts_, q_starts_, count_, tree_, page_ids_, slots_;
};

bool alike(float a, float b, float tolerance) {
  return a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

bool agree(const std::vector<float>& a, const std::vector<float>& b, float tolerance) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!alike(a[i], b[i], tolerance)) return false;
  }
  return true;
}

int fuzz(int rounds, uint32_t seed) {
  Threads pool(3);
  for (int round = 0; round < rounds; ++round) {
    Random random(seed + round);
    Case one(random);
    one.write(pool);
    const std::vector<float> expected = one.attend(portable_kernels(), pool);
    for (const Kernels* kernels : usable_kernels()) {
      if (!agree(one.attend(*kernels, pool), expected, one.tolerance()) && !one.is_nonsense()) {
        std::printf("%s and portable differ: fuzz 1 %u\n", kernels->name, seed + round);
        return 1;
      }
    }
  }
  std::printf("%d calls\n", rounds);
  return 0;
}

}  // namespace
}  // namespace paged

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 1000;
  const uint32_t seed = count > 2 ? static_cast<uint32_t>(std::atoi(arguments[2])) : 0;
  return paged::fuzz(rounds, seed);
}
