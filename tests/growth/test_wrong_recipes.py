"""A growth with one rule changed is not exact: what the exactness tests would miss if they compared too little."""

import numpy as np
import pytest
from conftest import random_params, with_fields
from growth_cases import GROUPED, SMALL, grow64, growth_error, logit_error, with_rule

from flmjax.config import resize
from flmjax.growth import duplicate, zero
from flmjax.growth.rules import Rule


def replaced(rule, **fields):
    """A copy of `rule` in which each role in `fields` ({role: changes}) has those changes."""
    return lambda role, leaf, g: rule(role, leaf, g)._replace(**fields.get(role, {}))


WRONG = {
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
def test_a_wrong_recipe_changes_the_logits(recipe, monkeypatch):
    family, dim, rule, fields = WRONG[recipe]
    old = with_fields(SMALL, **fields)
    assert growth_error(old, family, SIZES[dim]) <= 1e-12
    monkeypatch.setattr("flmjax.growth.growth.family_of", lambda o: with_rule(family, dim, rule)[o.family])
    assert growth_error(old, family, SIZES[dim]) > 1e-5  # seven orders above what is exact


def test_uneven_copies_under_layernorm_change_the_logits(monkeypatch):
    uneven = with_rule("duplicate", "embed", source=duplicate.cyclic)
    monkeypatch.setattr("flmjax.growth.growth.family_of", lambda o: uneven[o.family])
    assert growth_error(SMALL, "duplicate", {"embed_dim": 37}) > 1e-3
    assert growth_error(with_fields(SMALL, norm="rmsnorm"), "duplicate", {"embed_dim": 37}) <= 1e-12


@pytest.mark.parametrize("wrong", ["eps", "frequencies", "heads appended", "split tiled"])
def test_wrong_configs_and_orders_of_heads_change_the_logits(wrong):
    old = with_fields(SMALL, **GROUPED)
    sizes = {"embed_dim": 48, "head_dim": 10, "num_heads": 6}
    if wrong == "split tiled":
        sizes |= {"num_kv_heads": 4, "num_heads": 4}
    new = resize(old, **sizes)
    params = random_params(old, spread=0.3)
    grown = grow64(params, old, new)
    assert logit_error(params, grown, old, new) <= 1e-12
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
    assert logit_error(params, grown, old, new) > 1e-3
