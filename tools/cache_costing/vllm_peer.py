"""Runs the workloads on the KV cache manager of vLLM v1, called as vLLM's scheduler calls it.

`peer` runs this module with a Python that has vLLM. It reads one JSON object per line of stdin, and answers with one
line on stdout. `{"prepare": NAME}` prepares a workload. `{"turn": null}` runs one turn of it. The time includes
`KVCacheManager`, the hashing of `Request`, the rows of `BlockTable`, and the lengths and positions of a step in numpy.
It does not include vLLM's scheduler, which needs an engine.
"""

import gc
import itertools
import json
import os
import sys
from collections.abc import Iterator

import numpy as np
import torch
from vllm import __version__
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.worker.block_table import BlockTable

from cache_costing.workloads import PAGE_SIZE, Laps, Turn, Workload, tokens_of

HASHER = get_request_block_hasher(PAGE_SIZE, sha256)


def manager_of(work: Workload) -> KVCacheManager:
    """Returns a manager with prefix reuse and one group of full-attention layers."""
    spec = FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
    config = KVCacheConfig(work.num_pages, [], [KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, max_model_len=work.tokens, scheduler_block_size=PAGE_SIZE, hash_block_size=PAGE_SIZE)


def request_of(name: object, tokens: list[int]) -> Request:
    """Returns a request. vLLM hashes its full pages when it is made."""
    return Request(str(name), tokens, SamplingParams(max_tokens=1 << 30), None, block_hasher=HASHER)


def admit(manager: KVCacheManager, request: Request) -> list[int]:
    """Allocate a whole prompt, with its cache hits. Returns the ids of all its pages."""
    found, tokens, _ = manager.get_computed_blocks(request)
    if manager.allocate_slots(request, request.num_tokens - tokens, tokens, found) is None:
        raise MemoryError(f"vLLM has no pages left for {request.num_tokens} tokens")
    request.num_computed_tokens = request.num_tokens
    return manager.get_block_ids(request.request_id)[0]


class Rows:
    """The arrays of vLLM's model runner: a row of the block table and a length for each running request."""

    def __init__(self, work: Workload) -> None:
        cpu = torch.device("cpu")
        self._table = BlockTable(PAGE_SIZE, work.seqs, work.pages_per_seq, work.seqs, False, cpu, 1)
        self._computed = np.zeros(work.seqs, np.int32)
        self._ones = np.ones(work.seqs, np.int32)

    def start(self, row: int, block_ids: list[int], computed: int) -> None:
        """Add a running request."""
        self._table.add_row(block_ids, row)
        self._computed[row] = computed

    def step(self, new_ids: list[tuple[list[int], ...] | None], computed: list[int]) -> tuple[np.ndarray, ...]:
        """Append the new pages. Returns lengths, positions and cumulative query lengths of a step of one token each."""
        for row, ids in enumerate(new_ids):
            if ids is not None:
                self._table.append_row(ids[0], row)
        self._computed[:] = computed
        rows = np.repeat(np.arange(len(computed)), self._ones)
        return self._computed + self._ones, self._computed[rows], np.cumsum(self._ones)

    def transfer(self) -> None:
        """Copy the rows in use to the device's array."""
        self._table.commit_block_table(len(self._computed))


def decode(work: Workload) -> Turn:
    """Returns a turn of decode steps, with one token for each running request."""
    manager, rows = manager_of(work), Rows(work)
    requests = [request_of(number, work.running(number)) for number in range(work.seqs)]
    for row, request in enumerate(requests):
        rows.start(row, admit(manager, request), request.num_tokens)
        request.append_output_token_ids(row)

    def turn() -> dict[str, float]:
        sampled = tokens_of(requests[0].num_tokens, work.seqs)
        for laps in (Laps(), Laps()):  # the first round is not counted
            laps()
            for _ in range(work.times):
                manager.new_step_starts()
                blocks = [manager.allocate_slots(request, 1) for request in requests]
                new_ids = [block.get_block_ids(allow_none=True) for block in blocks]
                laps("extend")
                rows.step(new_ids, [request.num_computed_tokens for request in requests])
                laps("metadata")
                for request, token in zip(requests, sampled, strict=True):
                    request.num_computed_tokens += 1
                    request.append_output_token_ids(token)
                laps("commit")
        for _ in range(work.times):
            laps()
            rows.transfer()
            laps("transfer", by_clock=True)
        return laps.over(work.operations)

    return turn


def admissions(work: Workload, manager: KVCacheManager, numbers: Iterator[int], expected: int) -> Turn:
    """Returns a turn that admits and releases prompts. Each must have `expected` cache hits."""

    def turn() -> dict[str, float]:
        laps = Laps()
        for number in itertools.islice(numbers, work.times):
            tokens = work.prompt(number)
            laps()
            request = request_of(number, tokens)
            found, hits, _ = manager.get_computed_blocks(request)
            manager.allocate_slots(request, request.num_tokens - hits, hits, found)
            manager.get_block_ids(request.request_id)
            laps("admit")
            manager.free(request)
            laps("release")
            if hits != expected:
                raise ValueError(f"{work.name}: {hits} tokens are cache hits, but {expected} should be")
        return laps.over(work.operations)

    return turn


def admit_new(work: Workload) -> Turn:
    """Returns a turn of prompts that are new each time."""
    return admissions(work, manager_of(work), itertools.count(), 0)


def admit_again(work: Workload) -> Turn:
    """Returns a turn that admits the same prompt each time."""
    manager = manager_of(work)
    first = request_of("first", work.prompt(0))
    admit(manager, first)
    manager.free(first)
    return admissions(work, manager, itertools.repeat(0), (work.tokens - 1) // PAGE_SIZE * PAGE_SIZE)


def churn(work: Workload) -> Turn:
    """Returns a turn of new prompts while every free page is cached, so that pages are evicted."""
    manager = manager_of(work)
    prompts = work.num_pages // work.pages_per_seq + 1
    for number in range(prompts):
        request = request_of(number, work.prompt(number))
        admit(manager, request)
        manager.free(request)
    return admissions(work, manager, itertools.count(prompts), 0)


KINDS = {"decode": decode, "admit": admit_new, "hit": admit_again, "churn": churn}
"""vLLM's manager has no fork and no swap."""


def main() -> None:
    """Answer each line of stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM's own prints go to stderr
    init_none_hash(sha256)
    print(json.dumps({"version": __version__, "kinds": list(KINDS)}), file=answers)
    turn: Turn | None = None
    for line in sys.stdin:
        question = json.loads(line)
        if "prepare" in question:
            turn = None  # free the previous workload
            gc.unfreeze()
            gc.collect()
            work = Workload.parse(question["prepare"])
            turn = KINDS[work.kind](work)
            gc.collect()
            gc.freeze()  # as vLLM's engine does
            print("{}", file=answers)
        elif turn is not None:
            print(json.dumps(turn()), file=answers)


if __name__ == "__main__":
    main()
