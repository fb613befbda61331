"""What cache a model's layers need."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from paged_cache._src.manager.groups import KVShape, LayerGroup
from paged_cache._src.spec.hf_config import HFConfig
from paged_cache._src.spec.hf_layers import check_supported, layers_of, shared_layers_of


class LayerPlace(NamedTuple):
    """Where one layer finds its keys and values."""

    group: int
    """The group whose page table it reads, by index in `CacheSpec.pool_groups()`."""
    view: int
    """The view of the cache that holds them, by index in `CacheSpec.views()`."""
    writes: bool
    """True if the layer writes them; False if it reads those of another layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What cache a model's layers need: what each layer sees (`LayerGroup`), and what it stores (`KVShape`).

    All groups take their pages from one pool, so every view has as many pages. A page belongs to one group at a time:

        views            group 0 (shape A)   group 1 (shape A)   group 2 (shape B)
        view 0, shape A  its first layer     its first layer     unused
        view 1, shape A  its second layer    its second layer    unused
        view 2, shape B  unused              unused              its first layer

    So groups of the same shape share views, and a page of one shape's group leaves the views of other shapes unused:
    with `n` shapes of the same size, a cache stores `1 / n` of what its bytes could hold.

    Layers are counted by their attention: one that has self-attention and cross-attention counts as two.

    Raises:
        ValueError: a group has no layers or no shape, or a layer is in no group, in two, or shares a layer that does
            not come before it or writes nothing itself.
    """

    groups: tuple[LayerGroup, ...]
    """The layers that store keys and values, with their shape: one group for each kind, window and shape."""
    shared_layers: tuple[tuple[int, int], ...] = ()
    """Layers that store nothing, each with the layer before it whose keys and values it reads (Gemma 3n, Gemma 4)."""
    assumed: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """What the config left out and its model type implies, as `key=value`."""

    def __post_init__(self) -> None:
        if not self.groups or not all(group.layers and group.kv for group in self.groups):
            raise ValueError(
                f"groups={self.groups} must be at least one group, each with the layers that are in it and their kv"
            )
        stored = [layer for group in self.groups for layer in group.layers]
        layers = sorted([*stored, *(layer for layer, _ in self.shared_layers)])
        if layers != list(range(len(layers))):
            raise ValueError(
                f"groups and shared_layers name the layers {layers}; they must name each of 0..{len(layers) - 1} once"
            )
        for layer, source in self.shared_layers:
            if source >= layer or source not in stored:
                raise ValueError(
                    f"shared_layers has ({layer}, {source}); layer {layer} must read an earlier layer, one of a group"
                )

    @property
    def num_layers(self) -> int:
        """Number of layers, those included that store nothing."""
        return self.num_stored_layers + len(self.shared_layers)

    @property
    def num_stored_layers(self) -> int:
        """Number of layers that store keys and values."""
        return sum(len(group.layers) for group in self.groups)

    @property
    def shapes(self) -> tuple[KVShape, ...]:
        """Each shape once, in order of its first group."""
        return tuple(dict.fromkeys(_kv(group) for group in self.groups))

    @classmethod
    def uniform(cls, num_layers: int, kv: KVShape) -> Self:
        """Layers that all see every key before them, and store the same.

        >>> CacheSpec.uniform(32, KVShape(num_kv_heads=8, head_dim=128)).num_layers
        32
        """
        return cls(groups=(LayerGroup.full(range(num_layers), kv),))

    @classmethod
    def of_layers(
        cls, layers: Iterable[tuple[LayerGroup, KVShape]], shared_layers: Iterable[tuple[int, int]] = ()
    ) -> Self:
        """What each layer sees and stores, in the model's order.

        >>> kv = KVShape(num_kv_heads=2, head_dim=64)
        >>> window, full = LayerGroup.window(8), LayerGroup.full()
        >>> spec = CacheSpec.of_layers([(window, kv), (full, kv), (window, kv)])
        >>> [(group.kind, group.layers) for group in spec.groups]
        [('window', (0, 2)), ('full', (1,))]

        Args:
            layers: for each layer a group that says what it sees, and its shape; both are ignored for a layer that
                reads the keys and values of another.
            shared_layers: each of these layers, and the one that it reads.
        """
        shared = dict(shared_layers)
        members: dict[LayerGroup, list[int]] = {}
        for index, (sight, kv) in enumerate(layers):
            if index not in shared:
                members.setdefault(dataclasses.replace(sight, layers=(), kv=kv), []).append(index)
        groups = (dataclasses.replace(group, layers=tuple(indices)) for group, indices in members.items())
        return cls(groups=tuple(groups), shared_layers=tuple(shared.items()))

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any] | HFConfig) -> Self:
        """What the model of a Hugging Face config.json needs; of its text, where that is nested.

        >>> spec = CacheSpec.from_hf_config({"num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 64,
        ...     "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8})
        >>> [(group.kind, group.tokens, group.layers) for group in spec.groups]
        [('window', 8, (0,)), ('full', 0, (1,))]

        Args:
            config: the parsed file. Change it to say what the file does not: `{**config, "head_dim": 128}`.

        Raises:
            ValueError: a key is missing, or has a value that makes no sense; names it.
            NotImplementedError: the model keeps something else than keys and values; names the key that says so.
        """
        config = config if isinstance(config, HFConfig) else HFConfig.of(config)
        check_supported(config)
        layers = layers_of(config)
        spec = cls.of_layers(layers, shared_layers_of(config, layers))
        return dataclasses.replace(spec, assumed=config.assumed)

    def pool_groups(self) -> tuple[LayerGroup, ...]:
        """The groups to give to a `PageManager`: cut so that none has more layers than the smallest had.

        A page takes room in as many views as the largest group of a shape has layers, so groups of different sizes
        would waste most of the small ones' pages. vLLM's hybrid allocator cuts so too. The last piece of a group may be
        smaller.
        """
        size = min(len(group.layers) for group in self.groups)
        return tuple(
            dataclasses.replace(group, layers=group.layers[start : start + size])
            for group in self.groups
            for start in range(0, len(group.layers), size)
        )

    def views(self) -> tuple[KVShape, ...]:
        """The shape of each view of the cache: for each shape as many views as its largest group has layers."""
        return tuple(shape for shape, count in self._views_of_shapes().items() for _ in range(count))

    def places(self) -> tuple[LayerPlace, ...]:
        """Where each layer finds its keys and values, in the model's order.

        >>> kv = KVShape(num_kv_heads=2, head_dim=64)
        >>> sights = [LayerGroup.window(8), LayerGroup.full(), LayerGroup.full()]
        >>> CacheSpec.of_layers([(sight, kv) for sight in sights], shared_layers=[(2, 1)]).places()[1:]
        (LayerPlace(group=1, view=0, writes=True), LayerPlace(group=1, view=0, writes=False))
        """
        first_views, first = {}, 0
        for shape, count in self._views_of_shapes().items():
            first_views[shape] = first
            first += count
        places = {
            layer: LayerPlace(index, first_views[group.kv] + at, writes=True)
            for index, group in enumerate(self.pool_groups())
            for at, layer in enumerate(group.layers)
        }
        places |= {layer: places[source]._replace(writes=False) for layer, source in self.shared_layers}
        return tuple(places[layer] for layer in range(self.num_layers))

    def _views_of_shapes(self) -> dict[KVShape, int]:
        """How many views each shape has."""
        counts: dict[KVShape, int] = {}
        for group in self.pool_groups():
            kv = _kv(group)
            counts[kv] = max(counts.get(kv, 0), len(group.layers))
        return counts


def _kv(group: LayerGroup) -> KVShape:
    if group.kv is None:
        raise ValueError(f"{group} must have kv, what each of its layers stores")
    return group.kv
