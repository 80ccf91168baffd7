"""Options of drawing cells: a record for each family of models, and verbs that take those of their model alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from invirtuo.errors import preview
from invirtuo.flow import SOLVER_NAMES, SOLVERS
from invirtuo.settings import Settings, parameters, setting

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
ADAPTIVE = "dopri5"  # the solver that finds its own steps


@dataclass(frozen=True)
class NoSampling(Settings):
    """Base of the records: no options."""

    def check(self, name: str, config: Any) -> None:
        """Refuse options that cannot act on a model of this name and Config."""


@dataclass(frozen=True)
class SampleConfig(NoSampling):
    """Options of every model that predicts log expression."""

    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        'precision of the arithmetic; "auto" is bf16 where it is measured to be faster. bf16 rounds; closed forms stay '
        "as they are",
    )
    batch_size: int = setting(
        256, "cells in the network at once, of models of sets at least one set; the cells do not depend on it", ge=1
    )
    clamp_min: float | None = setting(None, "raise values below this to it (0 for expression); None leaves them")
    zeros: Literal["threshold", "moved"] | None = setting(
        None,
        'how values of a continuous model become cells with zeros. "threshold": below half the smallest positive '
        'training value they are 0. "moved": control cells of the covariates, moved to the mean that the model gives, '
        "with their zeros kept. None: as the model draws them",
    )


@dataclass(frozen=True)
class SolverSampling(NoSampling):
    """Options of models that solve a differential equation."""

    steps: int | None = setting(None, "number of steps of the solver; None takes the model's own", ge=1)
    solver: str | None = setting(
        None, "solver; None takes the model's own, dopri5 finds its steps by itself", choices=SOLVER_NAMES
    )

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
    """Options of generators with a weight of guidance for every attribute."""

    guidance: float | Mapping[str, float | tuple[float, ...]] | None = setting(
        None,
        "weight of every attribute: a number for all, or attribute to a number, or to one number per cell; attributes "
        "that are not named then have weight 0 and no influence. None: 1 for all",
    )


@dataclass(frozen=True)
class FlowSampling(SolverSampling, SampleConfig):
    """Options of conditional flows."""

    guidance: float = setting(1.0, "weight of classifier-free guidance; 1 is no guidance")
    interval: tuple[float, float] = setting((0.0, 1.0), "times between which guidance acts", ge=0, le=1)
    grid: tuple[float, ...] | None = setting(
        None, "own times of the steps, from 0 to 1, in place of `steps`", ge=0, le=1
    )

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        super().__post_init__()
        start, end = self.interval
        if start >= end:
            raise ValueError(f"interval is {self.interval}; expected two times that rise, between 0 and 1")
        if (start, end) != (0, 1) and not self.is_guided:
            raise ValueError(f"interval is {self.interval} and guidance is 1; expected another weight, which it bounds")
        if self.grid is None:
            return
        rises = list(self.grid) == sorted(set(self.grid))
        if not rises or self.grid[:1] + self.grid[-1:] != (0, 1):
            raise ValueError(f"grid is {self.grid}; expected times that rise from 0 to 1")
        if self.steps is not None:
            raise ValueError(f"steps is {self.steps} and grid has {len(self.grid)} times; give one of them")

    @property
    def weights(self) -> list[float]:
        """Weights of the branches behind the null condition."""
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
    """Options of conditional flows that guide by parts."""

    guidance: float | Mapping[str, float] = setting(  # type: ignore[assignment]
        1.0,
        'weight of classifier-free guidance; 1 is no guidance. By parts, ``{"perturbation": 2, "covariates": 1}``: how '
        "strongly cells are drawn from the control cells of their covariates towards the perturbation, and from all "
        "cells towards their covariates",
    )

    def __post_init__(self) -> None:
        """Refuse parts that there are not; those that are not named have weight 1."""
        super().__post_init__()
        if not isinstance(self.guidance, Mapping):
            return
        if unknown := [name for name in self.guidance if name not in PARTS]:
            raise ValueError(f"guidance: {preview(unknown)} is no part of it; expected {preview(PARTS)}")
        object.__setattr__(self, "guidance", dict.fromkeys(PARTS, 1.0) | dict(self.guidance))

    @property
    def weights(self) -> list[float]:
        """Weights of the branches behind the null condition: the condition; or its control cells, then itself."""
        if isinstance(self.guidance, Mapping):
            return [self.guidance.get(part, 1.0) for part in reversed(PARTS)]
        return [self.guidance]


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
            self.made[owner] = _with_options(self.function, self.sampling or owner.Sampling)  # type: ignore[attr-defined]
        made = self.made[owner]
        return made if instance is None else made.__get__(instance, owner)


def _with_options(function: Callable[..., Any], sampling: type[NoSampling]) -> Callable[..., Any]:
    """The method with these options in its signature and docstring, and a check of their names."""
    own = inspect.signature(function)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [] if len(named) == len(own.parameters) else _parameters(sampling)

    @functools.wraps(function)
    def call(model: Any, /, *arguments: Any, **given: Any) -> Any:
        check_names(call, model.name, given)
        return function(model, *arguments, **given)

    call.__signature__ = own.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    call.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("{options}\n", parameters(sampling))
    return call


def check_names(method: Callable[..., Any], model: str, given: Iterable[str]) -> None:
    """Refuse options that a verb of a model has not got."""
    known = list(inspect.signature(method).parameters)[1:]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{model}.{method.__name__} has no option {preview(unknown)}; its options: {', '.join(known)}")


def _parameters(sampling: type[NoSampling]) -> list[inspect.Parameter]:
    """The fields of a record as keyword-only parameters."""
    found = []
    for field in fields(sampling):
        default = None if field.default is MISSING else field.default
        parameter = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type
        )
        found.append(parameter)
    return found
