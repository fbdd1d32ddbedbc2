"""How each kind of parameter scales with width and depth: one table that model, optimizer and growth read.

muP (arXiv 2203.03466) as FLM-101B uses it: m = embed_dim / base_embed_dim is the width multiplier, N the number of
layers, s the configured init_std. What multiplies a matrix is the growth of its fan-in, the axis that it reads: m for
the residual stream, m_H for the heads and m_F for the MLP, which are m unless heads or MLP grew alone. In the standard
parametrisation all are 1.

    kind              init_std             forward                   rate_divisor   weight_decay   eps
    input             s                    embedding_multiplier      1              1              1
    hidden            s / sqrt(m)          1                         m              1              1
    attention_output  s / sqrt(2 N m_H)    1                         m_H            1              1
    mlp_output        s / sqrt(2 N m_F)    1                         m_F            1              1
    output            s                    output_multiplier         1              1              1
                                           / (m softmax_temperature)
    vector            -                    1                         1              0              1

attention_output and mlp_output write to the residual stream, to which each of the 2 N branches adds its variance. A
tied embedding has the row "input"; where it is the output head, its products take the factor of the row "output". The
reference code of muP also starts query matrices at 0; flmjax, like the published FLM recipe, does not.
Example: embed_dim 512 over base_embed_dim 256 is m = 2; a hidden matrix starts with deviation s / 1.414, and a run's
learning rate of 4e-4 is 2e-4 for it.
"""

import math
from typing import Literal, NamedTuple

from flmjax.config import ModelConfig
from flmjax.sharding.axes import LeafAxes

Kind = Literal["input", "hidden", "attention_output", "mlp_output", "output", "vector"]


class Scaling(NamedTuple):
    """A row of the table.

    Attributes:
        init_std: standard deviation of the initial values; 0 for vectors, which start as ones (gains) or zeros.
        forward: factor on the result of the parameter's product or lookup.
        rate_divisor: the run's learning rate is divided by it; a divisor, since 1 / m is rarely a binary number.
        weight_decay: factor on the optimizer's weight decay. A parameter shrinks by the run's learning rate times this,
            not by the divided rate: shrinking does not depend on width.
        eps: factor on Adam's eps.
    """

    init_std: float
    forward: float = 1.0
    rate_divisor: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def scaling_table(config: ModelConfig) -> dict[Kind, Scaling]:
    """Scaling of every kind of parameter in a model."""
    s, m = config.init_std, config.width_multiplier

    def to_residual(m: float) -> Scaling:
        return Scaling(s / math.sqrt(m * (2 * config.num_layers)), rate_divisor=m)

    return {
        "input": Scaling(s, forward=config.embedding_multiplier),
        "hidden": Scaling(s / math.sqrt(m), rate_divisor=m),
        "attention_output": to_residual(config.heads_multiplier),
        "mlp_output": to_residual(config.mlp_multiplier),
        "output": Scaling(s, forward=config.output_multiplier / (config.softmax_temperature * m)),
        "vector": Scaling(0.0, weight_decay=0.0),
    }


def kind_of(leaf: LeafAxes) -> Kind:
    """Kind of a parameter, decided by the roles of its axes."""
    if not leaf.is_matrix:
        return "vector"
    if "index" in leaf.roles:
        return "input"
    if "layers" not in leaf.names:
        return "output"
    if leaf.role("embed") != "write":
        return "hidden"
    return "mlp_output" if leaf.role("mlp") == "read" else "attention_output"


def scaling_of(config: ModelConfig, leaf: LeafAxes) -> Scaling:
    """Scaling of one parameter of a model: the table's row for its kind."""
    return scaling_table(config)[kind_of(leaf)]


def logit_growth(old: ModelConfig, new: ModelConfig) -> float:
    """Factor by which growth from `old` to `new` divides the logits under muP; the last norm's gain takes it back.

    It is the ratio of the width multipliers: growth changes neither the temperature nor the output multiplier.
    """
    return new.width_multiplier / old.width_multiplier
