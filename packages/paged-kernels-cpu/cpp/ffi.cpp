// What XLA calls: the arguments as buffers and attributes, and what Python asks before it registers the calls.

#include "xla/ffi/api/ffi.h"

#include <string>

#include "attention.h"
#include "write.h"

namespace ffi = xla::ffi;

namespace paged {
namespace {

// The pool of XLA's CPU client.
class XlaPool : public ThreadPool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool) {}
  int64_t num_threads() const override { return pool_.num_threads(); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  mutable ffi::ThreadPool pool_;
};

// The static facts of pages that their buffers do not tell.
struct Layout {
  int64_t k_dim, v_dim, v_start;
  bool latent, int4;
};

// An array that is absent has no elements.
template <class T>
const T* data_or_null(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() ? reinterpret_cast<const T*>(buffer.untyped_data()) : nullptr;
}

bool find_kv_type(ffi::DataType stored, bool int4, KvType& type) {
  switch (stored) {
    case ffi::F32:
      type = KvType::f32;
      return true;
    case ffi::BF16:
      type = KvType::bf16;
      return true;
    case ffi::F16:
      type = KvType::f16;
      return true;
    case ffi::S8:
      type = int4 ? KvType::int4 : KvType::int8;
      return true;
    case ffi::F8E4M3FN:
      type = KvType::e4m3;
      return true;
    case ffi::F8E5M2:
      type = KvType::e5m2;
      return true;
    default:
      return false;
  }
}

bool find_row_type(ffi::DataType type, RowType& found) {
  switch (type) {
    case ffi::F32:
      found = RowType::f32;
      return true;
    case ffi::BF16:
      found = RowType::bf16;
      return true;
    case ffi::F16:
      found = RowType::f16;
      return true;
    default:
      return false;
  }
}

// Returns false if the pages have a type that no kernel takes.
bool read_pages(const ffi::AnyBuffer& data, const ffi::AnyBuffer& scales, const Layout& layout, Pages& pages) {
  const auto shape = data.dimensions();
  const bool has_scales = scales.element_count() > 0;
  pages.data = data.untyped_data();
  pages.scales = data_or_null<float>(scales);
  pages.num_pages = shape[0];
  pages.kv_heads = shape[1];
  pages.page_size = shape[2];
  pages.storage_lanes = shape[3];
  pages.scale_lanes = has_scales ? scales.dimensions()[3] : 0;
  pages.entry_bytes = static_cast<int64_t>(data.size_bytes()) / (shape[0] * shape[1] * shape[2]);
  pages.k_dim = layout.k_dim;
  pages.v_dim = layout.v_dim;
  pages.v_start = layout.v_start;
  pages.latent = layout.latent;
  return find_kv_type(data.element_type(), layout.int4, pages.type);
}

// Returns the kernels of this name, or null. Without a name, the best that this processor can run.
const Kernels* find_kernels(std::string_view name) {
  for (const Kernels* kernels : usable_kernels()) {
    if (name.empty() || name == kernels->name) return kernels;
  }
  return nullptr;
}

ffi::Error attention(ffi::ThreadPool thread_pool, ffi::AnyBuffer q, ffi::AnyBuffer data, ffi::AnyBuffer scales,
                     ffi::AnyBuffer page_table, ffi::AnyBuffer kv_lens, ffi::AnyBuffer cu_q_lens,
                     ffi::AnyBuffer num_seqs, ffi::AnyBuffer q_starts, ffi::AnyBuffer tree_mask, ffi::AnyBuffer sinks,
                     ffi::AnyBuffer alibi_slopes, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                     int64_t k_dim, int64_t v_dim, int64_t v_start, bool latent, bool int4, float softmax_scale,
                     float soft_cap, int64_t sliding_window, bool causal, int64_t q_rows, int64_t chunk_keys,
                     std::string_view target) {
  AttentionCall call;
  const Kernels* kernels = find_kernels(target);
  if (!kernels) return ffi::Error::InvalidArgument("this processor has no target " + std::string(target));
  if (!read_pages(data, scales, {k_dim, v_dim, v_start, latent, int4}, call.pages) ||
      !find_row_type(q.element_type(), call.row_type)) {
    return ffi::Error::InvalidArgument("q or the pages have a type that no kernel takes");
  }
  call.batch = {page_table.reinterpret_data<int32_t>(),
                kv_lens.reinterpret_data<int32_t>(),
                cu_q_lens.reinterpret_data<int32_t>(),
                num_seqs.reinterpret_data<int32_t>(),
                data_or_null<int32_t>(q_starts),
                data_or_null<int32_t>(tree_mask),
                page_table.dimensions()[0],
                page_table.dimensions()[1],
                tree_mask.dimensions()[1]};
  call.spec = {softmax_scale, soft_cap, sliding_window, causal};
  call.q = q.untyped_data();
  call.out = out->untyped_data();
  call.lse = lse->element_count() ? lse->reinterpret_data<float>() : nullptr;
  call.tokens = q.dimensions()[0];
  call.q_heads = q.dimensions()[1];
  call.sinks = data_or_null<float>(sinks);
  call.alibi_slopes = data_or_null<float>(alibi_slopes);
  call.q_rows = q_rows;
  call.chunk_keys = chunk_keys;
  XlaPool pool(thread_pool);
  attend(call, *kernels, pool);
  return ffi::Error::Success();
}

// The results are the pages' own buffers.
ffi::Error page_write(ffi::ThreadPool thread_pool, ffi::AnyBuffer data, ffi::AnyBuffer scales, ffi::AnyBuffer k,
                      ffi::AnyBuffer v, ffi::AnyBuffer page_ids, ffi::AnyBuffer slots,
                      ffi::Result<ffi::AnyBuffer> new_data, ffi::Result<ffi::AnyBuffer> new_scales, int64_t k_dim,
                      int64_t v_dim, int64_t v_start, bool latent, bool int4) {
  WriteCall call;
  if (!read_pages(data, scales, {k_dim, v_dim, v_start, latent, int4}, call.pages) ||
      !find_row_type(k.element_type(), call.row_type)) {
    return ffi::Error::InvalidArgument("k or the pages have a type that no kernel takes");
  }
  call.data = new_data->untyped_data();
  call.scales = new_scales->element_count() ? new_scales->reinterpret_data<float>() : nullptr;
  call.k = k.untyped_data();
  call.v = v.untyped_data();
  call.tokens = k.dimensions()[0];
  call.page_ids = page_ids.reinterpret_data<int32_t>();
  call.slots = slots.reinterpret_data<int32_t>();
  XlaPool pool(thread_pool);
  write(call, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace paged

using Buffer = ffi::AnyBuffer;

extern "C" [[gnu::visibility("default")]] XLA_FFI_Error* paged_attention(XLA_FFI_CallFrame* call_frame);
extern "C" [[gnu::visibility("default")]] XLA_FFI_Error* paged_write(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention, paged::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()  // q
                                  .Arg<Buffer>()  // data
                                  .Arg<Buffer>()  // scales
                                  .Arg<Buffer>()  // page_table
                                  .Arg<Buffer>()  // kv_lens
                                  .Arg<Buffer>()  // cu_q_lens
                                  .Arg<Buffer>()  // num_seqs
                                  .Arg<Buffer>()  // q_starts
                                  .Arg<Buffer>()  // tree_mask
                                  .Arg<Buffer>()  // sinks
                                  .Arg<Buffer>()  // alibi_slopes
                                  .Ret<Buffer>()  // out
                                  .Ret<Buffer>()  // lse
                                  .Attr<int64_t>("k_dim")
                                  .Attr<int64_t>("v_dim")
                                  .Attr<int64_t>("v_start")
                                  .Attr<bool>("latent")
                                  .Attr<bool>("int4")
                                  .Attr<float>("softmax_scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("sliding_window")
                                  .Attr<bool>("causal")
                                  .Attr<int64_t>("q_rows")
                                  .Attr<int64_t>("chunk_keys")
                                  .Attr<std::string_view>("target"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_write, paged::page_write,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()  // data
                                  .Arg<Buffer>()  // scales
                                  .Arg<Buffer>()  // k
                                  .Arg<Buffer>()  // v
                                  .Arg<Buffer>()  // page_ids
                                  .Arg<Buffer>()  // slots
                                  .Ret<Buffer>()  // data
                                  .Ret<Buffer>()  // scales
                                  .Attr<int64_t>("k_dim")
                                  .Attr<int64_t>("v_dim")
                                  .Attr<int64_t>("v_start")
                                  .Attr<bool>("latent")
                                  .Attr<bool>("int4"));

// Returns the names of the targets that this processor can run, best first, separated by commas.
extern "C" [[gnu::visibility("default")]] const char* paged_targets() {
  static const std::string names = [] {
    std::string joined;
    for (const paged::Kernels* kernels : paged::usable_kernels())
      joined += (joined.empty() ? "" : ",") + std::string(kernels->name);
    return joined;
  }();
  return names.c_str();
}

// The version of the FFI headers that the calls were compiled with.
extern "C" [[gnu::visibility("default")]] int paged_ffi_major() { return XLA_FFI_API_MAJOR; }
extern "C" [[gnu::visibility("default")]] int paged_ffi_minor() { return XLA_FFI_API_MINOR; }
