"""What every part of a run's description is made of: its base class, its kinds of numbers, its names and paths.

Every number of things has an upper bound, far above what is of use: a slip of the keyboard is refused before anything
is allocated.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from starquant.errors import expand_home

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
#: Tokens of a text, an answer, a block.
Tokens = Annotated[int, Field(ge=1, le=2**20)]
#: Of a sampler or an optimizer.
Steps = Annotated[int, Field(ge=1, le=100_000)]
#: Vectors that are held at once: tokens, positions, draws, texts.
Rows = Annotated[int, Field(ge=1, le=100_000)]
Positive = Annotated[float, Field(gt=0.0)]
Ratio = Annotated[float, Field(gt=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Scale = Annotated[float, Field(ge=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

#: Characters of a name: four of them, joined, still name a file.
LONGEST_NAME = 48
#: Characters of a task's name, which names files by itself.
LONGEST_TASK = 120


def validate_name(name: str, longest: int = LONGEST_NAME) -> str:
    """Return what may become part of a file's name; raises ValueError for anything else."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name) or len(name) > longest:
        raise ValueError(
            f"got {name[:80]!r}, allowed: at most {longest} letters (a-z), digits and '_.+-', not led by '.', '+', '-'"
        )
    return name


#: Becomes part of the names of files: no path, no blank, of a length that leaves room for others.
Name = Annotated[str, AfterValidator(validate_name)]
TaskName = Annotated[str, AfterValidator(lambda name: validate_name(name, LONGEST_TASK))]
#: Of a file or folder of the user.
UserPath = Annotated[str, AfterValidator(expand_home)]


def _validate_whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        raise ValueError(f"got {value!r}, allowed: a whole number, written as {value:.0f}")
    return value


#: Beside a `Literal` of whole numbers, which takes 4.0 for 4.
Whole = BeforeValidator(_validate_whole)


class Spec(BaseModel):
    """Base of every part of a run's description: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


#: Of a field that cannot change a score: where things lie, how fast they run, who is told.
INERT: JsonDict = {"inert": True}
