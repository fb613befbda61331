"""The equations of a decoder in float64 numpy, on one whole sequence: no pages, no jax."""

import math

import numpy as np
from dense import attention

_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def dense_logits(model, tokens):
    """The logits after each token, `[tokens, vocab]`, from the model's weights."""
    config, tokens = model.config, list(tokens)
    x = _weight(model.embed.embedding)[tokens] * config.embed_scale
    if config.learned_positions:
        x = x + _weight(model.position_embed.embedding)[: len(tokens)]
    inputs, shared, keys = _per_layer_inputs(model, tokens, x), dict(config.shared_layers), {}
    for index, layer in enumerate(model.layers):
        x, keys[index] = _layer(layer, x, keys.get(shared.get(index)))
        if inputs is not None:
            own = layer.per_layer_input
            gate = ACTIVATIONS[own.config.activation](_apply(x, own.gate_proj))
            x = x + _norm(_apply(gate * inputs[:, index], own.out_proj), own.norm)
        if layer.config.has_scalar:
            x = x * _weight(layer.scalar)
    head = model.embed.embedding if config.tie_word_embeddings else model.lm_head
    logits = _norm(x, model.norm) @ _weight(head).T * config.logit_scale
    cap = config.logit_soft_cap
    return logits if cap is None else cap * np.tanh(logits / cap)


def dense_answer(model, prompt, max_new_tokens):
    """The greedy answer: each token from all tokens before it, computed anew."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(dense_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def _layer(layer, x, keys):
    """The rows after attention and MLP, and the keys and values that a later layer may read."""
    r, before = layer.config.residual_multiplier, _norm(x, layer.attention_norm)
    out, keys = _attention(layer.attention, before, keys)
    x = x + r * _norm(out, layer.attention_post_norm)
    if not layer.config.parallel:
        before = _norm(x, layer.mlp_norm)
    return x + r * _norm(_mlp(layer.mlp, before), layer.mlp_post_norm), keys


def _attention(module, x, keys):
    config, n = module.config, len(x)

    def heads(y, norm):
        if config.qk_norm_over == "projection":
            y = _norm(y, norm)
        y = y.reshape(n, -1, config.head_dim)
        return _turned(_norm(y, norm) if config.qk_norm_over == "head" else y, config.rope)

    q = heads(_apply(x, module.q_proj), module.q_norm)
    if config.query_growth is not None:
        steps = np.arange(n) // config.query_growth.tokens
        q = q * (1 + config.query_growth.beta * np.log(1 + steps))[:, None, None]
    if config.stores_kv:
        k = _apply(x, module.k_proj)
        v = k if config.values_are_keys else _apply(x, module.v_proj)
        keys = heads(k, module.k_norm), _norm(v.reshape(n, -1, config.head_dim), module.v_norm)
    options = {"scale": config.softmax_scale, "soft_cap": config.soft_cap, "sliding_window": config.sliding_window}
    out = attention(q, *keys, **options, sinks=module.sinks[...] if config.sinks else None)
    return _apply(out.reshape(n, -1), module.o_proj), keys


def _mlp(module, x):
    act, up = ACTIVATIONS[module.config.activation], _apply(x, module.up_proj)
    return _apply(act(_apply(x, module.gate_proj)) * up if module.config.gated else act(up), module.down_proj)


def _per_layer_inputs(model, tokens, x):
    """`[tokens, layers, size]`, or `None`."""
    if model.config.per_layer_input is None:
        return None
    module, size = model.per_layer_inputs, model.config.per_layer_input.size
    projected = _norm((_apply(x, module.proj) / math.sqrt(x.shape[1])).reshape(len(x), -1, size), module.norm)
    of_tokens = _weight(module.embed.embedding)[tokens].reshape(projected.shape)
    return (projected + math.sqrt(size) * of_tokens) / math.sqrt(2)


def _weight(param):
    return np.asarray(param[...], np.float64)


def _norm(x, module):
    if module is None:
        return x
    if module.config.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + module.config.eps)
    if module.config.use_scale:
        x = x * (_weight(module.scale) + module.config.offset)
    return x + _weight(module.bias) if module.config.use_bias else x


def _apply(x, module):
    y = x @ _weight(module.kernel)
    return y if module.bias is None else y + _weight(module.bias)


def _turned(x, rope):
    """The pairs of each head as complex numbers, turned by their positions (plain rotary embedding)."""
    if rope is None:
        return x
    assert rope.rope_type == "default"
    part, rest = x[..., : rope.rotary_dim or x.shape[-1]], x[..., rope.rotary_dim or x.shape[-1] :]
    half = part.shape[-1] // 2
    a, b = (part[..., ::2], part[..., 1::2]) if rope.interleaved else (part[..., :half], part[..., half:])
    turn = np.arange(len(x))[:, None] * rope.theta ** (-np.arange(half) / half)
    z = (a + 1j * b) * np.exp(1j * turn)[:, None] * rope.attention_factor
    turned = (
        np.stack([z.real, z.imag], -1).reshape(part.shape)
        if rope.interleaved
        else np.concatenate([z.real, z.imag], axis=-1)
    )
    return np.concatenate([turned, rest], axis=-1)
