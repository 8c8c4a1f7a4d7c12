"""Conversion from a published layout of names to ours and back: a strict engine, and tables as its data (`layouts/`).

`python -m zoo.convert` converts files.

A rule is a pair of templates, theirs -> ours. `{i}` and `{j}` stand for numbers, `{i+1}` for a number that is one more
than the `{i}` of the other side. A rule applies to a whole key or to a module: `stem.0.1` covers `stem.0.1.weight`, and
what follows it is kept.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

from torch import Tensor

from ..errors import listed


@dataclass(frozen=True)
class Change:
    """A tensor that is stored differently in the two layouts: `to_ours(theirs)` and its inverse."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Group:
    """Tensors that are regrouped before the rules apply: projections stored separately, factors stored as one.

    theirs    templates of the tensors in the file, in order
    units     templates of the intermediate names that the rules apply to, in order, such as that of a fused qkv
    to_units  the tensors of `theirs` -> those of `units`; `to_theirs` is its inverse
    """

    theirs: tuple[str, ...]
    units: tuple[str, ...]
    to_units: Callable[[Tensors], Tensors]
    to_theirs: Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Constant:
    """An entry that is not learned, such as an index table: dropped on the way to ours, computed on the way back.

    beside  their template of an entry that accompanies each of these, with the same numbers
    make    that entry -> this one; ValueError if it does not determine it
    """

    beside: str
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """How one source names and writes the tensors of one class of model.

    name       short name of the source: "timm", "torchvision", "official", ...
    rules      their template -> our template
    drop       their templates of entries that are not learned, and how to compute them
    changes    our template -> how the tensor differs
    groups     tensors to regroup before the rules apply; an incomplete group is left as it is, and is thus unknown
    models     what the names of the models begin with whose files these are, where the source tells models apart that
               have the same tensors
    """

    name: str
    rules: Mapping[str, str]
    drop: Mapping[str, Constant] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    models: str = ""

    @cached_property
    def _forward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(theirs), ours) for theirs, ours in self.rules.items()]

    @cached_property
    def _backward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(ours), theirs) for theirs, ours in self.rules.items()]

    def ours(self, key: str) -> str | None:
        """Our name for their `key`; None if no rule applies to it. Raises ValueError if two do."""
        return _rename(key, self._forward)

    def theirs(self, key: str) -> str | None:
        """Their name for our `key`; None if no rule applies to it."""
        return _rename(key, self._backward)

    def drops(self, key: str) -> bool:
        return any(_pattern(template).fullmatch(key) for template in self.drop)

    def units(self, keys: Iterable[str]) -> list[str]:
        """The names of a file, regrouped as the rules expect them."""
        names: dict[str, Tensor | None] = dict.fromkeys(keys)
        for group in self.groups:
            names = _regroup(names, group.theirs, group.units, lambda taken, group=group: [None] * len(group.units))
        return list(names)

    def unknown(self, keys: Iterable[str]) -> list[str]:
        """The keys, regrouped, that this layout has no rule for."""
        return [key for key in self.units(keys) if not self.drops(key) and self.ours(key) is None]

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their state dict with our names, its tensors stored our way.

        Raises ValueError for an unknown key, for two keys with one new name, and for a tensor of an unexpected shape.
        """
        if unknown := self.unknown(state):
            raise ValueError(f"layout {self.name!r} has no rule for {listed(unknown)}")
        for group in self.groups:
            state = _regroup(state, group.theirs, group.units, partial(self._regrouped, group.to_units))
        out: dict[str, Tensor] = {}
        for key, tensor in state.items():
            if self.drops(key):
                continue
            name = self.ours(key)
            if name in out:
                raise ValueError(f"layout {self.name!r} gives two entries the name {name}")
            change = self._change(name)
            with self._rewriting({key: tensor}):
                out[name] = change.to_ours(tensor) if change else tensor
        return out

    def to_theirs(self, state: Mapping[str, Tensor], *, constants: bool = False) -> dict[str, Tensor]:
        """The inverse of `to_ours`; the entries that it dropped are only included if `constants` asks for them."""
        out = {}
        for key, tensor in state.items():
            name = self.theirs(key)
            if name is None:
                raise ValueError(f"layout {self.name!r} has no name for our {key}")
            change = self._change(key)
            with self._rewriting({key: tensor}):
                out[name] = change.to_theirs(tensor) if change else tensor
        for group in self.groups:
            out = _regroup(out, group.units, group.theirs, partial(self._regrouped, group.to_theirs))
        return out | self._constants(out) if constants else out

    def _constants(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries of their state dict that are not learned."""
        out = {}
        for template, constant in self.drop.items():
            for key in state:
                if (match := _pattern(constant.beside).fullmatch(key)) and not match["rest"]:
                    with self._rewriting({key: state[key]}):
                        out[_fill(template, match)] = constant.make(state[key])
        return out

    def _regrouped(self, convert: Callable[[Tensors], Tensors], tensors: Mapping[str, Tensor]) -> Tensors:
        with self._rewriting(tensors):
            return convert(list(tensors.values()))

    @contextmanager
    def _rewriting(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Raise ValueError if the shapes of these tensors do not allow what is done to them inside."""
        try:
            yield
        except (IndexError, RuntimeError, AssertionError) as error:  # the last from stack of meta tensors in torch 2.9
            said = " or ".join(f"{key} than {tuple(tensor.shape)}" for key, tensor in tensors.items())
            raise ValueError(f"layout {self.name!r} expects another shape for {said}") from error

    def _change(self, name: str) -> Change | None:
        return next((change for template, change in self.changes.items() if _pattern(template).fullmatch(name)), None)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Anchored; `{i+n}` becomes a group `i_n`, whose number, of four digits at most, is n more than i."""
    out = re.escape(template)
    out = re.sub(r"\\{(\w)(?:\\\+(\d))?\\}", lambda m: rf"(?P<{m[1]}_{m[2] or 0}>[0-9]{{1,4}})", out)
    return re.compile(out + r"(?P<rest>(?:\..+)?)")


def _rename(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    hits = [(match, target) for pattern, target in rules if (match := pattern.fullmatch(key))]
    if len(hits) > 1:
        raise ValueError(f"{len(hits)} rules apply to {key}: their targets are {[target for _, target in hits]}")
    if not hits:
        return None
    return _fill(hits[0][1], hits[0][0])


def _fill(template: str, match: re.Match[str]) -> str:
    """The template with the numbers of a match, and what followed it there."""
    numbers = {name[0]: int(value) - int(name[2:]) for name, value in match.groupdict().items() if name != "rest"}
    return re.sub(r"\{(\w)(?:\+(\d))?\}", lambda m: str(numbers[m[1]] + int(m[2] or 0)), template) + match["rest"]


def _regroup(state: Mapping, have: tuple[str, ...], want: tuple[str, ...], convert: Callable) -> dict:
    """`state` with the tensors named `want` in place of each complete set of those named `have`.

    convert  tensors by name, those taken out -> tensors in the order of `want`
    """
    out = dict(state)
    for key in state:
        match = _pattern(have[0]).fullmatch(key)
        names = [_fill(template, match) for template in have] if match else []
        if names and all(name in state for name in names):
            made = convert({name: out.pop(name) for name in names})
            if len(made) != len(want):
                raise ValueError(f"{key} makes {len(made)} tensors: expected {len(want)}, {listed(want)}")
            out |= {_fill(template, match): tensor for template, tensor in zip(want, made, strict=True)}
    return out
