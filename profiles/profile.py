"""What a profile may say: variants, routes, axes, tolerances, prompts (diffoundry.profile/1.0)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from diffoundry.types import Limits, Precision

SCHEMA = "diffoundry.profile/1.0"
Level = Literal["call", "drift", "trajectory", "image"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AxisRequest(_Strict):
    """A range asked for. unit "native" counts in multiples of the model's own picture size."""

    unit: Literal["pixels", "native", "count"] = "count"
    min: float = Field(gt=0)
    opt: float = Field(gt=0)
    max: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> AxisRequest:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min ≤ opt ≤ max does not hold: {self.min}, {self.opt}, {self.max}")
        return self


class ShapeRequest(_Strict):
    """One shape of a list. An axis left out has its opt value.

    unit "native" counts height and width in multiples of the model's own picture size, which are
    rounded to the nearest legal value as an axis' bounds are.
    """

    unit: Literal["pixels", "native"] = "pixels"
    batch: int | None = Field(default=None, ge=1)
    height: float | None = Field(default=None, gt=0)
    width: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _whole_pixels(self) -> ShapeRequest:
        if self.unit == "pixels" and any(value % 1 for value in self.sizes().values()):
            raise ValueError(f"pixels are whole numbers: {self.sizes()}")
        return self

    def sizes(self) -> dict[str, float]:
        """The axes that it names."""
        named = {"batch": self.batch, "height": self.height, "width": self.width}
        return {axis: value for axis, value in named.items() if value is not None}


def _each_once(shapes: tuple[ShapeRequest, ...]) -> tuple[ShapeRequest, ...]:
    double = [str(one.sizes()) for i, one in enumerate(shapes) if one in shapes[:i]]
    if double:
        raise ValueError(f"a shape stands twice in the list: {', '.join(double)}")
    return shapes


def _is_list(value: Any) -> str:
    return "[list]" if isinstance(value, list | tuple) else "[word]"


# A plain union would report a mistake in one shape against both alternatives.
Shapes = Annotated[
    Annotated[Literal["dynamic", "fixed"], Tag("[word]")]
    | Annotated[
        tuple[ShapeRequest, ...], Field(min_length=1), AfterValidator(_each_once), Tag("[list]")
    ],
    Discriminator(_is_list),
]


class StageRequest(BaseModel):
    """One stage of a route: its name, and its options beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    stage: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class VariantRequest(_Strict):
    """One complete way to run the pipeline: runtime, precision, shapes, and how to get there."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    runtime: str
    device: str = "cpu"
    precision: Precision = "fp32"
    shapes: Shapes = "dynamic"
    route: tuple[StageRequest, ...] = Field(min_length=1)
    component_routes: dict[str, tuple[StageRequest, ...]] = {}
    limits: dict[Level, Limits] = {}
    power: Literal["low", "balanced", "full"] | None = None
    """What `generate --power` finds it by."""

    @property
    def shape_kind(self) -> Literal["dynamic", "fixed", "enumerated"]:
        """The kind of shape policy asked for."""
        return self.shapes if isinstance(self.shapes, str) else "enumerated"


class CheckRequest(_Strict):
    """How the pipeline is checked. None: the model's own default (see docs/profiles.md)."""

    judge_pairs: int | None = Field(default=None, ge=1)
    calibration_pairs: int = Field(default=4, ge=1)
    tuning_pairs: int = Field(default=4, ge=1)
    calibration_calls: int = Field(default=8, ge=1)
    """Calls kept of each component and of each of these two splits, spread over their pairs."""
    recorded_trajectories: int = Field(default=2, ge=1)
    shapes: Literal["auto", "all"] = "auto"
    """"auto": of a large model, shapes of more work than the usual one are not visited,
    which the table and the build's last line say. "all": they are."""
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0)
    scheduler: str | None = None
    negative: str = ""


class Profile(_Strict):
    """A whole profile file."""

    schema_: Literal["diffoundry.profile/1.0"] = Field(alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    prompts: str = "default"
    axes: dict[Literal["batch", "height", "width"], AxisRequest] = {}
    check: CheckRequest = CheckRequest()
    limits: dict[Level, Limits] = {}
    include: tuple[str, ...] = ()
    """Shipped profiles whose variants are built too; `reading` has added them to `variants`."""
    variants: tuple[VariantRequest, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_names(self) -> Profile:
        names = [variant.name for variant in self.variants]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"variant names must differ: {', '.join(double)}")
        return self
