"""The certificate of a growth: what it measures, in which precision, and which growths it stops."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import random_batch, random_params, with_fields
from growth_cases import EXACT, KEY, SMALL, certificate_of, with_rule

from flmjax.config import GrowthConfig, MeshShape, resize
from flmjax.growth import comparison
from flmjax.growth.certificate import GrowthPoint, certify
from flmjax.growth.grow import grow_params
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import masked
from flmjax.growth.rules import GrowthError, Rule
from flmjax.model.loss import loss_sums
from flmjax.model.transformer import abstract_params
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import Placement, batch_sharding, tree_shardings


@pytest.mark.parametrize("family", EXACT)
def test_certificate_of_an_exact_growth(family):
    new = resize(SMALL, family, embed_dim=37, num_layers=3, vocab_size=70)
    params, batch = random_params(SMALL), random_batch(SMALL, rows=2)
    good = certificate_of(SMALL, new, params, GrowthConfig(family), batch)
    good.check()
    assert good.exact
    assert good.max_difference["float32"] <= 2e-5 * good.max_logit
    assert good.max_difference["float32"] <= good.tolerance == 8 * good.rounding["float32"]
    assert good.rms_difference["float64"] < good.max_difference["float64"] < 1e-6 * good.rounding["float32"]
    assert good.parameter_error <= 1e-6
    assert (good.rows, good.float64_rows) == (2, 1)
    assert good.max_difference["float64"] <= 1e-12 * good.max_logit
    assert good.sizes == {"num_layers": (2, 3), "embed_dim": (24, 37), "vocab_size": (61, 70)}
    assert abs(good.loss_before - reference.loss(params, SMALL, batch)[0] / batch["weights"].sum()) < 1e-4
    assert good.loss_after == pytest.approx(good.loss_before, abs=1e-5)
    assert 0 <= good.kl < 1e-6
    before, after = good.gradient_norm
    assert before > 0.1
    # A closed mask lets no gradient through to the new parameters, which add 2 % here.
    assert after == pytest.approx(before, rel=1e-5) if family == "mask" else after > 1.01 * before
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
    jit_comparison, seen = comparison.jit_comparison, {}

    def spy(growth, dtype, placement, gradients=False):
        seen[dtype, gradients] = jax.config.jax_default_matmul_precision
        return jit_comparison(growth, dtype, placement, gradients)

    monkeypatch.setattr(comparison, "jit_comparison", spy)
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
        program = comparison.jit_comparison(Growth(old, new, GrowthConfig()), "float32", gradients=True)
        return program.lower(params, batch).as_text()

    assert text(remat) == text("full")


def test_sequences_are_compared_one_by_one():
    """The logits of all at once took 151 GiB a device for a model of 6.9B on 8 GPUs."""
    growth = Growth(SMALL, resize(SMALL, embed_dim=37), GrowthConfig(), KEY)
    params, batch = random_params(SMALL), random_batch(SMALL, rows=6)
    both = (params, jax.jit(lambda p: grow_params(p, growth))(params))
    program = comparison.jit_comparison(growth, "float32", gradients=True)
    at_once = comparison.compare(program, both, batch)
    parts = [comparison.compare(program, both, {k: x[i : i + 1] for k, x in batch.items()}) for i in range(6)]
    for field in ("growth", "rounding"):
        of_all, each = getattr(at_once, field), [getattr(part, field) for part in parts]
        row = int(np.argmax([difference.max for difference in each]))
        assert of_all.max == each[row].max > 0
        assert of_all.row == (row, each[row].row[1])
    squares = [part.growth.rms**2 for part in parts]
    assert at_once.growth.rms == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5)
    weights = [batch["weights"][i].sum() for i in range(6)]
    for model in range(2):
        assert at_once.losses[model] == pytest.approx(np.average([p.losses[model] for p in parts], weights=weights))
    loss = jax.grad(lambda p: loss_sums(p, batch, SMALL)[0] / batch["weights"].sum())
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(loss(params))))
    assert at_once.gradient_norms[0] == pytest.approx(norm, rel=1e-5)
    sizes = [
        program.lower(both, random_batch(SMALL, rows=rows)).compile().memory_analysis().temp_size_in_bytes
        for rows in (1, 12)
    ]
    assert sizes[1] < 2 * sizes[0]


def test_logits_are_not_gathered_where_the_growth_changes_the_mesh():
    """With gathered logits FLM-101B's certificate needs 205 GiB on a TPU v6e, which has 31 GiB."""
    sizes = {"embed_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 48}
    old = with_fields(SMALL, vocab_size=512, max_length=16, **sizes)
    growth = Growth(old, resize(old, num_layers=2 * old.num_layers), GrowthConfig("zero"))
    meshes = [make_mesh(MeshShape(*shape), jax.devices()) for shape in ((2, 2, 2), (1, 2, 4))]

    def sharded(mesh, config):
        params, axes = abstract_params(config)
        shardings = tree_shardings(mesh, axes)
        return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), params, shardings)

    params = (sharded(meshes[0], growth.old), sharded(meshes[1], growth.new))
    batch = {name: random_batch(old, rows=8)[name] for name in ("tokens", "targets", "weights")}
    placements = tuple(Placement(mesh) for mesh in meshes)
    program = comparison.jit_comparison(growth, "float32", placements, gradients=True)
    text = program.lower(params, jax.device_put(batch, batch_sharding(meshes[1]))).compile().as_text()
    assert not re.search(r"= f32\[\d+,16,512\]\S* all-gather", text)
    assert re.search(r"all-gather", text)


def test_the_bar_is_a_multiple_of_the_old_models_own_rounding():
    params, new = random_params(SMALL), resize(SMALL, embed_dim=37)
    measured = certificate_of(SMALL, new, params, GrowthConfig(), roundings=3.0)
    assert measured.tolerance == 3 * measured.rounding["float32"]
    with pytest.raises(GrowthError, match=r"exceeds .*, 1e-06 times the old model's own rounding"):
        certificate_of(SMALL, new, params, GrowthConfig(), roundings=1e-6).check()


def test_the_row_of_the_largest_difference_is_said():
    """One word has a wrong embedding, and only the last token is that word."""
    old = with_fields(SMALL, tied_embedding=False)
    growth, params = Growth(old, resize(old, mlp_dim=40), GrowthConfig(), KEY), random_params(old)
    grown = jax.jit(lambda p: grow_params(p, growth))(params)
    grown["embedding"] = grown["embedding"].at[3].multiply(-1)
    batch = random_batch(old, rows=3)
    batch["tokens"] = np.arange(10, 34, dtype=np.int32).reshape(3, 8)
    batch["tokens"][2, 7] = 3
    measured = certify((params, grown), growth, batch, GrowthPoint(5, "a", "b"), float64_below=0)
    assert measured.row["run"] == (2, 7)
    assert "largest in sequence 2, token 7" in str(measured)
    assert "(sequence 2, token 7)" in measured.failure


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
