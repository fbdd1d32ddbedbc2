"""Growth certificate: logits, losses and gradients of the models before and after growth, compared on real tokens."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from flmjax.config import SIZES, Dtype, ModelConfig
from flmjax.disk import writing
from flmjax.growth.grow import grow_params
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import masked
from flmjax.growth.rules import GrowthError
from flmjax.model.loss import divisor, token_cross_entropy
from flmjax.model.transformer import abstract_params, count_parameters, forward, real_ids
from flmjax.sharding.axes import Params, path_name
from flmjax.sharding.rules import Placement, tree_shardings

MAX_KL = 1e-3  # nats a token, in the run's dtype; the rounding of bfloat16 alone causes about 1e-5


Placements = tuple[Placement, Placement]  # sharding of the activations of the old and of the new model


class GrowthPoint(NamedTuple):
    """A growth in a run's history: the number of updates before it, and the names of the stages before and after it."""

    step: int
    from_stage: str
    to_stage: str


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Result of comparing the models before and after growth; a growth point prints and stores it.

    Attributes:
        claim: the family's claim in words (families.py).
        exact: whether the family claims that the function stays the same.
        max_difference: max |logit before - logit after| over the old vocabulary, computed in the "run"'s dtype, in
            "float32" and in "float64" (None: not recomputed).
        max_logit: max |logit before|.
        mask_removed: max |difference| of logits between the fully open growth mask and no mask, in the widest dtype
            that was computed; None for a growth without a mask.
        kl: mean KL(before || after) in nats a token; like losses and gradient norms it is computed in the run's dtype.
        tolerance: largest float32 difference that is accepted, absolute.
        failure: why the growth does not keep its claim; None if it does.
    """

    step: int
    from_stage: str
    to_stage: str
    family: str
    claim: str
    exact: bool
    sizes: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    max_difference: dict[str, float | None]
    max_logit: float
    mask_removed: float | None
    kl: float
    run_dtype: str
    loss_before: float
    loss_after: float
    gradient_norm: tuple[float, float]
    rows: int
    tokens: int
    tolerance: float
    failure: str | None = None

    def check(self) -> None:
        """Refuse a growth that does not keep its claim.

        Raises:
            GrowthError: if the family claims exactness and a difference exceeds the tolerance or is NaN, or if the
                grown model cannot learn.
        """
        if self.failure is not None:
            raise GrowthError(
                f"growth {self.from_stage} -> {self.to_stage} by '{self.family}' {self.failure}; "
                "nothing was overwritten"
            )

    def save(self, directory: Path) -> Path:
        """Write step_NNNNNNNN.json in `directory` and return its path; a killed write leaves no partial file."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"step_{self.step:08d}.json"
        partial = path.with_suffix(".partial")
        with writing(path):
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
            return partial.replace(path)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in self.sizes.items()) or "equal sizes"
        numbers = ", ".join(
            f"{self.run_dtype if name == 'run' else name} {value:.2g}{' (the run)' if name == 'run' else ''}"
            for name, value in self.max_difference.items()
            if value is not None and not (name == self.run_dtype and value == self.max_difference["run"])
        )
        failure = "" if self.failure is None else f"; FAILED: {self.failure}"
        removed = (
            ""
            if self.mask_removed is None
            else f"; removing the open growth mask changes logits by at most {self.mask_removed:.2g}"
        )
        return (
            f"growth certificate at step {self.step}: {self.from_stage} -> {self.to_stage} by '{self.family}' "
            f"({self.claim}); {sizes}; parameters {self.parameters[0]:,} -> {self.parameters[1]:,}; "
            f"max |difference| of logits on {self.tokens} validation tokens: {numbers} "
            f"(max |logit| {self.max_logit:.3g}){removed}; loss {_change(self.loss_before, self.loss_after, '.6f')}, "
            f"KL {self.kl:.2g}; gradient norm {_change(*self.gradient_norm, '.4g')}{failure}"
        )


def _change(before: float, after: float, digits: str) -> str:
    """Both numbers, or one if they are equal to the digits shown."""
    texts = dict.fromkeys((format(before, digits), format(after, digits)))
    return " -> ".join(texts)


def certify(
    params: tuple[Params, Params],
    growth: Growth,
    batch: Mapping[str, Any],
    point: GrowthPoint,
    *,
    placements: Placements | None = None,
    float64_below: int = 20_000_000,
    tolerance: float = 2e-5,
) -> Certificate:
    """Compare the models before and after growth on `batch`.

    Args:
        params: float32 parameters before and after growth. For the comparison in float64 the growth is repeated from
            the first tree; after a learned growth the second tree is converted instead.
        growth: the growth, with its key.
        batch: tokens, targets and loss weights (B, L); segment_ids and positions (B, L) if documents are kept apart.
        point: step and stage names of the growth.
        placements: of the old and of the new model; the batch's sequences must divide over the data axes of both.
        float64_below: largest number of parameters of the new model for which the float64 comparison is computed.
        tolerance: largest float32 difference that is accepted, relative to max |logit| (at least 1).

    Raises:
        AssertionError: of chex, naming the leaf, for parameters that do not have the shapes of the growth's models.
    """
    old, new, family = growth.old, growth.new, growth.family
    for tree, model in zip(params, (old, new), strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, abstract_params(model)[0])
    compare = functools.partial(_compare, growth, batch)
    in_run = compare(params, dtype=new.dtype, placements=placements, gradients=True)
    single = in_run
    if new.dtype != "float32" or jax.devices()[0].platform != "cpu":
        # An accelerator may multiply float32 at a lower precision, which says nothing about growth.
        with jax.default_matmul_precision("highest"):
            single = compare(params, dtype="float32", placements=placements)
    differences: dict[str, float | None] = {"run": in_run.difference, "float32": single.difference, "float64": None}
    limit, removed = tolerance * max(1.0, single.max_logit), single.mask_removed
    if count_parameters(params[1]) <= float64_below:
        with jax.enable_x64(True):
            exact = compare(_in_float64(params, growth), dtype="float64")
        differences["float64"], removed = exact.difference, exact.mask_removed
    sizes = {name: (getattr(old, name), getattr(new, name)) for name in SIZES}
    claim = family.claim
    if family.is_exact and old.vocab_size != new.vocab_size:
        claim += ", for the words of the old vocabulary"
    failure = _learning_failure(in_run, params)
    if failure is None and family.is_exact:
        failure = exactness_failure(single.difference, removed, in_run.kl, limit, new.dtype)
    return Certificate(
        family=growth.config.family,
        claim=claim,
        exact=family.is_exact,
        sizes={name: both for name, both in sizes.items() if both[0] != both[1]},
        parameters=(count_parameters(params[0]), count_parameters(params[1])),
        max_difference=differences,
        max_logit=in_run.max_logit,
        mask_removed=removed,
        kl=in_run.kl,
        run_dtype=new.dtype,
        loss_before=in_run.losses[0],
        loss_after=in_run.losses[1],
        gradient_norm=in_run.gradient_norms,
        rows=batch["tokens"].shape[0],
        tokens=batch["tokens"].size,
        tolerance=limit,
        failure=failure,
        **point._asdict(),
    )


def _in_float64(params: tuple[Params, Params], growth: Growth) -> tuple[Params, Params]:
    """Both trees in float64: the second is grown again from the first, or converted after a learned growth."""
    to_double = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree))
    before = to_double(params[0])
    if growth.family.tunes:
        return before, to_double(params[1])
    return before, jax.jit(lambda p, key: grow_params(p, dataclasses.replace(growth, key=key)))(before, growth.key)


class Comparison(NamedTuple):
    """Differences and losses of two models, computed in one dtype; the gradient norms are 0 if not requested."""

    difference: float
    max_logit: float
    mask_removed: float | None
    kl: float
    losses: tuple[float, float]
    gradient_norms: tuple[float, float]


def _compare(growth: Growth, batch: Mapping[str, Any], params: tuple[Params, Params], **settings: Any) -> Comparison:
    numbers = Comparison(*jax.tree.map(float, jit_comparison(growth, **settings)(params, batch)))
    # A KL divergence is not negative, but near 0 its terms of both signs are rounded by more than their sum.
    numbers = numbers._replace(kl=math.nan if math.isnan(numbers.kl) else max(numbers.kl, 0.0))
    return numbers if growth.family.ramps else numbers._replace(mask_removed=None)


def jit_comparison(growth: Growth, dtype: Dtype, placements: Placements | None = None, gradients: bool = False) -> Any:
    """The jitted program of a certificate: ((old, new) parameters, batch) -> the fields of a Comparison.

    Both models are compared on the old vocabulary: padded ids are left out, and so are new words, which have no logits
    before growth.
    """
    # Attention is "plain" in every dtype: the rounding of a fused kernel would hide the difference that growth makes.
    # Remat is "full", whatever the model trains with: all sequences and two models are in memory at once.
    old, is_masked = growth.old, growth.family.ramps
    before, after = (
        dataclasses.replace(c, dtype=dtype, attention="plain", scan_unroll=1, remat="full") for c in (old, growth.new)
    )

    def logits(params: Params, config: ModelConfig, batch: Mapping[str, jax.Array]) -> jax.Array:
        placement = None if placements is None else placements[config is after]
        y_BLV = forward(params, config, batch["tokens"], batch.get("segment_ids"), batch.get("positions"), placement)
        return jnp.where(real_ids(old), y_BLV[..., : old.padded_vocab_size], -jnp.inf)

    def loss(params: Params, config: ModelConfig, batch: Mapping[str, jax.Array]) -> Any:
        if config is after and is_masked:
            params = masked(params, growth, 0.0)
        y_BLV = logits(params, config, batch)
        loss_BL, log_probs_BLV = token_cross_entropy(y_BLV, batch["targets"])
        return _weighted_mean(loss_BL, batch["weights"]), (y_BLV, log_probs_BLV)

    def compare(params: tuple[Params, Params], batch: Mapping[str, jax.Array]) -> Any:
        results = []
        for p, config in zip(params, (before, after), strict=True):
            if gradients:
                (mean, aux), grads = jax.value_and_grad(loss, has_aux=True)(p, config, batch)
                if placements is not None:  # pinned, else the partitioner may not shard them
                    mesh = placements[config is after].mesh
                    grads = jax.lax.with_sharding_constraint(grads, tree_shardings(mesh, abstract_params(config)[1]))
                norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
            else:
                (mean, aux), norm = loss(p, config, batch), jnp.zeros(())
            results.append((mean, norm, aux))
        (loss_a, norm_a, (y_a, log_a)), (loss_b, norm_b, (y_b, log_b)) = results
        real = real_ids(old)
        kl_BL = jnp.sum(jnp.where(real, jnp.exp(log_a) * (log_a - log_b), 0), axis=-1)
        removed = jnp.zeros(())
        if is_masked:
            opened = logits(masked(params[1], growth, 1.0), after, batch)
            removed = jnp.max(jnp.where(real, jnp.abs(opened - logits(params[1], after, batch)), 0))
        return (
            jnp.max(jnp.where(real, jnp.abs(y_a - y_b), 0)),
            jnp.max(jnp.where(real, jnp.abs(y_a), 0)),
            removed,
            _weighted_mean(kl_BL, batch["weights"]),
            (loss_a, loss_b),
            (norm_a, norm_b),
        )

    # A growth point runs the program once: on a CPU compiling it costs more than running it, so it is not optimised.
    device = jax.devices()[0] if placements is None else placements[0].mesh.devices.flat[0]
    quick = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    return jax.jit(compare, compiler_options=quick)


def exactness_failure(difference: float, removed: float | None, kl: float, limit: float, dtype: str) -> str | None:
    """Reason why a growth is not exact; None if it is.

    Args:
        difference: max |difference| of float32 logits before and after growth.
        removed: max |difference| of logits with the growth mask fully open and without it; None if there is no mask.
        kl: KL divergence in nats a token, computed in `dtype`.
        limit: largest value that is accepted for both differences.
    """
    for name, value, bound in (
        ("max |difference| of float32 logits", difference, limit),
        ("max |difference| of logits when the growth mask is removed", removed, limit),
        (f"KL divergence in {dtype}", kl, MAX_KL),
    ):
        try:
            chex.assert_trees_all_close(0.0 if value is None else value, 0.0, rtol=0, atol=bound)
        except AssertionError:  # also raised for NaN
            return f"is not exact: {name} {value:.3g} exceeds {bound:.3g}"
    return None


def _learning_failure(in_run: Comparison, params: tuple[Params, Params]) -> str | None:
    """Reason why the grown model cannot learn; None if it can.

    Example: a tied embedding of zeros under xPos has no gradient, and an exact growth keeps the zeros.
    """
    norm = in_run.gradient_norms[1]
    if not math.isfinite(norm):
        return f"has a gradient that is not finite: its norm is {norm}, and was {in_run.gradient_norms[0]}"
    if norm > 0:
        return None
    pairs = zip(jax.tree_util.tree_leaves_with_path(params[0]), jax.tree.leaves(params[1]), strict=True)
    zeros = [
        f"{path_name(path)} {old.shape} -> {new.shape}"
        for (path, old), new in pairs
        if old.ndim > 1 and path[-1].key != "bias" and not (jnp.any(old) or jnp.any(new))
    ]
    return (
        "produces a model that cannot learn, because its gradient is 0 everywhere; matrices of zeros: "
        f"{', '.join(zeros) or 'none'}; family 'perturb' would fill them"
    )


def _weighted_mean(values_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    return jnp.sum(values_BL * weights_BL) / divisor(jnp.sum(weights_BL))
