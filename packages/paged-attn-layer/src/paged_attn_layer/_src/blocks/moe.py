"""A mixture of experts in place of an MLP: each token is computed by a few of many MLPs."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.attention.mesh import AnyMesh, on_mesh
from paged_attn_layer._src.blocks.expert_dot import expert_dot
from paged_attn_layer._src.blocks.mlp import MLP, MLPConfig
from paged_attn_layer._src.blocks.norm import Norm, NormConfig, normed
from paged_attn_layer._src.blocks.router import Choice, Router, RouterConfig
from paged_cache import PagedAttentionCacheView

ExpertWeights = Mapping[str, Array]
"""The weights of `Experts` by name, or one device's part of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts. Static and hashable.

        y = sum over the chosen experts e of weight_e expert_e(x)        plus shared(x), if there is a shared one

    Raises:
        ValueError: experts and shared expert are for hidden rows of different sizes.
        NotImplementedError: the experts have no gate.
    """

    router: RouterConfig
    """How many experts there are, and which are chosen."""
    expert: MLPConfig
    """Each of the experts."""
    shared: MLPConfig | None = None
    """The expert that computes every token; several of them are one that is as wide as all. `None` if there is none."""
    norm: NormConfig | None = None
    """What normalises rows before the experts and before the shared one, and what each of the two gives (Gemma 4).

    The router then gets the rows as they are.
    """
    expert_axes: tuple[str, ...] = ("ep",)
    """Axes of a mesh over which the experts are split, if the mesh has them and they divide the experts."""
    mlp_axes: tuple[str, ...] = ("tp",)
    """Axes of a mesh over which each expert is split, if the mesh has them and they divide `intermediate_size`."""

    def __post_init__(self) -> None:
        if not self.expert.gated:
            raise NotImplementedError("expert.gated=False is not supported; experts must have a gate")
        if self.shared is not None and self.shared.hidden_size != self.hidden_size:
            raise ValueError(
                f"shared.hidden_size={self.shared.hidden_size} must be expert.hidden_size={self.hidden_size}"
            )

    @property
    def hidden_size(self) -> int:
        """Size of the rows that it maps."""
        return self.expert.hidden_size

    @property
    def intermediate_size(self) -> int:
        """Size of the rows within one expert."""
        return self.expert.intermediate_size

    def axes_on(self, mesh: AnyMesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The axes of a mesh over which the experts are split, and those over which each expert is."""
        experts = _axes_that_divide(mesh, self.expert_axes, self.router.num_experts)
        mlp = () if set(experts) & set(self.mlp_axes) else self.mlp_axes
        return experts, _axes_that_divide(mesh, mlp, self.intermediate_size)


class MoE(nnx.Module):
    """A mixture of experts as `MoEConfig` writes it: `router`, `experts`, and `shared` if there is a shared one.

    On a mesh, each device computes the part of the sum that its experts give, for all rows of its replica. The parts
    are added by one `psum`; nothing else is communicated.
    """

    def __init__(self, config: MoEConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.router = Router(config.hidden_size, config.router, param_dtype=param_dtype, rngs=rngs)
        self.experts = Experts(config.router.num_experts, config.expert, param_dtype=param_dtype, rngs=rngs)

        def norm() -> Norm | None:
            return None if config.norm is None else Norm(config.hidden_size, config.norm, param_dtype=param_dtype)

        self.expert_norm, self.expert_post_norm = norm(), norm()
        if config.shared is not None:
            self.shared_norm, self.shared_post_norm = norm(), norm()
            self.shared = MLP(config.shared, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*rows hidden"], cache_view: PagedAttentionCacheView | None = None
    ) -> Float[Array, "*rows hidden"]:
        """The output for each row.

        Args:
            x: the rows; with a leading `replicas` axis where the cache is split over a data axis.
            cache_view: a layer's pages, which say what mesh there is; `None` without one.

        Raises:
            NotImplementedError: the experts and the rows are split over the same axis.
        """
        view = None if cache_view is None else on_mesh(cache_view)
        if view is None or view.mesh is None:
            out = _mixture((self.router, self.expert_norm), self.config.expert, self.experts.weights(), x)
        else:
            out = self._on_devices(x, view.mesh, view.data_axis)
        out = normed(out, self.expert_post_norm)
        if self.config.shared is None:
            return out
        return out + normed(self.shared(normed(x, self.shared_norm)), self.shared_post_norm)

    def _on_devices(self, x: Array, mesh: AnyMesh, data_axis: str | None) -> Array:
        expert_axes, mlp_axes = self.config.axes_on(mesh)
        if data_axis in expert_axes + mlp_axes:
            raise NotImplementedError(
                f"experts split over {data_axis!r}, the data axis of the cache, are not supported; split them over "
                "another axis of the mesh"
            )
        whole_graph, whole_weights = nnx.split((self.router, self.expert_norm))  # every device has all of these

        def part(x: Array, whole_weights: nnx.State, weights: ExpertWeights) -> Array:
            if mlp_axes and "down_bias" in weights:  # the devices' sums are added: one of them has the bias
                bias, is_first = weights["down_bias"], jax.lax.axis_index(mlp_axes) == 0
                weights = {**weights, "down_bias": jnp.where(is_first, bias, jnp.zeros_like(bias))}
            first = jax.lax.axis_index(expert_axes) * len(weights["up_proj"]) if expert_axes else 0
            out = _mixture(nnx.merge(whole_graph, whole_weights), self.config.expert, weights, x, first)
            return jax.lax.psum(out, expert_axes + mlp_axes) if expert_axes or mlp_axes else out

        weights, rows = self.experts.weights(), PartitionSpec(data_axis)
        specs = {name: _spec(name, expert_axes or None, mlp_axes or None) for name in weights}
        # The loops over blocks of rows carry no replication types, so shard_map cannot check them.
        split = jax.shard_map(part, mesh=mesh, in_specs=(rows, PartitionSpec(), specs), out_specs=rows, check_vma=False)
        return split(x, whole_weights, weights)


class Experts(nnx.Module):
    """MLPs of one form, their weights stacked: `{gate|up}_proj [experts, hidden, intermediate]`, `down_proj`.

    Their biases are `{gate|up|down}_bias [experts, ...]`.
    """

    def __init__(
        self, num_experts: int, config: MLPConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        wide, narrow = (num_experts, config.hidden_size, config.intermediate_size), (num_experts, config.hidden_size)
        init = nnx.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        self.gate_proj = nnx.Param(init(rngs(), wide, param_dtype))
        self.up_proj = nnx.Param(init(rngs(), wide, param_dtype))
        self.down_proj = nnx.Param(init(rngs(), (num_experts, *wide[:0:-1]), param_dtype))
        if config.use_bias:
            self.gate_bias = nnx.Param(jnp.zeros((num_experts, config.intermediate_size), param_dtype))
            self.up_bias = nnx.Param(jnp.zeros((num_experts, config.intermediate_size), param_dtype))
            self.down_bias = nnx.Param(jnp.zeros(narrow, param_dtype))

    def weights(self) -> ExpertWeights:
        """All weights by name."""
        kinds = ("proj", "bias") if self.config.use_bias else ("proj",)
        names = [f"{part}_{kind}" for kind in kinds for part in ("gate", "up", "down")]
        return {name: getattr(self, name)[...] for name in names}


def _mixture(
    router_and_norm: tuple[Router, Norm | None],
    config: MLPConfig,
    weights: ExpertWeights,
    x: Float[Array, "*rows hidden"],
    first: int | Int32[Array, ""] = 0,
) -> Float[Array, "*rows hidden"]:
    """The weighted sum of what some of each row's experts give: the `first` and those after it, which `weights` has."""
    router, norm = router_and_norm
    rows, count = x.reshape(-1, x.shape[-1]), len(weights["up_proj"])
    choice, rows = router(rows), normed(rows, norm)
    experts = choice.experts.reshape(-1) - first
    experts = jnp.where((experts >= 0) & (experts < count), experts, count)  # `count` is any that is not here
    order = jnp.argsort(experts)  # pairs of a row and one of its experts, those of the first expert first
    sizes = jnp.bincount(experts, length=count + 1)[:count].astype(jnp.int32)
    by_expert = _expert_mlps(config, weights, rows[order // choice.experts.shape[1]], experts[order], sizes)
    by_expert = jnp.where((experts[order] < count)[:, None], by_expert, jnp.zeros((), x.dtype))
    each = jnp.zeros_like(by_expert).at[order].set(by_expert).reshape(*choice.experts.shape, -1)
    return _weighted(each, choice).astype(x.dtype).reshape(x.shape)


def _weighted(each: Float[Array, "rows k hidden"], choice: Choice) -> Float[Array, "rows hidden"]:
    return (each.astype(jnp.float32) * choice.weights[..., None]).sum(1)


def _expert_mlps(
    config: MLPConfig,
    weights: ExpertWeights,
    x: Array,
    experts: Int32[Array, "*pairs"],
    sizes: Int32[Array, "*experts"],
) -> Array:
    """The MLP of each row's expert; rows of one expert are together."""

    def project(name: str, x: Array) -> Array:
        out = expert_dot(x, weights[f"{name}_proj"], sizes)
        return out + weights[f"{name}_bias"].at[experts].get(mode="clip") if config.use_bias else out

    return project("down", config.activate(project("up", x), project("gate", x)))


def _spec(name: str, experts: tuple[str, ...] | None, mlp: tuple[str, ...] | None) -> PartitionSpec:
    """How an expert weight is split: `gate` and `up` make the rows within an expert, `down` takes them."""
    if name == "down_bias":
        return PartitionSpec(experts)
    if name == "down_proj":
        return PartitionSpec(experts, mlp)
    return PartitionSpec(experts, mlp) if name.endswith("bias") else PartitionSpec(experts, None, mlp)


def _axes_that_divide(mesh: AnyMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Those of the axes that the mesh has; none if they do not divide the size."""
    present = tuple(axis for axis in axes if axis in mesh.shape)
    return () if size % math.prod(mesh.shape[axis] for axis in present) else present
