"""The page write on TPUs: `runs` plans it, `copies`, `merge` and `kernel` do it, `launch` fits them to arguments."""

from paged_kernels._src.page_write.tpu.launch import write_kv_tpu

__all__ = ["write_kv_tpu"]
