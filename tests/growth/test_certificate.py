"""The certificate of a growth: what it measures, in which precision, and which growths it stops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import random_batch, random_params, with_fields
from growth_cases import EXACT, KEY, SMALL, certificate_of, with_rule

from flmjax.config import GrowthConfig, resize
from flmjax.growth import certificate
from flmjax.growth.certificate import GrowthPoint, certify, exactness_failure
from flmjax.growth.grow import grow_params
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import masked
from flmjax.growth.rules import GrowthError, Rule
from flmjax.model.loss import loss_sums
from flmjax.model.transformer import abstract_params


@pytest.mark.parametrize("family", EXACT)
def test_certificate_of_an_exact_growth(family):
    new = resize(SMALL, family, embed_dim=37, num_layers=3, vocab_size=70)
    params, batch = random_params(SMALL), random_batch(SMALL, rows=2)
    good = certificate_of(SMALL, new, params, GrowthConfig(family), batch)
    good.check()
    assert good.exact
    assert good.max_difference["float32"] <= 2e-5 * good.max_logit
    assert good.max_difference["float64"] <= 1e-12 * good.max_logit
    assert good.sizes == {"num_layers": (2, 3), "embed_dim": (24, 37), "vocab_size": (61, 70)}
    assert abs(good.loss_before - reference.loss(params, SMALL, batch)[0] / batch["weights"].sum()) < 1e-4
    assert good.loss_after == pytest.approx(good.loss_before, abs=1e-5)
    assert 0 <= good.kl < 1e-6
    before, after = good.gradient_norm
    assert before > 0.1
    assert after != before
    assert (good.mask_removed is not None) == (family == "mask")
    assert good.mask_removed is None or good.mask_removed <= 1e-12 * good.max_logit


@pytest.mark.parametrize("seed", range(3))
def test_kl_of_an_exact_growth_is_not_negative(seed):
    """The sum of terms of both signs was -1e-8 for two of these seeds."""
    params, batch = random_params(SMALL, seed, spread=0.03), random_batch(SMALL, rows=2, seed=seed)
    good = certificate_of(SMALL, resize(SMALL, embed_dim=37), params, GrowthConfig(), batch, float64_below=0)
    assert 0 <= good.kl < 1e-7
    assert "KL -" not in str(good)


@pytest.mark.parametrize("family", ["stack", "perturb"])
def test_certificate_of_an_inexact_family_says_that_it_is(family):
    new = resize(SMALL, family, num_layers=4)
    measured = certificate_of(SMALL, new, random_params(SMALL), GrowthConfig(family))
    measured.check()
    assert not measured.exact
    assert "not exact" in str(measured)
    assert measured.max_difference["float64"] > 1e-3
    assert measured.kl > 1e-3


def test_certificate_of_equal_sizes_has_no_empty_place():
    shown = str(certificate_of(SMALL, SMALL, random_params(SMALL), GrowthConfig()))
    assert "(exact); equal sizes; parameters" in shown


def test_certificate_stops_a_growth_that_is_not_exact(monkeypatch):
    new = resize(SMALL, embed_dim=37, num_layers=3)
    wrong = with_rule("zero", "layers", lambda *_: Rule("fresh"))
    monkeypatch.setattr("flmjax.growth.growth.family_of", lambda o: wrong[o.family])
    with pytest.raises(GrowthError, match=r"a -> b by 'zero' is not exact.*float32 logits"):
        certificate_of(SMALL, new, random_params(SMALL), GrowthConfig()).check()
    good = certificate_of(SMALL, resize(SMALL, mlp_dim=40), random_params(SMALL), GrowthConfig())
    good.check()
    for difference, removed, kl, words in (
        (3e-5, None, 0.0, "float32 logits 3e-05 exceeds 2e-05"),
        (np.nan, None, 0.0, "float32 logits nan"),
        (0.0, 3e-5, 0.0, "when the growth mask is removed"),
        (0.0, None, 2e-3, "KL divergence in bfloat16 0.002"),
    ):
        assert words in exactness_failure(difference, removed, kl, 2e-5, "bfloat16")
    assert exactness_failure(1e-5, 1e-5, 1e-4, 2e-5, "bfloat16") is None


def test_certificate_compares_in_the_runs_dtype_too():
    old = with_fields(SMALL, dtype="bfloat16")
    new = resize(old, embed_dim=48)
    params = random_params(old)
    measured = certificate_of(old, new, params, GrowthConfig(), float64_below=0)
    assert measured.run_dtype == "bfloat16"
    assert measured.max_difference["float32"] <= 1e-4 < measured.max_difference["run"]
    assert measured.max_difference["float64"] is None
    measured.check()  # KL within 1e-3


@pytest.mark.parametrize("family", EXACT)
def test_growth_in_bfloat16_changes_the_loss_within_its_rounding(family):
    """The yardstick is the loss error of bfloat16 itself: products accumulate in float32, whatever their order."""
    old = with_fields(SMALL, dtype="bfloat16")
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


def test_float32_comparison_runs_at_full_precision(monkeypatch):
    """An H100 multiplies float32 with 10 bits unless told otherwise: 5e-4, where growth itself is 1e-6."""
    comparison, seen = certificate.jit_comparison, {}

    def spy(*args, dtype, gradients=False, **kwargs):
        seen[dtype, gradients] = jax.config.jax_default_matmul_precision
        return comparison(*args, dtype=dtype, gradients=gradients, **kwargs)

    monkeypatch.setattr(certificate, "jit_comparison", spy)
    old = with_fields(SMALL, dtype="bfloat16")
    certificate_of(old, resize(old, mlp_dim=40), random_params(old), GrowthConfig(), float64_below=0)
    assert seen == {("bfloat16", True): None, ("float32", False): "highest"}


@pytest.mark.parametrize("damage", ["structure", "shape", "dtype"])
def test_trees_of_another_model_are_refused_by_the_certificate(damage):
    """chex names the leaf; compared without it, a tree of another shape could broadcast."""
    old, new = SMALL, resize(SMALL, mlp_dim=40)
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
def test_certificate_recomputes_layers_however_the_model_trains(remat):
    def text(remat):
        old, new = (dataclasses.replace(c, remat=remat) for c in (SMALL, resize(SMALL, mlp_dim=40)))
        params = tuple(abstract_params(c)[0] for c in (old, new))
        ints, floats = (jax.ShapeDtypeStruct((2, old.max_length), dtype) for dtype in (jnp.int32, jnp.float32))
        batch = {"tokens": ints, "targets": ints, "weights": floats}
        comparison = certificate.jit_comparison(Growth(old, new, GrowthConfig()), "float32", gradients=True)
        return comparison.lower(params, batch).as_text()

    assert text(remat) == text("full")


def test_tolerance_is_relative_to_the_logits():
    params, new = random_params(SMALL), resize(SMALL, mlp_dim=40)
    params["final_norm"] = {name: 100 * x for name, x in params["final_norm"].items()}
    measured = certificate_of(SMALL, new, params, GrowthConfig(), tolerance=1e-5)
    assert measured.max_logit > 10
    assert measured.tolerance == pytest.approx(1e-5 * measured.max_logit, rel=1e-4)
    small = {**params, "final_norm": {name: 0 * x for name, x in params["final_norm"].items()}}
    assert certificate_of(SMALL, new, small, GrowthConfig(), tolerance=1e-5).tolerance == 1e-5


def test_a_model_that_cannot_learn_is_refused():
    """Tied, xPos, embedding 0: every gradient is 0, and an exact growth keeps it so."""
    params = random_params(SMALL)
    params["embedding"] = np.zeros_like(params["embedding"])
    for part in ("attention", "mlp"):
        for name in ("attention_norm", "mlp_norm"):
            params["layers"][name]["bias"] = np.zeros_like(params["layers"][name]["bias"])
        for linear in params["layers"][part].values():
            linear["bias"] = np.zeros_like(linear["bias"])
    params["final_norm"]["bias"] = np.zeros_like(params["final_norm"]["bias"])
    words = r"its gradient is 0 everywhere; matrices of zeros: embedding \(64, 24\) -> \(64, 29\); family 'perturb'"
    with pytest.raises(GrowthError, match=words):
        certificate_of(SMALL, resize(SMALL, num_layers=3, embed_dim=29), params, GrowthConfig()).check()
    new = resize(SMALL, "perturb", num_layers=3, embed_dim=29)
    assert certificate_of(SMALL, new, params, GrowthConfig("perturb")).gradient_norm[1] > 0
