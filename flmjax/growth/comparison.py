"""Programs of a growth certificate: both models' logits on the same tokens, beside the rounding of the old model."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from flmjax.config import Dtype, ModelConfig
from flmjax.growth.grow import grow_params
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import masked
from flmjax.growth.rescaled import Factors, draw_factors, rescaled
from flmjax.model.loss import divisor, token_cross_entropy
from flmjax.model.microbatches import in_parts
from flmjax.model.transformer import abstract_params, count_parameters, forward, real_ids
from flmjax.sharding.axes import Params, path_name
from flmjax.sharding.reshard import reshard
from flmjax.sharding.rules import Placement, batch_sharding, constrain, tree_shardings, whole_rows

# Rescaled models whose largest difference is the own rounding. Where one token amplifies roundings far more than the
# others, its error decides, which is one draw of a distribution around 0: a single model may be near 0 there by chance.
DRAWS = 4


Placements = tuple[Placement, Placement]  # sharding of the activations of the old and of the new model


class Difference(NamedTuple):
    """Difference of two models' logits over the old vocabulary, on a batch.

    Attributes:
        max, rms: the largest absolute value, and the root mean square.
        row: the sequence of the batch and the token in it, from 0, where the largest value stands.
        kl: mean KL(first || second) in nats a token.
    """

    max: float
    rms: float
    row: tuple[int, int]
    kl: float


class Comparison(NamedTuple):
    """Two models compared in one dtype; the gradient norms are 0 if not requested.

    Attributes:
        growth: difference of the models before and after growth.
        rounding: difference of the old model and of the same function computed with other numbers (rescaled.py), the
            largest of DRAWS.
        losses, gradient_norms: before and after growth.
    """

    growth: Difference
    rounding: Difference
    max_logit: float
    losses: tuple[float, float]
    gradient_norms: tuple[float, float]


class Measurement(NamedTuple):
    """Comparisons of the models before and after growth in three dtypes.

    Attributes:
        in_run: in the run's dtype, with gradients.
        in_float32: with float32 products; the same as in_run for a float32 run on a CPU.
        in_float64: of a sample of the sequences; None if not computed.
        errors: the largest difference of each grown parameter, by its path, and of the growth repeated in float64,
            relative to the parameter's largest value; {} without float64 and after a learned growth.
        mask_changes: the same of each parameter under the fully open growth mask and without it, in float64 or else in
            float32; {} for a growth without a mask.
        float64_rows: number of sequences in the float64 comparison.
    """

    in_run: Comparison
    in_float32: Comparison
    in_float64: Comparison | None = None
    errors: Mapping[str, float] = MappingProxyType({})
    mask_changes: Mapping[str, float] = MappingProxyType({})
    float64_rows: int = 0

    def by_dtype(self) -> dict[str, Comparison | None]:
        """The comparisons by the keys "run", "float32" and "float64"."""
        return {"run": self.in_run, "float32": self.in_float32, "float64": self.in_float64}


def measure(
    params: tuple[Params, Params],
    growth: Growth,
    batch: Mapping[str, jax.Array],
    placements: Placements | None,
    float64_below: int,
    roundings: float,
) -> Measurement:
    """The comparisons of a certificate; the arguments are those of certificate.certify.

    In float64 the growth is repeated from the old parameters; after a learned growth the new ones are converted.
    """
    dtype = growth.new.dtype
    in_run = in_float32 = compare(jit_comparison(growth, dtype, placements, gradients=True), params, batch)
    if dtype != "float32" or jax.devices()[0].platform != "cpu":
        # An accelerator may multiply float32 at a lower precision, which says nothing about growth.
        with jax.default_matmul_precision("highest"):
            in_float32 = compare(jit_comparison(growth, "float32", placements), params, batch)
    # A TPU has no float64: XLA computes it with pairs of float32, in many times the time.
    if count_parameters(params[1]) > float64_below or jax.devices()[0].platform == "tpu":
        changes = jax.jit(lambda grown: _mask_changes(grown, growth))(params[1])
        return Measurement(in_run, in_float32, mask_changes=_by_path(changes))
    with jax.enable_x64(True):
        rows, stride = _sample(batch, placements)
        both, errors, changes = _in_float64(params, growth, placements)
        program = jit_comparison(growth, "float64", placements, rounding=False)
        in_float64 = compare(program, both, rows)._replace(rounding=_float64_rounding(in_float32.rounding))
        if not in_float64.growth.max <= roundings * in_float64.rounding.max:
            # Wrong, or float32 keeps so few digits of a logit that nothing follows from its rounding: it is measured.
            in_float64 = compare(jit_comparison(growth, "float64", placements), both, rows)
    (sequence, token), float64_rows = in_float64.growth.row, len(rows["tokens"])
    in_float64 = in_float64._replace(growth=in_float64.growth._replace(row=(sequence * stride, token)))
    return Measurement(in_run, in_float32, in_float64, _by_path(errors), _by_path(changes), float64_rows)


def _float64_rounding(rounding: Difference) -> Difference:
    """The own rounding in float64 by that in float32: the unit of rounding is 2^-29 of float32's.

    Measured for 2 to 80 layers, float64 had 0.3 to 2.1 times that; it no longer holds where the rounding in float32
    exceeds a tenth of max |logit|. It saves compiling the rescaled model once more: a tenth of a small model's
    certificate on a CPU.
    """
    return Difference(rounding.max * 2.0**-29, rounding.rms * 2.0**-29, rounding.row, rounding.kl * 2.0**-58)


def _sample(batch: Mapping[str, jax.Array], placements: Placements | None) -> tuple[Mapping[str, jax.Array], int]:
    """The first sequence of each data shard, and the number of sequences from one to the next.

    Their logits are enough to find a wrong parameter; more would take long on devices that are slow in float64.
    """
    shards = 1 if placements is None else whole_rows(1, *(placement.mesh for placement in placements))
    sharding = None if placements is None else batch_sharding(placements[1].mesh)

    def first(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: x.reshape(shards, -1, *x.shape[1:])[:, 0] for name, x in batch.items()}

    return jax.jit(first, out_shardings=sharding)(batch), len(batch["tokens"]) // shards


def _in_float64(
    params: tuple[Params, Params], growth: Growth, placements: Placements | None
) -> tuple[tuple[Params, Params], Params, Params]:
    """Both trees in float64, the errors and the mask_changes of a Measurement."""

    shardings = None  # pinned, else the partitioner may not shard the parameters
    if placements is not None:
        before_axes = abstract_params(growth.old)[1]
        old, new = placements
        moved_shardings = tree_shardings(new.mesh, before_axes)
        shardings = tree_shardings(old.mesh, before_axes), tree_shardings(new.mesh, abstract_params(growth.new)[1])

    def program(before: Params, after: Params, key: jax.Array) -> tuple[tuple[Params, Params], Params, Params]:
        before, converted = (jax.tree.map(lambda x: x.astype(jnp.float64), tree) for tree in (before, after))
        if growth.family.tunes:
            return (before, converted), {}, {}
        moved = before if shardings is None else jax.tree.map(reshard, before, shardings[0], moved_shardings)
        grown = grow_params(moved, dataclasses.replace(growth, key=key))
        return (before, grown), _changes(grown, converted), _mask_changes(grown, growth)

    out_shardings = None if shardings is None else (shardings, None, None)
    return jax.jit(program, out_shardings=out_shardings)(*params, growth.key)


def _changes(before: Params, after: Params) -> Params:
    """Largest absolute change of each parameter, divided by its largest absolute value before."""

    def change(x: jax.Array, y: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.abs(x))
        return jnp.max(jnp.abs(y - x)) / jnp.where(largest > 0, largest, 1)

    changes: Params = jax.tree.map(change, before, after)
    return changes


def _mask_changes(grown: Params, growth: Growth) -> Params:
    return _changes(grown, masked(grown, growth, 1.0)) if growth.family.ramps else {}


def _by_path(changes: Params) -> dict[str, float]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(changes))
    return {path_name(path): float(change) for path, change in leaves}


def compare(program: Any, params: tuple[Params, Params], batch: Mapping[str, jax.Array]) -> Comparison:
    """The numbers that a program of `jit_comparison` computes.

    Args:
        params: parameters before and after growth.
        batch: tokens, targets and loss weights (B, L); segment_ids and positions (B, L) if documents are kept apart.
    """
    growth, rounding, max_logit, losses, norms = jax.device_get(program(params, batch))
    return Comparison(
        _in_python(*growth),
        _in_python(*rounding),
        float(max_logit),
        (float(losses[0]), float(losses[1])),
        (float(norms[0]), float(norms[1])),
    )


def _in_python(largest: Any, rms: Any, row: Any, kl: Any) -> Difference:
    # A KL divergence is not negative, but near 0 its terms of both signs are rounded by more than their sum.
    return Difference(
        float(largest), float(rms), (int(row[0]), int(row[1])), math.nan if math.isnan(kl) else max(float(kl), 0.0)
    )


def jit_comparison(
    growth: Growth,
    dtype: Dtype,
    placements: Placements | None = None,
    gradients: bool = False,
    rounding: bool = True,
) -> Any:
    """The jitted program of a certificate: ((old, new) parameters, batch) -> the fields of a Comparison.

    Without `rounding` the own rounding is NaN.
    """
    models = _Models(growth, dtype, placements)
    shards = 1 if placements is None else whole_rows(1, *(placement.mesh for placement in placements))

    def program(params: tuple[Params, Params], batch: Mapping[str, jax.Array]) -> Any:
        weights_BL = batch["weights"]
        parts = max(len(weights_BL) // shards, 1)
        grads, tokens = in_parts(lambda part, _: models.compare(params, part, gradients, rounding), batch, parts)
        largest = jnp.nan, jnp.nan, (0, 0), jnp.nan
        if rounding:
            draws = jax.vmap(functools.partial(_summary, weights_BL=weights_BL), in_axes=-1)(tokens["rounding"])
            largest = jax.tree.map(lambda x: x[jnp.argmax(draws[0])], draws)
        norms = [_norm(grad) / divisor(jnp.sum(weights_BL)) for grad in grads]
        return (
            _summary(tokens["growth"], weights_BL),
            largest,
            jnp.max(tokens["largest"]),
            tuple(_weighted_mean(loss_BL, weights_BL) for loss_BL in tokens["loss"]),
            tuple(norms) or (jnp.zeros(()), jnp.zeros(())),
        )

    # A growth point runs the program once: on a CPU compiling it costs more than running it, so it is not optimised.
    device = jax.devices()[0] if placements is None else placements[0].mesh.devices.flat[0]
    quick = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    return jax.jit(program, compiler_options=quick)


class _Models:
    """The models before and after a growth, as a certificate computes them.

    Both are compared on the old vocabulary: padded ids are left out, and so are new words, which have no logits before
    growth. Attention is "plain" in every dtype: the rounding of a fused kernel would hide the difference that growth
    makes. Remat is "full", whatever the model trains with: two models are in memory at once.
    """

    def __init__(self, growth: Growth, dtype: Dtype, placements: Placements | None):
        self._growth = growth
        self._configs = tuple(
            dataclasses.replace(c, dtype=dtype, attention="plain", scan_unroll=1, remat="full")
            for c in (growth.old, growth.new)
        )
        self._placements = placements or (None, None)

    @property
    def _real(self) -> jax.Array:
        return real_ids(self._growth.old)

    def compare(
        self, params: tuple[Params, Params], batch: Mapping[str, jax.Array], gradients: bool, rounding: bool
    ) -> tuple[list[Params], dict[str, Any]]:
        """(gradients of both models' summed losses, or []; arrays of the tokens by name).

        The names are "loss", "largest", "growth" and, with `rounding`, "rounding"; the last two are _TokenDifferences.
        """
        grads, losses, outputs = [], [], []
        for index, (p, config, placement) in enumerate(zip(params, self._configs, self._placements, strict=True)):
            if gradients:
                (_, (loss_BL, output)), grad = jax.value_and_grad(self._loss, has_aux=True)(p, index, batch)
                grads.append(_pinned(grad, config, placement))
            else:
                loss_BL, output = self._loss(p, index, batch)[1]
            losses.append(loss_BL)
            outputs.append(output)
        before, after = outputs
        largest_BL = jnp.max(jnp.where(self._real, jnp.abs(before[0]), 0), axis=-1)
        moved = (self._on_new_mesh(before[0]), self._on_new_mesh(before[1]))
        growth = _difference(moved, after, self._real)
        tokens: dict[str, Any] = {"loss": losses, "largest": largest_BL, "growth": growth}
        if rounding:

            def own_rounding(by: Factors) -> _TokenDifference:
                y_BLV = self._logits(*rescaled(params[0], self._configs[0], by), self._placements[0], batch)
                return _difference(before, (y_BLV, jax.nn.log_softmax(y_BLV, axis=-1)), self._real)

            draws = jax.lax.map(own_rounding, draw_factors(self._growth.old, DRAWS))
            tokens["rounding"] = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), draws)  # sequences first
        return grads, tokens

    def _on_new_mesh(self, x_BLV: jax.Array) -> jax.Array:
        """The old model's logits or log-probabilities with the new model's sharding; XLA alone may gather them."""
        old, new = self._placements
        if old is None or new is None:
            return x_BLV
        old_sharding, new_sharding = (NamedSharding(p.mesh, p.spec("batch", None, "vocab")) for p in (old, new))
        return reshard(x_BLV, old_sharding, new_sharding)

    def _loss(self, params: Params, index: int, batch: Mapping[str, jax.Array]) -> Any:
        """(summed loss, (losses of the tokens, (logits, log-probabilities))) of the model before or after growth."""
        if index == 1 and self._growth.family.ramps:
            params = masked(params, self._growth, 0.0)
        y_BLV = self._logits(params, self._configs[index], self._placements[index], batch)
        loss_BL, log_probs_BLV = token_cross_entropy(y_BLV, batch["targets"])
        # Without this pin XLA gives the old model's log-probabilities the new model's sharding, and gathers them.
        log_probs_BLV = constrain(self._placements[index], log_probs_BLV, "batch", None, "vocab")
        return jnp.sum(loss_BL * batch["weights"]), (loss_BL, (y_BLV, log_probs_BLV))

    def _logits(
        self, params: Params, config: ModelConfig, placement: Placement | None, batch: Mapping[str, jax.Array]
    ) -> jax.Array:
        extras = batch.get("segment_ids"), batch.get("positions")
        y_BLV = forward(params, config, batch["tokens"], *extras, placement)
        return jnp.where(self._real, y_BLV[..., : self._growth.old.padded_vocab_size], -jnp.inf)


def _pinned(grads: Params, config: ModelConfig, placement: Placement | None) -> Params:
    """Gradients with the parameters' shardings; unpinned, the partitioner may not shard them."""
    if placement is None:
        return grads
    return jax.lax.with_sharding_constraint(grads, tree_shardings(placement.mesh, abstract_params(config)[1]))


def _norm(grads: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))


class _TokenDifference(NamedTuple):
    """Difference of two models' logits for each token (B, L): the largest, the mean square, KL(first || second)."""

    largest: jax.Array
    square: jax.Array
    kl: jax.Array


def _difference(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array], real: jax.Array) -> _TokenDifference:
    """The difference of two models' (logits, log-probabilities), each (B, L, V), over the `real` ids (V,)."""
    (y_a, log_a), (y_b, log_b) = a, b
    difference_BLV = jnp.where(real, jnp.abs(y_a - y_b), 0)
    return _TokenDifference(
        jnp.max(difference_BLV, axis=-1),
        jnp.sum(jnp.square(difference_BLV), axis=-1) / jnp.sum(real),
        jnp.sum(jnp.where(real, jnp.exp(log_a) * (log_a - log_b), 0), axis=-1),
    )


def _summary(tokens: _TokenDifference, weights_BL: jax.Array) -> tuple[Any, ...]:
    """The fields of a Difference."""
    row = jnp.unravel_index(jnp.argmax(tokens.largest), tokens.largest.shape)
    # Summed by tokens first: one float32 sum of 1e10 squares would stop growing.
    rms = jnp.sqrt(jnp.mean(tokens.square))
    return jnp.max(tokens.largest), rms, row, _weighted_mean(tokens.kl, weights_BL)


def _weighted_mean(values_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    return jnp.sum(values_BL * weights_BL) / divisor(jnp.sum(weights_BL))
