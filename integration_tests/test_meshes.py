"""Every kind of mesh gives the logits of one device, and a step communicates only where the table of shardings says."""

import re

import numpy as np
import pytest
import transformers
from mesh_step import MAX_SEQS, ROWS, MeshStep, mesh_of
from tpu_costing.collectives import read_collectives
from tpu_costing.model_step import bytes_on_device

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
LATENT = {"kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 9, "q_lora_rank": 20}
EXPERTS = {"moe_intermediate_size": 20, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
MODELS = {
    "llama": {"head_dim": 8},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6},
    "deepseek_v3": {**LATENT, **EXPERTS, "num_key_value_heads": 8, "n_routed_experts": 8, "first_k_dense_replace": 1},
}
TEXTS = [np.random.default_rng(n).integers(0, 96, n).tolist() for n in (5, 3, 9, 1)]
MESHES = {
    "1": {"tp": 1},
    "2x1": {"dp": 2, "tp": 1},
    "1x2": {"tp": 2},
    "2x2": {"dp": 2, "tp": 2},
    "4x2": {"dp": 4, "tp": 2},
}
SPLIT_EXPERTS = {"2x2x2": {"dp": 2, "ep": 2, "tp": 2}, "ep4-tp2": {"ep": 4, "tp": 2}}
RUNS = [(model, mesh) for model in MODELS for mesh in (MESHES if model == "llama" else MESHES | SPLIT_EXPERTS)]


def settings_of(model):
    return transformers.AutoConfig.for_model(model, **{**SIZES, **MODELS[model]}).to_dict()


@pytest.fixture(scope="module")
def on_one_device(request):
    """The name of a model, and its logits of each text on one device."""
    step = MeshStep(settings_of(request.param))
    return request.param, np.concatenate([step.logits(TEXTS[:2]), step.logits(TEXTS[2:])])


@pytest.mark.parametrize(("on_one_device", "mesh"), RUNS, indirect=["on_one_device"])
def test_logits(on_one_device, mesh):
    model, expected = on_one_device
    step = MeshStep(settings_of(model), mesh_of(**{**MESHES, **SPLIT_EXPERTS}[mesh]))
    texts = [TEXTS] if step.replicas > 1 else [TEXTS[:2], TEXTS[2:]]
    logits = np.concatenate([step.logits(part) for part in texts])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.ptp(expected))


STEPS = [
    ("llama", {"dp": 2, "tp": 2}),
    ("gpt_oss", {"ep": 2, "tp": 2}),
    ("deepseek_v3", {"dp": 2, "ep": 2, "tp": 2}),
]


@pytest.mark.parametrize(("model", "axes"), STEPS, ids=[f"{model}-{'-'.join(axes)}" for model, axes in STEPS])
def test_collectives_of_a_step(model, axes):
    """One sum of rows after the embedding, each attention, MLP and shared expert, and the largest logit of each part.

    So no page, weight or logit is sent, and no page is copied.
    """
    step = MeshStep(settings_of(model), mesh_of(**axes))
    compiled = step.compiled(TEXTS[0])
    hidden, others = (ROWS, SIZES["hidden_size"]), []
    sums = 0
    for each in read_collectives(compiled.as_text()):
        if each.kind == "all-reduce" and all(shape[-2:] == hidden for shape in each.shapes):
            sums += len(each.shapes)  # of hidden rows; XLA may join two
        else:
            others.append(each)
    shared = sum(hasattr(layer.mlp, "shared") for layer in step.model.layers)
    assert sums == 1 + 2 * len(step.model.layers) + shared
    assert [(each.kind, each.shapes[0][-2:]) for each in others] == 2 * [("all-gather", (MAX_SEQS, axes["tp"]))]
    assert compiled.memory_analysis().alias_size_in_bytes == bytes_on_device(step.cache)
    views = step.cache.views
    text, shapes = compiled.as_text(), {view.pages.data.sharding.shard_shape(view.pages.data.shape) for view in views}
    assert not [shape for shape in shapes if re.search(rf"\[{','.join(map(str, shape))}\]\S* copy\(", text)]
