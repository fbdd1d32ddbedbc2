"""Growths that cannot be are refused with the field or the leaf; the plan says what becomes of every leaf."""

import pytest
import reference
from conftest import random_params, with_fields
from growth_cases import KEY, SMALL

from flmjax.config import ConfigError, GrowthConfig, resize
from flmjax.growth import families, zero
from flmjax.growth.grow import grow_params, plan_growth
from flmjax.growth.growth import Growth
from flmjax.growth.rules import AxisRule, GrowthError


def test_illegal_growth_is_refused():
    grouped = with_fields(SMALL, num_heads=8, num_kv_heads=2)
    wider = resize(SMALL, head_dim=10)
    for old, new, family, words in (
        (SMALL, resize(SMALL, embed_dim=23), "zero", "embed_dim would shrink from 24 to 23"),
        (SMALL, resize(SMALL, num_layers=1), "zero", "num_layers would shrink from 2 to 1"),
        (SMALL, resize(SMALL, vocab_size=60), "zero", "vocab_size would shrink from 61 to 60"),
        (SMALL, with_fields(SMALL, activation="swiglu"), "zero", "cannot change activation from gelu to swiglu"),
        (SMALL, with_fields(SMALL, embed_dim=30), "zero", "norm_eps must be"),
        (
            grouped,
            resize(grouped, num_heads=9, num_kv_heads=3),
            "zero",
            "8 query heads in 2 groups cannot become 9 in 3",
        ),
        (SMALL, with_fields(wider, rotary_dim=None), "zero", "rotary_dim must be 6 after growth"),
        (SMALL, wider, "duplicate", "rotary_repeat must be True for family 'duplicate'"),
    ):
        with pytest.raises((GrowthError, ConfigError), match=words):
            Growth(old, new, GrowthConfig(family))
    params = random_params(SMALL)
    with pytest.raises(ConfigError, match="growth family 'zeros'; did you mean zero"):
        Growth(SMALL, resize(SMALL, mlp_dim=40), GrowthConfig("zeros"), KEY)
    with pytest.raises(GrowthError, match=r"attention/\w+/\w+ has shape .*; the old configuration says"):
        grow_params(params, Growth(with_fields(SMALL, num_heads=3), resize(SMALL, num_heads=5), GrowthConfig(), KEY))


def test_leaf_without_a_rule_is_named(monkeypatch):
    without = {n: r for n, r in zero.AXES.items() if n != "mlp"} | {
        "mlp": AxisRule(zero.at_the_end, lambda *_: {}["no"])
    }
    table = {"zero": families.FAMILIES["zero"]._replace(axes=without)}
    monkeypatch.setattr("flmjax.growth.growth.family_of", lambda o: table[o.family])
    with pytest.raises(GrowthError, match=r"layers/mlp/\w+/\w+: no rule for axis 'mlp' \(\w+\) from 29 to 40"):
        grow_params(random_params(SMALL), Growth(SMALL, resize(SMALL, mlp_dim=40), GrowthConfig(), KEY))


def test_the_plan_names_every_leaf_and_its_rules():
    new = resize(SMALL, embed_dim=48, num_layers=3)
    plan = {p.path: p for p in plan_growth(Growth(SMALL, new, GrowthConfig()))}
    assert set(plan) == {path.replace(".", "/") for path in reference.shapes(new)}
    up = plan["layers/mlp/up/kernel"]
    assert (up.old_shape, up.new_shape) == ((2, 24, 29), (3, 48, 29))
    assert up.rules == ("layers 2 -> 3, new ones fresh", "embed 24 -> 48, new ones fresh")
    assert plan["layers/mlp/down/kernel"].rules == ("layers 2 -> 3, new ones 0", "embed 24 -> 48, new ones the mean")
    assert plan["final_norm/scale"].rules == ("embed 24 -> 48, new ones fresh, old ones x 0.7071",)
