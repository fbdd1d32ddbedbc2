"""Growth keeps the function: in float64 against the NumPy model, with random, non-trivial leaves everywhere."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import random_batch, random_params, with_fields
from growth_cases import (
    ALL,
    BLOCKS,
    EXACT,
    GROUPED,
    KEY,
    LLAMA,
    SMALL,
    error_in_roundings,
    grow64,
    growth_error,
    logit_error,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flmjax.config import GrowthConfig, resize
from flmjax.growth.grow import grow_params
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import masked

AXES = {
    "embed": ({}, {"embed_dim": 37}),
    "embed_doubled": ({}, {"embed_dim": 48}),
    "mlp": ({}, {"mlp_dim": 41}),
    "heads": ({"num_kv_heads": None}, {"num_heads": 7}),
    "head_dim": ({}, {"head_dim": 10}),
    "layers": ({}, {"num_layers": 5}),
    "vocab": ({}, {"vocab_size": 77}),
    "length": ({}, {"max_length": 13}),
    "query_heads_of_each_group": (GROUPED, {"num_heads": 6, "num_kv_heads": 2}),
    "groups": (GROUPED, {"num_heads": 6, "num_kv_heads": 3}),
    "groups_split": ({"num_heads": 4, "num_kv_heads": 1}, {"num_heads": 6, "num_kv_heads": 3}),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("block", ["gpt_xpos_tied", "gpt_learned_untied", "llama"])
@pytest.mark.parametrize("family", EXACT)
def test_growth_of_an_axis_is_exact(family, block, axis):
    start, sizes = AXES[axis]
    assert growth_error(with_fields(SMALL, **BLOCKS[block] | start), family, sizes) <= 1e-12


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("family", EXACT)
def test_growth_of_all_axes_at_once_is_exact(family, block):
    old = with_fields(SMALL, **BLOCKS[block])
    groups = {"num_kv_heads": 3} if old.num_kv_heads else {}
    assert growth_error(old, family, ALL | groups) <= 1e-12


@settings(max_examples=16, deadline=None)
@example("duplicate", "gpt_xpos_tied", (1, 2, 1, 1, 1), (0, 1, 1, 0, 2))
@given(
    st.sampled_from(EXACT),
    st.sampled_from(sorted(BLOCKS)),
    st.tuples(*[st.integers(1, 13)] * 5),
    st.tuples(*[st.integers(0, 26)] * 5),
)
def test_growth_is_exact_at_any_size(family, block, sizes, steps):
    names = ("num_layers", "embed_dim", "num_heads", "mlp_dim", "head_dim")
    even = [(a, b) if name != "head_dim" else (2 * a, 2 * b) for name, a, b in zip(names, sizes, steps, strict=True)]
    small = dict(zip(names, (a for a, _ in even), strict=True))
    old = with_fields(SMALL, **BLOCKS[block] | small | {"vocab_size": 13, "num_kv_heads": None})
    large = {n: a + min(b, 2 * a) for n, (a, b) in zip(names, even, strict=True)}
    assert error_in_roundings(old, family, large) <= 64


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(EXACT), *[st.integers(1, 4)] * 3, *[st.integers(0, 5)] * 2)
def test_groups_of_heads_grow_exactly_at_any_size(family, groups, per_part, parts, more_groups, more_heads):
    old = with_fields(SMALL, **LLAMA, num_kv_heads=groups, num_heads=groups * per_part * parts, vocab_size=13)
    grown_groups, heads = groups * parts + more_groups, per_part + more_heads
    assert growth_error(old, family, {"num_kv_heads": grown_groups, "num_heads": grown_groups * heads}) <= 1e-12


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("block", ["gpt_xpos_tied", "llama"])
def test_growth_in_steps_keeps_the_function_in_any_order(block, family):
    old = with_fields(SMALL, **BLOCKS[block])
    params = random_params(old, spread=0.3)
    sizes = {"embed_dim": 48, "num_layers": 3, "head_dim": 12, "mlp_dim": 33}
    for order in (tuple(sizes), tuple(reversed(sizes))):
        config, grown = old, params
        for name in order:
            larger = resize(config, family, **{name: sizes[name]})
            grown = grow64(grown, config, larger, family)
            config = larger
        assert logit_error(params, grown, old, config) <= 1e-12


def test_growth_holds_at_every_length():
    """Lengths 1, 2, odd, full: xPos's centre moves with max_length, which scores must not show."""
    for family in EXACT:
        new = resize(SMALL, family, head_dim=8, embed_dim=29, max_length=12)
        params = random_params(SMALL, spread=0.3)
        grown = grow64(params, SMALL, new, family)
        for length in (1, 2, 5, 8):
            tokens = random_batch(with_fields(SMALL, max_length=length), rows=2)["tokens"]
            before, after = reference.logits(params, SMALL, tokens), reference.logits(grown, new, tokens)
            assert np.abs(before - after)[..., :61].max() <= 1e-12 * np.abs(before).max()


def test_copies_are_the_same_in_both_precisions():
    """The proof in float64 is about the float32 growth that a run makes: both draw the same shares of copies."""
    new = resize(SMALL, "duplicate", mlp_dim=58, embed_dim=48)
    params, operator = random_params(SMALL), GrowthConfig("duplicate")
    single = jax.jit(lambda p: grow_params(p, Growth(SMALL, new, operator, KEY)))(params)
    chex.assert_trees_all_close(single, grow64(params, SMALL, new, "duplicate"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("block", ["gpt_xpos_tied", "llama", "mup_tied"])
def test_an_open_mask_is_no_mask(block):
    old = with_fields(SMALL, **BLOCKS[block])
    new = resize(old, "mask", **ALL | ({"num_kv_heads": 3} if old.num_kv_heads else {}))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(new, spread=0.3))
        opened, half = (
            jax.tree.map(np.asarray, masked(params, Growth(old, new, GrowthConfig("mask")), c)) for c in (1.0, 0.5)
        )
    assert logit_error(params, opened, new, new) <= 1e-12
    assert logit_error(params, half, new, new) > 1e-3
