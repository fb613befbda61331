"""Arrays that an earlier call took over are refused by name, in every call that takes arrays."""

import jax
import jax.numpy as jnp
import pytest

from paged_kernels import (
    AttentionSpec,
    HeadParams,
    KVPages,
    RaggedBatch,
    paged_attention,
    paged_attention_update,
    prepare_batch,
    write_kv,
)

SPEC = AttentionSpec()
CALLS = {
    "paged_attention": lambda a, batch: paged_attention(a["q"], a["pages"], batch, SPEC, a["head_params"]),
    "write_kv": lambda a, batch: write_kv(a["pages"], a["k"], a["v"], batch),
    "paged_attention_update": lambda a, batch: paged_attention_update(
        a["q"], a["k"], a["v"], a["pages"], batch, SPEC, a["head_params"]
    ),
}


def make_arguments(dtype: str = "float32") -> dict:
    rows = [jnp.ones((2, heads, 64), jnp.float32) for heads in (4, 2, 2)]
    return {
        **dict(zip("qkv", rows, strict=True)),
        "pages": KVPages.zeros(3, 8, 2, 64, dtype),
        "batch": RaggedBatch.from_lists([[1], [2]], [4, 3], [1, 1]),
        "head_params": HeadParams(sinks=jnp.ones(4, jnp.float32)),
    }


def prepare(arguments: dict):
    names = {name: arguments[name] for name in ("batch", "pages", "head_params")}
    return prepare_batch(**names, spec=SPEC, tokens=2, q_heads=4, q_dtype="float32", backend="xla")


def delete(tree) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("call", "name", "message"),
    [
        ("paged_attention", "q", "q is deleted: it was donated"),
        ("paged_attention", "pages", r"pages\.data is deleted: it was donated to an earlier call, which reused its"),
        ("paged_attention", "batch", r"batch(\.batch)?\.page_table is deleted"),
        ("paged_attention", "head_params", r"head_params\.sinks is deleted"),
        ("write_kv", "k", "k is deleted"),
        ("write_kv", "v", "v is deleted"),
        ("write_kv", "pages", r"pages\.data is deleted.*; use what that call returned in its place"),
        ("write_kv", "batch", r"batch(\.batch)?\.page_table is deleted"),
        ("paged_attention_update", "q", "q is deleted"),
        ("paged_attention_update", "k", "k is deleted"),
        ("paged_attention_update", "v", "v is deleted"),
        ("paged_attention_update", "pages", r"pages\.data is deleted"),
    ],
)
def test_a_deleted_argument_is_refused_by_name(call, name, message, prepared):
    arguments = make_arguments()
    batch = prepare(arguments) if prepared else arguments["batch"]
    delete(batch if name == "batch" else arguments[name])
    with pytest.raises(ValueError, match=message):
        CALLS[call](arguments, batch)


def test_a_batch_with_deleted_arrays_is_not_prepared():
    arguments = make_arguments()
    delete(arguments["batch"])
    with pytest.raises(ValueError, match=r"batch\.page_table is deleted"):
        prepare(arguments)


def test_donated_pages_are_refused_and_the_returned_ones_work():
    arguments = make_arguments("int8")
    update = jax.jit(lambda pages: write_kv(pages, arguments["k"], arguments["v"], batch), donate_argnums=0)
    batch, old = arguments["batch"], arguments["pages"]
    pages = update(old)
    with pytest.raises(ValueError, match=r"pages\.data is deleted: it was donated to an earlier call"):
        paged_attention(arguments["q"], old, batch, SPEC)
    with pytest.raises(ValueError, match=r"cache\.pages\.data is deleted"):
        old.check_not_donated("cache.pages")
    pages.check_not_donated()
    assert paged_attention(arguments["q"], pages, batch, SPEC).shape == (2, 4, 64)
