"""Options of drawing cells: a record for each family of models, and verbs that take those of their model alone."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from invirtuo.errors import preview, whole_number
from invirtuo.flow import SOLVERS
from invirtuo.settings import Settings

__all__ = [
    "FlowSampling",
    "GuidedSampling",
    "NoSampling",
    "PartsSampling",
    "SampleConfig",
    "SolverSampling",
    "check_names",
    "takes_options",
]

PARTS = ("perturbation", "covariates")  # of guidance, see PartsSampling
ENTRY = re.compile(r"^(\w.*)\n((?: .*\n?)+)", re.MULTILINE)  # of a numpydoc list of parameters
ADAPTIVE = "dopri5"  # the solver that finds its own steps


@dataclass(frozen=True)
class NoSampling(Settings):
    """Base of the records: no options."""

    def check(self, name: str, config: Any) -> None:
        """Refuse options that cannot act on a model of this name and Config."""


@dataclass(frozen=True)
class SampleConfig(NoSampling):
    """Options of every model that predicts log expression.

    Parameters
    ----------
    precision
        "fp32", "bf16", or "auto": bf16 where it is measured to be faster. bf16 rounds; closed forms stay as they are.
    batch_size
        Cells in the network at once, of models of sets at least one set. The cells do not depend on it.
    clamp_min
        Raise values below this to it (0 for expression); None leaves them.
    """

    precision: str = "auto"
    batch_size: int = 256
    clamp_min: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        super().__post_init__()
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}; expected auto, fp32 or bf16")
        whole_number("batch_size", self.batch_size)
        if self.clamp_min is not None and not _is_finite(self.clamp_min):
            raise ValueError(f"clamp_min is {self.clamp_min!r}; expected a finite number, or None")


@dataclass(frozen=True)
class SolverSampling(NoSampling):
    """Options of models that solve a differential equation.

    Parameters
    ----------
    steps, solver
        Number of steps, and euler, midpoint, heun, ab2, rk4 or dopri5; None takes the model's own. dopri5 finds its
        steps by itself.
    """

    steps: int | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        super().__post_init__()
        if self.steps is not None:
            whole_number("steps", self.steps)
        if self.solver is not None and self.solver not in (*SOLVERS, ADAPTIVE):
            raise ValueError(f"solver is {self.solver!r}; expected one of {', '.join(SOLVERS)}, {ADAPTIVE}")

    def check(self, name: str, config: Any) -> None:
        """Refuse steps where the solver finds its own."""
        super().check(name, config)
        solver = self.solver or config.solver
        if self.steps is not None and solver == ADAPTIVE:
            raise ValueError(
                f"steps is {self.steps} and the solver of {name} is {ADAPTIVE}, which finds its steps by itself; leave "
                f"steps out, or choose solver= among {', '.join(SOLVERS)}"
            )


@dataclass(frozen=True)
class GuidedSampling(SolverSampling):
    """Options of generators with a weight of guidance for every attribute.

    Parameters
    ----------
    guidance
        Weight of every attribute: a number for all, or attribute to a number, or to one number per cell; attributes
        that are not named then have weight 0 and no influence. None: 1 for all.
    """

    guidance: float | Mapping[str, float | Sequence[float]] | None = None


@dataclass(frozen=True)
class FlowSampling(SolverSampling, SampleConfig):
    """Options of conditional flows.

    Parameters
    ----------
    guidance, interval
        Weight of classifier-free guidance, and between which times it acts; 1 is no guidance.
    grid
        Own times of the steps, from 0 to 1, in place of `steps`.
    """

    guidance: float | Mapping[str, float] = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    grid: tuple[float, ...] | None = None

    parts: ClassVar[tuple[str, ...]] = ()  # of guidance that may be weighed by themselves

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant; lists from JSON become tuples."""
        super().__post_init__()
        self._check_guidance()
        times = _times("interval", self.interval)
        if not (len(times) == 2 and 0 <= times[0] < times[1] <= 1):
            raise ValueError(f"interval is {self.interval}; expected two times that rise, between 0 and 1")
        object.__setattr__(self, "interval", times)
        if times != (0.0, 1.0) and not self.is_guided:
            raise ValueError(f"interval is {self.interval} and guidance is 1; expected another weight, which it bounds")
        if self.grid is None:
            return
        grid = _times("grid", self.grid)
        if list(grid) != sorted(set(grid)) or grid[:1] + grid[-1:] != (0, 1):
            raise ValueError(f"grid is {self.grid}; expected times that rise from 0 to 1")
        if self.steps is not None:
            raise ValueError(f"steps is {self.steps} and grid has {len(grid)} times; give one of them")
        object.__setattr__(self, "grid", grid)

    def _check_guidance(self) -> None:
        weights = self.guidance
        if isinstance(weights, Mapping):
            if not self.parts:
                raise ValueError(f"guidance is {dict(weights)}; this model has one weight of guidance, a number")
            if strange := [name for name in weights if name not in self.parts]:
                raise ValueError(f"guidance: {preview(strange)} is no part of it; expected {preview(self.parts)}")
            weights = dict.fromkeys(self.parts, 1.0) | dict(weights)
            object.__setattr__(self, "guidance", weights)
        if not all(map(_is_finite, self.weights)):
            raise ValueError(f"guidance is {self.guidance!r}; expected finite numbers")

    @property
    def weights(self) -> list[float]:
        """Weights of the branches behind the null condition: the condition; or its control cells, then itself."""
        if isinstance(self.guidance, Mapping):
            return [self.guidance["covariates"], self.guidance["perturbation"]]
        return [self.guidance]

    @property
    def is_guided(self) -> bool:
        """Whether any weight is another than 1."""
        return any(weight != 1 for weight in self.weights)

    def check(self, name: str, config: Any) -> None:
        """Refuse weights of a null condition that was never trained, and a grid for a solver that finds its steps."""
        super().check(name, config)
        if self.weights[0] != 1 and config.prob_unconditional == 0:
            raise ValueError(
                f"guidance is {self.guidance}; this {name} was made with prob_unconditional=0 and never saw the null "
                "condition that guidance leads away from. Leave guidance out, or fit with prob_unconditional=0.1"
            )
        if self.grid is not None and (self.solver or config.solver) == ADAPTIVE:
            raise ValueError(
                f"grid is given and the solver is {ADAPTIVE}, which finds its steps; choose another solver"
            )


@dataclass(frozen=True)
class PartsSampling(FlowSampling):
    """Options of conditional flows that guide by parts.

    Parameters
    ----------
    guidance, interval
        Weight of classifier-free guidance, and between which times it acts; 1 is no guidance. By parts,
        ``{"perturbation": 2, "covariates": 1}``: how strongly cells are drawn from the control cells of their
        covariates towards the perturbation, and from all cells towards their covariates.
    """

    parts = PARTS


class takes_options:
    """A method that takes the options of the model it is called on, in place of its ``**options``, and no others.

    Its signature and its docstring, with ``{options}`` for these, name them.

    Parameters
    ----------
    sampling
        Record of the options; None takes `Sampling` of the class.
    """

    def __init__(self, *, sampling: type[NoSampling] | None = None):
        self.sampling = sampling
        self.made: dict[type, Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any]) -> takes_options:
        """Take the method."""
        self.function = function
        self.__doc__ = function.__doc__
        return self

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        if owner not in self.made:
            self.made[owner] = _of_class(self.function, self.sampling or owner.Sampling)  # type: ignore[attr-defined]
        made = self.made[owner]
        return made if instance is None else made.__get__(instance, owner)


def _of_class(function: Callable[..., Any], sampling: type[NoSampling]) -> Callable[..., Any]:
    """The method as a class with these options has it."""
    own = inspect.signature(function)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [] if len(named) == len(own.parameters) else _parameters(sampling)

    @functools.wraps(function)
    def call(model: Any, /, *arguments: Any, **given: Any) -> Any:
        check_names(call, model.name, given)
        return function(model, *arguments, **given)

    call.__signature__ = own.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    call.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("{options}\n", _described(sampling))
    return call


def check_names(method: Callable[..., Any], model: str, given: Iterable[str]) -> None:
    """Refuse options that a verb of a model has not got."""
    known = list(inspect.signature(method).parameters)[1:]
    if strange := [name for name in given if name not in known]:
        raise ValueError(f"{model}.{method.__name__} has no option {preview(strange)}; its options: {', '.join(known)}")


def _parameters(sampling: type[NoSampling]) -> list[inspect.Parameter]:
    """The fields of a record as parameters."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(f.name, keyword, default=None if f.default is MISSING else f.default, annotation=f.type)
        for f in fields(sampling)
    ]


def _described(sampling: type[NoSampling]) -> str:
    """What the docstrings of a record and of those below it say of their fields."""
    texts: dict[str, str] = {}  # of fields, those of a record in place of those below it
    for kind in reversed(sampling.__mro__):
        _, _, parameters = inspect.cleandoc(kind.__doc__ or "").partition("----------\n")
        if issubclass(kind, NoSampling):
            texts |= dict(ENTRY.findall(parameters))
    return "".join(f"{names}\n{text.rstrip()}\n" for names, text in texts.items())


def _times(name: str, values: Any) -> tuple[float, ...]:
    """Times as floats."""
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {values!r}; expected times between 0 and 1") from None


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)
