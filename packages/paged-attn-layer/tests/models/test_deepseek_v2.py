import re

import numpy as np
import pytest
from tiny_checkpoints import read_tiny

from paged_attn_layer._src.blocks.mlp import MLPConfig
from paged_attn_layer._src.blocks.moe import MoEConfig


def test_the_first_layers_are_dense_and_the_others_share_an_expert():
    dense, sparse = (layer.mlp for layer in read_tiny("deepseek_v2").layers)
    assert isinstance(dense, MLPConfig)
    assert dense.intermediate_size == 24
    assert isinstance(sparse, MoEConfig)
    assert (sparse.expert.intermediate_size, sparse.shared.intermediate_size) == (6, 12)  # two shared experts


def test_groups_are_read_where_the_method_has_them():
    grouped = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    router = read_tiny("deepseek_v2", **grouped).layers[1].mlp.router
    assert (router.expert_groups, router.groups_per_token, router.group_score) == (2, 1, "largest")
    assert read_tiny("deepseek_v2", n_group=2, topk_group=1).layers[1].mlp.router.expert_groups == 1


def test_yarn_scales_the_logits_too():
    scaling = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    attention = read_tiny("deepseek_v2", rope_scaling=scaling).layers[0].attention
    mscale = 0.1 * 0.707 * np.log(40) + 1
    np.testing.assert_allclose(attention.softmax_scale, 6**-0.5 * mscale**2)
    assert attention.rope.attention_factor == 1.0
    assert read_tiny("deepseek_v2").layers[0].attention.softmax_scale == 6**-0.5


def test_queries_may_be_made_of_the_hidden_state():
    assert read_tiny("deepseek_v2", q_lora_rank=None).layers[0].attention.q_rank is None


def test_norms_of_latent_vectors_have_an_epsilon_of_their_own():
    config = read_tiny("deepseek_v2", rms_norm_eps=1e-3)
    assert (config.final_norm.eps, config.layers[0].attention.latent_norm.eps) == (1e-3, 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported; greedy and group_limited_greedy are"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported; 'softmax' is"),
        ({"norm_topk_prob": True}, "norm_topk_prob=True is not supported; False is"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; 1 is"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported; 4 is"),
        ({"index_topk": 64}, "index_topk"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(settings, message):
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        read_tiny("deepseek_v2", **settings)


def test_latent_attention_has_rotary_embedding():
    with pytest.raises(ValueError, match="rope_parameters gives null for full_attention; latent attention must have"):
        read_tiny("deepseek_v2", rope_parameters={"full_attention": None})
