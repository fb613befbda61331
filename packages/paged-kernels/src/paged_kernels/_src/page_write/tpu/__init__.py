"""The page write on TPUs: `runs` plans it, `copies`, `merge` and `kernel` do it, `launch` fits them to arguments."""
