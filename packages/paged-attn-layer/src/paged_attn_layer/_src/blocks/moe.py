"""A mixture of experts in place of an MLP: each token is computed by a few of many MLPs."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.blocks.grouped_dot import grouped_dot
from paged_attn_layer._src.blocks.mlp import MLP, MLPConfig
from paged_attn_layer._src.blocks.router import Choice, Router, RouterConfig


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


class MoE(nnx.Module):
    """A mixture of experts as `MoEConfig` writes it: `router`, `experts`, and `shared` if there is a shared one."""

    def __init__(self, config: MoEConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.router = Router(config.hidden_size, config.router, param_dtype=param_dtype, rngs=rngs)
        self.experts = Experts(config.router.num_experts, config.expert, param_dtype=param_dtype, rngs=rngs)
        if config.shared is not None:
            self.shared = MLP(config.shared, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """The output for each row."""
        rows = x.reshape(-1, self.config.hidden_size)
        out = self.experts(rows, self.router(rows)).reshape(x.shape)
        return out if self.config.shared is None else out + self.shared(x)


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

    def __call__(self, x: Float[Array, "rows hidden"], choice: Choice) -> Float[Array, "rows hidden"]:
        """The weighted sum of what each row's experts give."""
        experts = choice.experts.reshape(-1)
        order = jnp.argsort(experts)  # pairs of a row and one of its experts, those of expert 0 first
        sizes = jnp.bincount(experts, length=self.gate_proj.shape[0]).astype(jnp.int32)
        by_expert = self._mlp(x[order // choice.experts.shape[1]], experts[order], sizes)
        each = jnp.zeros_like(by_expert).at[order].set(by_expert).reshape(*choice.experts.shape, -1)
        return (each.astype(jnp.float32) * choice.weights[..., None]).sum(1).astype(x.dtype)

    def _mlp(self, x: Array, experts: Int32[Array, "*pairs"], sizes: Int32[Array, "*experts"]) -> Array:
        """The MLP of each row's expert; rows of one expert are together."""
        gate, up = grouped_dot(x, self.gate_proj[...], sizes), grouped_dot(x, self.up_proj[...], sizes)
        if self.config.use_bias:
            gate, up = gate + self.gate_bias[...][experts], up + self.up_bias[...][experts]
        out = grouped_dot(self.config.activate(up, gate), self.down_proj[...], sizes)
        return out + self.down_bias[...][experts] if self.config.use_bias else out
