import check_imports
import pytest


@pytest.mark.parametrize(
    ("package", "module", "names", "message"),
    [
        ("paged_attn_layer", "paged_cache", ["PageManager"], None),
        ("paged_attn_layer", "paged_cache.transfer", ["HostPages"], None),
        ("paged_attn_layer", "paged_cache", ["PagedAttentionCache"], None),  # added to __all__ by a second statement
        ("paged_attn_layer", "paged_cache", ["HostPages"], r"HostPages is not in paged_cache.__all__"),
        ("paged_attn_layer", "paged_cache.transfer", ["Archive"], r"Archive is not in paged_cache.transfer.__all__"),
        (
            "paged_attn_layer",
            "paged_cache._src.manager",
            ["PagePool"],
            "paged_cache._src.manager is private to paged_cache; import from paged_cache",
        ),
        (
            "paged_attn_layer",
            "paged_cache._version",
            ["__version__"],
            "paged_cache._version is private to paged_cache",
        ),
        ("paged_cache", "paged_attn_layer", ["Engine"], "paged_cache is below paged_attn_layer and must not import it"),
        ("paged_cache", "flax", [], "flax is not a dependency of paged_cache"),
        ("paged_cache", ".view", [], "relative import; write the module's full name"),
    ],
)
def test_an_import_against_the_rules_is_named(package, module, names, message):
    breach = check_imports.breach(package, module, names)
    assert breach is None if message is None else message in breach
