"""The bar of a certificate: an exact growth differs by the old model's own rounding, a wrong one by much more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, random_params, with_fields
from growth_cases import BLOCKS, EXACT, KEY, SMALL, certificate_of, logit_error, with_rule

from flmjax.config import GrowthConfig, RunConfig, resize
from flmjax.growth import rescaled as page
from flmjax.growth.certificate import GrowthPoint, certify, exactness_failure
from flmjax.growth.comparison import Comparison, Difference, Measurement, compare, jit_comparison
from flmjax.growth.grow import grow_params
from flmjax.growth.growth import Growth
from flmjax.growth.rescaled import draw_factors, rescaled
from flmjax.growth.rules import GrowthError
from flmjax.growth.zero import hidden
from flmjax.model.transformer import abstract_params
from flmjax.sharding.axes import map_with_axes, path_name

ROUNDINGS = RunConfig().certificate_roundings
WIDE = {"embed_dim": 64, "num_heads": 4, "head_dim": 16, "mlp_dim": 96, "norm_eps": 1e-5}
SIZES = {"embed_dim": 112, "mlp_dim": 150, "head_dim": 18}
BLOCK_OF = {"zero": BLOCKS["gpt_xpos_tied"], "duplicate": BLOCKS["llama"], "mask": BLOCKS["teleflm"]}


def deep(block, depth, vocab_size=400, max_length=64):
    """A narrow model of `depth` layers; 4 sequences of it have 100,000 logits."""
    return with_fields(SMALL, **{**block, **WIDE}, num_layers=depth, vocab_size=vocab_size, max_length=max_length)


def with_kernels(params, config, factor):
    """Parameters whose matrices of the layers are multiplied by `factor`."""
    return map_with_axes(
        lambda _, leaf, x: x * np.float32(factor if leaf.is_matrix and "layers" in leaf.names else 1),
        abstract_params(config)[1],
        params,
    )


class Pair:
    """An old model, its growth, and the programs that grow and compare, each compiled once."""

    def __init__(self, old, family, **sizes):
        self.growth = Growth(old, resize(old, family, **sizes), GrowthConfig(family), KEY)
        # The key is an argument: the shares of copies are drawn anew in each precision, as in a certificate.
        self.grow = jax.jit(lambda params, key: grow_params(params, dataclasses.replace(self.growth, key=key)))
        self.programs = {}

    def compare(self, dtype, params, batch, grown=None):
        """The comparison in one dtype; `grown` changes the tree of grown parameters."""
        with jax.enable_x64(dtype == "float64"):
            params = jax.tree.map(lambda x: jnp.asarray(x, "float64" if dtype == "float64" else "float32"), params)
            after = self.grow(params, KEY)
            after = after if grown is None else grown(after)
            program = self.programs.setdefault(dtype, jit_comparison(self.growth, dtype))
            return compare(program, (params, after), batch)


def refusal(single, double=None, run=None, dtype="float32"):
    return exactness_failure(Measurement(run or single, single, double), ROUNDINGS, dtype)


# ---- exact growths are never refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_a_rescaled_model_computes_the_same_function(block):
    """In float64, by the reference model; every parameter with a rescaled axis has other values."""
    config = with_fields(SMALL, **BLOCKS[block])
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(config, spread=0.3))
        factors = jax.tree.map(lambda x: x[1], draw_factors(config, 2))
        other, changed = rescaled(params, config, factors)
    same = [
        path_name(path)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(other), strict=True)
        if np.allclose(x, y)
    ]
    assert logit_error(params, other, config, changed) <= 1e-13
    assert set(same) <= {f"layers/mlp/{name}/bias" for name in ("up", "gate")}


def test_a_role_without_a_factor_is_an_error_that_names_the_parameter(monkeypatch):
    axes = abstract_params(SMALL)[1]
    leaf = axes["layers"]["attention"]["query"]["kernel"]
    new_role = leaf._replace(roles=tuple("scale" if role == "query" else role for role in leaf.roles))
    monkeypatch.setattr(
        page,
        "abstract_params",
        lambda _: (None, map_with_axes(lambda _, x: new_role if x == leaf else x, axes)),
    )
    with pytest.raises(ValueError, match="layers/attention/query/kernel: role 'scale' of axis 'head_dim'"):
        rescaled(random_params(SMALL), SMALL, draw_factors(SMALL, 1))


@pytest.mark.parametrize("depth", [2, 80])
@pytest.mark.parametrize("family", EXACT)
def test_an_exact_growth_is_within_the_models_own_rounding(family, depth):
    """100,000 logits, kernels times 1 and 8. With 80 layers and kernels times 8 float32 keeps no digit of a logit."""
    old = deep(BLOCK_OF[family], depth)
    pair = Pair(old, family, **SIZES, num_layers=depth + 1)
    batch = random_batch(old)
    for factor in (1, 8):
        params = with_kernels(random_params(old), old, factor)
        single, double, half = (pair.compare(dtype, params, batch) for dtype in ("float32", "float64", "bfloat16"))
        assert refusal(single, double, half, "bfloat16") is None
        for measured in (single, double, half):
            assert measured.growth.max <= 4 * measured.rounding.max
            assert measured.growth.rms <= 4 * measured.rounding.rms


def test_a_deep_model_with_large_kernels_is_not_refused():
    """2e-5 of max |logit| refused 40 layers, 64 -> 112, kernels times 4, whose growth is exact to 1e-11 in float64."""
    old = deep({}, 40)
    params = with_kernels(random_params(old), old, 4)
    single = Pair(old, "zero", embed_dim=112).compare("float32", params, random_batch(old))
    assert single.growth.max > 2e-5 * single.max_logit
    assert refusal(single) is None


@pytest.mark.parametrize("tokens", [64, 1024, 10_240])
def test_the_bar_grows_with_the_number_of_compared_logits(tokens):
    """6e5 to 1e8 logits: both largest differences grow, their ratio does not."""
    old = deep({"norm": "layernorm"}, 2, vocab_size=9_800)
    pair = Pair(old, "zero", embed_dim=112, num_layers=3)
    single = pair.compare("float32", random_params(old), random_batch(old, rows=tokens // 64))
    assert 0.2 <= single.growth.max / single.rounding.max <= 3
    assert 0.2 <= single.growth.rms / single.rounding.rms <= 2
    assert refusal(single) is None


@pytest.mark.parametrize("family", EXACT)
def test_split_groups_and_new_words_are_not_refused(family):
    old = with_fields(SMALL, **BLOCKS["llama"] | {"num_heads": 4, "num_kv_heads": 1})
    new = resize(old, family, num_heads=6, num_kv_heads=3, vocab_size=70, embed_dim=31)
    certificate_of(old, new, random_params(old, spread=0.5), GrowthConfig(family)).check()


def test_growth_under_mup_in_bfloat16_is_not_refused():
    """Logits are divided by 44, then by 80; neither factor is a bfloat16 number."""
    old = with_fields(SMALL, dtype="bfloat16", embed_dim=22, base_embed_dim=1, output_multiplier=0.5)
    for family in EXACT:
        certificate_of(old, resize(old, family, embed_dim=40), random_params(old), GrowthConfig(family)).check()


# ---- wrong growths are refused ---------------------------------------------------------------------------------------


def scaled_leaf(path, factor):
    """The change of a tree in which one parameter is multiplied by `factor`."""
    return lambda tree: jax.tree_util.tree_map_with_path(lambda p, x: x * factor if path_name(p) == path else x, tree)


@pytest.mark.parametrize("block", ["gpt_xpos_tied", "gpt_learned_untied", "llama"])
def test_one_wrong_leaf_is_refused(block):
    """Off by one part in 1e4 in float64, by one part in 1e2 in float32.

    A bias of all keys has no effect without rotary positions: softmax does not see it.
    """
    old = with_fields(SMALL, **BLOCKS[block])
    pair, params, batch = Pair(old, "zero", embed_dim=37, num_layers=3), random_params(old), random_batch(old)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    exact = pair.compare("float32", params, batch)
    assert refusal(exact) is None
    accepted = {
        path
        for path in paths
        if refusal(pair.compare("float32", params, batch, scaled_leaf(path, 1.01))) is None
        or refusal(exact, pair.compare("float64", params, batch, scaled_leaf(path, 1.0001))) is None
    }
    assert accepted == ({"layers/attention/key/bias"} if old.bias and not old.is_rotary else set())


@pytest.mark.parametrize(("depth", "factor"), [(20, 1), (2, 8)])
def test_one_wrong_leaf_of_a_deep_or_large_model_is_refused(depth, factor):
    """Kernels times 8 round by 1e-4 of the logits in float32, which hides 1 % of a bias; float64 shows 0.01 %."""
    old = deep({}, depth)
    pair, batch = Pair(old, "duplicate", **SIZES), random_batch(old, rows=2)
    params = with_kernels(random_params(old), old, factor)
    exact = pair.compare("float32", params, batch)
    for path in ("embedding", "layers/attention/query/kernel", "layers/mlp/down/bias", "layers/mlp_norm/scale"):
        if factor == 1:
            assert refusal(pair.compare("float32", params, batch, scaled_leaf(path, 1.01))) is not None
        wrong = pair.compare("float64", params, batch, scaled_leaf(path, 1.0001))
        assert "float64 logits" in refusal(exact, wrong)


def test_a_wrong_rule_is_refused_by_the_float64_rows(monkeypatch):
    """The growth repeated in float64 has the same fault: the logits show it, no parameter does."""

    def wrong(role, leaf, d):
        return hidden(role, leaf, d)._replace(weight=1.0001 if role == "read" else 1.0)

    monkeypatch.setattr("flmjax.growth.growth.family_of", lambda _: with_rule("zero", "mlp", wrong)["zero"])
    measured = certificate_of(SMALL, resize(SMALL, mlp_dim=40), random_params(SMALL), GrowthConfig())
    assert measured.parameter_error < 1e-6
    assert measured.max_difference["float64"] > 1e6 * measured.rounding["float64"]
    with pytest.raises(GrowthError, match="is not exact"):
        measured.check()


@pytest.mark.parametrize(("factor", "below"), [(1 + 1e-4, 20_000_000), (1.01, 0)])
def test_a_wrong_tree_of_parameters_is_refused(factor, below):
    """The program that grew the run's state is at fault, not the rules: the growth repeated in float64 is right."""
    new = resize(SMALL, embed_dim=37, num_layers=3)
    growth, params = Growth(SMALL, new, GrowthConfig(), KEY), random_params(SMALL)
    grown = scaled_leaf("layers/mlp/up/bias", factor)(jax.jit(lambda p: grow_params(p, growth))(params))
    batch = random_batch(SMALL, rows=2)
    measured = certify((params, grown), growth, batch, GrowthPoint(1, "a", "b"), float64_below=below)
    assert (measured.parameter_error is None) == (below == 0)
    with pytest.raises(GrowthError, match="is not exact"):
        measured.check()
    if below:
        assert measured.parameter_error == pytest.approx(1e-4, rel=0.01)


def test_each_bar_refuses_what_is_above_it_or_not_a_number():
    def comparison(**values):
        growth = Difference(2e-6, 5e-7, (1, 7), 1e-5)._replace(**values)
        return Comparison(growth, Difference(1e-6, 2e-7, (0, 0), 1e-5), 3.0, (1.0, 1.0), (1.0, 1.0))

    good = comparison()
    assert refusal(good, good, good, "bfloat16") is None
    for value, words in (
        (
            {"max": 9e-6},
            "max |difference| of float32 logits (sequence 1, token 7) is 9e-06 and exceeds 8e-06, 8 times the old",
        ),
        ({"max": np.nan}, "is nan and exceeds 8e-06"),
        ({"rms": 2e-6}, "rms difference of float32 logits is 2e-06 and exceeds 1.6e-06"),
        ({"rms": np.nan}, "rms difference of float32 logits is nan"),
    ):
        wrong = comparison(**value)
        assert words in refusal(wrong)
        assert "float64" in refusal(good, wrong)
        assert "bfloat16 logits (the run)" in refusal(good, good, wrong, "bfloat16")
    for kl in (2e-3, np.nan):
        assert f"KL divergence in bfloat16 is {kl:.3g}" in refusal(good, good, comparison(kl=kl), "bfloat16")
    unknown = good._replace(rounding=Difference(np.nan, np.nan, (0, 0), 0.0))
    assert "exceeds nan" in refusal(unknown)
    for change in (1e-4, np.nan):
        for field, words in (("errors", "from the growth repeated"), ("mask_changes", "when the open growth mask")):
            measured = Measurement(good, good, good)._replace(**{field: {"head": 0.0, "embedding": change}})
            assert f"difference of embedding {words}" in exactness_failure(measured, 8.0, "float32")


def test_bfloat16_accepts_a_larger_divergence_only_from_a_model_that_has_it_already():
    """Bar 1e-3 nats a token; with 80 layers and kernels times 8 the old model's own rounding makes 0.4."""
    own = Difference(1.0, 1.0, (0, 0), 0.4)
    single = Comparison(own, own, 3.0, (1.0, 1.0), (1.0, 1.0))
    assert refusal(single._replace(growth=own._replace(kl=1.5))) is None
    assert "KL" in refusal(single._replace(growth=own._replace(kl=1.7)))
    assert "KL" in refusal(single._replace(growth=own._replace(kl=1.1e-3), rounding=own._replace(kl=2e-4)))
