"""The page write on TPU.

- `launch`: chooses sizes and calls the kernel.
- `runs`: the runs of a page write, as integers.
- `kernel`, `copies`, `merge`: the kernel body, its copies, and the merge of new rows into old ones.
"""
