"""Rules that say which weights of a checkpoint make which weights of our model, and the way back.

A rule names weights by templates: `"model.layers.{layer}.self_attn.{q|k|v}_proj.weight"`. A placeholder stands for an
integer (`{layer}`) or for one of some words (`{q|k|v}`). A placeholder on both sides of a rule stands for the same on
both. A placeholder on one side only (`{expert}`) counts the weights of that side: 0, 1, 2, ...
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paged_attn_layer._src.convert.lazy import LazyArray, Shape
from paged_attn_layer._src.convert.operations import (
    Operation,
    Transpose,
    apply_all,
    reverse_all,
    shapes_after_all,
)
from paged_attn_layer._src.convert.source import ConversionError, WeightSource
from paged_attn_layer._src.convert.templates import fill, parse, placeholders


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """Weights named `sources` become weights named `targets` by the operations, in turn.

    The operations get one array for each source and return one for each target. A source with a placeholder of its own
    is many arrays, in order: with sources `("{expert}.gate", "{expert}.up")` all gates come first, then all ups. A rule
    without targets names weights that the model does not use.

    Raises:
        ValueError: the names of one side do not all have the same placeholders.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()

    def __post_init__(self) -> None:
        for side in (self.sources, self.targets):
            if len({placeholders(name) for name in side}) > 1:
                raise ValueError(f"{', '.join(side)} must all have the same placeholders")

    def reverse(self) -> "WeightRule":
        """The rule from the targets to the sources."""
        return WeightRule(self.targets, self.sources, reverse_all(self.operations))

    def matches(self, targets: Mapping[str, Shape]) -> Iterator["WeightMatch"]:
        """The rule applied to a model: one match for each value of the placeholders on both sides.

        Args:
            targets: shapes of all weights of the model by name.

        Raises:
            ValueError: the model has only some of the rule's targets, or an operation does not fit their shapes.
        """
        found = [parse(template, name) for template in self.targets for name in targets]
        shared = placeholders(*self.sources) & placeholders(*self.targets)
        keys = [tuple((key, values[key]) for key in sorted(shared)) for values in found if values is not None]
        for key, count in collections.Counter(keys).items():
            yield self._match(dict(key), math.ceil(count / len(self.targets)), targets)

    def _match(self, values: Mapping[str, str], count: int, targets: Mapping[str, Shape]) -> "WeightMatch":
        """The match for these values; a placeholder that only the targets have counts to `count`."""
        names = _expand(self.targets, self.sources, values, count)
        try:
            shapes = shapes_after_all(reverse_all(self.operations), [_shape_of(name, targets) for name in names])
        except ValueError as error:
            raise ValueError(f"the rule that makes {', '.join(names)} does not fit: {error}") from error
        sources = _expand(self.sources, self.targets, values, len(shapes) // len(self.sources))
        if len(sources) != len(shapes):
            raise ValueError(
                f"the rule that makes {', '.join(names)} has {len(sources)} sources; its operations need {len(shapes)}"
            )
        return WeightMatch(tuple(zip(sources, shapes, strict=True)), tuple(names), self.operations)


@dataclasses.dataclass(frozen=True)
class WeightMatch:
    """Weights of a checkpoint, and the weights of the model that are made of them."""

    sources: tuple[tuple[str, Shape], ...]
    """Name and shape of each weight that the checkpoint must have."""
    targets: tuple[str, ...]
    operations: tuple[Operation, ...]

    def forward(self, arrays: Sequence[Any]) -> list[LazyArray]:
        """The targets' arrays from those of the sources, which may be lazy or in memory."""
        return apply_all(self.operations, arrays)

    def backward(self, arrays: Sequence[Any]) -> list[LazyArray]:
        """The sources' arrays from those of the targets, which may be lazy or in memory."""
        return apply_all(reverse_all(self.operations), arrays)


def rename(source: str, target: str, *operations: Operation) -> WeightRule:
    """One weight that becomes one weight: as it is, or changed by the operations."""
    return WeightRule((source,), (target,), operations)


def linear(source: str, target: str) -> tuple[WeightRule, WeightRule]:
    """A `torch.nn.Linear` that becomes an `nnx.Linear`: `weight [out, in]` to `kernel [in, out]`, and the bias.

    The rule of the bias has no effect where the model has no bias.
    """
    return (
        rename(f"{source}.weight", f"{target}.kernel", Transpose()),
        rename(f"{source}.bias", f"{target}.bias"),
    )


def unused(source: str) -> WeightRule:
    """A weight of the checkpoint that the model does not use."""
    return WeightRule((source,), ())


def match_weights(
    source: WeightSource, targets: Mapping[str, Shape], rules: Sequence[WeightRule]
) -> tuple[WeightMatch, ...]:
    """The matches that fill all of the model's weights from a checkpoint. No weight is read.

    If several rules make one weight, the first whose sources are in the checkpoint is taken.

    Args:
        source: the checkpoint.
        targets: shapes of the model's weights by path.
        rules: the family's table.

    Raises:
        ConversionError: a file is unreadable, or a weight is left over, missing or of another shape. Lists them all.
        ValueError: the table does not fit the model.
    """
    if source.problems and not source.shapes:  # no file can be read: all other problems follow from that
        raise ConversionError(source.where, source.problems)
    matches = _choose_matches(targets, rules, source.shapes)
    problems = [*source.problems, *_not_made(matches, targets)]
    for match in matches:
        problems += _missing_or_misshapen(match, source.shapes)
    problems += _left_over(matches, rules, source.shapes)
    if problems:
        raise ConversionError(source.where, problems)
    return matches


def make_weights(source: WeightSource, matches: Sequence[WeightMatch]) -> Iterator[tuple[str, LazyArray]]:
    """The model's weights by path, made of a checkpoint's. They are lazy: nothing is read here."""
    for match in matches:
        yield from zip(match.targets, match.forward([source.weight(name) for name, _ in match.sources]), strict=True)


def export_weights(weights: Mapping[str, Any], rules: Sequence[WeightRule]) -> Iterator[tuple[str, LazyArray]]:
    """The weights of a model under their names in a checkpoint: the inverse of loading, bit for bit.

    If several rules make one weight, the first is taken.

    Args:
        weights: arrays by path in the model, lazy or in memory.
        rules: the family's table.

    Raises:
        ValueError: the table does not fit the model, or makes not all of its weights.
    """
    shapes = {path: weight.shape for path, weight in weights.items()}
    matches = _choose_matches(shapes, rules, {})
    problems = _not_made(matches, shapes)
    if problems:
        raise ValueError("\n".join(problems))
    for match in matches:
        arrays = match.backward([weights[path] for path in match.targets])
        yield from zip((name for name, _ in match.sources), arrays, strict=True)


def _choose_matches(
    targets: Mapping[str, Shape], rules: Sequence[WeightRule], available: Mapping[str, Shape | None]
) -> tuple[WeightMatch, ...]:
    """The matches that make the targets, in the targets' order. One with available sources goes before the others."""
    chosen: dict[str, WeightMatch] = {}
    for rule in rules:
        for match in rule.matches(targets):
            other = chosen.get(match.targets[0])
            if other is None or (_is_available(match, available) and not _is_available(other, available)):
                chosen.update(dict.fromkeys(match.targets, match))
    return tuple(dict.fromkeys(chosen[path] for path in targets if path in chosen))


def _is_available(match: WeightMatch, available: Mapping[str, Shape | None]) -> bool:
    return any(name in available for name, _ in match.sources)


def _not_made(matches: Sequence[WeightMatch], targets: Mapping[str, Shape]) -> list[str]:
    made = {path for match in matches for path in match.targets}
    return [
        f"{path} {targets[path]} of the model is made by no rule of its family" for path in targets if path not in made
    ]


def _missing_or_misshapen(match: WeightMatch, shapes: Mapping[str, Shape | None]) -> list[str]:
    problems = []
    for name, want in match.sources:
        if name not in shapes:
            problems.append(f"{name} {want} is missing: {_users(match)} cannot be made; the checkpoint is not complete")
        elif shapes[name] not in (want, None):  # None: unreadable, and reported as such already
            problems.append(
                f"{name} has shape {shapes[name]}, which must be {want} for {_users(match)}; "
                "is config.json this checkpoint's own?"
            )
    return problems


def _users(match: WeightMatch) -> str:
    first, *others = match.targets
    return f"the model's {first}" + (f" and {len(others)} more" if others else "")


def _left_over(
    matches: Sequence[WeightMatch], rules: Sequence[WeightRule], shapes: Mapping[str, Shape | None]
) -> list[str]:
    used = {name for match in matches for name, _ in match.sources}
    unused_names = [template for rule in rules if not rule.targets for template in rule.sources]
    return [
        f"{name} {shape} has no place in the model; is config.json this checkpoint's own?"
        for name, shape in shapes.items()
        if name not in used and all(parse(template, name) is None for template in unused_names)
    ]


def _expand(templates: Sequence[str], others: Sequence[str], values: Mapping[str, str], count: int) -> list[str]:
    """The names of one side of a rule, whose `others` are the templates of the other side."""
    if placeholders(*templates) <= placeholders(*others):
        count = 1
    return [fill(template, values, index) for template in templates for index in range(count)]


def _shape_of(name: str, targets: Mapping[str, Shape]) -> Shape:
    if name not in targets:
        raise ValueError(f"the model has no {name}")
    return targets[name]
