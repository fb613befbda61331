"""The Pallas TPU kernel for attention. Each file is one step, and each step is tested alone.

- `launch`: checks the call, chooses sizes and calls the kernel.
- `config`, `sizes`: the static facts of one kernel, and its block sizes.
- `enlarge_pages`: joins small pages into larger ones where the page size cannot be copied.
- `singles`: splits the single-row sequences from a mixed batch.
- `schedule`: which rows attend to which pages, as integers.
- `arrange`: the order of rows in HBM.
- `memory`: the kernel's inputs and its scratch memory.
- `kernel`, `decode`: the kernel bodies, for any batch and for decode.
- `copies`, `subblocks`: the copies of pages and rows between HBM and VMEM.
- `tile_attention`: what happens to one tile.
- `unpack`, `scales`: stored types as operands of the products.
- `softmax`: one step of the online softmax.
"""
