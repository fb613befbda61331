"""The engine: requests in, answers out, one compiled step of the model at a time."""

import collections
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from paged_attn_layer._src.convert.load import load_model
from paged_attn_layer._src.convert.tokenizer import load_tokenizer
from paged_attn_layer._src.engine import checks, sizes
from paged_attn_layer._src.engine.arrivals import checked_arrivals
from paged_attn_layer._src.engine.compilations import count_compilations
from paged_attn_layer._src.engine.compiled_step import CompiledStep
from paged_attn_layer._src.engine.completion import Completion
from paged_attn_layer._src.engine.config import EngineConfig
from paged_attn_layer._src.engine.interrupts import Interrupts, hold_interrupts
from paged_attn_layer._src.engine.params import SamplingParams, params_of
from paged_attn_layer._src.engine.progress import ServingBar, progress_bar
from paged_attn_layer._src.engine.request import Request, RequestState
from paged_attn_layer._src.engine.request_maker import PromptLike, RequestMaker, end_tokens
from paged_attn_layer._src.engine.sampling import pack_rows
from paged_attn_layer._src.engine.scheduler import Checkpoint, ScheduledStep, Scheduler
from paged_attn_layer._src.engine.stats import EngineStats, StepRecord
from paged_attn_layer._src.engine.text import Tokenizer
from paged_attn_layer._src.models.causal_lm import CausalLM
from paged_cache import BatchShapes, PageManager, StepBatch

OnStep = Callable[[StepRecord, list[Request]], None]
"""Called after each step with its record and the requests that it finished."""


class Engine:
    """Serves many requests at once from one paged KV cache: sampling, continuous batching, chunked prefill.

        engine = Engine.load("model.gguf")
        for completion in engine.generate(["What is a page table?", "Name three rivers."]):
            print(completion.text)

    Every step is one call of one compiled function, whose arrays have one of a few fixed shapes, so after `warm_up`
    nothing compiles. An engine is for one thread.

    A step is done as a whole or not at all. Ctrl-C waits until it is done (a second Ctrl-C does not). After a step that
    raised, all requests are as before it; pages and cache are new and empty, so the next step computes them again.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Take the model's weights as they are placed, and allocate the cache that its layers need.

        Args:
            model: what to serve; it is asked only what `CausalLM` says.
            tokenizer: turns prompts into token ids, and answers into text; without one, both are token ids.
            config: how much is served at once.
            mesh: the devices that share the cache; `None` for the default one.

        Raises:
            ValueError: the sizes do not fit each other or the model.
        """
        longest = sizes.longest_sequence(config or EngineConfig(), model)
        self.config = dataclasses.replace(config or EngineConfig(), max_sequence_length=longest)
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        self._vocab_size = model.vocab_size
        named = model.end_token_ids | end_tokens(tokenizer)
        ends = named & frozenset(range(self._vocab_size))  # some files name -1, and mean none
        self._maker = RequestMaker(tokenizer, self._vocab_size, ends)
        groups = model.cache_spec.pool_groups()
        cache_config = sizes.cache_config(self.config, longest, model, mesh)
        self._new_manager = functools.partial(
            PageManager,
            cache_config.num_pages,
            self.config.page_size,
            max_seqs=self.config.max_seqs,
            max_sequence_length=longest,
            groups=groups,
            prefix_reuse=self.config.prefix_reuse,
        )
        self._scheduler = Scheduler(self._new_manager(), token_budget=self.config.token_budget)
        self._shapes = BatchShapes(
            self.config.token_buckets, self.config.max_seqs, cache_config.pages_per_seq, len(groups)
        )
        self._compute = CompiledStep(model, self._shapes, cache_config, mesh)
        self._checkpoint: Checkpoint | None = None  # set while a step is under way

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        config: EngineConfig | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
        warm_up: bool = True,
    ) -> "Engine":
        """An engine for the model and tokenizer of a Hugging Face directory or a GGUF file; warmed up, if so asked.

        Raises:
            ValueError: the model cannot be converted; the message says why.
        """
        model = load_model(path, dtype=dtype, mesh=mesh)
        tokenizer = cast(Tokenizer, load_tokenizer(path))  # eos_token_id is made at run time, unseen by type checkers
        engine = cls(model, tokenizer=tokenizer, config=config, mesh=mesh)
        if warm_up:
            engine.warm_up()
        return engine

    @property
    def num_pages(self) -> int:
        """The number of pages that requests can get."""
        return self._manager.num_pages - 1

    @property
    def pages_used(self) -> int:
        """The number of pages in use."""
        return self._manager.num_used

    @property
    def has_work(self) -> bool:
        """True if a request waits or runs."""
        return self._scheduler.has_work

    def warm_up(self, *, progress: bool = False) -> None:
        """Compile the step for every shape that it can have, and the sampler.

        `progress` shows a bar on standard error (needs tqdm).
        """
        started = time.perf_counter()
        with count_compilations() as compilations:
            for shape in (progress_bar("compiling") if progress else iter)(self._compute.shapes):
                with self._transaction():
                    self._compute.warm_up(shape)
            with self._transaction():
                self._compute.warm_up_sampler(self._manager.max_sequence_length)
                self._compute.warm_up_moves()
        self.stats.warm_up_seconds = time.perf_counter() - started
        self.stats.warm_up_compilations = compilations.total

    def request(
        self,
        prompt: PromptLike,
        sampling: SamplingParams | None = None,
        *,
        chat: bool | None = None,
        namespace: str = "",
        max_new_tokens: int | None = None,
        stop: str | Collection[str] | None = None,
        stop_token_ids: Collection[int] | None = None,
        ignore_end_tokens: bool | None = None,
    ) -> Request:
        """A request that this engine can serve, not queued yet.

        Args:
            prompt: text; or token ids, which are taken as they are; or the messages of a chat, in the form of
                `[{"role": "user", "content": "Hi"}]`.
            sampling: how tokens are chosen, and what ends the answer. `None`: the likeliest token, and the next
                arguments, which are fields of `SamplingParams`.
            chat: if true, a text is put into the tokenizer's chat template. `None`: if there is a template, and it has
                not rendered the text already.
            namespace: only requests of the same one share pages; give each tenant one of its own.
            max_new_tokens: the answer's longest length (default: 64).
            stop: the answer ends before the first of these strings (or this one).
            stop_token_ids: tokens that end the answer, beside the model's end tokens: those that its config, its
                generation config, its GGUF file or the tokenizer names.
            ignore_end_tokens: if true, the model's end tokens do not end the answer.

        Raises:
            ValueError: the prompt is empty, holds an id outside the vocabulary (the tokenizer may be another model's),
                or with its answer is longer than the longest sequence or the cache; an argument is of another type, or
                is given beside `sampling`; or text is asked for without a tokenizer.
        """
        params = params_of(sampling, max_new_tokens, stop, stop_token_ids, ignore_end_tokens)
        request = self._maker.make(prompt, params, chat, namespace)
        self._check(request)
        return request

    def add_request(self, request: Request) -> None:
        """Queue a request that `request` made; `step` serves it.

        Raises:
            ValueError: it was added before, or it was made for a larger engine.
        """
        self._check(request)
        with hold_interrupts():
            self._scheduler.add(request)

    def abort(self, request: Request) -> None:
        """End a request early and free its pages. A finished one stays as it is.

        Raises:
            ValueError: it is no request.
        """
        if not isinstance(request, Request):
            raise ValueError(f"request={request!r} must be what Engine.request gave")
        if request.state is RequestState.FINISHED:
            return
        with self._transaction():
            self._scheduler.finish(request, "aborted")

    def step(self) -> list[Request]:
        """Compute the next step; returns the requests that it finished. Does nothing when there is nothing to do.

        If it raises, no request has changed, and the next call computes the same.
        """
        with self._transaction():
            return self._step()

    def _step(self) -> list[Request]:
        with count_compilations() as compilations:
            started = time.perf_counter()
            step = self._scheduler.schedule()
            if not step.work:
                return []
            batch = self._pack(step)
            rows = pack_rows(step.sampled, self.config.max_seqs, self._manager.max_sequence_length)
            called = time.perf_counter()
            pages_used = self._manager.num_used
            self._compute.apply(self._manager.take_moves())
            next_tokens = self._compute(batch, rows)
            device_seconds = time.perf_counter() - called
            finished = self._scheduler.advance(step, next_tokens[: len(step.work)].tolist())
            host_seconds = time.perf_counter() - started - device_seconds
        self.stats.compilations += compilations.total
        self.stats.preemptions += step.num_preempted
        self.stats.steps.append(
            StepRecord(
                mode=step.mode,
                prefill_tokens=step.prefill_tokens,
                cached_tokens=step.cached_tokens,
                decode_tokens=step.decode_tokens,
                new_tokens=step.new_tokens,
                running=len(step.work),
                waiting=len(self._scheduler.waiting),
                pages_used=pages_used,
                host_seconds=host_seconds,
                device_seconds=device_seconds,
            )
        )
        return finished

    def serve(
        self, requests: Sequence[Request], *, arrivals: Sequence[int] | None = None, on_step: OnStep | None = None
    ) -> list[Completion]:
        """Serve requests made by `request` to their end; the answers, in the requests' order.

        Args:
            requests: what to serve.
            arrivals: for each request the step (counted from 0) before which it is not known to the scheduler;
                `None` means that all are there from the start. Steps in which nothing can be done are skipped.
            on_step: called after each step.

        A request whose tokens cannot be turned into text finishes with the reason "error"; the others go on.

        Raises:
            ValueError: a request was added before or is there twice, or there is not one arrival for each; nothing is
                served then.
        """
        self._check_new(requests)
        coming = collections.deque(
            sorted(zip(checked_arrivals(arrivals, len(requests)), requests, strict=True), key=lambda pair: pair[0])
        )
        with hold_interrupts() as interrupts:
            try:
                self._serve(coming, on_step, interrupts)
            finally:  # an interrupted call leaves no request behind
                for request in requests:
                    self.abort(request)
        return [Completion.of(request) for request in requests]

    def generate(
        self,
        prompts: Sequence[PromptLike],
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        stop: str | Collection[str] | None = None,
        stop_token_ids: Collection[int] | None = None,
        ignore_end_tokens: bool | None = None,
        chat: bool | None = None,
        arrivals: Sequence[int] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """The answers to some prompts, in their order; all prompts are checked before the first is served.

        `sampling` is for all prompts; each gets a seed of its own if it names none. `progress` shows a bar on standard
        error (needs tqdm). The other arguments are those of `request` and `serve`.

        Raises:
            ValueError: as `request`; the message says which prompt.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r} is one text; it must be a list of prompts, such as [{prompts!r}]")
        if not isinstance(prompts, Iterable) or isinstance(prompts, Set | Mapping):  # answers come in their order
            raise ValueError(f"prompts={prompts!r} must be a list of prompts")
        requests = []
        for index, prompt in enumerate(prompts):
            try:
                made = self.request(
                    prompt,
                    sampling,
                    max_new_tokens=max_new_tokens,
                    stop=stop,
                    stop_token_ids=stop_token_ids,
                    ignore_end_tokens=ignore_end_tokens,
                    chat=chat,
                )
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from None
            requests.append(made)
        if not progress:
            return self.serve(requests, arrivals=arrivals)
        with ServingBar(requests) as bar:
            return self.serve(requests, arrivals=arrivals, on_step=bar.update)

    def _serve(
        self, coming: collections.deque[tuple[int, Request]], on_step: OnStep | None, interrupts: Interrupts
    ) -> None:
        now = 0
        while coming or self.has_work:
            if not self.has_work:
                now = max(now, coming[0][0])
            while coming and coming[0][0] <= now:
                self.add_request(coming.popleft()[1])
            finished = self.step()
            now += 1
            if on_step is not None:
                on_step(self.stats.steps[-1], finished)
            interrupts.deliver()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Interrupts wait for the block's end. If it raises all the same, it is undone."""
        with hold_interrupts():
            self._recover()  # from an exception that came too early or too late for the `except` below
            self._checkpoint = self._scheduler.checkpoint()
            try:
                yield
            except BaseException:
                self._recover()
                raise
            self._checkpoint = None

    def _recover(self) -> None:
        """Undo a block that broke off: its requests are as before it, and wait; pages and cache are new and empty."""
        if self._checkpoint is not None:
            self._compute.drop_cache()
            self._scheduler.restart(self._new_manager(), self._checkpoint)
            self._checkpoint = None

    @property
    def _manager(self) -> PageManager:
        return self._scheduler.manager

    def _check(self, request: Request) -> None:
        if max(request.prompt_ids) >= self._vocab_size:
            checks.token_ids("the prompt", request.prompt_ids, self._vocab_size)
        self._scheduler.check(request)

    def _check_new(self, requests: Sequence[Request]) -> None:
        """Refuse requests that `add_request` would refuse, before any is served."""
        for index, request in enumerate(requests):
            if not isinstance(request, Request):
                raise ValueError(f"requests[{index}]={request!r} must be a Request; make it by Engine.request")
            if request.state is not RequestState.NEW:
                raise ValueError(f"requests[{index}] was added before (it is {request.state.name}); make a new one")
            self._check(request)
        if len(set(requests)) < len(requests):
            raise ValueError("requests has one request twice; make a new one for each answer")

    def _pack(self, step: ScheduledStep) -> StepBatch:
        """The step's arrays on the host, padded to one of the fixed shapes."""
        token_ids = np.array(step.token_ids, np.int32)
        return self._shapes.pack_seqs(self._manager, step.seqs, token_ids, q_lens=step.q_lens)
