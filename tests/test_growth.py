"""Growth keeps the function: in float64 against the NumPy model, with random, non-trivial leaves everywhere."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import TINY, random_batch, random_params, with_fields
from hypothesis import given, settings
from hypothesis import strategies as st

from flmjax.config import ConfigError, GrowthConfig, OptimizerConfig, resize
from flmjax.growth import certificate, duplicate, families, zero
from flmjax.growth.certificate import GrowthPoint, certify, exactness_failure
from flmjax.growth.grow import grow, grow_params, plan_growth
from flmjax.growth.growth import Growth
from flmjax.growth.learned import expand, first_matrices, fresh_part, tune, tuning_flops
from flmjax.growth.ramp import Ramp, masked, openness
from flmjax.growth.rules import AxisRule, GrowthError, Rule
from flmjax.model.loss import loss_sums
from flmjax.model.transformer import abstract_params
from flmjax.optimizer.adam import FIRST, AdamState
from flmjax.sharding.axes import map_with_axes
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import jit_train_step

GROWN = with_fields(TINY, embed_dim=24, num_heads=4, head_dim=6, mlp_dim=29, max_length=8, norm_eps=1e-2)
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
ALL = {"embed_dim": 53, "mlp_dim": 31, "num_heads": 9, "head_dim": 14, "num_layers": 3, "vocab_size": 70}
EXACT = ("zero", "duplicate", "mask")
KEY = jax.random.key(9)


def grow64(params, old, new, family="zero", **fields):
    """Grown parameters in float64; of the mask family, those that its model computes with at first."""
    operator = GrowthConfig(family, **fields)

    def grown(params):
        grown = grow_params(params, Growth(old, new, operator, KEY))
        return masked(grown, Growth(old, new, GrowthConfig("mask")), 0.0) if family == "mask" else grown

    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        return jax.tree.map(np.asarray, jax.jit(grown)(double))


def error(params, grown, old, new, rows=2):
    """max |difference| of logits over max |logit|, in float64."""
    tokens = random_batch(old, rows)["tokens"]
    before, after = reference.logits(params, old, tokens), reference.logits(grown, new, tokens)
    real = np.s_[..., : old.vocab_size]
    return np.abs(before[real] - after[real]).max() / np.abs(before[real]).max()


def growth_error(old, family, sizes, **fields):
    new = resize(old, family, **sizes)
    params = random_params(old, spread=0.3)
    grown = grow64(params, old, new, family, **fields)
    chex.assert_trees_all_equal_shapes(grown, abstract_params(new)[0])
    return error(params, grown, old, new)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("block", ["gpt_xpos_tied", "gpt_learned_untied", "llama"])
@pytest.mark.parametrize("family", EXACT)
def test_growth_of_an_axis_is_exact(family, block, axis):
    start, sizes = AXES[axis]
    assert growth_error(with_fields(GROWN, **BLOCKS[block] | start), family, sizes) <= 1e-12


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("family", EXACT)
def test_growth_of_all_axes_at_once_is_exact(family, block):
    old = with_fields(GROWN, **BLOCKS[block])
    groups = {"num_kv_heads": 3} if old.num_kv_heads else {}
    assert growth_error(old, family, ALL | groups) <= 1e-12


@settings(max_examples=16, deadline=None)
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
    old = with_fields(GROWN, **BLOCKS[block] | small | {"vocab_size": 13, "num_kv_heads": None})
    large = {n: a + min(b, 2 * a) for n, (a, b) in zip(names, even, strict=True)}
    assert growth_error(old, family, large) <= 1e-12


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(EXACT), *[st.integers(1, 4)] * 3, *[st.integers(0, 5)] * 2)
def test_groups_of_heads_grow_exactly_at_any_size(family, groups, per_part, parts, more_groups, more_heads):
    old = with_fields(GROWN, **LLAMA, num_kv_heads=groups, num_heads=groups * per_part * parts, vocab_size=13)
    grown_groups, heads = groups * parts + more_groups, per_part + more_heads
    assert growth_error(old, family, {"num_kv_heads": grown_groups, "num_heads": grown_groups * heads}) <= 1e-12


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("block", ["gpt_xpos_tied", "llama"])
def test_growth_in_steps_keeps_the_function_in_any_order(block, family):
    old = with_fields(GROWN, **BLOCKS[block])
    params = random_params(old, spread=0.3)
    sizes = {"embed_dim": 48, "num_layers": 3, "head_dim": 12, "mlp_dim": 33}
    for order in (tuple(sizes), tuple(reversed(sizes))):
        config, grown = old, params
        for name in order:
            bigger = resize(config, family, **{name: sizes[name]})
            grown = grow64(grown, config, bigger, family)
            config = bigger
        assert error(params, grown, old, config) <= 1e-12


def test_growth_holds_at_every_length():
    """Lengths 1, 2, odd, full: xPos's centre moves with max_length, which scores must not show."""
    for family in EXACT:
        new = resize(GROWN, family, head_dim=8, embed_dim=29, max_length=12)
        params = random_params(GROWN, spread=0.3)
        grown = grow64(params, GROWN, new, family)
        for length in (1, 2, 5, 8):
            tokens = random_batch(with_fields(GROWN, max_length=length), rows=2)["tokens"]
            before, after = reference.logits(params, GROWN, tokens), reference.logits(grown, new, tokens)
            assert np.abs(before - after)[..., :61].max() <= 1e-12 * np.abs(before).max()


# ---- wrong recipes --------------------------------------------------------------------------------------------------


def with_rule(family, dim, rule=None, source=None):
    """The family with another rule, or another source, on one axis."""
    axes = families.FAMILIES[family].axes
    changed = AxisRule(source or axes[dim].source, rule or axes[dim].rule)
    return {**families.FAMILIES, family: families.FAMILIES[family]._replace(axes={**axes, dim: changed})}


def replaced(rule, **fields):
    """`rule`, but for the roles named: {role: changes}."""
    return lambda role, leaf, g: rule(role, leaf, g)._replace(**fields.get(role, {}))


WRONG = {  # facts: 4d
    "zero pad of an uncentred LayerNorm stream": ("zero", "embed", replaced(zero.embed, write={"fill": "zero"}), {}),
    "fresh writers": ("zero", "embed", replaced(zero.embed, write={"fill": "fresh"}), {}),
    "mean fill without the gain's factor": ("zero", "embed", replaced(zero.embed, scale={"weight": 1.0}), {}),
    "muP: logits divided by the new width": (
        "zero",
        "embed",
        replaced(zero.embed, output_scale={"weight": (24 / 48) ** 0.5}, output_shift={"weight": 1.0}),
        {"base_embed_dim": 8},
    ),
    "readers of new units not 0": ("zero", "mlp", replaced(zero.hidden, read={"fill": "fresh"}), {}),
    "queries not rescaled": ("zero", "head_dim", replaced(zero.head_dim, query={"weight": 1.0}), {}),
    "fresh keys": ("zero", "head_dim", replaced(zero.head_dim, key={"fill": "fresh"}), {}),
    "copied layers called exact": ("zero", "layers", lambda role, leaf, g: Rule("fresh"), {}),
    "copies not shared": ("duplicate", "mlp", lambda role, leaf, g: Rule("fresh"), {}),
    "RMSNorm recipe: copies not divided": ("duplicate", "embed", replaced(duplicate.embed, write={"weight": 1.0}), {}),
    "tied head not divided": ("duplicate", "embed", replaced(duplicate.embed, output_scale={"weight": 1.0}), {}),
}
SIZES = {"embed": {"embed_dim": 48}, "mlp": {"mlp_dim": 40}, "head_dim": {"head_dim": 10}, "layers": {"num_layers": 3}}


@pytest.mark.parametrize("recipe", WRONG)
def test_wrong_recipes_are_found(recipe, monkeypatch):
    family, dim, rule, fields = WRONG[recipe]
    old = with_fields(GROWN, **fields)
    assert growth_error(old, family, SIZES[dim]) <= 1e-12
    monkeypatch.setattr("flmjax.growth.growth.family_of", lambda o: with_rule(family, dim, rule)[o.family])
    assert growth_error(old, family, SIZES[dim]) > 1e-5  # seven orders above what is exact


def test_uneven_copies_under_layernorm_are_found(monkeypatch):
    uneven = with_rule("duplicate", "embed", source=duplicate.cyclic)
    monkeypatch.setattr("flmjax.growth.growth.family_of", lambda o: uneven[o.family])
    assert growth_error(GROWN, "duplicate", {"embed_dim": 37}) > 1e-3
    assert growth_error(with_fields(GROWN, norm="rmsnorm"), "duplicate", {"embed_dim": 37}) <= 1e-12


@pytest.mark.parametrize("wrong", ["eps", "frequencies", "heads appended", "split tiled"])
def test_wrong_configurations_and_orders_of_heads_are_found(wrong):
    old = with_fields(GROWN, **GROUPED)
    sizes = {"embed_dim": 48, "head_dim": 10, "num_heads": 6}
    if wrong == "split tiled":
        sizes |= {"num_kv_heads": 4, "num_heads": 4}
    new = resize(old, **sizes)
    params = random_params(old, spread=0.3)
    grown = grow64(params, old, new)
    assert error(params, grown, old, new) <= 1e-12
    if wrong == "eps":
        new = with_fields(new, norm_eps=old.norm_eps)
    elif wrong == "frequencies":
        new = with_fields(new, rotary_dim=None)
    elif wrong == "heads appended":  # 0 1 | 2 3 -> 0 1 n | 2 3 n is right
        order = [0, 1, 3, 4, 2, 5]
        attention = grown["layers"]["attention"]
        for name, axis in (("query", 2), ("output", 1)):
            attention[name]["kernel"] = np.take(attention[name]["kernel"], order, axis=axis)
        attention["query"]["bias"] = attention["query"]["bias"][:, order]
    else:  # 0 1 -> 0 0 1 1 is right
        for name in ("key", "value"):
            for leaf, axis in (("kernel", 2), ("bias", 1)):
                x = grown["layers"]["attention"][name][leaf]
                grown["layers"]["attention"][name][leaf] = np.take(x, [0, 2, 1, 3], axis=axis)
    assert error(params, grown, old, new) > 1e-3


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["gpt_xpos_tied", "llama", "mup_tied"])
def test_an_open_mask_is_no_mask(block):
    old = with_fields(GROWN, **BLOCKS[block])
    new = resize(old, "mask", **ALL | ({"num_kv_heads": 3} if old.num_kv_heads else {}))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(new, spread=0.3))
        opened, half = (
            jax.tree.map(np.asarray, masked(params, Growth(old, new, GrowthConfig("mask")), c)) for c in (1.0, 0.5)
        )
    assert error(params, opened, new, new) <= 1e-12
    assert error(params, half, new, new) > 1e-3


def test_openness_rises_from_0_to_1():
    linear, cosine = (GrowthConfig("mask", ramp_steps=10, ramp=ramp) for ramp in ("linear", "cosine"))
    for operator in (linear, cosine):
        assert [float(openness(operator, n)) for n in (0, 5, 10, 11)] == pytest.approx([0, 0.5, 1, 1])
    assert float(openness(linear, 2)) == pytest.approx(0.2)
    assert float(openness(cosine, 2)) == pytest.approx((1 - np.cos(np.pi * 0.2)) / 2)


# ---- gradients and moments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["gpt_xpos_tied", "llama", "mup_tied"])
@pytest.mark.parametrize("family", ["zero", "duplicate"])
def test_gradient_pulled_back_through_growth_is_the_old_gradient(family, block):
    """f_new(grow(p)) = f_old(p) for every p, so the chain rule gives back the old gradient, leaf by leaf."""
    old = with_fields(GROWN, **BLOCKS[block], dtype="float64")
    sizes = {"embed_dim": 29, "mlp_dim": 31, "num_heads": 6, "head_dim": 8, "num_layers": 3}
    new = resize(old, family, **sizes)
    batch = random_batch(old)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(old))

        def both(params):
            operator = GrowthConfig(family)
            grown, pull_back = jax.vjp(lambda p: grow_params(p, Growth(old, new, operator, KEY)), params)
            new_gradient = jax.grad(lambda p: loss_sums(p, batch, new)[0])(grown)
            return jax.grad(lambda p: loss_sums(p, batch, old)[0])(params), pull_back(new_gradient)[0]

        expected, found = jax.jit(both)(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "split", "fields", "embed_dim"),
    [
        ("zero", "equal", {"norm": "rmsnorm", "base_embed_dim": 8}, 37),
        ("duplicate", "equal", {"norm": "rmsnorm", "tied_embedding": False}, 37),
        ("duplicate", "equal", {"base_embed_dim": 8}, 48),
        ("duplicate", "unequal", {"norm": "rmsnorm", "tied_embedding": False}, 37),
        ("duplicate", "unequal", {"base_embed_dim": 8}, 48),
        ("duplicate", "unequal", LLAMA | GROUPED, 48),
        ("mask", "equal", {}, 37),
    ],
)
def test_growing_moments_is_training_the_grown_model(family, split, fields, embed_dim):
    """Adam's moments of the grown state, at rate 0: those of old weights and copies are what training would make them.

    Not so of what LayerNorm's mean fills (there the old weights' own gradient changes), and not of what writes unequal
    copies to the residual stream: the part of its gradient that comes through the norm's denominator is equal.
    """
    old = with_fields(GROWN, **fields, dtype="float64")
    sizes = {"embed_dim": embed_dim, "mlp_dim": 41, "num_heads": 6, "head_dim": 12, "num_layers": 3}
    if old.num_kv_heads:
        sizes |= {"num_kv_heads": 3, "num_heads": 9}
    new = resize(old, family, **sizes)
    operator = GrowthConfig(family, split=split)
    batch = random_batch(old)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(old))
        states = {}
        for name, config in (("old", old), ("new", new)):
            axes = abstract_params(config)[1]

            def loss(p, config=config):
                p = masked(p, Growth(old, new, GrowthConfig("mask")), 0.0) if family == "mask" and config is new else p
                return loss_sums(p, batch, config)[0]

            states[name] = (config, axes, loss)

        def moments(name, params):
            _, _, loss = states[name]
            gradient = jax.grad(loss)(params)
            adam = optax.ScaleByAdamState(jnp.ones((), jnp.int32), gradient, jax.tree.map(jnp.square, gradient))
            births = {k: jnp.full(n, FIRST, jnp.int32) for k, n in sizes_of(states[name][0]).items()}
            return AdamState(adam, births, jnp.zeros((), jnp.int32))

        def both(params):
            state = State(params, (moments("old", params),))
            grown = grow(state, Growth(old, new, operator, KEY))
            return grown.opt_state[0].adam, moments("new", grown.params).adam, grown.opt_state[0].births

        grown, trained, births = jax.jit(both)(params)
    compared = 0

    def check(path, leaf, a, b):
        nonlocal compared
        born = functools.reduce(
            np.maximum,
            [
                np.asarray(births[n]).reshape([-1 if j == i else 1 for j in range(a.ndim)])
                for i, n in enumerate(leaf.names)
            ],
        )
        here = np.broadcast_to(born < 0, a.shape)
        if split == "unequal" and leaf.role("embed") == "write":
            return
        compared += here.sum()
        scale = np.abs(b).max()
        np.testing.assert_allclose(
            np.where(here, a, 0), np.where(here, b, 0), rtol=1e-9, atol=1e-10 * scale, err_msg=path
        )
        assert not np.asarray(a)[~here].any(), path

    axes = states["new"][1]
    map_with_axes(check, axes, grown.mu, trained.mu)
    map_with_axes(check, axes, grown.nu, trained.nu)
    assert compared >= (2 if split == "equal" else 1) * sum(x.size for x in jax.tree.leaves(params))


@dataclasses.dataclass
class State:
    """As much of a training state as growth reads."""

    params: object
    opt_state: object

    def replace(self, **fields):
        return dataclasses.replace(self, **fields)


def sizes_of(config):
    from flmjax.sharding.axes import axis_sizes

    return axis_sizes(config)


def trained_state(config, mesh, steps=20, learning_rate=3e-3, optimizer=None):
    spec = state_spec(config, optimizer or OptimizerConfig(), mesh)
    state = init_state(spec, 0)
    step = jit_train_step(spec, 1)
    for i in range(steps):
        state, _ = step(state, random_batch(config, seed=i), np.float32(learning_rate))
    return spec, state


@pytest.fixture(scope="module")
def grown_state(one_device_mesh):
    """A trained state, grown on every axis."""
    old = with_fields(GROWN, norm_eps=1e-5)
    new = resize(old, embed_dim=37, mlp_dim=31, num_heads=6, num_layers=3)
    optimizer = OptimizerConfig(b2=0.999)  # where a new weight's first update would be 3.2 rates
    _, state = trained_state(old, one_device_mesh, optimizer=optimizer)
    grown = jax.jit(lambda s: grow(s, Growth(old, new, GrowthConfig(), jax.random.key(3))))(state)
    return old, new, state, grown, state_spec(new, optimizer, one_device_mesh)


def adam(state):
    return next(s for s in state.opt_state if isinstance(s, AdamState))


def test_moments_grow_by_the_rule_of_their_weights(grown_state):  # case G04
    old, new, state, grown, _ = grown_state
    chex.assert_trees_all_equal_structs(adam(grown).adam.mu, grown.params)
    assert int(adam(grown).adam.count) == int(adam(state).adam.count) == 20
    assert int(grown.step) == 20
    gain = np.sqrt(old.embed_dim / new.embed_dim)

    def check(path, leaf, before, after, power):
        old_part = np.asarray(after)[tuple(slice(0, n) for n in before.shape)]
        factor = gain**-power if leaf.role("embed") in ("scale", "output_scale") else 1.0
        np.testing.assert_allclose(old_part, np.asarray(before) * factor, rtol=1e-6, err_msg=path)
        total = np.abs(np.asarray(after, np.float64)).sum()
        np.testing.assert_allclose(total, np.abs(np.float64(old_part)).sum(), rtol=1e-9, err_msg=path)  # new ones are 0

    axes = abstract_params(old)[1]
    map_with_axes(functools.partial(check, power=1), axes, adam(state).adam.mu, adam(grown).adam.mu)
    map_with_axes(functools.partial(check, power=2), axes, adam(state).adam.nu, adam(grown).adam.nu)


def test_parts_of_a_split_group_share_its_moments(one_device_mesh):
    """Their query heads part, so each key head gets some of the gradient, in expectation an equal share."""
    old = with_fields(GROWN, **LLAMA, num_heads=4, num_kv_heads=1)
    new = resize(old, num_kv_heads=2)
    _, state = trained_state(old, one_device_mesh, steps=2)
    grown = jax.jit(lambda s: grow(s, Growth(old, new, GrowthConfig(), KEY)))(state)
    for name, power in (("mu", 1), ("nu", 2)):
        before, after = (getattr(adam(s).adam, name)["layers"]["attention"]["key"]["kernel"] for s in (state, grown))
        np.testing.assert_allclose(after, np.repeat(before, 2, axis=2) / 2**power, rtol=1e-6)


def test_moments_can_be_forgotten(grown_state):
    old, new, state, _, _ = grown_state
    operator = GrowthConfig(moments="reset")
    grown = jax.jit(lambda s: grow(s, Growth(old, new, operator, KEY)))(state)
    assert not any(x.any() for x in jax.tree.leaves((adam(grown).adam.mu, adam(grown).adam.nu)))
    assert int(adam(grown).reset) == 20
    assert set(np.asarray(adam(grown).births["embed"])) == {FIRST, 20}
    assert set(np.asarray(adam(grown).births["vocab"])) == {FIRST}


def test_births_date_every_axis(grown_state):
    _, _, _, grown, _ = grown_state
    births = adam(grown).births
    for name, (before, after) in {"embed": (24, 37), "mlp": (29, 31), "layers": (2, 3), "heads": (4, 6)}.items():
        np.testing.assert_array_equal(births[name], [-1] * before + [20] * (after - before), err_msg=name)
    assert (np.asarray(births["vocab"]) == -1).all()


@pytest.mark.parametrize("warmup", [0, 10])
def test_first_update_of_new_weights_stays_below_the_learning_rate(grown_state, warmup):
    old, _, _, grown, spec = grown_state
    rate = 1e-3
    before = jax.tree.map(np.asarray, grown.params)
    step = jit_train_step(spec, 1, new_warmup=warmup)
    after, _ = step(jax.tree.map(jnp.copy, grown), random_batch(old, seed=99), np.float32(rate))
    decay = 0.1 * rate

    def check(path, leaf, a, b):
        new = np.ones(a.shape, bool)
        new[tuple(slice(0, n) for n in leaf_shape(old, path))] = False
        if not new.any():
            return
        update = np.abs(np.asarray(b) - a) - decay * np.abs(a) * leaf.is_matrix
        assert update[new].max() <= rate / max(warmup, 1) * 1.001, path
        assert "mlp/down" not in path or update[new].max() >= 0.9 * rate / max(warmup, 1)

    map_with_axes(check, abstract_params(old)[1], before, after.params)


def leaf_shape(config, path):
    return reference.shapes(config)[path.replace("/", ".")]


@pytest.mark.parametrize("family", EXACT)
def test_everything_new_learns_within_three_steps(family, one_device_mesh):  # facts: T4
    """From gradients alone: without decay, which moves whatever is not 0.

    What is new on one axis needs two steps: what reads it must move first. A new dimension of a new head waits for both
    its key and its output; a mask is closed at the first step.
    """
    old = with_fields(GROWN, norm_eps=1e-5)
    new = resize(old, family, embed_dim=37, mlp_dim=31, num_heads=6, head_dim=8, num_layers=3)
    optimizer, operator = OptimizerConfig(weight_decay=0.0), GrowthConfig(family)
    _, state = trained_state(old, one_device_mesh, optimizer=optimizer)
    spec = state_spec(new, optimizer, one_device_mesh)
    state = jax.jit(lambda s: grow(s, Growth(old, new, operator, KEY)), out_shardings=spec.shardings)(state)
    step = jit_train_step(spec, 1, ramp=Ramp(Growth(old, new, operator), 20) if family == "mask" else None)
    before = jax.tree.map(np.asarray, state.params)
    for i in range(3):
        state, _ = step(state, random_batch(old, rows=8, seed=i), np.float32(1e-2))

    def check(path, leaf, a, b):
        if path.endswith("embedding"):  # rows of padded and of unseen ids do not move
            a, b = a[:61], b[:61]
        assert (np.asarray(a) != np.asarray(b)).mean() > 0.95, path

    map_with_axes(check, spec.axes, before, state.params)


def test_only_the_newest_weights_warm_up(one_device_mesh):
    """Two growths: what the first one made keeps its full rate when the second one's weights warm up."""
    old = with_fields(GROWN, norm_eps=1e-5)
    middle, new = resize(old, mlp_dim=35), resize(old, mlp_dim=35, num_layers=3)
    optimizer, rate = OptimizerConfig(weight_decay=0.0, clip_norm=None), 1e-3
    _, state = trained_state(old, one_device_mesh, steps=2, optimizer=optimizer)
    state = jax.jit(lambda s: grow(s, Growth(old, middle, GrowthConfig(), KEY)))(state)
    step = jit_train_step(state_spec(middle, optimizer, one_device_mesh), 1)
    for i in range(3):
        state, _ = step(state, random_batch(old, seed=i), np.float32(rate))
    spec = state_spec(new, optimizer, one_device_mesh)
    state = jax.jit(lambda s: grow(s, Growth(middle, new, GrowthConfig(), KEY)), out_shardings=spec.shardings)(state)
    before = np.asarray(state.params["layers"]["mlp"]["down"]["kernel"])
    state, _ = jit_train_step(spec, 1, new_warmup=1000)(state, random_batch(old, seed=9), np.float32(rate))
    moved = np.abs(np.asarray(state.params["layers"]["mlp"]["down"]["kernel"]) - before)
    assert moved[:2, 29:].max() > 0.3 * rate
    assert 0 < moved[2].max() < 1.01e-3 * rate


@pytest.mark.parametrize("grows", [True, False])
def test_a_reset_ends_the_warm_up_of_earlier_growth(grows, one_device_mesh):
    """After a reset every age starts at 0; only what that growth creates warms up, not what an earlier one created."""
    old = with_fields(GROWN, norm_eps=1e-5)
    middle = resize(old, mlp_dim=35)
    new = resize(middle, num_layers=3) if grows else middle
    optimizer, rate = OptimizerConfig(weight_decay=0.0, clip_norm=None), 1e-3
    _, state = trained_state(old, one_device_mesh, steps=2, optimizer=optimizer)
    state = jax.jit(lambda s: grow(s, Growth(old, middle, GrowthConfig(), KEY)))(state)
    state, _ = jit_train_step(state_spec(middle, optimizer, one_device_mesh), 1)(
        state, random_batch(old), np.float32(rate)
    )
    spec = state_spec(new, optimizer, one_device_mesh)
    reset = GrowthConfig(moments="reset")
    state = jax.jit(lambda s: grow(s, Growth(middle, new, reset, KEY)), out_shardings=spec.shardings)(state)
    before = np.asarray(state.params["layers"]["mlp"]["down"]["kernel"])
    state, _ = jit_train_step(spec, 1, new_warmup=1000)(state, random_batch(old, seed=9), np.float32(rate))
    moved = np.abs(np.asarray(state.params["layers"]["mlp"]["down"]["kernel"]) - before)
    assert moved[:2].max() == pytest.approx(rate, rel=1e-3)  # a first update, at the full rate
    assert moved[:2, 29:].max() == pytest.approx(rate, rel=1e-3)
    assert not grows or 0 < moved[2].max() < 1.01e-3 * rate


def test_copies_are_the_same_in_both_precisions():
    """The proof in float64 is of the growth that was made."""
    new = resize(GROWN, "duplicate", mlp_dim=58, embed_dim=48)
    params, operator = random_params(GROWN), GrowthConfig("duplicate")
    single = jax.jit(lambda p: grow_params(p, Growth(GROWN, new, operator, KEY)))(params)
    chex.assert_trees_all_close(single, grow64(params, GROWN, new, "duplicate"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("split", ["unequal", "equal"])
def test_unequal_copies_part_and_equal_ones_never(split, one_device_mesh):
    old = with_fields(GROWN, norm_eps=1e-5)
    new = resize(old, "duplicate", mlp_dim=58, num_heads=8)
    _, state = trained_state(old, one_device_mesh)
    spec = state_spec(new, OptimizerConfig(), one_device_mesh)
    operator = GrowthConfig("duplicate", split=split)
    state = jax.jit(lambda s: grow(s, Growth(old, new, operator, KEY)), out_shardings=spec.shardings)(state)
    step = jit_train_step(spec, 1)
    for i in range(50):
        state, _ = step(state, random_batch(new, seed=i), np.float32(3e-3))
    up = np.asarray(state.params["layers"]["mlp"]["up"]["kernel"])
    apart = np.abs(up[..., :29] - up[..., 29:]).max() / np.abs(up).max()
    query = np.asarray(state.params["layers"]["attention"]["query"]["kernel"])
    heads_apart = np.abs(query[:, :, :4] - query[:, :, 4:]).max() / np.abs(query).max()
    if split == "equal":
        assert max(apart, heads_apart) < 1e-5
    else:
        assert min(apart, heads_apart) > 1e-2


@pytest.mark.parametrize("family", ["zero", "duplicate"])
def test_loss_does_not_jump_after_growth(family, one_device_mesh):  # case G02
    config = with_fields(GROWN, norm_eps=1e-5)
    rng = np.random.default_rng(0)
    successor = rng.integers(0, 61, (61, 3))  # a language of 61 words, three of which may follow each

    def batch(seed, rows=64):
        rng = np.random.default_rng(seed)
        tokens = np.zeros((rows, config.max_length + 1), np.int32)
        tokens[:, 0] = rng.integers(0, 61, rows)
        for i in range(config.max_length):
            tokens[:, i + 1] = successor[tokens[:, i], rng.integers(0, 3, rows)]
        ones = np.ones((rows, config.max_length), np.float32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones, "bytes": ones[:, 0]}

    held_out = batch(10**6, rows=256)
    spec = state_spec(config, OptimizerConfig(), one_device_mesh)
    state = init_state(spec, 0)
    step = jit_train_step(spec, 1)
    for i in range(300):
        state, _ = step(state, batch(i), np.float32(2e-3))
    weight = held_out["weights"].sum()
    before = float(jax.jit(lambda p: loss_sums(p, held_out, config)[0])(state.params)) / weight
    new = resize(config, family, embed_dim=37, mlp_dim=48, num_heads=6, num_layers=3)
    spec = state_spec(new, OptimizerConfig(), one_device_mesh)
    operator = GrowthConfig(family)
    state = jax.jit(lambda s: grow(s, Growth(config, new, operator, KEY)), out_shardings=spec.shardings)(state)
    step, evaluate = jit_train_step(spec, 1), jax.jit(lambda p: loss_sums(p, held_out, new)[0])
    losses = []
    for i in range(300, 350):
        state, _ = step(state, batch(i), np.float32(2e-3))
        losses.append(float(evaluate(state.params)) / weight)
    assert before < 2.0  # it has learnt something: 61 words are 4.1 nats
    assert max(losses) <= before + 0.05
    assert losses[-1] <= before


# ---- families that are not exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layers"),
    [("stack", [0, 1, 2, 3, 0, 1]), ("interleave", [0, 0, 1, 2, 2, 3]), ("middle", [0, 1, 2, 1, 2, 3])],
)
def test_depth_families_copy_layers_and_their_moments(family, layers, one_device_mesh):
    old = with_fields(GROWN, num_layers=4)
    new = resize(old, family, num_layers=6, mlp_dim=31)
    _, state = trained_state(old, one_device_mesh, steps=2)
    grown = jax.jit(lambda s: grow(s, Growth(old, new, GrowthConfig(family), KEY)))(state)
    for before, after in ((state.params, grown.params), (adam(state).adam.nu, adam(grown).adam.nu)):
        a, b = before["layers"]["mlp"]["up"]["kernel"], after["layers"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(np.asarray(a)[layers], np.asarray(b)[..., :29])
    assert (np.asarray(adam(grown).births["layers"]) == -1).all()


def test_perturb_shrinks_pads_and_adds_noise():
    new = resize(GROWN, "perturb", embed_dim=37)
    params = random_params(GROWN)
    operator = GrowthConfig("perturb", shrink=0.5)
    grown = jax.jit(lambda p: grow_params(p, Growth(GROWN, new, operator, KEY)))(params)
    a, b = params["layers"]["mlp"]["up"]["kernel"], np.asarray(grown["layers"]["mlp"]["up"]["kernel"])
    noise = b[:, :24] - 0.5 * a
    assert 0.015 < noise.std() < 0.025  # init_std 0.02
    assert 0.015 < b[:, 24:].std() < 0.025
    gain = np.asarray(grown["final_norm"]["scale"])
    np.testing.assert_array_equal(gain, [*params["final_norm"]["scale"], *[1.0] * 13])


@pytest.mark.parametrize("block", ["gpt_learned_untied", "llama", "mup_tied"])
def test_learned_growth_starts_as_the_zero_family(block):
    old = with_fields(GROWN, **BLOCKS[block])
    new = resize(old, "learned", **ALL | ({"num_kv_heads": 3} if old.num_kv_heads else {}), max_length=11)
    params = random_params(old, spread=0.3)

    growth = Growth(old, new, GrowthConfig("learned"), KEY)

    def both(params):
        return expand(first_matrices(growth), params, fresh_part(growth), growth), grow_params(params, growth)

    made, grown = jax.jit(both)(params)
    chex.assert_trees_all_close(made, grown, rtol=1e-5, atol=1e-6)


def test_learned_growth_learns():
    old = with_fields(GROWN, norm_eps=1e-5)
    new = resize(old, "learned", embed_dim=37, mlp_dim=41, num_layers=3, num_heads=6)
    params, operator = random_params(old), GrowthConfig("learned", tuning_learning_rate=3e-3)
    batches = [random_batch(old, seed=0)] * 30

    def loss(p, batch, config=new):
        return loss_sums(p, batch, config)[0] / jnp.sum(batch["weights"])

    grown, losses = tune(params, Growth(old, new, operator, KEY), jax.value_and_grad(loss), batches)
    chex.assert_trees_all_equal_shapes(grown, abstract_params(new)[0])
    before = float(jax.jit(lambda p: loss(p, batches[0], old))(params))
    assert losses[0] == pytest.approx(before, abs=1e-5)
    assert float(jax.jit(loss)(grown, batches[0])) < losses[-1] < losses[0] - 0.1
    found = certify(
        params, grown, old, new, batches[0], operator=operator, key=KEY, step=1, from_stage="a", to_stage="b"
    )
    found.check()  # claims nothing
    assert not found.exact
    assert found.max_difference["float64"] > 1e-3  # of what was tuned, not of its exact start
    assert found.loss_after < found.loss_before


def test_cost_of_learning_counts_every_product():
    """4 -> 6 places on one axis of each leaf: 6 FLOPs x entries x new places."""
    old = with_fields(GROWN, mlp_dim=4)
    new = with_fields(old, mlp_dim=6)
    entries = 2 * (24 * 4 + 4 + 4 * 24)  # layers x (up kernel and bias, down kernel)
    assert tuning_flops(Growth(old, new, GrowthConfig("learned"))) == 6 * entries * 6


# ---- certificates ---------------------------------------------------------------------------------------------------


def certificate_of(old, new, params, operator, batch=None, **arguments):
    growth = Growth(old, new, operator, KEY)
    grown = jax.jit(lambda p: grow_params(p, growth))(params)
    batch = random_batch(old, rows=2) if batch is None else batch
    return certify((params, grown), growth, batch, GrowthPoint(5, "a", "b"), **arguments)


@pytest.mark.parametrize("family", EXACT)
def test_certificate_of_an_exact_growth(family):
    new = resize(GROWN, family, embed_dim=37, num_layers=3, vocab_size=70)
    params, batch = random_params(GROWN), random_batch(GROWN, rows=2)
    good = certificate_of(GROWN, new, params, GrowthConfig(family), batch)
    good.check()
    assert good.exact
    assert good.max_difference["float32"] <= 2e-5 * good.max_logit
    assert good.max_difference["float64"] <= 1e-12 * good.max_logit
    assert good.sizes == {"num_layers": (2, 3), "embed_dim": (24, 37), "vocab_size": (61, 70)}
    assert abs(good.loss_before - reference.loss(params, GROWN, batch)[0] / batch["weights"].sum()) < 1e-4
    assert good.loss_after == pytest.approx(good.loss_before, abs=1e-5)
    assert abs(good.kl) < 1e-6
    before, after = good.gradient_norm
    assert before > 0.1
    assert after != before
    assert (good.mask_removed is not None) == (family == "mask")
    assert good.mask_removed is None or good.mask_removed <= 1e-12 * good.max_logit


@pytest.mark.parametrize("family", ["stack", "perturb"])
def test_certificate_says_so_when_a_growth_is_not_exact_by_design(family):
    new = resize(GROWN, family, num_layers=4)
    found = certificate_of(GROWN, new, random_params(GROWN), GrowthConfig(family))
    found.check()
    assert not found.exact
    assert "not exact" in str(found)
    assert found.max_difference["float64"] > 1e-3
    assert found.kl > 1e-3


def test_certificate_stops_a_growth_that_is_not_exact(monkeypatch):
    new = resize(GROWN, embed_dim=37, num_layers=3)
    wrong = with_rule("zero", "layers", lambda *_: Rule("fresh"))
    monkeypatch.setattr("flmjax.growth.growth.family_of", lambda o: wrong[o.family])
    with pytest.raises(GrowthError, match=r"a -> b by 'zero' is not exact.*float32 logits"):
        certificate_of(GROWN, new, random_params(GROWN), GrowthConfig()).check()
    good = certificate_of(GROWN, resize(GROWN, mlp_dim=40), random_params(GROWN), GrowthConfig())
    good.check()
    for difference, removed, kl, words in (
        (3e-5, None, 0.0, "float32 logits 3e-05 exceeds 2e-05"),
        (np.nan, None, 0.0, "float32 logits nan"),
        (0.0, 3e-5, 0.0, "when the growth mask is removed"),
        (0.0, None, 2e-3, "KL divergence in bfloat16 0.002"),
    ):
        assert words in exactness_failure(difference, removed, kl, 2e-5, "bfloat16")
    assert exactness_failure(1e-5, 1e-5, 1e-4, 2e-5, "bfloat16") is None


def test_certificate_is_made_in_the_runs_dtype_too():  # facts: T11
    old = with_fields(GROWN, dtype="bfloat16")
    new = resize(old, embed_dim=48)
    params = random_params(old)
    found = certificate_of(old, new, params, GrowthConfig(), float64_below=0)
    assert found.run_dtype == "bfloat16"
    assert found.max_difference["float32"] <= 1e-4 < found.max_difference["run"]
    assert found.max_difference["float64"] is None
    found.check()  # KL within 1e-3


@pytest.mark.parametrize("family", EXACT)
def test_growth_in_bfloat16_changes_the_loss_no_more_than_its_rounding(family):  # facts: T11
    """Products accumulate in float32: reordering a sum changes nothing, so bfloat16's own error is the yardstick."""
    old = with_fields(GROWN, dtype="bfloat16")
    new, wide = resize(old, family, embed_dim=48), with_fields(old, dtype="float32")
    loss = jax.jit(lambda p, b, config: loss_sums(p, b, config)[0] / jnp.sum(b["weights"]), static_argnums=2)

    def first(params):
        grown = grow_params(params, Growth(old, new, GrowthConfig(family), KEY))
        return masked(grown, Growth(old, new, GrowthConfig("mask")), 0.0) if family == "mask" else grown

    first = jax.jit(first)
    rounding, growth = [], []
    for seed in range(8):
        params, batch = random_params(old, seed=seed), random_batch(old, rows=16, seed=seed)
        before = float(loss(params, batch, old))
        rounding.append(before - float(loss(params, batch, wide)))
        growth.append(before - float(loss(first(params), batch, new)))
    assert 0 < np.std(growth) <= 3 * np.std(rounding)


def test_float32_proof_is_made_at_full_precision(monkeypatch):
    """An H100 multiplies float32 with 10 bits unless told otherwise: 5e-4, where growth itself is 1e-6."""
    comparison, seen = certificate.jit_comparison, {}

    def spy(*args, dtype, gradients=False, **kwargs):
        seen[dtype, gradients] = jax.config.jax_default_matmul_precision
        return comparison(*args, dtype=dtype, gradients=gradients, **kwargs)

    monkeypatch.setattr(certificate, "jit_comparison", spy)
    old = with_fields(GROWN, dtype="bfloat16")
    certificate_of(old, resize(old, mlp_dim=40), random_params(old), GrowthConfig(), float64_below=0)
    assert seen == {("bfloat16", True): None, ("float32", False): "highest"}


@pytest.mark.parametrize("damage", ["structure", "shape", "dtype"])
def test_trees_of_another_model_are_refused_by_the_certificate(damage):
    """chex names the leaf; compared without it, a tree of another shape could broadcast."""
    old, new = GROWN, resize(GROWN, mlp_dim=40)
    growth = Growth(old, new, GrowthConfig(), KEY)
    params = random_params(old)
    grown = jax.jit(lambda p: grow_params(p, growth))(params)
    if damage == "structure":
        del grown["embedding"]
    elif damage == "shape":
        grown["embedding"] = grown["embedding"][:, :1]
    else:
        grown["embedding"] = grown["embedding"].astype(jnp.bfloat16)
    with pytest.raises(AssertionError, match="embedding"):
        certify((params, grown), growth, random_batch(old, rows=2), GrowthPoint(5, "a", "b"))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_certificate_recomputes_every_layer_however_the_model_trains(remat):
    def text(remat):
        old, new = (dataclasses.replace(c, remat=remat) for c in (GROWN, resize(GROWN, mlp_dim=40)))
        params = tuple(abstract_params(c)[0] for c in (old, new))
        ints, floats = (jax.ShapeDtypeStruct((2, old.max_length), dtype) for dtype in (jnp.int32, jnp.float32))
        batch = {"tokens": ints, "targets": ints, "weights": floats}
        comparison = certificate.jit_comparison(Growth(old, new, GrowthConfig()), "float32", gradients=True)
        return comparison.lower(params, batch).as_text()

    assert text(remat) == text("full")


def test_tolerance_is_relative_to_the_logits():
    params, new = random_params(GROWN), resize(GROWN, mlp_dim=40)
    params["final_norm"] = {name: 100 * x for name, x in params["final_norm"].items()}
    found = certificate_of(GROWN, new, params, GrowthConfig(), tolerance=1e-5)
    assert found.max_logit > 10
    assert found.tolerance == pytest.approx(1e-5 * found.max_logit, rel=1e-4)
    small = {**params, "final_norm": {name: 0 * x for name, x in params["final_norm"].items()}}
    assert certificate_of(GROWN, new, small, GrowthConfig(), tolerance=1e-5).tolerance == 1e-5


def test_a_model_that_cannot_learn_is_refused():
    """Tied, xPos, embedding 0: every gradient is 0, and an exact growth keeps it so."""
    params = random_params(GROWN)
    params["embedding"] = np.zeros_like(params["embedding"])
    for part in ("attention", "mlp"):
        for name in ("attention_norm", "mlp_norm"):
            params["layers"][name]["bias"] = np.zeros_like(params["layers"][name]["bias"])
        for linear in params["layers"][part].values():
            linear["bias"] = np.zeros_like(linear["bias"])
    params["final_norm"]["bias"] = np.zeros_like(params["final_norm"]["bias"])
    words = r"its gradient is 0 everywhere: matrices of zeros are embedding \(64, 24\) -> \(64, 29\); 'perturb'"
    with pytest.raises(GrowthError, match=words):
        certificate_of(GROWN, resize(GROWN, num_layers=3, embed_dim=29), params, GrowthConfig()).check()
    new = resize(GROWN, "perturb", num_layers=3, embed_dim=29)
    assert certificate_of(GROWN, new, params, GrowthConfig("perturb")).gradient_norm[1] > 0


# ---- refusals and plans ---------------------------------------------------------------------------------------------


def test_illegal_growth_is_refused():
    grouped = with_fields(GROWN, num_heads=8, num_kv_heads=2)
    wider = resize(GROWN, head_dim=10)
    for old, new, family, words in (
        (GROWN, resize(GROWN, embed_dim=23), "zero", "embed_dim would shrink from 24 to 23"),
        (GROWN, resize(GROWN, num_layers=1), "zero", "num_layers would shrink from 2 to 1"),
        (GROWN, resize(GROWN, vocab_size=60), "zero", "vocab_size would shrink from 61 to 60"),
        (GROWN, with_fields(GROWN, activation="swiglu"), "zero", "cannot change activation from gelu to swiglu"),
        (GROWN, with_fields(GROWN, embed_dim=30), "zero", "norm_eps must be"),
        (
            grouped,
            resize(grouped, num_heads=9, num_kv_heads=3),
            "zero",
            "8 query heads in 2 groups cannot become 9 in 3",
        ),
        (GROWN, with_fields(wider, rotary_dim=None), "zero", "rotary_dim must be 6 after growth"),
        (GROWN, wider, "duplicate", "rotary_repeat must be True for family 'duplicate'"),
    ):
        with pytest.raises((GrowthError, ConfigError), match=words):
            Growth(old, new, GrowthConfig(family))
    params = random_params(GROWN)
    with pytest.raises(ConfigError, match="growth family 'zeros'; did you mean zero"):
        Growth(GROWN, resize(GROWN, mlp_dim=40), GrowthConfig("zeros"), KEY)
    with pytest.raises(GrowthError, match=r"attention/\w+/\w+ has shape .*; the old configuration says"):
        grow_params(params, Growth(with_fields(GROWN, num_heads=3), resize(GROWN, num_heads=5), GrowthConfig(), KEY))


def test_leaf_without_a_rule_is_named(monkeypatch):
    without = {n: r for n, r in zero.AXES.items() if n != "mlp"} | {
        "mlp": AxisRule(zero.at_the_end, lambda *_: {}["no"])
    }
    table = {"zero": families.FAMILIES["zero"]._replace(axes=without)}
    monkeypatch.setattr("flmjax.growth.growth.family_of", lambda o: table[o.family])
    with pytest.raises(GrowthError, match=r"layers/mlp/\w+/\w+: no rule for axis 'mlp' \(\w+\) from 29 to 40"):
        grow_params(random_params(GROWN), Growth(GROWN, resize(GROWN, mlp_dim=40), GrowthConfig(), KEY))


def test_the_plan_names_every_leaf_and_its_rules():
    new = resize(GROWN, embed_dim=48, num_layers=3)
    plan = {p.path: p for p in plan_growth(Growth(GROWN, new, GrowthConfig()))}
    assert set(plan) == {path.replace(".", "/") for path in reference.shapes(new)}
    up = plan["layers/mlp/up/kernel"]
    assert (up.old_shape, up.new_shape) == ((2, 24, 29), (3, 48, 29))
    assert up.rules == ("layers 2 -> 3, new ones fresh", "embed 24 -> 48, new ones fresh")
    assert plan["layers/mlp/down/kernel"].rules == ("layers 2 -> 3, new ones 0", "embed 24 -> 48, new ones the mean")
    assert plan["final_norm/scale"].rules == ("embed 24 -> 48, new ones fresh, old ones x 0.7071",)
