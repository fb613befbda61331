"""A config.json that leaves keys out is read as transformers reads it: with the defaults of its model type."""

import dataclasses

import pytest
import transformers
from family_cases import CASES

from paged_attn_layer import read_config

SIZES = {"vocab_size": 101, "hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 32}
"""What no file leaves out. All default numbers of KV heads divide these heads."""
NEEDED = {
    "granitemoehybrid": {"layer_types": ["full_attention"] * 5, "num_local_experts": 0, "mamba_n_heads": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"num_key_value_heads": 32},
}
"""By model type: without these the defaults are a model that is not supported."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_keys_that_a_file_leaves_out(case):
    given = {"model_type": case.model_type, **SIZES, **NEEDED.get(case.model_type, {})}
    whole = transformers.AutoConfig.for_model(**given).to_dict()
    given["intermediate_size"] = whole.get("intermediate_size")  # every file but GPT-2's has it
    assert without_end_tokens(read_config(given)) == without_end_tokens(read_config(whole))


def without_end_tokens(config):
    """The config without `eos_token_id`: transformers' defaults are those of one model of the type."""
    return dataclasses.replace(config, end_token_ids=frozenset())
