#include "write.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.h"

namespace paged {
namespace {

constexpr int64_t rows_of_item = 32;

// The largest magnitude that a type with scales can store.
float largest_of(KvType type) {
  switch (type) {
    case KvType::int8:
      return 127;
    case KvType::int4:
      return 7;
    case KvType::e4m3:
      return 448;
    default:
      return 57344;  // e5m2
  }
}

// One key or one value of a row, and where it goes.
struct Part {
  const void* rows;
  int64_t from;  // its first element in `rows`
  int64_t size;
  int64_t lane;  // its first lane in the entry
};

// Divisions here multiply by the reciprocal, as XLA's do, so that all backends write the same bits.

// Returns max |x| / largest, or 1 if all of it is zero. A NaN in `x` makes it NaN.
float scale_of(const std::vector<float>& x, float largest) {
  uint32_t most = 0;  // magnitudes are ordered like their bits, and those of a NaN are the largest
  for (float value : x) most = std::max(most, bits_as<uint32_t>(value) & 0x7fffffffu);
  const float scale = bits_as<float>(most) * (1 / largest);
  return scale < 1.17549435e-38f ? 1 : scale;
}

// Writes one entry: K and V side by side, with zeros around them.
class EntryWriter {
 public:
  explicit EntryWriter(const WriteCall& call) : call_(call), pages_(call.pages) {}

  // `scales` are those of the page and head, or null.
  void write(int64_t row_and_head, void* entry, float* scales, int64_t slot) {
    std::memset(entry, 0, pages_.entry_bytes);
    put({call_.k, row_and_head * pages_.k_dim, pages_.k_dim, 0}, entry, scales ? scales + slot : nullptr);
    if (pages_.latent) return;
    float* v_scale = scales ? scales + pages_.page_size + slot : nullptr;
    put({call_.v, row_and_head * pages_.v_dim, pages_.v_dim, pages_.v_start}, entry, v_scale);
  }

 private:
  void put(const Part& part, void* entry, float* scale) {
    if (same_type()) {
      const int64_t bytes = call_.row_type == RowType::f32 ? 4 : 2;
      std::memcpy(static_cast<char*>(entry) + part.lane * bytes,
                  static_cast<const char*>(part.rows) + part.from * bytes, part.size * bytes);
      return;
    }
    x_.resize(part.size);
    for (int64_t i = 0; i < part.size; ++i) x_[i] = load_row_element(part.rows, call_.row_type, part.from + i);
    if (scale) quantise(*scale);
    for (int64_t i = 0; i < part.size; ++i) put_number(entry, part.lane + i, x_[i]);
  }

  bool same_type() const {
    return (call_.row_type == RowType::f32 && pages_.type == KvType::f32) ||
           (call_.row_type == RowType::bf16 && pages_.type == KvType::bf16) ||
           (call_.row_type == RowType::f16 && pages_.type == KvType::f16);
  }

  // Divides `x_` by its scale, and rounds it where the type holds integers.
  void quantise(float& scale) {
    const float largest = largest_of(pages_.type);
    scale = scale_of(x_, largest);
    const float inverse = 1 / scale;
    for (float& value : x_) value = std::clamp(value * inverse, -largest, largest);
    if (pages_.type != KvType::int8 && pages_.type != KvType::int4) return;
    for (float& value : x_) value = std::isnan(value) ? 0 : std::nearbyint(value);
  }

  void put_number(void* entry, int64_t lane, float value) const {
    auto* bytes = static_cast<uint8_t*>(entry);
    switch (pages_.type) {
      case KvType::f32:
        static_cast<float*>(entry)[lane] = value;
        break;
      case KvType::bf16:
        static_cast<uint16_t*>(entry)[lane] = float_to_bfloat16(value);
        break;
      case KvType::f16:
        static_cast<uint16_t*>(entry)[lane] = float_to_half(value);
        break;
      case KvType::int8:
        bytes[lane] = static_cast<uint8_t>(static_cast<int8_t>(value));
        break;
      case KvType::e4m3:
        bytes[lane] = static_cast<uint8_t>(narrow(value, e4m3_format));
        break;
      case KvType::e5m2:
        bytes[lane] = static_cast<uint8_t>(narrow(value, e5m2_format));
        break;
      case KvType::int4:
        put_nibble(bytes, lane, static_cast<uint8_t>(static_cast<int8_t>(value)) & 0xf);
        break;
    }
  }

  // Lanes of the second half are the high nibbles.
  void put_nibble(uint8_t* bytes, int64_t lane, uint8_t nibble) const {
    const int64_t half = pages_.storage_lanes;
    if (lane < half) {
      bytes[lane] |= nibble;
    } else {
      bytes[lane - half] |= nibble << 4;
    }
  }

  const WriteCall& call_;
  const Pages& pages_;
  std::vector<float> x_;
};

void write_rows(const WriteCall& call, int64_t begin, int64_t end) {
  const Pages& pages = call.pages;
  EntryWriter writer(call);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t page = call.page_ids[row], slot = call.slots[row];
    if (page <= 0 || page >= pages.num_pages || slot < 0 || slot >= pages.page_size) continue;
    for (int64_t head = 0; head < pages.kv_heads; ++head) {
      const int64_t place = page * pages.kv_heads + head;
      char* entry = static_cast<char*>(call.data) + (place * pages.page_size + slot) * pages.entry_bytes;
      float* scales = call.scales ? call.scales + place * pages.scale_lanes : nullptr;
      writer.write(row * pages.kv_heads + head, entry, scales, slot);
    }
  }
}

}  // namespace

void write(const WriteCall& call, ThreadPool& pool) {
  const int64_t items = (call.tokens + rows_of_item - 1) / rows_of_item;
  for_each_item(pool, items, [&call](int64_t i) {
    write_rows(call, i * rows_of_item, std::min(call.tokens, (i + 1) * rows_of_item));
  });
}

}  // namespace paged
