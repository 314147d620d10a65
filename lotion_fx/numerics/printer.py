"""SymPy expressions printed as source code, PyTorch's or Triton's, and PyTorch's made into functions.

Every printed function takes ``(z, lo, hi, third)`` and returns a tuple. Expressions may hold those four symbols, the
distance `gap` between the levels, the fractional position `D` and the third level's `reach`; these are computed from
the four, without 0 / 0 at a level, where ``lo == hi``.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import sympy
import torch
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.pycode import PythonCodePrinter

D = sympy.Symbol("D", nonnegative=True)
z, lo, hi, third, reach = sympy.symbols("z lo hi third reach", real=True)
gap = sympy.Symbol("gap", nonnegative=True)

_GIVEN = (z, lo, hi, third)
# What the other symbols are, in the order in which they are computed. A gap of 0 has numerators of 0.
_COMPUTED = {
    gap: "hi - lo",
    D: "(z - lo) / {where}(gap == 0, 1.0, gap)",
    reach: "{where}(gap == 0, 0.0, third - lo) / {where}(gap == 0, 1.0, gap)",
}


class _Printer(PythonCodePrinter):
    """Sums, products, comparisons and parentheses are Python's; functions are the target's own."""

    module: ClassVar[str]
    functions: ClassVar[dict[str, str]]

    def _print(self, expr: Any, **kwargs: Any) -> str:
        # Python's printer has its own idea of many functions, in a method each.
        if isinstance(expr, sympy.Function) and not isinstance(expr, sympy.Piecewise):
            return self._print_Function(expr)
        return super()._print(expr, **kwargs)

    def _print_Float(self, expr: Any) -> str:
        return repr(float(expr))

    def _print_Pow(self, expr: Any, rational: bool = False) -> str:
        base, exponent = expr.as_base_exp()
        if exponent.could_extract_minus_sign():
            return f"(1.0/{self._print(base**-exponent)})"
        if exponent.is_Integer and exponent <= 16:
            return "(" + "*".join([self.parenthesize(base, PRECEDENCE["Pow"])] * int(exponent)) + ")"
        if exponent == sympy.Rational(1, 2):
            return f"{self.module}.sqrt({self._print(base)})"
        return self.functions["Pow"].format(self._print(base), self._print(exponent))

    def _print_Function(self, expr: Any) -> str:
        name = type(expr).__name__
        if name not in self.functions or name == "Pow":
            known = ", ".join(sorted({*self.functions, "sqrt", "Piecewise"} - {"Pow"}))
            raise ValueError(f"{name} cannot be printed to {self.module}; expected powers and {known}")
        return self.functions[name].format(self._print(expr.args[0]))

    def _print_ExprCondPair(self, expr: Any) -> str:
        return self._print(expr.expr)

    def _print_Piecewise(self, expr: Any) -> str:
        text = "float('nan')"  # outside of every condition
        for value, condition in reversed(expr.args):
            here = self._print(value) if value.free_symbols else f"({self._print(value)} + 0*z)"
            text = here if condition == sympy.true else f"{self.module}.where({self._print(condition)}, {here}, {text})"
        return text

    def _print_And(self, expr: Any) -> str:
        return "(" + " & ".join(self._print(argument) for argument in expr.args) + ")"

    def _print_Or(self, expr: Any) -> str:
        return "(" + " | ".join(self._print(argument) for argument in expr.args) + ")"

    def _print_Not(self, expr: Any) -> str:
        return f"(~{self._print(expr.args[0])})"

    def _extreme(self, expr: Any, name: str) -> str:
        numbers, others = [a for a in expr.args if a.is_number], [a for a in expr.args if not a.is_number]
        text = self._print(others[0])
        for other in others[1:]:
            text = f"{self.module}.{name}({text}, {self._print(other)})"
        return self.functions[name].format(text, self._print(numbers[0])) if numbers else text

    def _print_Max(self, expr: Any) -> str:
        return self._extreme(expr, "maximum")

    def _print_Min(self, expr: Any) -> str:
        return self._extreme(expr, "minimum")

    def emptyPrinter(self, expr: Any) -> str:
        raise ValueError(f"{expr} cannot be printed to {self.module}")

    _print_not_supported = _print_Derivative = emptyPrinter


class TorchPrinter(_Printer):
    """To ATen, which eager, `torch.compile` and `make_fx` see alike."""

    module = "torch"
    functions: ClassVar = {
        **{name: f"torch.{name}({{0}})" for name in ("erf", "exp", "log", "sin", "cos", "tanh", "sign")},
        "Abs": "torch.abs({0})",
        "Heaviside": "torch.where({0} > 0, 1.0, torch.where({0} < 0, 0.0, 0.5))",
        "Pow": "torch.pow({0}, {1})",
        "maximum": "torch.clamp({0}, min={1})",
        "minimum": "torch.clamp({0}, max={1})",
    }


class TritonPrinter(_Printer):
    """To `triton.language`."""

    module = "tl"
    functions: ClassVar = {
        **{name: f"tl.{name}({{0}})" for name in ("erf", "exp", "log", "sin", "cos")},
        "tanh": "(1.0 - 2.0/(tl.exp(2.0*({0})) + 1.0))",
        "Abs": "tl.abs({0})",
        "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
        "Heaviside": "tl.where({0} > 0, 1.0, tl.where({0} < 0, 0.0, 0.5))",
        "Pow": "tl.exp({1}*tl.log({0}))",
        "maximum": "tl.maximum({0}, {1})",
        "minimum": "tl.minimum({0}, {1})",
    }


def _folded(expr: Any) -> Any:
    """The expression with its constants worked out here, rather than by the target in its own precision."""
    if isinstance(expr, sympy.Expr) and not expr.free_symbols and not expr.is_Integer:
        value = expr.evalf(20)
        if not value.is_Float:
            raise ValueError(f"{expr} is no finite real number")
        return value
    if expr.is_Pow:
        return sympy.Pow(_folded(expr.base), expr.exp if expr.exp.is_Rational else _folded(expr.exp))
    return expr.func(*map(_folded, expr.args)) if expr.args else expr


def source(name: str, outputs: Sequence[sympy.Expr], printer: _Printer) -> str:
    """A function of ``(z, lo, hi, third)`` that returns the outputs, with their common subexpressions taken once."""
    shared, results = sympy.cse([_folded(expr) for expr in outputs], symbols=sympy.numbered_symbols("x"))
    used = set().union(*(expr.free_symbols for expr in (*(value for _, value in shared), *results)))
    used |= {gap} if used & {D, reach} else set()
    if unknown := used - {*_GIVEN, *_COMPUTED, *(symbol for symbol, _ in shared)}:
        raise ValueError(f"free symbols {', '.join(sorted(map(str, unknown)))}")
    lines = [f"{s} = {text.format(where=f'{printer.module}.where')}" for s, text in _COMPUTED.items() if s in used]
    lines += [f"{symbol} = {printer.doprint(value)}" for symbol, value in shared]
    lines.append(f"return {', '.join(printer.doprint(value) for value in results)},")
    return f"def {name}(z, lo, hi, third):\n" + "".join(f"    {line}\n" for line in lines)


def define(name: str, text: str, namespace: dict[str, Any]) -> Callable[..., Any]:
    """The function of this name in a source text, whose lines `inspect` finds, as tracebacks and Triton need."""
    path = f"<lotion_fx {name} {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[path] = len(text), None, text.splitlines(keepends=True), path
    exec(compile(text, path, "exec"), namespace)
    return namespace[name]


def torch_function(name: str, outputs: Sequence[sympy.Expr]) -> Callable[..., tuple[Any, ...]]:
    """The outputs as a function of tensors; one that is a number is returned as that."""
    return define(name, source(name, outputs, TorchPrinter()), {"torch": torch})
