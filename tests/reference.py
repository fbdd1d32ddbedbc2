"""The model in float64 NumPy, written from its equations: the oracle that the JAX model is compared with.

It shares no code with flmjax.model and imports no JAX. Nothing is fused and heads are a plain loop. Names carry shapes:
B batch, L length, D embed, F mlp, H query heads, G key-value heads, K head_dim, V padded vocabulary, N layers.
"""

import dataclasses
import math

import numpy as np

from flmjax.config import ModelConfig


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter as path -> shape; a tree with more or fewer leaves is not this model."""
    N, D, F, K = config.num_layers, config.embed_dim, config.mlp_dim, config.head_dim
    H, G, V = config.num_heads, config.kv_heads, config.padded_vocab_size
    linears = {"query": ((D,), (H, K)), "key": ((D,), (G, K)), "value": ((D,), (G, K)), "output": ((H, K), (D,))}
    linears = {f"attention.{name}": sizes for name, sizes in linears.items()}
    linears |= {f"mlp.{name}": ((D,), (F,)) for name in (("up", "gate") if config.activation == "swiglu" else ("up",))}
    linears["mlp.down"] = ((F,), (D,))

    out: dict[str, tuple[int, ...]] = {"embedding": (V, D)}
    if not config.is_rotary:
        out["positions"] = (config.max_length, D)
    for name, (inputs, outputs) in linears.items():
        out[f"layers.{name}.kernel"] = (N, *inputs, *outputs)
        if config.bias:
            out[f"layers.{name}.bias"] = (N, *outputs)
    for name, stack in (("layers.attention_norm", (N,)), ("layers.mlp_norm", (N,)), ("final_norm", ())):
        out[f"{name}.scale"] = (*stack, D)
        if config.bias and config.norm == "layernorm":
            out[f"{name}.bias"] = (*stack, D)
    if not config.tied_embedding:
        out["head"] = (D, V)
    return out


def flatten(params: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dicts -> path -> array, in float64."""
    out: dict[str, np.ndarray] = {}
    for name, value in params.items():
        nested = isinstance(value, dict)
        out |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: np.asarray(value, np.float64)}
    return out


def nest(leaves: dict[str, np.ndarray]) -> dict:
    """Inverse of flatten."""
    out: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return out


def norm(x_BLD: np.ndarray, params: dict, config: ModelConfig) -> np.ndarray:
    """LayerNorm (x - mean) / sqrt(var + eps), population variance; RMSNorm x / sqrt(mean(x^2) + eps)."""
    if config.norm == "layernorm":
        x_BLD = x_BLD - x_BLD.mean(-1, keepdims=True)  # mean(x^2) is now the variance
    y_BLD = x_BLD / np.sqrt((x_BLD**2).mean(-1, keepdims=True) + config.norm_eps) * params["scale"]
    return y_BLD + params["bias"] if "bias" in params else y_BLD


def linear(x: np.ndarray, params: dict, contracted: int = 1) -> np.ndarray:
    """X @ kernel + bias over the last `contracted` axes of x."""
    y = np.tensordot(x, params["kernel"], contracted)
    return y + params["bias"] if "bias" in params else y


def rotary(x_BLHK: np.ndarray, positions_BL: np.ndarray, config: ModelConfig, sign: int) -> np.ndarray:
    """Each pair (x[2j], x[2j+1]) is a complex number that turns by position * theta^(-2j/K).

    xPos also multiplies it by zeta_j^(sign * (position - max_length // 2) / scale_base), sign +1 for queries and -1 for
    keys, zeta_j = (2j + 0.4 K) / (1.4 K) (Sun et al. 2022, arXiv 2212.10554, in torchscale's convention).
    Of a head that has grown, K is the size before; the pairs after it repeat the first ones or are left alone.
    """
    K = config.rotary_dim or x_BLHK.shape[-1]
    if x_BLHK.shape[-1] > K:
        first = dataclasses.replace(config, rotary_dim=None)
        parts = [x_BLHK[..., start : start + K] for start in range(0, x_BLHK.shape[-1], K)]
        padded = [np.concatenate([part, np.zeros((*part.shape[:-1], K - part.shape[-1]))], -1) for part in parts]
        turned = [rotary(part, positions_BL, first, sign) for part in padded]
        rest = turned[1:] if config.rotary_repeat else padded[1:]
        return np.concatenate([turned[0], *rest], -1)[..., : x_BLHK.shape[-1]]
    even = np.arange(0, K, 2)
    position = positions_BL[:, :, None, None].astype(np.float64)
    pairs = (x_BLHK[..., 0::2] + 1j * x_BLHK[..., 1::2]) * np.exp(1j * position * config.rope_theta ** (-even / K))
    if config.position == "xpos":
        zeta = (even + 0.4 * K) / (1.4 * K)
        pairs *= zeta ** (sign * (position - config.max_length // 2) / config.xpos_scale_base)
    return np.stack([pairs.real, pairs.imag], -1).reshape(x_BLHK.shape)


def attention(
    x_BLD: np.ndarray, params: dict, config: ModelConfig, positions_BL: np.ndarray, segment_ids_BL: np.ndarray
) -> np.ndarray:
    """softmax(q k / sqrt(K)) v over this and earlier places of one segment; query head h reads kv head h // (H/G)."""
    q_BLHK, k_BLGK, v_BLGK = (linear(x_BLD, params[name]) for name in ("query", "key", "value"))
    if config.is_rotary:
        q_BLHK = rotary(q_BLHK, positions_BL, config, sign=1)
        k_BLGK = rotary(k_BLGK, positions_BL, config, sign=-1)
    place = np.arange(x_BLD.shape[1])
    allowed_BLL = (segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]) & (place[:, None] >= place)
    out_BLHK = np.empty_like(q_BLHK)
    for h in range(config.num_heads):
        g = h // (config.num_heads // config.kv_heads)
        scores_BLL = q_BLHK[:, :, h] @ k_BLGK[:, :, g].swapaxes(1, 2) / math.sqrt(config.head_dim)
        scores_BLL = np.where(allowed_BLL, scores_BLL, -np.inf)
        weights_BLL = np.exp(
            scores_BLL - scores_BLL.max(-1, keepdims=True)
        )  # a place always sees itself: max is finite
        out_BLHK[:, :, h] = weights_BLL / weights_BLL.sum(-1, keepdims=True) @ v_BLGK[:, :, g]
    return linear(out_BLHK, params["output"], contracted=2)


def mlp(x_BLD: np.ndarray, params: dict, config: ModelConfig) -> np.ndarray:
    """down(activation(up(x))), or down(silu(gate(x)) * up(x)) for swiglu."""
    up_BLF = linear(x_BLD, params["up"])
    if config.activation == "swiglu":
        gate_BLF = linear(x_BLD, params["gate"])
        hidden_BLF = gate_BLF / (1 + np.exp(-gate_BLF)) * up_BLF
    elif config.activation == "gelu":
        hidden_BLF = up_BLF * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(up_BLF / math.sqrt(2)))
    else:
        assert config.activation == "gelu_tanh", config.activation
        hidden_BLF = up_BLF * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (up_BLF + 0.044715 * up_BLF**3)))
    return linear(hidden_BLF, params["down"])


def block(
    x_BLD: np.ndarray, params: dict, config: ModelConfig, positions_BL: np.ndarray, segment_ids_BL: np.ndarray
) -> np.ndarray:
    """One pre-norm layer; `params` holds the leaves of this layer only."""
    normed_BLD = norm(x_BLD, params["attention_norm"], config)
    x_BLD = x_BLD + attention(normed_BLD, params["attention"], config, positions_BL, segment_ids_BL)
    return x_BLD + mlp(norm(x_BLD, params["mlp_norm"], config), params["mlp"], config)


def logits(
    params: dict,
    config: ModelConfig,
    tokens: np.ndarray,
    segment_ids: np.ndarray | None = None,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Float64 logits (B, L, V) of tokens (B, L), those of padded ids included; without dropout.

    Raises:
        ValueError: when the leaves of `params` or their shapes are not those of `config`.
    """
    leaves, expected = flatten(params), shapes(config)
    wrong = [
        f"{path}: {leaves[path].shape if path in leaves else None}, expected {expected.get(path)}"
        for path in sorted(leaves.keys() | expected.keys())
        if path not in leaves or leaves[path].shape != expected.get(path)
    ]
    if wrong:
        raise ValueError(f"parameters are not those of the config: {'; '.join(wrong)}")
    positions_BL = np.broadcast_to(np.arange(tokens.shape[1]) if positions is None else positions, tokens.shape)
    segment_ids_BL = np.zeros_like(tokens) if segment_ids is None else segment_ids

    params = nest(leaves)
    x_BLD = config.embedding_multiplier * params["embedding"][tokens]
    if not config.is_rotary:
        x_BLD = x_BLD + params["positions"][positions_BL]
    for n in range(config.num_layers):
        layer = nest({path: leaf[n] for path, leaf in flatten(params["layers"]).items()})
        x_BLD = block(x_BLD, layer, config, positions_BL, segment_ids_BL)
    x_BLD = norm(x_BLD, params["final_norm"], config)
    head_DV = params["embedding"].T if config.tied_embedding else params["head"]
    width = config.embed_dim / (config.base_embed_dim or config.embed_dim)  # muP divides logits by it
    return config.output_multiplier / config.softmax_temperature / width * (x_BLD @ head_DV)


def loss(params: dict, config: ModelConfig, batch: dict[str, np.ndarray]) -> tuple[float, float]:
    """(sum of weight * cross-entropy in nats, sum of weights); padded ids take no part in the softmax.

    `batch` holds tokens, targets and weights (B, L), and may hold segment_ids and positions (B, L).
    """
    z_BLV = logits(params, config, batch["tokens"], batch.get("segment_ids"), batch.get("positions"))
    z_BLV = z_BLV[..., : config.vocab_size]
    top_BL = z_BLV.max(-1)
    log_sum_BL = top_BL + np.log(np.exp(z_BLV - top_BL[..., None]).sum(-1))
    target_BL = np.take_along_axis(z_BLV, batch["targets"][..., None], -1)[..., 0]
    weights_BL = batch["weights"].astype(np.float64)
    return float((weights_BL * (log_sum_BL - target_BL)).sum()), float(weights_BL.sum())
