"""The sizes that an engine takes where its config leaves them open."""

import dataclasses
import logging

from jax.sharding import Mesh

from paged_attn_layer._src.engine.config import DEFAULT_SEQUENCE_LENGTH, EngineConfig
from paged_attn_layer._src.models.causal_lm import CausalLM
from paged_cache import CacheConfig

_LOGGER = logging.getLogger(__name__)


def longest_sequence(config: EngineConfig, model: CausalLM) -> int:
    """Returns the most tokens of a request: as asked for, else what is usual and the model allows."""
    longest, asked = model.max_positions, config.max_sequence_length
    if asked is None:
        if longest < DEFAULT_SEQUENCE_LENGTH:
            _LOGGER.warning("max_sequence_length is %d, the model's longest sequence", longest)
        return min(DEFAULT_SEQUENCE_LENGTH, longest)
    if asked > longest:
        raise ValueError(f"max_sequence_length={asked} must be at most {longest}, the model's longest sequence")
    return asked


def cache_config(config: EngineConfig, longest: int, model: CausalLM, mesh: Mesh | None) -> CacheConfig:
    """Returns the cache that the model's layers need: as many pages as asked for, else as are of use and fit."""
    spec = model.cache_spec
    fitting = CacheConfig.for_spec(
        spec,
        mesh,
        max_seqs=config.max_seqs,
        max_sequence_length=longest,
        page_size=config.page_size,
        num_pages=config.num_pages,
        dtype=model.dtype if config.kv_dtype is None else config.kv_dtype,
    )
    if config.num_pages is not None:
        return fitting
    longest_request = sum(
        group.most_pages(longest, config.token_budget, config.page_size) for group in spec.pool_groups()
    )
    of_use = 1 + config.max_seqs * longest_request  # the null page, and `max_seqs` of the longest requests
    return dataclasses.replace(fitting, num_pages=min(fitting.num_pages, of_use))
