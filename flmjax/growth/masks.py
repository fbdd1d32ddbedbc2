"""The mask family: new weights are fresh and fade in. After MSG (arXiv 2305.02869), which FLM-101B grew by.

MSG puts masks into the layers. Here parameters are masked, the model knows nothing: at openness c a new entry is
(1 - c) x what the zero family would have put there + c x its own value. So c = 0 is the zero family's function, exact
for any fresh weights, and c = 1 is the plain model, for which the stored parameters are used as they are. In between a
RMSNorm sees MSG's masked mean square, its mask c^2; a LayerNorm also measures the new entries from the old ones' mean.
"""

from flmjax.growth import zero
from flmjax.growth.rules import AxisRule, Dimension, Rule, at_the_end
from flmjax.model.mup import logit_growth
from flmjax.sharding.axes import LeafAxes


def keep(role: str, leaf: LeafAxes, d: Dimension) -> Rule:
    """Old entries as they are, new ones fresh. Only the width that muP divides logits by is taken back for good."""
    width = logit_growth(d.old, d.new)
    return Rule("fresh", width if role.startswith("output_") else 1.0)


AXES = {name: AxisRule(at_the_end, keep) for name in zero.AXES}
