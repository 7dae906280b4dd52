"""Laws of loss and error: their formulas, and what of a row they take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sret_cli.runtime.errors import DATA, SretError
from sret_cli.spec.run import Row

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Law:
    """A law `y = E + sum of coefficient * term`, whose terms depend on exponents.

    Attributes:
        formula: the law, for people.
        source: where it comes from.
        inputs: the quantities that it takes.
        spans: those of them that must span a decade, since a term has an exponent of them.
        coefficients: names of the linear parameters, `E` first.
        is_signed: whether coefficients may be negative.
        exponents: the other parameters, with the ends and the number of points of their grids.
        terms: the terms after the constant one, from the inputs and the exponents.
    """

    formula: str
    source: str
    inputs: tuple[str, ...]
    spans: tuple[str, ...]
    coefficients: tuple[str, ...]
    is_signed: bool
    exponents: Mapping[str, tuple[float, float, int]]
    terms: Callable[..., tuple[np.ndarray, ...]]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters, coefficients first."""
        return (*self.coefficients, *self.exponents)

    def design(self, inputs: Values, exponents: np.ndarray) -> np.ndarray:
        """The terms `[n, coefficients]`, the constant one first."""
        terms = self.terms(*(inputs[name] for name in self.inputs), *exponents)
        return np.stack([np.ones_like(terms[0]), *terms], axis=1)

    def predict(self, inputs: Values, parameters: np.ndarray) -> np.ndarray:
        """The law at some inputs `[n]`."""
        split = len(self.coefficients)
        return self.design(inputs, parameters[split:]) @ parameters[:split]


LAWS = {
    "power": Law(
        formula="E + A x^-alpha",
        source="power law with offset",
        inputs=("x",),
        spans=("x",),
        coefficients=("E", "A"),
        is_signed=True,
        exponents={"alpha": (0.01, 4.0, 60)},
        terms=lambda x, alpha: (x**-alpha,),
    ),
    "exponential": Law(
        formula="E + A exp(-x / scale), log_scale = ln scale",
        source="saturating exponential",
        inputs=("x",),
        spans=("x",),
        coefficients=("E", "A"),
        is_signed=True,
        exponents={"log_scale": (-3.0, 30.0, 100)},
        terms=lambda x, log_scale: (np.exp(-x * np.exp(-log_scale)),),
    ),
    "chinchilla": Law(
        formula="E + A N^-alpha + B D^-beta",
        source="Hoffmann et al., 2022, arXiv 2203.15556",
        inputs=("N", "D"),
        spans=("N", "D"),
        coefficients=("E", "A", "B"),
        is_signed=False,
        exponents={"alpha": (0.02, 2.0, 20), "beta": (0.02, 2.0, 20)},
        terms=lambda n, d, alpha, beta: (n**-alpha, d**-beta),
    ),
    "recurrence": Law(
        formula="E + A (N_once + r^phi N_rec)^-alpha + B D^-beta",
        source="arXiv 2604.21106",
        inputs=("N_once", "N_rec", "r", "D"),
        spans=("N", "r"),
        coefficients=("E", "A", "B"),
        is_signed=False,
        exponents={"alpha": (0.02, 2.0, 10), "beta": (0.02, 2.0, 10), "phi": (-1.0, 2.0, 7)},
        terms=lambda once, rec, r, d, alpha, beta, phi: ((once + r**phi * rec) ** -alpha, d**-beta),
    ),
}


def inputs_of(row: Row, law: Law, x: str) -> dict[str, float] | None:
    """What a law takes of a row; None if the row lacks it.

    `N` are parameters, `D` images seen in training, `r` the recursions of all stages. `N_rec` are
    the parameters that each recursion uses again, and `N_once` the others.

    Raises:
        SretError: the stages of the model have different recursions.
    """
    from sret_cli.study.axes import number_of

    known = {"x": number_of(row, x), "N": row.get("params"), "D": row.get("images_seen")}
    if "r" in law.inputs:
        known |= _recurrence_of(row)
    found = {name: known.get(name) for name in {*law.inputs, *law.spans}}
    numbers = {name: float(v) for name, v in found.items() if isinstance(v, int | float)}
    return numbers if len(numbers) == len(found) else None


def _recurrence_of(row: Row) -> dict[str, float]:
    """`r`, `N_rec` and `N_once` of a row; nothing for a timm model."""
    from sret_cli.cost.count import recurrent_params
    from sret_cli.spec.model import ModelSpec
    from sret_cli.spec.strict import as_tuples

    names = [f for f in ModelSpec.model_fields if row.get(f"model.{f}") is not None]
    if row.get("model.backbone") or "recursions" not in names:
        return {}
    recursions = set(as_tuples(row["model.recursions"]))
    if len(recursions) > 1:
        raise SretError(
            f"run {row.get('run_id')} has recursions {row['model.recursions']}: the law of "
            "recurrence needs the same count in all stages; choose runs with --where",
            DATA,
        )
    spec = ModelSpec(**{name: as_tuples(row[f"model.{name}"]) for name in names})
    rec = recurrent_params(spec)
    return {"r": float(recursions.pop()), "N_rec": rec, "N_once": row["params"] - rec}
