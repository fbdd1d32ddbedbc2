"""Growth: the pair of an old and a new model, the family with its settings, and the key of all random draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import DERIVED, SIZES, GrowthConfig, ModelConfig, Stage, resize, split_factor
from flmjax.growth.families import Family, family_of
from flmjax.growth.rules import (
    Dimension,
    GrowthError,
    Rule,
    copy,
    dim_sizes,
    draw_share,
    fill,
    leaf_dims,
    leaf_sizes,
    scale,
)
from flmjax.optimizer.schedule import new_warmup
from flmjax.sharding.axes import AXES, LeafAxes, axis_sizes


@dataclasses.dataclass(frozen=True, eq=False)
class Growth:
    """A growth from one model to a larger model, checked at construction.

    Attributes:
        old, new: the models; `new` is config.resize(old, family, ...): no size smaller, the norm's epsilon scaled.
        config: the family and its settings.
        key: key of fresh parameters and of the shares of copies; None if nothing is drawn, as in a comparison.
        new_warmup: number of updates in which new parameters reach their full learning rate.

    Raises:
        ConfigError: for an unknown family, or heads that cannot become the new ones.
        GrowthError: naming the field and both values.
    """

    old: ModelConfig
    new: ModelConfig
    config: GrowthConfig
    key: jax.Array | None = None
    new_warmup: int = 0

    def __post_init__(self) -> None:
        family_of(self.config)
        _check(self.old, self.new, self.config.family)

    @classmethod
    def into(cls, stage: Stage, key: jax.Array | None = None) -> "Growth":
        """The growth at the start of `stage`, which must have a previous stage."""
        assert stage.previous is not None
        return cls(stage.previous.model, stage.model, stage.config.growth, key, new_warmup(stage.config))

    @functools.cached_property
    def family(self) -> Family:
        """The growth's family: its rules and its claim."""
        return family_of(self.config)

    @functools.cached_property
    def split(self) -> int:
        """Number of parts that each group of query heads splits into; 1 if groups are not split."""
        return split_factor(self.old, self.new)

    @functools.cached_property
    def dimensions(self) -> dict[str, Dimension]:
        """The dimensions that grow, by name. The shares of copies are drawn from the key once, for all leaves."""
        if isinstance(self.key, jax.core.Tracer):
            return self._dimensions()
        with jax.ensure_compile_time_eval():  # cached values must outlive the trace in which they are computed
            return self._dimensions()

    def _dimensions(self) -> dict[str, Dimension]:
        key = None if self.key is None else jax.random.fold_in(self.key, 1)
        dimensions = {}
        for i, name in enumerate(AXES):
            before, after = dim_sizes(name, self.old, self.split)[name], dim_sizes(name, self.new)[name]
            if before == after and (name != "vocab" or self.old.vocab_size == self.new.vocab_size):
                continue
            if name == "vocab":  # padded rows belong to no word
                before = int(self.old.vocab_size or 0)
            source = self.family.axes[name].source(before, after, self.old, self.new)
            assert source.shape == (after,), (name, source.shape)
            copies = np.where(source < 0, 1, np.bincount(source[source >= 0], minlength=before)[source])
            # The two dimensions of a rotated pair have one share, else the rotation would mix their gradients.
            pair = 2 if name == "head_dim" and self.new.is_rotary else 1
            axis_key = None if key is None else jax.random.fold_in(key, i)
            share = draw_share(source[::pair] // pair, copies[::pair], self.config, axis_key)
            share = np.repeat(share, pair) if isinstance(share, np.ndarray) else jnp.repeat(share, pair)
            dimensions[name] = Dimension(name, before, after, source, copies, share, self.old, self.new)
        return dimensions

    def rules_of(self, path: str, leaf: LeafAxes) -> list[tuple[int, Dimension, Rule]]:
        """(position, dimension, rule) of each growing dimension of a leaf.

        Raises:
            GrowthError: naming the leaf, both sizes and the axis that no rule covers.
        """
        rules = []
        for i, (axis, name) in enumerate(leaf_dims(leaf)):
            if name in self.dimensions:
                dimension, role = self.dimensions[name], str(leaf.role(axis))
                try:
                    rules.append((i, dimension, self.family.axes[name].rule(role, leaf, dimension)))
                except KeyError:
                    raise GrowthError(
                        f"{path}: no rule for axis '{axis}' ({role}) from {dimension.before} to {dimension.after}"
                    ) from None
        return rules

    def grow_leaf(
        self, path: str, leaf: LeafAxes, x: jax.Array, fresh: jax.Array | None = None, power: int = 0
    ) -> jax.Array:
        """One parameter of the larger model, or its first or second moment.

        It is computed by pads, selections and sums, never by updating a slice: XLA gathers a sharded array for that.

        Args:
            leaf: axes of the parameter.
            x: the parameter or moment of the old model.
            fresh: initial values of the larger model; None fills new places with 0, for moments.
            power: 0 for a parameter, 1 and 2 for its first and second moment.

        Raises:
            GrowthError: as rules_of, or if the shape of `x` is not the old model's.
        """
        shape = tuple(axis_sizes(self.old)[name] for name in leaf.names)
        if x.shape != shape:
            raise GrowthError(f"{path} has shape {x.shape}; the old configuration says {shape}")
        if (
            "kv_heads" in leaf.names and self.split > 1
        ):  # each part gets a copy of the key head, and an equal share of its gradient
            x = jnp.repeat(x, self.split, axis=leaf.names.index("kv_heads"))
            x = x * jnp.asarray(float(self.split) ** -power, x.dtype)
        rules = self.rules_of(path, leaf)
        out = copy(x.reshape(leaf_sizes(leaf, self.old, self.split)), {i: d.source for i, d, _ in rules})
        for i, _, rule in rules:
            out = scale(out, i, rule.weight if power == 0 else rule.moment_factor(power))
        if fresh is not None:
            fresh = fresh.reshape(leaf_sizes(leaf, self.new)).astype(x.dtype)
        for i, d, rule in sorted(
            rules, key=lambda entry: entry[1].name == "layers"
        ):  # layers last: a new layer is fresh in all its entries
            out = fill(out, i, d.is_new, "zero" if fresh is None else rule.fill, fresh)
        return out.reshape([axis_sizes(self.new)[name] for name in leaf.names])


def _check(old: ModelConfig, new: ModelConfig, family: str) -> None:
    """Raise GrowthError or ConfigError unless `new` is a larger version of `old` that can compute the same function."""
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before != after and not field.metadata and field.name not in (*SIZES, *DERIVED):
            raise GrowthError(f"growth cannot change {field.name} from {before} to {after}")
    for name in SIZES:
        before, after = (c.kv_heads if name == "num_kv_heads" else getattr(c, name) for c in (old, new))
        if after < before:
            raise GrowthError(f"{name} would shrink from {before} to {after}; growth needs every size to stay or grow")
    split_factor(old, new)
    expected = resize(old, family, **{name: getattr(new, name) for name in SIZES})
    if abs(new.norm_eps - expected.norm_eps) > 1e-9 * expected.norm_eps:
        raise GrowthError(
            f"norm_eps must be {expected.norm_eps} after growth, not {new.norm_eps}; take config.resize(old, ...)"
        )
    for name in ("base_mlp_dim", "base_heads_dim"):
        if getattr(new, name) != getattr(expected, name):
            raise GrowthError(
                f"{name} must be {getattr(expected, name)} after growth, not {getattr(new, name)}: other multipliers "
                "of muP would change the old matrices' rates; take config.resize(old, ...)"
            )
    # The old dimensions keep their frequencies. New dimensions may have any, unless they are copies.
    if new.is_rotary and new.rotated_dims != old.rotated_dims:
        raise GrowthError(
            f"rotary_dim must be {old.rotated_dims} after growth, not {new.rotary_dim}: other frequencies would turn "
            "the old dimensions by other angles; take config.resize(old, ...)"
        )
    already = old.head_dim > old.rotated_dims
    if new.rotary_repeat != (old if already else expected).rotary_repeat:
        raise GrowthError(
            f"rotary_repeat must be {expected.rotary_repeat} for family '{family}' from head_dim "
            f"{old.head_dim} to {new.head_dim}; take config.resize(old, '{family}', ...)"
        )
