import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from paged_cache import CacheConfig, CacheSpec, KVShape, LayerGroup, PagedAttentionCacheMetaData
from paged_cache._src.cache import fitting
from paged_kernels import KVPages

SIZES = {
    "batch_size": 4,
    "num_hidden_layers": 3,
    "max_sequences": 70,
    "page_size": 16,
    "num_kv_heads": 4,
    "kv_head_dim_size": 8,
}
ROWS = 3 * 16 * 4  # layers, tokens, heads
PAGE_BYTES = ROWS * 128 * 2  # lanes of a row (K and V of 8 numbers, and padding), bytes of bfloat16


def create(mesh=None, **changes):
    return CacheConfig.create(mesh, **(SIZES | changes))


def mesh_of(*sizes):
    names = ("dp", "tp")[-len(sizes) :]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def report_memory(monkeypatch, stats):
    """Let devices say this of their memory, as an accelerator's do."""
    monkeypatch.setattr(fitting, "_devices", lambda mesh: [FakeDevice(each) for each in stats])


class FakeDevice:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_easydels_name_and_positions():
    made = PagedAttentionCacheMetaData.create(None, 4, 3, 70, 16, 4, 8, 0.9, 11)
    assert made == create(num_pages=11)
    assert (made.max_sequences, made.kv_head_dim_size, made.num_pages_per_layer, made.batch_size) == (70, 8, 11, 4)
    assert (made.num_hidden_layers, made.num_kv_heads, made.head_dim, made.v_head_dim) == (3, 4, 8, None)


def test_sizes_follow_from_the_fields():
    made = create(num_pages=11)
    assert made.pages_per_seq == 5
    assert made.bytes_per_page == PAGE_BYTES
    assert made.total_bytes == 11 * PAGE_BYTES


def test_is_static_and_equal_dtypes_hash_alike():
    assert hash(create(num_pages=4, dtype=jnp.float32)) == hash(create(num_pages=4, dtype="float32"))


def test_page_count_from_a_byte_budget():
    assert create(byte_budget=10 * PAGE_BYTES + 1).num_pages == 10


@pytest.mark.parametrize(("tp", "pages"), [(1, 10), (2, 20), (4, 40), (8, 10)])
def test_split_heads_fit_more_pages_into_each_device(tp, pages):
    assert create(mesh_of(tp), byte_budget=10 * PAGE_BYTES).num_pages == pages  # 4 heads do not divide by 8


def test_page_count_from_the_fullest_device(monkeypatch):
    roomy = {"bytes_limit": 100 * PAGE_BYTES, "bytes_in_use": 0}
    report_memory(monkeypatch, [roomy, roomy | {"bytes_in_use": 30 * PAGE_BYTES}])
    assert create(hbm_utilization=0.5).num_pages == 20


def test_a_full_device_is_an_error_not_a_negative_page_count(monkeypatch):
    report_memory(monkeypatch, [{"bytes_limit": 100, "bytes_in_use": 99}])
    with pytest.raises(ValueError, match=rf"need {2 * PAGE_BYTES:,} bytes a device, but 0 are available.*hbm_util"):
        create()


def test_devices_without_stats_use_a_share_of_host_memory(monkeypatch):
    monkeypatch.setattr(fitting.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 16 * PAGE_BYTES, "SC_PAGE_SIZE": 8}[name])
    assert create(hbm_utilization=1.0).num_pages == 16
    assert create(mesh_of(2), num_kv_heads=1, hbm_utilization=1.0).num_pages == 21  # as many as are of use


def test_more_pages_than_all_memory_holds_are_refused_before_any_is_taken(monkeypatch):
    with pytest.raises(ValueError, match=r"num_pages=1000000000 needs 1?\d[\d,]+ bytes a device, which has"):
        create(num_pages=10**9)
    report_memory(monkeypatch, [{"bytes_limit": 9 * PAGE_BYTES, "bytes_in_use": 9 * PAGE_BYTES}])
    assert create(num_pages=9).num_pages == 9  # what is in use now may be free when the cache is made
    with pytest.raises(
        ValueError, match=r"num_pages=10 needs .* it must be at most 9: use fewer pages, or leave it out"
    ):
        create(num_pages=10)


def test_more_pages_than_the_host_holds_are_refused_where_devices_share_it(monkeypatch):
    monkeypatch.setattr(fitting.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 16 * PAGE_BYTES, "SC_PAGE_SIZE": 1}[name])
    assert create(num_pages=16).num_pages == 16
    with pytest.raises(ValueError, match=r"num_pages=11 needs .* it must be at most 10"):
        create(mesh_of(2), num_kv_heads=3, num_pages=11)


def test_sizing_works_on_this_machine():
    assert 2 <= create().num_pages <= 4 * 5 + 1


def test_without_any_report_of_memory_the_size_must_be_given(monkeypatch):
    monkeypatch.delattr(fitting.os, "sysconf_names")
    with pytest.raises(ValueError, match="give num_pages or byte_budget"):
        create()
    assert create(num_pages=5).num_pages == 5


@pytest.mark.parametrize("budget", [0, -5, 2 * PAGE_BYTES - 1])
def test_not_one_usable_page_is_an_error_that_says_needed_and_available(budget):
    with pytest.raises(ValueError, match=rf"need {2 * PAGE_BYTES:,} bytes a device, but {max(0, budget):,} are"):
        create(byte_budget=budget)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pages": 1}, "num_pages=1 must be at least 2: page 0 is the null page"),
        ({"num_pages": 0}, "num_pages=0 must be at least 1"),
        ({"num_pages": 2**31}, "num_pages=2147483648 must be at most 2147483647: page ids and lengths are int32"),
        ({"num_pages": 8, "byte_budget": 10}, "num_pages=8 and byte_budget=10 both set the size"),
        ({"num_pages": 8, "page_size": 0}, "page_size=0 must be at least 1"),
        ({"num_pages": 8, "num_hidden_layers": -1}, "num_hidden_layers=-1 must be"),
        ({"num_pages": 8, "kv_head_dim_size": 0}, "head_dim=0 must be"),
        ({"num_pages": 8, "num_kv_heads": 2.0}, r"num_kv_heads=2\.0 must be a whole number"),
        ({"num_pages": 8, "max_sequences": 0}, "max_sequence_length=0 must be"),
        ({"num_pages": 8, "batch_size": True}, "max_seqs=True must be a whole number"),
        ({"num_pages": 8, "dtype": "int32"}, "dtype=int32 must be one of"),
        ({"num_pages": 8, "v_head_dim": 0}, "v_head_dim=0 must be a whole number of at least 1"),
        ({"num_pages": 8, "v_head_dim": 9, "latent": True}, "v_head_dim=9 must be at most head_dim=8"),
        ({"hbm_utilization": 0}, r"hbm_utilization=0 must lie in \(0, 1\]"),
        ({"hbm_utilization": 1.5}, r"hbm_utilization=1\.5 must lie"),
    ],
)
def test_each_size_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        create(**change)


@pytest.mark.parametrize(
    ("dtype", "row_bytes"), [("int8", 256), ("float8_e4m3fn", 256), ("float8_e5m2", 256), ("int4", 128)]
)
def test_quantised_pages_are_sized_with_their_scales(dtype, row_bytes):
    pages = KVPages.zeros(1, 16, 4, 128, dtype)
    page_bytes = 3 * (pages.data.nbytes + pages.scales.nbytes)
    made = create(mesh_of(2), kv_head_dim_size=128, dtype=dtype, byte_budget=5 * page_bytes)
    assert made.bytes_per_page == page_bytes > ROWS * row_bytes
    assert made.num_pages == 10  # each device holds half of the heads


def test_values_of_another_size_and_latent_rows():
    assert create(num_pages=4, kv_head_dim_size=192, v_head_dim=128).bytes_per_page == ROWS * 2 * 384
    latent = create(num_pages=4, num_kv_heads=1, kv_head_dim_size=576, v_head_dim=512, latent=True)
    assert latent.bytes_per_page == 3 * 16 * 2 * 640


SMALL, LARGE = KVShape(num_kv_heads=4, head_dim=8), KVShape(num_kv_heads=1, head_dim=16, dtype="float32")
SPEC = CacheSpec.of_layers([(LayerGroup.window(8), SMALL), (LayerGroup.window(8), SMALL), (LayerGroup.full(), LARGE)])
"""Three groups of one layer, two views of different shapes."""
SMALL_BYTES, LARGE_BYTES = 16 * 4 * 128 * 2, 16 * 1 * 128 * 4  # tokens, heads, lanes of an entry, bytes of a number


def for_spec(mesh=None, spec=SPEC, **changes):
    return CacheConfig.for_spec(spec, mesh, **{"max_seqs": 4, "max_sequence_length": 70, "page_size": 16} | changes)


def test_a_config_for_a_spec_has_its_views():
    made = for_spec(num_pages=11)
    assert made.views == (SMALL, LARGE)
    assert made.bytes_per_page == SMALL_BYTES + LARGE_BYTES
    assert (made.num_pages, made.pages_per_seq, made.max_seqs, made.dtype) == (11, 5, 4, jnp.bfloat16)


def test_each_view_splits_its_own_heads_when_pages_are_counted():
    budget = 100 * (SMALL_BYTES + LARGE_BYTES)
    assert for_spec(byte_budget=budget).num_pages == 100
    assert for_spec(mesh_of(2), byte_budget=budget).num_pages == budget // (SMALL_BYTES // 2 + LARGE_BYTES)


def test_on_cpu_no_more_pages_are_taken_than_all_groups_can_use():
    assert for_spec().num_pages == 1 + 4 * 3 * 5  # sequences, groups, pages of 70 tokens
    assert for_spec(spec=CacheSpec.uniform(2, SMALL)).num_pages == create().num_pages == 1 + 4 * 5


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "num_kv_heads", "head_dim", "kv_head_dim_size", "v_head_dim", "latent"]
)
def test_what_is_said_of_all_views_is_refused_where_they_differ(name):
    with pytest.raises(ValueError, match=f"{name} is asked of a cache whose views differ: KVShape.*; read it from"):
        getattr(for_spec(num_pages=4), name)


def test_a_cache_without_views_is_refused():
    with pytest.raises(ValueError, match=r"views=\(\) must hold a KVShape for each view, at least one"):
        CacheConfig(views=(), num_pages=4, page_size=4, max_sequence_length=4, max_seqs=1)


def test_the_type_of_a_shape_is_checked_too():
    with pytest.raises(ValueError, match="dtype=int32 must be one of"):
        for_spec(spec=CacheSpec.uniform(1, KVShape(num_kv_heads=1, head_dim=8, dtype="int32")), num_pages=4)
