"""A model sharded over several devices gives the logits and tokens of one device."""

import json

import jax
import numpy as np
import pytest
from checkpoints import save_random
from family_cases import CASES, TEXT
from jax.sharding import Mesh
from paged_runner import PagedRunner, serve_greedy
from parity import Parity, assert_close
from safetensors.numpy import save_file

from paged_attn_layer import load_model
from paged_attn_layer._src.convert.load import open_checkpoint

DEVICES = [1, 2, 3, 4, 8]


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("tp",))


def run(path, mesh, vocab):
    """Returns the model, the logits of a prompt in chunks, and the greedy tokens of three prompts in one batch."""
    model = load_model(path, mesh=mesh)
    prompts = [np.random.default_rng(n).integers(20, vocab, n).tolist() for n in (11, 3, 6)]
    runner = PagedRunner(model, mesh=mesh, tokens=(16,), max_seqs=3, pages_per_seq=2)
    logits = runner.feed(prompts[0], [5, 1, 5])
    fresh = PagedRunner(model, mesh=mesh, tokens=(16,), max_seqs=3, pages_per_seq=2)
    tokens, _ = serve_greedy(fresh, prompts, 5, budget=16, chunk=8)
    return model, logits, tokens


@pytest.fixture(scope="module")
def smollm2(gguf_path, tmp_path_factory):
    """The real model, saved as a Hugging Face directory. It loads faster than the quantised GGUF file."""
    directory = tmp_path_factory.mktemp("smollm2")
    source = open_checkpoint(gguf_path)
    save_file({name: source.weight(name).read() for name in source.shapes}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(dict(source.config)))
    return directory, run(directory, None, 49152)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    save_random(directory)
    return directory, run(directory, None, 320)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_the_real_model(smollm2, devices):
    """The model has 3 KV heads. They are split over 3 devices, and replicated on 2 and 8."""
    directory, (_, logits, tokens) = smollm2
    model, sharded_logits, sharded_tokens = run(directory, mesh_of(devices), 49152)
    np.testing.assert_allclose(sharded_logits, logits, rtol=0, atol=1e-3)
    assert sharded_tokens == tokens
    kernel = model.layers[0].attention.q_proj.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == (576 // 3 if devices == 3 else 576)


@pytest.mark.parametrize("devices", DEVICES)
def test_heads_that_split(small, devices):
    """4 KV heads are split over 1, 2 and 4 devices, and replicated on 3 and 8. The MLP of 96 is always split."""
    directory, (_, logits, tokens) = small
    model, sharded_logits, sharded_tokens = run(directory, mesh_of(devices), 320)
    np.testing.assert_allclose(sharded_logits, logits, rtol=0, atol=1e-4)
    assert sharded_tokens == tokens
    kernel, up = model.layers[0].attention.q_proj.kernel[...], model.layers[0].mlp.up_proj.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == (64 // devices if devices in (1, 2, 4) else 64)
    assert up.sharding.shard_shape(up.shape)[1] == 96 // devices


@pytest.fixture(scope="module", params=["gpt_oss", "deepseek_v3"])
def experts(request, tmp_path_factory):
    case = next(case for case in CASES if case.model_type == request.param)
    return Parity(case, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("sizes", "names"), [((1, 2), ("dp", "ep")), ((2, 2), ("ep", "tp"))], ids=["1x2", "2x2"])
def test_experts_that_split(experts, sizes, names):
    """Experts are split over `ep`; what is within an expert is split over `tp`, as heads are."""
    mesh = Mesh(np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes), names)
    model = load_model(experts.directory, mesh=mesh)
    runner = PagedRunner(model, mesh=mesh, tokens=(40,), max_seqs=3, page_size=4, pages_per_seq=12)
    assert_close(runner.feed(TEXT, [30, 1, 1, 5]), experts.expected)
    up = model.layers[-1].mlp.experts.up_proj[...]
    counts = [whole // part for whole, part in zip(up.shape, up.sharding.shard_shape(up.shape), strict=True)]
    assert counts == [2, 1, mesh.shape.get("tp", 1)]
