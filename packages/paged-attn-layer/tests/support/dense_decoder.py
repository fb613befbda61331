"""The equations of a Llama-family decoder in float64 numpy, on one whole sequence: no pages, no jax."""

import numpy as np
from dense import attention


def dense_logits(model, tokens):
    """The logits after each token, `[tokens, vocab]`, from the model's weights."""
    config = model.config
    x = _weight(model.embed.embedding)[list(tokens)]
    for index, layer in enumerate(model.layers):
        n, each, sizes = _norm(x, layer.attention_norm), layer.attention, config.layers[index].attention
        q, k, v = (_apply(n, p).reshape(len(n), -1, sizes.head_dim) for p in (each.q_proj, each.k_proj, each.v_proj))
        out = attention(_turned(q, sizes.rope), _turned(k, sizes.rope), v, sliding_window=sizes.sliding_window)
        x = x + _apply(out.reshape(len(x), -1), each.o_proj)
        n, mlp = _norm(x, layer.mlp_norm), layer.mlp
        gate = _apply(n, mlp.gate_proj)
        x = x + _apply(gate / (1 + np.exp(-gate)) * _apply(n, mlp.up_proj), mlp.down_proj)
    head = model.embed.embedding if config.tie_word_embeddings else model.lm_head
    return _norm(x, model.norm) @ _weight(head).T


def dense_answer(model, prompt, max_new_tokens):
    """The greedy answer: each token from all tokens before it, computed anew."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(dense_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def _weight(param):
    return np.asarray(param[...], np.float64)


def _norm(x, module):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + module.config.eps) * _weight(module.scale)


def _apply(x, module):
    y = x @ _weight(module.kernel)
    return y if module.bias is None else y + _weight(module.bias)


def _turned(x, rope):
    """The pairs of each head as complex numbers, turned by their positions (plain rotary embedding)."""
    assert rope.rope_type == "default"
    half = x.shape[-1] // 2
    turn = np.arange(len(x))[:, None] * rope.theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turn)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)
