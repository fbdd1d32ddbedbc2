"""Number of parameters and FLOPs per training token, computed from the configuration without JAX.

Notation (FLOPs is a count, FLOP/s a rate):
    N layers, D embed_dim, H heads, G key/value heads, K head_dim, F mlp_dim, V true vocabulary, L length of a sequence
    M       parameters of one layer's matrices = 2 D H K + 2 D G K + 2 D F (SwiGLU: 3 D F)
    P       parameters that a token is multiplied with = N M + V D
    FLOPs of a token, forward and backward = 6 P + 6 N H K L

Example: N = 2, D = 6, H = 4, G = 2, K = 3, F = 5, V = 11, L = 10. M = 144 + 72 + 60 = 276, P = 552 + 66 = 618, and a
token takes 6 x 618 + 6 x 2 x 4 x 3 x 10 = 3,708 + 1,440 = 5,148 FLOPs.
"""

from flmjax.config import ConfigError, ModelConfig

FLOPS_CONVENTION = (
    "Model FLOPs, forward and backward: 6 per token and parameter in a matrix multiplication (output head once, true "
    "vocabulary; no embedding lookup, no recomputation) + attention products QK^T and AV, half of the square (causal)."
)


def block_matrices(config: ModelConfig) -> int:
    """Parameters of one layer's matrices: projections and MLP; 12 embed_dim^2 in GPT's shape."""
    query_and_output = 2 * config.embed_dim * config.num_heads * config.head_dim
    key_and_value = 2 * config.embed_dim * config.kv_heads * config.head_dim
    mlp = (3 if config.activation == "swiglu" else 2) * config.embed_dim * config.mlp_dim
    return query_and_output + key_and_value + mlp


def num_parameters(config: ModelConfig) -> int:
    """All parameters, padding of the vocabulary included; equal to count_parameters of the parameter tree."""
    norm = config.embed_dim * (2 if config.norm == "layernorm" and config.bias else 1)
    biases = (config.num_heads + 2 * config.kv_heads) * config.head_dim + 2 * config.embed_dim
    biases += (2 if config.activation == "swiglu" else 1) * config.mlp_dim
    layer = block_matrices(config) + 2 * norm + (biases if config.bias else 0)
    tables = config.padded_vocab_size * (1 if config.tied_embedding else 2)
    tables += config.max_length if not config.is_rotary else 0
    return config.num_layers * layer + norm + tables * config.embed_dim


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with: matrices of the layers and the output head once, tied or not.

    Neither biases, norms, embedding lookup and positions nor the padded rows of the vocabulary are counted.

    Raises:
        ConfigError: without a vocabulary size.
    """
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size is None; FLOPs need the tokenizer's")
    return config.num_layers * block_matrices(config) + config.vocab_size * config.embed_dim


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of one training token in sequences of `length` tokens, by FLOPS_CONVENTION.

    A multiplication with P parameters takes 2 P FLOPs forward and twice that backward (for the gradients of the input
    and of the parameters): 6 P. One query against s keys takes 2 s H K for QK^T and 2 s H K for AV. In a causal
    sequence s is L / 2 in the mean (half of the L x L square), so N layers take N * 4 (L / 2) H K = 2 N H K L forward
    and 6 N H K L in all.

    Raises:
        ConfigError: without a vocabulary size.
    """
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * length
    return float(6 * matmul_parameters(config) + attention)
