"""The Pallas TPU kernel, cut in steps that are tested alone.

`schedule` (which rows meet which pages, as integers), `copies` (fetches of pages and rows), `unpack` and `scales`
(stored types as operands), `softmax` (one online-softmax step on arrays), `step` (what happens to a tile), `kernel`
(the body that names these steps), `memory` (what it is given and allocates), `arrange` (the order of rows in HBM),
`grouping` (page sizes that no copy can have), `singles` (sequences of one row in a mixed batch), `sizes` (block sizes
and the memory they need), `launch` (checks and the `pallas_call`).
"""
