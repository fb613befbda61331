import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest
from dense import Step
from eformer.escale import PartitionAxis, PartitionManager

from paged_attn_layer import AttentionImpl, AttentionMetadata, AttentionOutput, AttentionRegistry, PagedAttn
from paged_attn_layer._src.easydel.registry import PLATFORMS

STEP = Step(kv_lens=(5,), q_lens=(5,))


class Named(AttentionImpl):
    """Says which forward ran."""

    @classmethod
    def get_impl_name(cls):
        return "named"

    def forward_native(self, q, k, v, cache_view, cache_metadata, *, head_params=None, return_lse=False):
        return AttentionOutput("native")


class Gpu(Named):
    def forward_gpu(self, q, k, v, cache_view, cache_metadata, *, head_params=None, return_lse=False):
        return AttentionOutput("gpu")


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(AttentionRegistry, "_implementations", {})


@pytest.mark.usefixtures("empty_registry")
class TestRegistry:
    def test_an_implementation_is_found_by_its_name(self):
        assert AttentionRegistry.register(Named) is Named
        assert AttentionRegistry.get("named") is Named
        assert AttentionRegistry.list_implementations() == ["named"]

    def test_create_gives_it_the_metadata(self):
        AttentionRegistry.register(Named)
        metadata = AttentionMetadata(softmax_scale=2.0)
        assert AttentionRegistry.create("named", metadata).metadata is metadata
        assert AttentionRegistry.create("named").metadata == AttentionMetadata()

    def test_a_second_one_of_a_name_is_refused(self):
        AttentionRegistry.register(Named)
        with pytest.raises(ValueError, match="'named' is registered already; choose a name other than 'named'"):
            AttentionRegistry.register(Named)

    def test_an_unknown_name_is_answered_with_the_known(self):
        AttentionRegistry.register(Named)
        with pytest.raises(ValueError, match="'flash' is not registered; there is 'named'"):
            AttentionRegistry.create("flash")

    def test_what_is_no_implementation_is_refused(self):
        with pytest.raises(ValueError, match="must be a subclass of AttentionImpl"):
            AttentionRegistry.register(dict)


def test_paged_attention_is_registered():
    assert AttentionRegistry.get("paged_attention") is PagedAttn


@pytest.mark.parametrize("platform", PLATFORMS)
def test_each_platform_falls_back_on_forward_native(platform):
    impl = Named(AttentionMetadata(platform=platform))
    assert impl(None, None, None, STEP.view(), STEP.batch).attention_outputs == "native"


@pytest.mark.parametrize(("platform", "runs"), [("gpu", "gpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("cpu", "native")])
def test_cuda_and_rocm_fall_back_on_forward_gpu(platform, runs):
    impl = Gpu(AttentionMetadata(platform=platform))
    assert impl(None, None, None, STEP.view(), STEP.batch).attention_outputs == runs


def test_the_devices_pick_the_platform_where_the_metadata_does_not():
    class Cpu(Named):
        def forward_cpu(self, q, k, v, cache_view, cache_metadata, *, head_params=None, return_lse=False):
            return AttentionOutput("cpu")

    assert Cpu()(None, None, None, STEP.view(), STEP.batch).attention_outputs == "cpu"


def test_an_unknown_platform_of_the_devices_is_refused(monkeypatch):
    monkeypatch.setattr("paged_attn_layer._src.easydel.registry.platform_of", lambda mesh: "neuron")
    with pytest.raises(ValueError, match="platform='neuron' must be one of cpu, gpu, cuda, rocm, tpu"):
        Named()(None, None, None, STEP.view(), STEP.batch)


@pytest.mark.parametrize(
    ("field", "value", "error", "match"),
    [
        ("platform", "neuron", ValueError, "platform='neuron' must be one of cpu, gpu, cuda, rocm, tpu"),
        ("backend", "triton", ValueError, "backend='triton' must be one of reference, "),
        ("softmax_scale", -1.0, ValueError, "scale=-1.0 must be a positive"),
        ("soft_cap", 0.0, ValueError, "soft_cap=0.0 must be a positive"),
        ("sliding_window", 0, ValueError, "sliding_window=0 must be an int of at least 1"),
        ("causal", None, ValueError, "causal=None must be True or False"),
        ("runtime_dtype", jnp.int32, ValueError, "must be a floating type"),
        ("runtime_softmax_dtype", jnp.bfloat16, NotImplementedError, "the softmax and its sums are float32 always"),
    ],
)
def test_metadata_refuses_what_means_nothing(field, value, error, match):
    with pytest.raises(error, match=match):
        AttentionMetadata(**{field: value})


def test_metadata_is_hashable_and_equal_by_value():
    def build():
        return AttentionMetadata(
            mesh=jax.make_mesh((2,), ("tp",)),
            partition_manager=PartitionManager(PartitionAxis()),
            runtime_softmax_dtype=jnp.float32,
        )

    assert build() == build()
    assert hash(build()) == hash(build())


def test_metadata_takes_keywords_only_and_all_are_optional():
    AttentionMetadata()
    assert {p.kind for p in inspect.signature(AttentionMetadata).parameters.values()} == {
        inspect.Parameter.KEYWORD_ONLY
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttentionMetadata().causal = False


def test_output_passes_through_jit():
    output = jax.jit(lambda x: AttentionOutput(x, cache_view=STEP.view()))(jnp.ones(3))
    assert output.attention_weights is None
    assert output.cache_view.pages.num_pages == STEP.num_pages
