"""The words of the partition language: terms, cuts and factors, and how a text becomes them.

    partition := own "|" factor ("," factor)*          one text, one bar
    own       := ("~"? term)*                           which block
    factor    := term* | "[" term* "]"                  what is inside the block
    term      := axes cut?
    axes      := name | name"..." | "..." | "(" axes* ")"
    cut       := ("/" | "//" | "~/") (number | name)    balanced, with remainder, tied

An empty factor just before a factor that starts with ``...`` (written ``,...``) spreads it: every axis becomes a
factor of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"\s*(?:(?P<ellipsis>[A-Za-z_]\w*\.\.\.|\.\.\.)|(?P<name>[A-Za-z_]\w*)|(?P<number>\d+)|(?P<sign>//|[|,()\[\]~/]))"
)


class PartitionError(ValueError):
    """A partition text that says nothing sensible, or nothing sensible about these axes."""

    def __init__(self, message: str, text: str, at: int | None = None, axes: Iterable[str] | None = None) -> None:
        lines = [message, f"    {text}"]
        if at is not None:
            lines.append(f"    {' ' * at}^")
        if axes is not None:
            lines.append(f"    axes here: {' '.join(axes) or '(none)'}")
        super().__init__("\n".join(lines))

    def about(self, name: str) -> PartitionError:
        """The same complaint, of a named parameter."""
        error = PartitionError("", "")
        error.args = (f"{name}: {self}",)
        return error


@dataclass(frozen=True)
class Cut:
    """How an axis is cut in pieces: at most ``limit`` entries each (a number, or an axis's name for its size)."""

    limit: int | str
    remainder: bool = False
    tied: bool = False

    def __str__(self) -> str:
        return f"{'~/' if self.tied else '//' if self.remainder else '/'}{self.limit}"


@dataclass(frozen=True)
class Term:
    """Axes that are treated as one, in row-major order, and perhaps cut; a lone ellipsis is one only if it is ``merged``."""

    axes: tuple[str, ...]
    cut: Cut | None = None
    tied: bool = False
    at: int = field(default=0, compare=False)
    merged: bool = False

    def __str__(self) -> str:
        inner = self.axes[0] if len(self.axes) == 1 and not self.merged else f"({' '.join(self.axes)})"
        return f"{'~' if self.tied else ''}{inner}{self.cut or ''}"


@dataclass(frozen=True)
class Factor:
    """One Kronecker factor: its terms; kept as a diagonal; one factor for every axis (``spread``)."""

    terms: tuple[Term, ...]
    diagonal: bool = False
    spread: bool = False

    def __str__(self) -> str:
        inner = " ".join(map(str, self.terms))
        inner = f"[{inner}]" if self.diagonal else inner
        return f",{inner}" if self.spread else inner


@dataclass(frozen=True)
class Sentence:
    """A parsed partition: own terms left of the bar, factors right of it."""

    own: tuple[Term, ...]
    factors: tuple[Factor, ...]

    def __str__(self) -> str:
        own = " ".join(map(str, self.own))
        factors = ", ".join(map(str, self.factors))
        return f"{own} | {factors}".strip()

    def terms(self) -> Iterator[Term]:
        """Every term, from left to right."""
        yield from self.own
        for factor in self.factors:
            yield from factor.terms


@dataclass(frozen=True)
class _Token:
    kind: str
    value: str
    at: int


def _tokens(text: str) -> list[_Token]:
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise PartitionError(f"unexpected {text[at]!r} in a partition", text, at)
        kind = str(match.lastgroup)
        tokens.append(_Token(kind if kind != "sign" else match[kind], match[kind], match.start(kind)))
        at = match.end()
    return [*tokens, _Token("end", "", len(text))]


class _Parser:
    """Recursive descent over the tokens; every complaint names its place."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.here = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.here]

    def fail(self, message: str, at: int | None = None) -> PartitionError:
        return PartitionError(message, self.text, self.token.at if at is None else at)

    def take(self, *kinds: str) -> _Token | None:
        if self.token.kind not in kinds:
            return None
        self.here += 1
        return self.tokens[self.here - 1]

    def sentence(self) -> Sentence:
        own = []
        while not self.take("|"):
            if self.token.kind == "end":
                raise self.fail("a partition needs a bar: own axes | factors")
            own.extend(self.own_term())
        factors = self.factors()
        if self.token.kind != "end":
            raise self.fail(f"unexpected {self.token.value!r} after the factors")
        sentence = Sentence(tuple(own), factors)
        self.check_once(sentence)
        return sentence

    def own_term(self) -> list[Term]:
        tied = self.take("~") is not None
        term = self.term(tied)
        if term.cut is not None and term.cut.tied:
            raise self.fail("a tied cut '~/' stands right of the bar; left of it write '~axis/n'", term.at)
        if term.cut is not None and not tied:
            raise self.fail("a cut left of the bar makes sense only tied in groups: '~axis/n'", term.at)
        return _unmerge(term)

    def factors(self) -> tuple[Factor, ...]:
        if self.token.kind == "end":
            return ()
        factors, spread = [], False
        while True:
            factor = self.factor(spread)
            empty = not factor.terms and not factor.diagonal
            if empty and not (self.token.kind == "," and self._spread_follows()):
                raise self.fail("an empty factor; a comma stands between two factors, or before '...' to spread it")
            if not empty:
                factors.append(factor)
            spread = empty
            if not self.take(","):
                return tuple(factors)

    def _spread_follows(self) -> bool:
        ahead = [token.kind for token in self.tokens[self.here + 1 : self.here + 3]]
        return ahead[0] == "ellipsis" or ahead == ["[", "ellipsis"]

    def factor(self, spread: bool) -> Factor:
        diagonal = self.take("[") is not None
        terms: list[Term] = []
        while self.token.kind in ("name", "ellipsis", "("):
            terms.extend(_unmerge(self.term(tied=False)))
        if self.token.kind == "~":
            raise self.fail("'~axis' ties blocks and stands left of the bar; a tied cut is 'axis~/n'")
        if diagonal and (not terms or not self.take("]")):
            raise self.fail("a diagonal factor is '[axes]' and closes with ']'")
        if diagonal and self.token.kind not in (",", "end"):
            raise self.fail("'[...]' is a whole factor; separate it by a comma")
        if spread and len(terms) != 1:
            raise self.fail("',...' spreads one ellipsis over factors of their own; nothing may stand beside it")
        return Factor(tuple(terms), diagonal, spread)

    def term(self, tied: bool) -> Term:
        start = self.token.at
        if opening := self.take("("):
            axes: list[str] = []
            while name := self.take("name", "ellipsis"):
                axes.append(name.value)
            if not self.take(")"):
                raise self.fail("'(' opens a merged axis and needs names, then ')'", opening.at)
            if not axes:
                raise self.fail("'()' merges nothing", opening.at)
        elif name := self.take("name", "ellipsis"):
            axes = [name.value]
        else:
            raise self.fail(f"expected an axis, got {self.token.value or 'the end'!r}")
        cut = self.cut()
        merged = opening is not None and cut is not None and len(axes) == 1 and axes[0].endswith("...")
        return Term(tuple(axes), cut, tied, start, merged)

    def cut(self) -> Cut | None:
        tied = self.token.kind == "~" and self.tokens[self.here + 1].kind in ("/", "//")
        if tied:
            self.take("~")
        sign = self.take("/", "//")
        if sign is None:
            return None
        if tied and sign.kind == "//":
            raise self.fail("a tied cut is '~/n'; its remainder is a tie of its own already", sign.at)
        limit = self.take("number", "name")
        if limit is None:
            raise self.fail("a cut needs a size: a number or an axis's name")
        if limit.kind == "number" and int(limit.value) == 0:
            raise self.fail("a cut into pieces of 0 entries", limit.at)
        value = int(limit.value) if limit.kind == "number" else limit.value
        return Cut(value, remainder=sign.kind == "//", tied=tied)

    def check_once(self, sentence: Sentence) -> None:
        seen: set[str] = set()
        for term in sentence.terms():
            for axis in term.axes:
                if axis in seen:
                    raise self.fail(f"axis {axis!r} is named twice", term.at)
                seen.add(axis)


def _unmerge(term: Term) -> list[Term]:
    """``(a b)`` without a cut is ``a b``."""
    if term.cut is not None:
        return [term]
    return [Term((axis,), None, term.tied, term.at) for axis in term.axes]


def parse(text: str) -> Sentence:
    """Parse a partition text.

    Raises:
        PartitionError: with the text and the place, when it is no partition.
    """
    return _Parser(text).sentence()
