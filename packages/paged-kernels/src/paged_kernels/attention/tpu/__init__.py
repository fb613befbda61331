"""The Pallas TPU kernel, cut in steps that are tested alone.

`schedule` (which rows meet which pages, as integers), `copies` (page fetches), `softmax` (one online-softmax step on
arrays), `kernel` (the body that names these steps), `arrange` (the order of query and output rows in HBM), `sizes`
(block sizes and the memory they need), `launch` (checks and the `pallas_call`).
"""
