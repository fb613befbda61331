"""What a step's layers share is made once, and serves every layer as the batch itself does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_data import (
    EVERY_WORKLOAD,
    SPECS,
    WORKLOADS,
    Workload,
    assert_lse_close,
    assert_rows_close,
    attend_densely,
    decode,
    make_case,
)

from paged_kernels import (
    HeadParams,
    KVPages,
    PreparedBatch,
    get_backend,
    paged_attention,
    paged_attention_update,
    prepare_batch,
    write_kv,
)
from paged_kernels._src.attention.tpu import fit
from paged_kernels._src.call import shapes_of

LAYERS = 4
MANY_ROWS = Workload(kv_lens=(40, 37, 9, 3), q_lens=(40, 1, 9, 1), tokens=56)
"""Enough rows that the TPU backend runs the sequences of one row in a kernel of their own."""


def prepare(case, spec=SPECS["plain"], backend=None) -> PreparedBatch:
    tokens, q_heads, _ = case.q.shape
    return prepare_batch(
        case.batch,
        shapes_of(case.pages),
        spec,
        tokens=tokens,
        q_heads=q_heads,
        q_dtype=case.q.dtype,
        head_params=case.heads,
        backend=backend,
    )


def new_rows(case):
    return case.new_rows(case.given_keys), None if case.pages.layout.latent else case.new_rows(case.given_values)


def sub_jaxprs(params):
    for value in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def count(jaxpr, primitive: str) -> int:
    """How often a primitive runs in a traced function, counting each call of a compiled part; kernels are left out."""
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == primitive
        if eqn.primitive.name != "pallas_call":
            found += sum(count(inner, primitive) for inner in sub_jaxprs(eqn.params))
    return found


def step(case, spec, backend, *, prepared: bool, layers: int):
    """A function of the case's arrays: the page write and the attention of some layers."""

    def run(q, k, v, pages, batch):
        if prepared:
            batch = prepare(dataclasses.replace(case, q=q, batch=batch), spec, backend)
        named = None if prepared else backend
        outputs = []
        for _ in range(layers):
            pages = write_kv(pages, k, v, batch, backend=named)
            outputs.append(paged_attention(q, pages, batch, spec, case.heads, backend=named))
        return outputs

    return run


@pytest.mark.parametrize("workload", [WORKLOADS["decode"], MANY_ROWS], ids=["decode", "many_rows"])
@pytest.mark.parametrize(
    ("backend", "of_attention", "of_write"), [("xla", "cumsum", None), ("tpu_interpret", "cumsum", "cummin")]
)
def test_tiles_and_runs_are_made_once_a_step_and_not_once_a_layer(workload, backend, of_attention, of_write):
    case = make_case(workload)
    arguments = (case.q, *new_rows(case), case.pages, case.batch)

    def counted(primitive, **kind):
        return count(jax.make_jaxpr(step(case, SPECS["plain"], backend, **kind))(*arguments).jaxpr, primitive)

    for primitive in filter(None, (of_attention, of_write)):
        once = counted(primitive, prepared=True, layers=1)
        assert once > 0
        assert counted(primitive, prepared=True, layers=LAYERS) == once
        assert counted(primitive, prepared=False, layers=LAYERS) == LAYERS * once


def test_rows_are_given_their_slots_once_a_step():
    """For the scatter, finding each row's sequence is a comparison of all ends with all rows, and a sum of it."""
    case = make_case(WORKLOADS["mixed"])
    arguments = (case.q, *new_rows(case), case.pages, case.batch)
    sums = [
        count(jax.make_jaxpr(step(case, SPECS["plain"], "reference", prepared=True, layers=n))(*arguments).jaxpr, "le")
        for n in (1, 2)
    ]
    prepared = count(jax.make_jaxpr(lambda: prepare(case, backend="reference"))().jaxpr, "le")
    assert prepared > 0
    assert sums[1] - prepared == 2 * (sums[0] - prepared)


CASES = [
    ("mixed", "float32", "everything", "both"),
    ("decode", "float32", "window", "plain"),
    ("tree_verify", "float32", "plain", "sinks"),
    ("page_2", "int8", "plain", "plain"),  # pages that no copy can move: the TPU backend joins them
    ("latent", "float32", "plain", "plain"),
    ("gaps", "bfloat16", "plain", "alibi"),
]


@pytest.mark.parametrize("names", CASES, ids="-".join)
@pytest.mark.parametrize("backend", ["reference", "xla", "tpu_interpret"])
def test_a_prepared_batch_serves_as_the_batch_itself(backend, names):
    workload, kv_dtype, spec, heads = names
    spec = SPECS[spec]
    case = make_case(EVERY_WORKLOAD[workload], spec=spec, kv_dtype=kv_dtype, heads=heads)
    k, v = new_rows(case)
    prepared = prepare(case, spec, backend)
    written, expected = (
        write_kv(case.pages, k, v, batch, backend=named) for batch, named in ((prepared, None), (case.batch, backend))
    )
    np.testing.assert_array_equal(*(np.asarray(pages.data).view(np.uint8) for pages in (written, expected)))
    got = paged_attention(case.q, written, prepared, spec, case.heads, return_lse=True)
    plain = paged_attention(case.q, written, case.batch, spec, case.heads, backend=backend, return_lse=True)
    for one, other in zip(got, plain, strict=True):
        np.testing.assert_allclose(np.float64(one), np.float64(other), rtol=1e-5, atol=1e-6)
    dense, dense_lse = attend_densely(case, spec)
    assert_rows_close(got[0], dense, case.q.dtype)
    assert_lse_close(got[1], dense_lse, case.q.dtype)


def test_sequences_of_one_row_beside_many_rows():
    case = make_case(MANY_ROWS)
    prepared = prepare(case, backend="tpu_interpret")
    assert prepared.attention.singles is not None
    out = paged_attention(case.q, case.pages, prepared, SPECS["plain"], case.heads)
    assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], "float32")


@pytest.mark.parametrize("backend", ["xla", "tpu_interpret"])
def test_an_update_takes_it(backend):
    case = make_case(WORKLOADS["decode"])
    k, v = new_rows(case)
    out, pages = paged_attention_update(case.q, k, v, case.pages, prepare(case, backend=backend), SPECS["plain"])
    assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], "float32")
    np.testing.assert_array_equal(pages.data, write_kv(case.pages, k, v, case.batch).data)


@pytest.mark.parametrize("backend", ["xla", "tpu_interpret"])
def test_it_goes_through_jit_and_scan(backend):
    case = make_case(decode(37, 16, 3))
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), case.pages)

    @jax.jit
    def run(q, layers, prepared):
        def attend(carry, pages):
            return carry, paged_attention(q, pages, carry, SPECS["plain"])

        return jax.lax.scan(attend, prepared, layers)[1]

    expected = attend_densely(case, SPECS["plain"])[0]
    for out in run(case.q, layers, prepare(case, backend=backend)):
        assert_rows_close(out, expected, "float32")


def test_it_goes_through_shard_map_with_the_shapes_of_one_device():
    """Heads over `tp`, and over `dp` a batch a device, with a leading axis that the caller adds."""
    case = make_case(WORKLOADS["mixed"])
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    half = KVPages.shapes(case.pages.num_pages, case.pages.page_size, 1, case.pages.head_dim, "float32")
    tokens, q_heads, _ = case.q.shape
    one = prepare_batch(
        case.batch, half, SPECS["plain"], tokens=tokens, q_heads=q_heads // 2, q_dtype="float32", backend="xla"
    )
    prepared = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    q = jnp.stack([case.q, case.q])
    pages = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), case.pages)

    def attend(q, pages, prepared):
        prepared = jax.tree.map(lambda leaf: leaf[0], prepared)
        return paged_attention(q[0], pages, prepared, SPECS["plain"])[None]

    rows = P("dp", None, "tp")
    specs = (rows, KVPages.partition_spec("tp", "dp"), P("dp"))
    sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False))
    for out in sharded(q, pages, prepared):
        assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], "float32")


def test_the_tpu_sizes_are_chosen_once_a_call_and_never_for_a_prepared_batch(monkeypatch):
    made = []
    original = fit.make_config
    monkeypatch.setattr(fit, "make_config", lambda *args, **kwargs: made.append(1) or original(*args, **kwargs))
    case = make_case(WORKLOADS["decode"])
    jax.make_jaxpr(lambda q: paged_attention(q, case.pages, case.batch, SPECS["plain"], backend="tpu_interpret"))(
        case.q
    )
    assert len(made) == 1
    prepared = prepare(case, backend="tpu_interpret")
    assert len(made) == 2
    paged_attention(case.q, case.pages, prepared, SPECS["plain"])
    assert len(made) == 2


@pytest.fixture(scope="module")
def case():
    return make_case(WORKLOADS["mixed"])


@pytest.fixture(scope="module")
def prepared(case):
    return prepare(case, backend="xla")


SINKS = HeadParams(sinks=jnp.zeros(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": lambda q: q[:-1]},
            r"q does not fit the prepared batch: it is .*39, 4, 64.* must be .*40, 4, 64",
        ),
        ({"q": lambda q: q.astype(jnp.bfloat16)}, "q does not fit the prepared batch: it is .*bfloat16"),
        (
            {"pages": lambda pages: jax.tree.map(lambda leaf: leaf[1:], pages)},
            "pages does not fit the prepared batch: it is KVPages",
        ),
        (
            {"spec": lambda spec: SPECS["window"]},
            "spec does not fit the prepared batch: it is .*window=21",
        ),
        ({"head_params": lambda _: SINKS}, r"head_params does not fit the prepared batch: it is \['sinks'\]"),
        ({"backend": lambda _: "reference"}, "backend='reference' is not the backend of the prepared batch, 'xla'"),
    ],
)
def test_attention_that_it_was_not_prepared_for_is_refused(case, prepared, change, message):
    arguments = {"q": case.q, "pages": case.pages, "spec": SPECS["plain"], "head_params": None, "backend": "xla"}
    arguments |= {name: change(arguments[name]) for name, change in change.items()}
    with pytest.raises(ValueError, match=message):
        paged_attention(batch=prepared, **arguments)


def test_a_write_that_it_was_not_prepared_for_is_refused(case, prepared):
    k, v = new_rows(case)
    with pytest.raises(ValueError, match="k has 39 rows; the batch was prepared for 40"):
        write_kv(case.pages, k[1:], v[1:], prepared)
    with pytest.raises(ValueError, match="pages does not fit the prepared batch"):
        write_kv(jax.tree.map(lambda leaf: leaf[1:], case.pages), k, v, prepared)
    part = make_case(EVERY_WORKLOAD["part_of_context"])
    k = jnp.zeros((part.q.shape[0], part.pages.num_kv_heads, part.pages.head_dim))
    with pytest.raises(ValueError, match="q_starts must be None in a write"):
        write_kv(part.pages, k, k, prepare(part))


def test_the_batch_is_checked_when_it_is_prepared(case):
    with pytest.raises(ValueError, match="q has 3 heads, which must be a multiple of the 2 KV heads of the pages"):
        prepare_batch(case.batch, case.pages, SPECS["plain"], tokens=40, q_heads=3, q_dtype="float32")
    with pytest.raises(ValueError, match=r"cu_q_lens\[.\]=.* must be at most the 5 rows given"):
        prepare_batch(case.batch, case.pages, SPECS["plain"], tokens=5, q_heads=4, q_dtype="float32")


def test_nothing_of_a_prepared_batch_is_checked_again(case, prepared, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("paged_kernels._src.validation.check_batch", fail)
    monkeypatch.setattr("paged_kernels._src.validation._check_batch_arrays", fail)
    paged_attention(case.q, case.pages, prepared, SPECS["plain"])
    write_kv(case.pages, *new_rows(case), prepared)


def test_its_backend_is_the_value_that_was_given(case):
    backend = get_backend("xla").with_block_sizes(q_rows=3, kv_pages=1)
    assert prepare(case, backend=backend).backend is backend
