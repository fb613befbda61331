"""The Pallas TPU kernel for attention. Each file is one step, and each step is tested alone.

- `fit`: the static choices for a call, made once per compilation: which kernels, with which sizes.
- `config`, `sizes`: the static facts of one kernel, and its block sizes.
- `prepare`: what all layers of a step need from its batch, made once per step.
- `schedule`: which rows attend to which pages, as integers.
- `singles`: splits the single-row sequences from a mixed batch.
- `enlarge_pages`: joins small pages into larger ones where the page size cannot be copied.
- `launch`: calls the kernels in each layer.
- `arrange`: the order of rows in HBM.
- `memory`: the kernel's inputs and its scratch memory.
- `kernel`, `decode`: the kernel bodies, for any batch and for decode.
- `copies`, `subblocks`: the copies of pages and rows between HBM and VMEM.
- `tile_attention`: what happens to one tile.
- `unpack`, `scales`: stored types as operands of the products.
- `softmax`: one step of the online softmax.
"""
