"""Growth certificate: logits, losses and gradients of the models before and after growth, compared on real tokens.

Accepted is a max |difference| of at most `roundings` times the old model's own rounding: the difference of its logits
and those of the same function computed with other numbers (rescaled.py), on the same tokens, by the same program, in
the same dtype. Depth and large kernels amplify the roundings of a growth and those of the old model alike. The table
has the measured ratio max |difference| / own rounding after exact growths, least and largest of the families zero,
duplicate and mask in two blocks (width 64 -> 112, MLP, heads and depth grow too; 1e5 logits, random parameters), and
in brackets the largest own rounding / max |logit|. Where that is near 1 the dtype keeps no digit of a logit, and its
comparison accepts everything; what decides is another dtype, or of bfloat16 the KL divergence:

    layers  kernels  float32              float64              bfloat16
    2       x 1      0.6 to 1.0 (3e-6)    0.6 to 0.8 (5e-15)   0.4 to 0.7 (0.05)
    2       x 8      0.3 to 1.6 (3e-4)    0.6 to 1.1 (3e-13)   0.3 to 0.8 (0.6)
    20      x 4      0.5 to 1.5 (2e-3)    0.4 to 1.2 (4e-12)   0.8 to 1.0 (1)
    80      x 1      0.6 to 0.8 (1e-5)    0.8 to 0.9 (2e-14)   0.5 to 1.0 (0.3)
    80      x 8      0.3 to 1.1 (0.9)     0.2 to 1.1 (1e-4)    0.7 to 1.1 (1)

Both maxima are taken over the same logits and grow alike, about as sqrt(2 ln n). Family zero, 2 layers: 0.9 at 6e5
logits, 0.7 at 1e7, 0.5 at 1e8 (the largest of four draws grows a little faster than one). FLM-101B compares 192 x 2048
x 100,256 = 4e10 logits; extrapolated, both are 1.15 times those at 1e8 (sqrt(ln 4e10 / ln 1e8)) and their ratio does
not grow.

Costs in forward passes of a model (a gradient with recomputation is 4): in the run's dtype 8 of the old and 4 of the
new, in float32 of a bfloat16 run 5 and 1 more, on certificate_rows sequences. Before FLM-101B's second stage, with
float32 16 times as slow as bfloat16: 192 x (8 x 16 + 4 x 51 + 16 (5 x 16 + 51)) of 8,400 x 2,304 x 4 x 51, 0.01 %;
before the quickstart's second stage 0.7 % of its FLOPs. Small models pay for compiling, about 10 s on a CPU.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from flmjax.config import SIZES, RunConfig
from flmjax.disk import writing
from flmjax.growth.comparison import Comparison, Measurement, Placements, measure
from flmjax.growth.growth import Growth
from flmjax.growth.rules import GrowthError
from flmjax.model.transformer import abstract_params, count_parameters
from flmjax.sharding.axes import Params, path_name

MAX_KL = 1e-3  # nats a token, in the run's dtype; a trained model's rounding in bfloat16 causes about 1e-5
KL_ROUNDINGS = 4  # accepted KL divergence in multiples of the own rounding's, where that is above MAX_KL
PARAMETER_TOLERANCE = 1e-5  # of a parameter's largest value; float32 growth rounds it a few times, by 6e-8 each


class GrowthPoint(NamedTuple):
    """A growth in a run's history: the number of updates before it, and the names of the stages before and after it."""

    step: int
    from_stage: str
    to_stage: str


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Result of comparing the models before and after growth; a growth point prints and stores it.

    The dictionaries have the keys "run" (computed in the run's dtype), "float32" and "float64" (None: not computed).

    Attributes:
        claim: the family's claim in words (families.py).
        exact: whether the family claims that the function stays the same.
        max_difference, rms_difference: of the logits before and after, over the old vocabulary.
        row: the sequence and the token in it, from 0, where max_difference stands.
        rounding, rms_rounding: the same numbers of the old model's own rounding; those of float64 follow from float32
            where that accepts the growth, else they are measured.
        max_logit: max |logit before|.
        mask_removed: largest difference of a parameter under the fully open growth mask and without it, relative to the
            parameter's largest value, in the widest dtype that was computed; None for a growth without a mask.
        parameter_error: largest difference of a grown parameter and of the same growth repeated in float64, relative
            to the parameter's largest value; None without float64 and after a learned growth.
        kl, kl_rounding: mean KL(before || after) in nats a token, and that of the old model's own rounding; like losses
            and gradient norms they are computed in the run's dtype.
        rows, float64_rows: number of sequences that are compared, and of those that are compared in float64.
        roundings: largest difference that is accepted, in multiples of the own rounding.
        tolerance: largest max_difference in float32 that is accepted.
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
    rms_difference: dict[str, float | None]
    row: dict[str, tuple[int, int] | None]
    rounding: dict[str, float | None]
    rms_rounding: dict[str, float | None]
    max_logit: float
    mask_removed: float | None
    parameter_error: float | None
    kl: float
    kl_rounding: float
    run_dtype: str
    loss_before: float
    loss_after: float
    gradient_norm: tuple[float, float]
    rows: int
    float64_rows: int
    tokens: int
    roundings: float
    tolerance: float
    failure: str | None = None

    def check(self) -> None:
        """Refuse a growth that does not keep its claim.

        Raises:
            GrowthError: if the family claims exactness and a difference exceeds its bar or is NaN, or if the grown
                model cannot learn.
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
        result = "accepted" if self.failure is None else f"FAILED: {self.failure}"
        bar = f" ({self.roundings:g} times that is accepted)" if self.exact else ""
        removed = (
            ""
            if self.mask_removed is None
            else f"; removing the open growth mask changes a parameter by at most {self.mask_removed:.2g}"
        )
        return (
            f"growth certificate at step {self.step}: {self.from_stage} -> {self.to_stage} by '{self.family}' "
            f"({self.claim}); {sizes}; parameters {self.parameters[0]:,} -> {self.parameters[1]:,}; "
            f"max |difference| of logits on {self.tokens:,} validation tokens, beside the old model's own rounding"
            f"{bar}: {self._differences()} (max |logit| {self.max_logit:.3g}){removed}; "
            f"loss {_change(self.loss_before, self.loss_after, '.6f')}, "
            f"KL {self.kl:.2g}, of own rounding {self.kl_rounding:.2g}; "
            f"gradient norm {_change(*self.gradient_norm, '.4g')}; {result}"
        )

    def _differences(self) -> str:
        """Each dtype's largest difference and own rounding; of the run's also the root mean square and the row."""
        texts = []
        for key, value in self.max_difference.items():
            if value is None or (key == self.run_dtype and value == self.max_difference["run"]):
                continue
            text = f"{self.run_dtype if key == 'run' else key} {value:.2g} beside {self.rounding[key]:.2g}"
            if key == "run":
                sequence, token = self.row[key] or (0, 0)
                text += f" (the run; rms {self.rms_difference[key]:.2g}, largest in sequence {sequence}, token {token})"
            texts.append(text)
        return ", ".join(texts)


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
    float64_below: int = RunConfig.certificate_float64_below,
    roundings: float = RunConfig.certificate_roundings,
) -> Certificate:
    """Compare the models before and after growth on `batch`.

    Args:
        params: float32 parameters before and after growth.
        growth: the growth, with its key.
        batch: tokens, targets and loss weights (B, L); segment_ids and positions (B, L) if documents are kept apart.
        point: step and stage names of the growth.
        placements: of the old and of the new model; the batch's sequences must divide over the data axes of both.
        float64_below: largest number of parameters of the new model for which the float64 comparison is computed.
        roundings: largest difference that is accepted, in multiples of the old model's own rounding.

    Raises:
        AssertionError: of chex, naming the leaf, for parameters that do not have the shapes of the growth's models.
    """
    old, new, family = growth.old, growth.new, growth.family
    for tree, model in zip(params, (old, new), strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, abstract_params(model)[0])
    measured = measure(params, growth, batch, placements, float64_below, roundings)
    failure = _learning_failure(measured.in_run, params)
    if failure is None and family.is_exact:
        failure = exactness_failure(measured, roundings, new.dtype)
    claim = family.claim
    if family.is_exact and old.vocab_size != new.vocab_size:
        claim += ", for the words of the old vocabulary"
    sizes = {name: (getattr(old, name), getattr(new, name)) for name in SIZES}
    return Certificate(
        family=growth.config.family,
        claim=claim,
        exact=family.is_exact,
        sizes={name: both for name, both in sizes.items() if both[0] != both[1]},
        parameters=(count_parameters(params[0]), count_parameters(params[1])),
        run_dtype=new.dtype,
        rows=batch["tokens"].shape[0],
        tokens=batch["tokens"].size,
        roundings=roundings,
        tolerance=roundings * measured.in_float32.rounding.max,
        failure=failure,
        **_numbers(measured),
        **point._asdict(),
    )


def _numbers(measured: Measurement) -> dict[str, Any]:
    """The fields of a Certificate that are read from the comparisons alone."""
    in_run = measured.in_run

    def by_dtype(read: Callable[[Comparison], Any]) -> dict[str, Any]:
        return {key: None if c is None else read(c) for key, c in measured.by_dtype().items()}

    return {
        "max_difference": by_dtype(lambda c: c.growth.max),
        "rms_difference": by_dtype(lambda c: c.growth.rms),
        "row": by_dtype(lambda c: c.growth.row),
        "rounding": by_dtype(lambda c: c.rounding.max),
        "rms_rounding": by_dtype(lambda c: c.rounding.rms),
        "max_logit": in_run.max_logit,
        "mask_removed": _largest(measured.mask_changes)[1] if measured.mask_changes else None,
        "parameter_error": _largest(measured.errors)[1] if measured.errors else None,
        "kl": in_run.growth.kl,
        "kl_rounding": in_run.rounding.kl,
        "loss_before": in_run.losses[0],
        "loss_after": in_run.losses[1],
        "gradient_norm": in_run.gradient_norms,
        "float64_rows": measured.float64_rows,
    }


def _largest(errors: Mapping[str, float]) -> tuple[str, float]:
    """(path, error) of the parameter with the largest error; NaN is larger than every number."""
    return max(errors.items(), key=lambda item: (math.isnan(item[1]), item[1]))


def exactness_failure(measured: Measurement, roundings: float, dtype: str) -> str | None:
    """Reason why a growth is not exact; None if it is.

    Args:
        measured: comparisons of the models before and after growth.
        roundings: largest difference that is accepted, in multiples of the old model's own rounding.
        dtype: the run's dtype.
    """
    bars = []  # (name of the value, value, largest value that is accepted, what the bar is)
    names = {"float32": "float32 logits", "float64": "float64 logits", "run": f"{dtype} logits (the run)"}
    for key, name in names.items():
        c = measured.by_dtype()[key]
        if c is not None and not (key == "run" and c is measured.in_float32):
            row = f" (sequence {c.growth.row[0]}, token {c.growth.row[1]})"
            bar_words = f"{roundings:g} times the old model's own rounding"
            bars.append((f"max |difference| of {name}{row}", c.growth.max, roundings * c.rounding.max, bar_words))
            bars.append((f"rms difference of {name}", c.growth.rms, roundings * c.rounding.rms, bar_words))
    kl, rounding_kl = measured.in_run.growth.kl, measured.in_run.rounding.kl
    bars.append((f"KL divergence in {dtype}", kl, max(MAX_KL, KL_ROUNDINGS * rounding_kl), "the accepted nats a token"))
    for changes, cause in (
        (measured.mask_changes, "when the open growth mask is removed"),
        (measured.errors, "from the growth repeated in float64"),
    ):
        if changes:
            path, change = _largest(changes)
            bars.append((f"difference of {path} {cause}", change, PARAMETER_TOLERANCE, "of its largest value"))
    for name, value, bar, meaning in bars:
        if not value <= bar:  # so is NaN
            return f"is not exact: {name} is {value:.3g} and exceeds {bar:.3g}, {meaning}"
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
