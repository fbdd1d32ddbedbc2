"""Parameters, and floating-point operations of a training token, from the configuration alone: no JAX."""

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
    """All parameters, padding of the vocabulary included; what count_parameters finds in the tree."""
    norm = config.embed_dim * (2 if config.norm == "layernorm" and config.bias else 1)
    biases = (config.num_heads + 2 * config.kv_heads) * config.head_dim + 2 * config.embed_dim
    biases += (2 if config.activation == "swiglu" else 1) * config.mlp_dim
    layer = block_matrices(config) + 2 * norm + (biases if config.bias else 0)
    tables = config.padded_vocab_size * (1 if config.tied_embedding else 2)
    tables += config.max_length if config.position == "learned" else 0
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
    """Model FLOPs of one training token in rows of `length` tokens, by FLOPS_CONVENTION.

    A multiplication with P parameters takes 2 P forward and twice that backward (for the input's gradient and for the
    parameters'): 6 P. One query against s keys takes 2 s H K for QK^T and 2 s H K for AV. Over a causal row s is L / 2
    in the mean (half of the L x L square), so N layers take N * 4 (L / 2) H K = 2 N H K L forward and 6 N H K L in all.

    Raises:
        ConfigError: without a vocabulary size.
    """
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * length
    return float(6 * matmul_parameters(config) + attention)
