"""Models, growths and comparisons that several tests of growth use."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import reference
from conftest import TINY, random_batch, random_params, with_fields

from flmjax.config import GrowthConfig, OptimizerConfig, resize
from flmjax.growth import families
from flmjax.growth.certificate import GrowthPoint, certify
from flmjax.growth.grow import grow_params
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import masked
from flmjax.growth.rules import AxisRule
from flmjax.model.transformer import abstract_params
from flmjax.optimizer.adam import AdamState
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import jit_train_step

# The model before growth.
SMALL = with_fields(TINY, embed_dim=24, num_heads=4, head_dim=6, mlp_dim=29, max_length=8, norm_eps=1e-2)
LLAMA = {"norm": "rmsnorm", "tied_embedding": False, "activation": "swiglu", "bias": False, "position": "rope"}
GROUPED = {"num_heads": 4, "num_kv_heads": 2}
BLOCKS = {
    "gpt_xpos_tied": {},
    "gpt_learned_untied": {"tied_embedding": False, "position": "learned"},
    "rmsnorm_rope_tied": {"norm": "rmsnorm", "position": "rope", "bias": False},
    "rmsnorm_biased": {"norm": "rmsnorm", "tied_embedding": False},
    "llama": LLAMA | GROUPED,
    "teleflm": LLAMA
    | {"embedding_multiplier": 1.7, "output_multiplier": 0.3, "softmax_temperature": 1.3, "base_embed_dim": 12},
    "mup_tied": {"base_embed_dim": 8},
}
ALL = {"embed_dim": 53, "mlp_dim": 31, "num_heads": 9, "head_dim": 14, "num_layers": 3, "vocab_size": 70}
EXACT = ("zero", "duplicate", "mask")
KEY = jax.random.key(9)


def grow64(params, old, new, family="zero", **fields):
    """Grown parameters in float64; for the mask family those under the closed mask, with which training starts."""
    operator = GrowthConfig(family, **fields)

    def grown(params):
        grown = grow_params(params, Growth(old, new, operator, KEY))
        return masked(grown, Growth(old, new, GrowthConfig("mask")), 0.0) if family == "mask" else grown

    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        return jax.tree.map(np.asarray, jax.jit(grown)(double))


def logit_error(params, grown, old, new, rows=2):
    """max |difference| of both models' logits over max |logit|, by the float64 reference."""
    tokens = random_batch(old, rows)["tokens"]
    before, after = reference.logits(params, old, tokens), reference.logits(grown, new, tokens)
    real = np.s_[..., : old.vocab_size]
    return np.abs(before[real] - after[real]).max() / np.abs(before[real]).max()


def growth_error(old, family, sizes, **fields):
    """`logit_error` of growing a random model to `sizes`."""
    new = resize(old, family, **sizes)
    params = random_params(old, spread=0.3)
    grown = grow64(params, old, new, family, **fields)
    chex.assert_trees_all_equal_shapes(grown, abstract_params(new)[0])
    return logit_error(params, grown, old, new)


def error_in_roundings(old, family, sizes):
    """`growth_error` in units of the rounding that either model's own logits have.

    The unit is how far the logits move when every parameter moves by one relative rounding, up or down. A LayerNorm
    over one or two channels, for example, amplifies roundings a thousandfold, in a model that never grew too.
    """
    new = resize(old, family, **sizes)
    params = random_params(old, spread=0.3)
    grown = grow64(params, old, new, family)
    unit = max(rounding_error(params, old), rounding_error(grown, new))
    return logit_error(params, grown, old, new) / unit


def rounding_error(params, config):
    """`logit_error` between a model and itself with every parameter moved by 2^-52 of its value, the largest of two."""

    def moved(seed):
        signs = np.random.default_rng(seed)
        return jax.tree.map(
            lambda x: np.asarray(x, np.float64) * (1 + 2.0**-52 * signs.choice([-1, 1], np.shape(x))), params
        )

    return max(logit_error(params, moved(seed), config, config) for seed in range(2))


def with_rule(family, dim, rule=None, source=None):
    """The table of families, in which `family` has another rule or another source along the axis `dim`."""
    axes = families.FAMILIES[family].axes
    changed = AxisRule(source or axes[dim].source, rule or axes[dim].rule)
    return {**families.FAMILIES, family: families.FAMILIES[family]._replace(axes={**axes, dim: changed})}


def trained_state(config, mesh, steps=20, learning_rate=3e-3, optimizer=None):
    """(spec, training state after `steps` updates on random batches)."""
    spec = state_spec(config, optimizer or OptimizerConfig(), mesh)
    state = init_state(spec, 0)
    step = jit_train_step(spec, 1)
    for i in range(steps):
        state, _ = step(state, random_batch(config, seed=i), np.float32(learning_rate))
    return spec, state


def adam(state):
    """Adam's state in a training state: its moments and the births of weights."""
    return next(s for s in state.opt_state if isinstance(s, AdamState))


def certificate_of(old, new, params, operator, batch=None, **arguments):
    """Certificate of growing `params` at update 5, between stages a and b."""
    growth = Growth(old, new, operator, KEY)
    grown = jax.jit(lambda p: grow_params(p, growth))(params)
    batch = random_batch(old, rows=2) if batch is None else batch
    return certify((params, grown), growth, batch, GrowthPoint(5, "a", "b"), **arguments)
