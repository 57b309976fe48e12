"""The graph of a shipped model: steps in order, each of which makes one value of earlier ones, checked as a whole.

Value 0 is the input, value k what step k makes. A step reads values before its own only, so there are no cycles.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from noctule.runtime.fields import ModelFileError, Tensors, parse, unparse
from noctule.runtime.operators import OPERATORS, Operator
from noctule.runtime.values import Value

MOST_STEPS = 100_000


@dataclass(frozen=True)
class Step:
    """One operator, what it reads, and the name of the module that it comes from."""

    name: str
    of: tuple[int, ...]
    operator: Operator


@dataclass
class Graph:
    """A model as steps.

    Raises:
        ValueError: a step cannot read what it is given; the text names it.
    """

    input: Value
    steps: Sequence[Step]
    facts: dict[str, Any] = field(default_factory=dict)
    """What the writer says about the model: names of classes, how data are prepared; plain JSON, not used here."""
    values: list[Value] = field(init=False)

    def __post_init__(self) -> None:
        self.values = [self.input]
        for number, step in enumerate(self.steps, start=1):
            where = f"step {number} ({step.name or 'of the model'}, {_op(step.operator)})"
            if not step.of or not all(0 <= k < number for k in step.of):
                raise ModelFileError(
                    f"{where} reads {[*step.of]}: only the values 0 to {number - 1} are there before it"
                )
            try:
                self.values.append(step.operator.infer(*(self.values[k] for k in step.of)))
            except (ValueError, TypeError) as error:
                raise ModelFileError(f"{where}: {error}") from error

    @property
    def output(self) -> Value:
        """The last value."""
        return self.values[-1]

    def to_json(self, tensors: dict[str, np.ndarray]) -> str:
        """The graph as JSON; its arrays are added to ``tensors``."""
        steps = []
        for number, step in enumerate(self.steps, start=1):
            fields = unparse(step.operator, f"{number}", tensors)
            steps.append({"op": _op(step.operator), "name": step.name, "of": [*step.of], **fields})
        input = {"shape": [*self.input.shape], "kind": self.input.kind}
        return json.dumps({"input": input, "steps": steps, "facts": self.facts}, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, tensors: Tensors) -> "Graph":
        """The graph of JSON; raises ModelFileError, which names the field, where it is not one."""
        try:
            data = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"the graph is no JSON: {error}") from error
        if (
            not isinstance(data, dict)
            or not isinstance(data.get("steps"), list)
            or not isinstance(data.get("facts"), dict)
        ):
            raise ModelFileError("the graph must be an object with input, steps and facts")
        if len(data["steps"]) > MOST_STEPS:
            raise ModelFileError(f"the graph has {len(data['steps']):,} steps, more than {MOST_STEPS:,}")
        steps = []
        for number, entry in enumerate(data["steps"], start=1):
            where = f"step {number}"
            if not isinstance(entry, dict):
                raise ModelFileError(f"{where} must be an object, got {entry!r:.100}")
            fields = dict(entry)
            op = parse(str, fields.pop("op", None), f"{where}.op", tensors)
            name = parse(str, fields.pop("name", None), f"{where}.name", tensors)
            if op not in OPERATORS:
                raise ModelFileError(
                    f"{where}.op is {op!r:.100}, which this version does not know: {', '.join(OPERATORS)}"
                )
            of = parse(tuple[int, ...], fields.pop("of", None), f"{where}.of", tensors)
            steps.append(Step(name, of, parse(OPERATORS[op], fields, where, tensors)))
        return cls(parse(Value, data.get("input"), "input", tensors), steps, data["facts"])

    def reference(self, x: np.ndarray) -> list[np.ndarray]:
        """All values for inputs (B, ...), computed in numpy: the oracle of the compiled code."""
        values = [x.astype(self.input.dtype)]
        for step in self.steps:
            made = step.operator.reference([values[k] for k in step.of], [self.values[k] for k in step.of])
            values.append(made)
        return values


def _op(operator: Operator) -> str:
    return next(name for name, kind in OPERATORS.items() if kind is type(operator))


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
