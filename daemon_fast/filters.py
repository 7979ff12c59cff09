"""Conditions on metrics, such as "sr_4 <= 0.2 and top_2_gram < 0.15"."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from daemon_fast.errors import InvalidInput

__all__ = ["Filter", "parse_filter"]

Columns = Mapping[str, Tensor]
Condition = Callable[[Columns], Tensor]
COMPARISONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<comparison><=|>=|==|!=|<|>)|(?P<bracket>[()])|(?P<end>$))"
)


@dataclass(frozen=True)
class Filter:
    """A condition on the metrics of texts.

    Attributes
    ----------
    names : metrics that it compares
    """

    names: tuple[str, ...]
    condition: Condition

    def __call__(self, columns: Columns) -> Tensor:
        """[N] bool: whether it holds for each text, from one [N] tensor for each of `names`.

        A number is compared in a column's own precision: 0.2 equals a float32 column's 1 / 5.
        """
        return self.condition(columns)


def parse_filter(text: str) -> Filter:
    """METRIC COMPARISON NUMBER, of <, <=, >, >=, == and !=, joined by `and`, which binds closer, and `or`; brackets.

    Raises
    ------
    InvalidInput
        Anything else, with its position.
    """
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.names, self.end = text, dict[str, None](), 0
        self.advance()

    def parse(self) -> Filter:
        try:
            condition = self.alternatives()
        except RecursionError:
            raise InvalidInput(f"filter '{self.text[:20]}...' is nested too deeply") from None
        if self.kind != "end":
            raise self.unexpected("'and' or 'or'")
        return Filter(tuple(self.names), condition)

    def advance(self) -> None:
        found = TOKEN.match(self.text, self.end)
        if found is None:
            rest = self.text[self.end :].lstrip()
            self.begin, self.kind, self.token = len(self.text) - len(rest), "", rest.split()[0]
            return
        assert found.lastgroup is not None
        self.kind, self.token = found.lastgroup, found[found.lastgroup]
        self.begin, self.end = found.span(found.lastgroup)

    def take(self, kind: str, expected: str) -> str:
        if self.kind != kind:
            raise self.unexpected(expected)
        token = self.token
        self.advance()
        return token

    def unexpected(self, expected: str) -> InvalidInput:
        found = repr(self.token) if self.token else "its end"
        return InvalidInput(
            f"filter {self.text!r}: expected {expected} at position {self.begin + 1}, found {found}; a filter is "
            f"such as 'sr_4 <= 0.2 and tr_8 < 0.5'"
        )

    def alternatives(self) -> Condition:
        return self.joined("or", self.conjunction, operator.or_)

    def conjunction(self) -> Condition:
        return self.joined("and", self.comparison, operator.and_)

    def joined(self, word: str, part: Callable[[], Condition], join: Callable[[Tensor, Tensor], Tensor]) -> Condition:
        parts = [part()]
        while self.token == word:
            self.advance()
            parts.append(part())
        return lambda columns: functools.reduce(join, (condition(columns) for condition in parts))

    def comparison(self) -> Condition:
        if self.token == "(":
            self.advance()
            condition = self.alternatives()
            if self.token != ")":
                raise self.unexpected("')'")
            self.advance()
            return condition
        name = self.take("name", "a metric")
        compare = COMPARISONS[self.take("comparison", "<, <=, >, >=, == or !=")]
        number = float(self.take("number", "a number"))
        self.names[name] = None
        return lambda columns: compare(columns[name], number)
