"""Proof that a growth kept the function: logits of both models on real tokens."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flmjax.config import SIZES, ModelConfig
from flmjax.growth.grow import grow_params
from flmjax.growth.operators import GrowthError
from flmjax.model.transformer import count_parameters, forward, real_ids


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What a growth point prints and stores. Differences are max |logit old - logit new|; losses in nats a token."""

    step: int
    from_stage: str
    to_stage: str
    family: str
    exact: bool
    sizes: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    max_difference: dict[str, float | None]  # "run" (its dtype), "float32", "float64" (None: not recomputed)
    max_logit: float
    run_dtype: str
    loss_before: float
    loss_after: float
    rows: int
    tokens: int
    tolerance: float

    def check(self) -> None:
        """Raise GrowthError if the float32 difference exceeds the tolerance, or is not a number."""
        difference = self.max_difference["float32"]
        if difference is None or not difference <= self.tolerance:
            raise GrowthError(
                f"growth {self.from_stage} -> {self.to_stage} by '{self.family}' is not exact: max |difference| of "
                f"float32 logits {difference:.3g} exceeds {self.tolerance:.3g}; nothing was overwritten"
            )

    def save(self, directory: Path) -> Path:
        """Write step_NNNNNNNN.json."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"step_{self.step:08d}.json"
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        return path

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in self.sizes.items())
        numbers = ", ".join(
            f"{self.run_dtype if name == 'run' else name} {value:.2g}{' (the run)' if name == 'run' else ''}"
            for name, value in self.max_difference.items()
            if value is not None
        )
        return (
            f"growth certificate at step {self.step}: {self.from_stage} -> {self.to_stage} by '{self.family}'; "
            f"{sizes}; "
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,}; max |difference| of logits on "
            f"{self.tokens} validation tokens: {numbers} (max |logit| {self.max_logit:.3g}); "
            f"loss {self.loss_before:.6f} -> {self.loss_after:.6f}"
        )


def certify(
    old_params: Any,
    new_params: Any,
    old: ModelConfig,
    new: ModelConfig,
    batch: Mapping[str, Any],
    *,
    family: str,
    key: jax.Array,
    placement: Any = None,
    float64_below: int = 20_000_000,
    **labels: Any,
) -> Certificate:
    """Compare both models' logits on `batch` (tokens, targets, weights (B, L); segment_ids, positions if packed so).

    Args:
        old_params, new_params: float32 trees before and after growth.
        family, key: of the growth; in float64 it is done again from `old_params`.
        placement: activations' sharding; the batch's rows must divide over its data axes.
        float64_below: parameters of the new model up to which the float64 comparison is made.
        labels: step, from_stage, to_stage, tolerance of the certificate.
    """
    run = new.dtype
    pair = (old_params, new_params)
    difference, max_logit, losses = _compare(pair, old, new, batch, run, placement)
    differences: dict[str, float | None] = {"run": difference, "float32": difference, "float64": None}
    if run != "float32":
        differences["float32"] = _compare(pair, old, new, batch, "float32", placement)[0]
    if count_parameters(new_params) <= float64_below:
        with jax.enable_x64(True):
            double = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree))(old_params)
            grown = jax.jit(lambda p, k: grow_params(p, old, new, family, k))(double, key)
            differences["float64"] = _compare((double, grown), old, new, batch, "float64", None)[0]
    sizes = {name: (getattr(old, name), getattr(new, name)) for name in SIZES}
    return Certificate(
        family=family,
        exact=True,
        sizes={name: pair for name, pair in sizes.items() if pair[0] != pair[1]},
        parameters=(count_parameters(old_params), count_parameters(new_params)),
        max_difference=differences,
        max_logit=max_logit,
        run_dtype=run,
        loss_before=losses[0],
        loss_after=losses[1],
        rows=batch["tokens"].shape[0],
        tokens=batch["tokens"].size,
        **labels,
    )


def _compare(
    params: tuple[Any, Any],
    old: ModelConfig,
    new: ModelConfig,
    batch: Mapping[str, Any],
    dtype: str,
    placement: Any,
) -> tuple[float, float, tuple[float, float]]:
    """max |difference|, max |logit| and both mean losses, in `dtype`. Padded ids do not count."""
    # The plain attention in every dtype: a fused kernel's own rounding is not what is asked about.
    old, new = (dataclasses.replace(c, dtype=dtype, attention="plain") for c in (old, new))

    def compare(params: tuple[Any, Any], batch: Mapping[str, jax.Array]) -> Any:
        logits = [
            forward(p, c, batch["tokens"], batch.get("segment_ids"), batch.get("positions"), placement)
            for c, p in zip((old, new), params, strict=True)
        ]
        losses = [_mean_loss(y, batch["targets"], batch["weights"]) for y in logits]
        return (
            jnp.max(jnp.abs(logits[0] - logits[1])),
            jnp.max(jnp.where(real_ids(old), jnp.abs(logits[0]), 0)),
            losses,
        )

    # Not donated, not cached: a growth point runs it once.
    difference, max_logit, losses = jax.jit(compare)(params, batch)
    return float(difference), float(max_logit), (float(losses[0]), float(losses[1]))


def _mean_loss(logits_BLV: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits_BLV, axis=-1)
    nll_BL = -jnp.take_along_axis(log_probs, targets_BL[..., None], axis=-1)[..., 0]
    return jnp.sum(nll_BL * weights_BL) / jnp.maximum(jnp.sum(weights_BL), 1.0)
