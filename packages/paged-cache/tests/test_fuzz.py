"""Hostile archives and configs: each is refused by an error of ours, or means what it says."""

import json
import random
import time

import fuzzing
import numpy as np
import pytest
from filled_cache import NUM_PAGES, PAGE_SIZE, assert_same, filled_cache, pages_of, stored
from fuzzing import BYTES, JSON, REFUSED, attempt, flip_bits, fuzzed, huge_number, overwrite
from managing import picture
from resigned import manifest_of, signed

from paged_cache import CacheSpec, HFConfig
from paged_cache._src.manager import LayerGroup, PageManager
from paged_cache._src.planning.cli import build_parser, run
from paged_cache._src.transfer.archive import Archive
from paged_cache._src.transfer.prefix_file import load_prefix_cache, save_prefix_cache
from paged_cache._src.transfer.sequence_pages import SequencePages, export_sequence, import_sequence


def raising(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (raising(ValueError("a.json has no layers; add them")), None),
        (raising(NotImplementedError("a.json asks for yarn, which is not supported")), None),
        (raising(ValueError("b.json has no layers; add them")), "b.json"),
        (raising(ValueError("a.json is wrong")), "a.json is wrong"),
        (raising(json.JSONDecodeError("a.json must not end", "", 0)), "JSONDecodeError"),
        (lambda: time.sleep(1), "a case took"),
    ],
)
def test_what_an_attempt_lets_pass(call, message, monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0.05)
    if message is None:
        assert attempt(call, "a.json") is REFUSED
    else:
        with pytest.raises((AssertionError, fuzzing.TooSlow), match=message):
            attempt(call, "a.json")


def test_a_case_is_always_the_same():
    for seed, mutator in enumerate(BYTES):
        case = fuzzing.Case(mutator, seed)
        assert case(bytes(range(256))) == case(bytes(range(256))) != bytes(range(256))


TOKENS = list(range(100, 110))
GROUPS = (LayerGroup.full([0, 2]), LayerGroup.window(6, [1]))


def of_manifest(mutator):
    """Another manifest, with the right checksum."""

    def mutated(rng, data):
        return signed(data, mutator(rng, manifest_of(data)))

    mutated.__name__ = f"manifest_{mutator.__name__}"
    return mutated


def other_numbers(rng, data):
    """Other token ids, places or lengths, with the right checksums. Keys and values are trusted."""
    whole = Archive.from_bytes(data, manifest_of(data)["kind"])
    name = rng.choice([name for name in whole.arrays if not name.startswith("view.")])
    array = whole.arrays[name]
    numbers = rng.choice([flip_bits, overwrite, huge_number])(rng, array.tobytes())
    other = np.frombuffer(numbers, array.dtype).reshape(array.shape)
    return Archive(whole.kind, whole.facts, whole.arrays | {name: other}).to_bytes()


def other_shape(rng, data):
    """An array that is cut, longer, of another order or of another type, with the right checksums."""
    whole = Archive.from_bytes(data, manifest_of(data)["kind"])
    name = rng.choice(list(whole.arrays))
    array = whole.arrays[name]
    others = [
        array[:-1],
        array[1:],
        np.concatenate([array, array]),
        array[None],
        array.reshape(-1),
        array.view(np.int8),
    ]
    return Archive(whole.kind, whole.facts, whole.arrays | {name: rng.choice(others)}).to_bytes()


ARCHIVES = (*BYTES, *map(of_manifest, JSON), other_numbers, other_shape)


def manager_of():
    return PageManager(NUM_PAGES, PAGE_SIZE, max_seqs=3, max_sequence_length=32, groups=GROUPS)


def computed():
    manager = manager_of()
    seq = manager.admit(TOKENS)
    manager.commit(seq, len(TOKENS))
    manager.take_moves()
    return manager, seq


@pytest.fixture(scope="module")
def sequence():
    return export_sequence(filled_cache(), *computed()).to_bytes()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A saved prefix cache, and the bytes of its pages."""
    manager, seq = computed()
    manager.release(seq)
    cache, path = filled_cache(), tmp_path_factory.mktemp("prefix") / "prefix.safetensors"
    save_prefix_cache(path, cache, manager)
    return path.read_bytes(), {page.tobytes() for page in pages_of(cache, [p.page for p in manager.indexed_pages()])[0]}


@fuzzed(ARCHIVES, quick=26, most=500)
def test_sequences(case, sequence):
    """The sequence holds the pages that its archive says, or nothing has changed."""
    manager, data = manager_of(), case(sequence)
    empty, cache = picture(manager), filled_cache(seed=1)
    before = stored(cache)
    got = attempt(lambda: import_sequence(cache, manager, SequencePages.from_bytes(data)))
    if got is REFUSED:
        assert picture(manager) == empty
        assert_same(stored(cache), before)
        return
    says, holds = SequencePages.from_bytes(data), export_sequence(got[0], manager, got[1])
    assert (holds.token_ids.tolist(), holds.places.tolist()) == (says.token_ids.tolist(), says.places.tolist())
    assert_same(map(bytes_of, holds.arrays.values()), map(bytes_of, says.arrays.values()))


def bytes_of(array):
    return np.frombuffer(array.tobytes(), np.uint8)


@fuzzed(ARCHIVES, quick=26, most=300)
def test_prefix_caches(case, prefix, tmp_path):
    """Pages that can be found are pages of the file, or nothing has changed."""
    data, its_pages = prefix
    path, manager = tmp_path / "prefix.safetensors", manager_of()
    path.write_bytes(case(data))
    empty, cache = picture(manager), filled_cache(seed=1)
    before = stored(cache)
    got = attempt(lambda: load_prefix_cache(path, cache, manager), path.name)
    if got is REFUSED:
        assert picture(manager) == empty
        assert_same(stored(cache), before)
    else:
        assert {page.tobytes() for page in pages_of(got, [p.page for p in manager.indexed_pages()])[0]} <= its_pages


CONFIGS = (
    {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    },
    {
        "text_config": {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "sliding_window": 16,
            "num_key_value_heads": 1,
            "sliding_window_pattern": 3,
            "head_dim": 16,
            "num_attention_heads": 4,
        }
    },
    {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "hidden_size": 32,
    },
)


@fuzzed(JSON, quick=26, most=400)
def test_configs(case, tmp_path):
    """The plan counts the layers that the config says; each count is a whole number."""
    path = tmp_path / "config.json"
    path.write_bytes(case(CONFIGS[case.seed % len(CONFIGS)]))
    args = build_parser().parse_args(["plan", "--model-config", str(path), "--memory", "1GiB", "--json"])
    if (got := attempt(lambda: run(args), path.name, "memory_bytes")) is REFUSED:
        return
    config = json.loads(path.read_bytes())
    layers = (config.get("text_config") or config)["num_hidden_layers"]
    spec = CacheSpec.from_hf_config(config)
    assert (type(layers), spec.num_layers) == (int, layers)
    assert all(type(size) is int and size > 0 for shape in spec.shapes for size in (shape.num_kv_heads, shape.head_dim))
    assert json.loads(got)[0]["num_pages"] > 1


GETTERS = ("whole", "number", "flag", "text", "per_layer", "mapping")


@fuzzed(JSON[:10], quick=10, most=100)
def test_settings(case):
    """Each getter returns a value of its type, or refuses."""
    try:
        config = json.loads(case(CONFIGS[case.seed % len(CONFIGS)]))
    except ValueError:
        return  # numbers that Python does not read
    keys = [*config, *(config["text_config"] if isinstance(config.get("text_config"), dict) else ())]
    for getter in GETTERS:
        key = random.Random(case.seed).choice(keys)
        found = attempt(lambda getter=getter, key=key: getattr(HFConfig.of(config), getter)(key))
        assert found is REFUSED or isinstance(found, {"whole": int, "number": float, "flag": bool}.get(getter, object))
