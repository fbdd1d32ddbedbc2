"""The mask family: new parameters are fresh and fade in. After MSG (arXiv 2305.02869), the growth of FLM-101B.

MSG puts growth masks into the layers. flmjax masks the parameters, and the model code has no masks. At openness c a new
entry is (1 - c) x (its value in the zero family) + c x (its stored value). At c = 0 the model is the zero family's,
exact for any fresh parameters; at c = 1 the stored parameters are used unchanged. For 0 < c < 1 an RMSNorm computes
MSG's masked mean square with the mask c^2; a LayerNorm also subtracts the old entries' mean from the new entries.
"""

from flmjax.growth import zero
from flmjax.growth.rules import AxisRule, Dimension, Rule, at_the_end
from flmjax.model.mup import logit_growth
from flmjax.sharding.axes import LeafAxes


def keep(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Rule of every axis: old entries unchanged, new entries fresh. The last norm takes back muP's logit factor."""
    width = logit_growth(d.old, d.new)
    return Rule("fresh", width if role.startswith("output_") else 1.0)


AXES = {name: AxisRule(at_the_end, keep) for name in zero.AXES}
