r"""Are two answers in LaTeX equal as mathematics? Called in the process of `dllm_gym.verify.latex` only.

math-verify's grammar reads them; what counts as equal is decided here, since its own comparison rounds to six places,
drops the base of a number, and takes whatever sympy fails at for unequal:

- Exact values are compared exactly, expressions up to algebra, equations up to a factor.
- A decimal is the fraction that it writes: 0.5 is 1/2, and 0.33 is not 1/3. Where the reference is a decimal, an exact
  value that agrees with it to `TOLERANCE` is right too.
- Bases, brackets and the order in brackets count where both answers show them; ``3, 5`` beside ``(3, 5)`` or ``204``
  beside ``204_5`` shows none and takes the other's. ``x =``, units, ``%`` and degrees are left out.
- What is shown in the question is no answer to it, unless it has the very form of the reference: to repeat what is to
  be factored is not to factor it.

The file is long because the rules decide together: which reading wins depends on all the others.
"""

from __future__ import annotations

import re
from itertools import accumulate

import sympy
import sympy.physics.units
from latex2sympy2_extended import NormalizationConfig, is_expr_of_only_symbols, latex2sympy, normalize_latex
from math_verify.grader import should_treat_as_complex
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

TOLERANCE = sympy.Rational(1, 10**6)
"""Relative, between a decimal reference and a value that is no decimal."""
NORMALISATION = NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="all", equations=False
)

TEXT = re.compile(
    r"\\(?:text|math)(?:rm|bf|it|sf|tt|normal)?\s*\{([^{}]*)\}|\\(?:mbox|hbox|operatorname)\s*\{([^{}]*)\}"
)
WORDS = re.compile(r"\(?[A-Za-z][A-Za-z .'-]*\)?")
SPACING = re.compile(r"\\(?:left|right|displaystyle|[,;:!])|~")
BASED = re.compile(r"(?<![\w.])([0-9A-Z]*[0-9][0-9A-Z]*)_\{?([0-9]+)\}?(?![\w.])")
MIXED = re.compile(r"(?<![\w.}])([0-9]+)(?:\s|\\ )+([0-9]+)\s*/\s*([0-9]+)(?![\w.])")
SPACED = re.compile(r"(?<![\w.,])[0-9]{1,3}(?:(?:\s|\\[,;! ])[0-9]{3})+(?![\w/])")
REPEATING = re.compile(r"(?<![\w.])([0-9]*)\.([0-9]*)\\overline\s?\{?([0-9]+)\}?")
LITERAL = re.compile(r"[-+]?[0-9.,]+(?:\\?%)?")
ARGUMENT = r"\s*(\\(?!sqrt|[dtc]?frac)[A-Za-z]+|[0-9A-Za-z])"
SHORT = re.compile(r"(\\sqrt(?:\[[^\[\]]*\])?|\\[dtc]?frac)" + ARGUMENT)
r"""``\sqrt2``, ``\frac\pi2``: an argument without braces."""
SHORT_SECOND = re.compile(r"(\\[dtc]?frac\s*\{(?:[^{}]|\{[^{}]*\})*\})" + ARGUMENT)
FORMULA = re.compile(r"\$\$?(.+?)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
LAST_FORMULAS = 20
"""Of a question: its own stand after those of worked examples."""


class CannotCompare(Exception):
    """Neither equal nor unequal could be shown."""


def equal(expected: str, answer: str, question: str = "") -> bool:
    r"""Whether an answer is the expected one.

    Args:
        expected: the reference, LaTeX.
        answer: LaTeX, without ``\boxed{}`` and ``$``.
        question: what was asked; a formula of it is no answer.

    Raises:
        CannotCompare: sympy cannot tell. Other exceptions are failures of a library, and mean the same.
    """
    expected, answer = without_group(expected), without_group(answer)
    if squeezed(expected) == squeezed(answer):
        return True
    if (same := same_words(expected, answer)) is not None:
        return same
    if (same := same_numeral(expected, answer)) is not None:
        return same
    is_complex = any(map(should_treat_as_complex, (expected, answer)))
    reference, given = read(expected, is_complex), read(answer, is_complex)
    if reference is None:
        raise CannotCompare("the reference cannot be read as mathematics")
    if given is None or not Comparison(expected, answer).equal(reference, given):
        return False
    return not repeats(question, answer, given, expected, reference, is_complex)


def repeats(question: str, answer: str, given, expected: str, reference, is_complex: bool) -> bool:
    """Whether the answer is a formula of the question, in another form than the reference."""
    written = _written(answer)
    if written == _written(expected) or (LITERAL.fullmatch(answer) and not given.has(sympy.Float)):
        return False
    same_form = given == reference
    if same_form and not getattr(given, "is_number", False):  # 6/8 is 3/4 as soon as it is read
        return False
    formulas = [next(filter(None, groups)) for groups in FORMULA.findall(question)[-LAST_FORMULAS:]]
    sides = [side for formula in formulas for side in {formula, *formula.split("=")}]
    if any(_written(side) == written for side in sides):
        return True
    return not same_form and any(
        (read_side := read(side, is_complex)) is not None and read_side.doit() == given.doit() for side in sides
    )


def _written(text: str) -> str:
    r"""A text in one spelling: ``\frac12`` as ``\frac{1}{2}``."""
    return squeezed(normalize_latex(text, NORMALISATION)).rstrip(".,")


def without_group(text: str) -> str:
    """A text without the braces around all of it."""
    text = text.strip()
    depths = list(accumulate((c == "{") - (c == "}") for c in text))
    grouped = text.startswith("{") and 0 in depths and depths.index(0) == len(depths) - 1
    return without_group(text[1:-1]) if grouped else text


def brackets(text: str) -> str:
    """The brackets around all of a text, ``()``, ``[]`` or ``{}``; "" where there are none."""
    text = squeezed(text).rpartition("=")[2].replace(r"\{", "{").replace(r"\}", "}")
    depths = list(accumulate((c in "([{") - (c in ")]}") for c in text))
    return text[:1] + text[-1:] if depths[:1] == [1] and 0 in depths and depths.index(0) == len(depths) - 1 else ""


def squeezed(text: str) -> str:
    """A text without what LaTeX does not show: no spaces but between digits, no commands for sizes and fonts."""
    text = SPACING.sub(" ", TEXT.sub(lambda match: match[1] or match[2] or "", text))
    text = re.sub(r"(?<=[0-9])\s+(?=[0-9])", "~", text)
    return "".join(text.split())


def same_words(expected: str, answer: str) -> bool | None:
    r"""Whether two answers in words are the same; None where one of them is no word, or may be a product of letters."""
    words = []
    for text in (expected, answer):
        shown = TEXT.sub(lambda match: match[1] or match[2] or "", text).strip()
        if not WORDS.fullmatch(shown):
            return None
        words.append("".join(shown.strip("(). ").lower().split()))
    if words[0] == words[1]:
        return True
    return False if TEXT.search(expected) or TEXT.search(answer) else None


def same_numeral(expected: str, answer: str) -> bool | None:
    """Whether two numerals are the same where one of them has a base; None where none has."""
    numerals = []
    for text in (expected, answer):
        text = squeezed(text).rpartition("=")[2]
        based = BASED.fullmatch(text)
        numerals.append((based[1], int(based[2])) if based else (text, None))
    (digits, base), (other_digits, other_base) = numerals
    if base is None and other_base is None:
        return None
    return digits.lstrip("0") == other_digits.lstrip("0") and (None in (base, other_base) or base == other_base)


def read(text: str, is_complex: bool = False):
    """The sympy object of a text, None where it is no mathematics. Numbers with a base have their value."""
    text = REPEATING.sub(_fraction_of_repeating, MIXED.sub(r"\1\\frac{\2}{\3}", text))
    text = SPACED.sub(lambda match: re.sub("[^0-9]", "", match[0]), text)
    text = BASED.sub(_value_of_based, text)
    text = TEXT.sub(lambda match: match[1] if re.match(r"\s*[-+]?[0-9.]", match[1] or "") else match[0], text)
    text = SHORT_SECOND.sub(r"\1{\2}", SHORT.sub(r"\1{\2}", text))
    try:
        found = latex2sympy(normalize_latex(text, NORMALISATION), is_real=not is_complex, normalization_config=None)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # of the grammar: its own way to say that the text is none
        return None
    if isinstance(found, sympy.Basic):
        found = found.subs({symbol: sympy.I for symbol in found.free_symbols if symbol.name == "i"})
    return found


def _fraction_of_repeating(match: re.Match) -> str:
    whole, fixed, repeated = match[1] or "0", match[2], match[3]
    numerator = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{10 ** len(fixed) * (10 ** len(repeated) - 1)}}}"


def _value_of_based(match: re.Match) -> str:
    try:
        return str(int(match[1], int(match[2])))
    except ValueError:
        return match[0]


class Comparison:
    """Equality of what was read of two texts, from which it knows what sympy does not keep."""

    def __init__(self, expected: str, answer: str):
        self.brackets = brackets(expected), brackets(answer)
        self.literal = LITERAL.fullmatch(answer.strip()) is not None

    def equal(self, a, b) -> bool:
        """Whether ``a`` of the reference equals ``b`` of the answer."""
        a, b = _joined(a), _joined(b)
        if _is_relation(a) != _is_relation(b):
            a, b = _value_of_assignment(a), _value_of_assignment(b)
        if _is_relation(a) and _is_relation(b):
            return self.equal_relations(a, b)
        if _is_relation(a) or _is_relation(b):
            relation, other = (a, b) if _is_relation(a) else (b, a)
            return isinstance(other, sympy.Set) and _equal_sets(_as_set(relation), other)
        if isinstance(a, MATRIX) or isinstance(b, MATRIX):
            return self.equal_matrices(a, b)
        if isinstance(a, COLLECTION) or isinstance(b, COLLECTION):
            return self.equal_collections(a, b)
        return isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and self.equal_values(a, b)

    def equal_values(self, a: sympy.Expr, b: sympy.Expr) -> bool:
        """Numbers and expressions."""
        decimal = a.has(sympy.Float) and not self.literal
        (a, a_percent), (b, b_percent) = _without_percent(_exact(a)), _without_percent(_exact(b))
        if not (_finite(a) and _finite(b)):
            return a == b and not a.has(sympy.nan, sympy.zoo)
        if _is_zero(a - b) or (a_percent != b_percent and _is_zero(a - 100 * b if a_percent else 100 * a - b)):
            return True
        if decimal and not (a.free_symbols or b.free_symbols):
            return bool(abs(sympy.N(a - b, 30)) <= TOLERANCE * abs(sympy.N(b, 30)))
        return False

    def equal_matrices(self, a, b) -> bool:
        """Entry by entry."""
        if not (isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase)):
            return bool(a == b)
        return a.shape == b.shape and all(map(self.equal, a.flat(), b.flat()))

    def equal_collections(self, a, b) -> bool:
        """Sets, tuples, intervals, and lists without brackets."""
        if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
            same_ends = (a.left_open, a.right_open) == (b.left_open, b.right_open)
            return same_ends and self.equal(a.start, b.start) and self.equal(a.end, b.end)
        members = _members(a), _members(b)
        if None in members:
            return isinstance(a, sympy.Set) and isinstance(b, sympy.Set) and _equal_sets(a, b)
        if len(members[0]) != len(members[1]) or (all(self.brackets) and self.brackets[0] != self.brackets[1]):
            return False
        if len(members[0]) > 1 and not (isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet)):
            return all(map(self.equal, *members))
        left = list(members[1])
        for member in members[0]:
            found = next((i for i, other in enumerate(left) if self.equal(member, other)), None)
            if found is None:
                return False
            del left[found]
        return True

    def equal_relations(self, a, b) -> bool:
        """Equations, inequalities, and chains of them such as ``1 < x < 2``."""
        parts, left = _parts(a), _parts(b)
        if len(parts) != len(left):
            return _equal_sets(_as_set(a), _as_set(b))
        for part in parts:
            found = next((i for i, other in enumerate(left) if self.equal_relation(part, other)), None)
            if found is None:
                return False
            del left[found]
        return True

    def equal_relation(self, a: Relational, b: Relational) -> bool:
        """One equation or inequality: the same up to a factor, which keeps the sign where that matters."""
        if a.rel_op == b.rel_op and self.equal(a.lhs, b.lhs) and self.equal(a.rhs, b.rhs):
            return True
        if _kind(a) != _kind(b) or not all(isinstance(side, sympy.Expr) for side in (*a.args, *b.args)):
            return False
        if _is_solved(a) != _is_solved(b):  # to solve the equation was what was asked
            return False
        differences = [sympy.together(_difference(relation)) for relation in (a, b)]
        inequality = _kind(a) in ("<", "<=")
        if not inequality:
            differences = [sympy.fraction(difference)[0] for difference in differences]
        if any(map(_is_zero, differences)):
            return all(map(_is_zero, differences))
        factor = sympy.simplify(differences[0] / differences[1])
        if factor.is_number:
            return bool(factor > 0) if inequality else True
        univariate = len(a.free_symbols | b.free_symbols) == 1
        return inequality and univariate and _equal_sets(_as_set(a), _as_set(b))


MATRIX = (sympy.MatrixBase, sympy.MatrixExpr)
COLLECTION = (sympy.Set, sympy.Tuple)


def _is_relation(a) -> bool:
    return isinstance(a, Relational | sympy.And)


def _parts(a) -> list[Relational]:
    return list(getattr(a, "_unsorted_args", a.args)) if isinstance(a, sympy.And) else [a]


def _joined(a):
    """``x = 2 + 3 = 5`` as ``x = 5``; a set of one member, no relation, as that member."""
    if isinstance(a, sympy.And) and all(isinstance(part, sympy.Eq) for part in _parts(a)):
        return sympy.Eq(_parts(a)[0].lhs, _parts(a)[-1].rhs, evaluate=False)
    return a.args[0] if isinstance(a, sympy.FiniteSet) and len(a) == 1 else a


def _is_assignment(a) -> bool:
    """``x = ...``, ``m + n = ...``, ``f(x) = ...``: the left side only says what is meant."""
    names = isinstance(a, sympy.Eq) and (isinstance(a.lhs, AppliedUndef) or is_expr_of_only_symbols(a.lhs))
    return names or (isinstance(a, sympy.Eq) and isinstance(a.lhs, sympy.Expr) and not a.lhs.free_symbols)


def _value_of_assignment(a):
    """The right side of an assignment; of ``2 + 3 = 5`` only if it is true."""
    if not _is_assignment(a) or (not a.lhs.free_symbols and not _is_zero(_exact(a.lhs - a.rhs))):
        return a
    return _joined(a.rhs)


def _is_solved(a) -> bool:
    return isinstance(a, sympy.Eq) and a.lhs.is_Symbol and not a.rhs.free_symbols


def _kind(a: Relational) -> str:
    return {"==": "=", "!=": "!=", "<": "<", ">": "<", "<=": "<=", ">=": "<="}[a.rel_op]


def _difference(a: Relational) -> sympy.Expr:
    """What is zero, or positive, where the relation holds."""
    return _exact(a.gts - a.lts if _kind(a) in ("<", "<=") else a.lhs - a.rhs)


def _members(a) -> list | None:
    """What a collection lists, in the order of the text; None for one that lists nothing."""
    if isinstance(a, sympy.FiniteSet):
        return list(getattr(a, "_unsorted_args", a.args))
    if isinstance(a, sympy.Tuple):
        return list(a.args)
    if isinstance(a, sympy.Interval):  # (3, 5) may be a point
        return [a.start, a.end] if a.is_open else None
    return None if isinstance(a, sympy.Set) else [a]


def _as_set(relation) -> sympy.Set:
    if len(relation.free_symbols) != 1:
        raise CannotCompare("a relation of several unknowns")
    return relation.as_set()


def _equal_sets(a: sympy.Set, b: sympy.Set) -> bool:
    if a == b:
        return True
    empty = sympy.SymmetricDifference(a, b).is_empty
    if empty is None:
        raise CannotCompare("sets")
    return empty


def _exact(a):
    """Decimals as the fractions that they write."""
    return a.replace(lambda x: isinstance(x, sympy.Float), lambda x: sympy.Rational(str(x)))


def _without_percent(a):
    """A value without a percent sign, and whether there was one."""
    percent = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
    if isinstance(a, sympy.Mul) and percent in a.args:
        return sympy.Mul(*(part for part in a.args if part != percent)), True
    return a, False


def _finite(a) -> bool:
    return not a.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)


def _is_zero(a) -> bool:
    a = a.doit()
    if a.is_Rational:
        return a == 0
    if not a.free_symbols and abs(sympy.N(a, 30)) > sympy.Rational(1, 10**9):
        return False
    simple = sympy.simplify(a)
    found = True if simple == 0 else simple.equals(0)
    if found is None:
        raise CannotCompare("whether an expression is zero")
    return bool(found)
