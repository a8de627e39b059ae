"""What a request for pictures has to be, held against the model and its engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffoundry.errors import UsageError
from diffoundry.models.geometry import Geometry


def check_request(
    geometry: Geometry, negative: str, guidance: float, seed: int, count: int
) -> None:
    """Raise UsageError for arguments that the model cannot take."""
    check_negative(geometry, negative)
    if negative and guidance <= 1:
        raise _usage("negative prompt", "guidance above 1", str(guidance), "raise guidance")
    if seed < 0:
        raise _usage("seed", "0 or more", str(seed), "choose another seed")
    if count < 1:
        raise _usage("count", "1 or more", str(count), "ask for at least one picture")


def check_negative(geometry: Geometry, negative: str) -> None:
    """Raise UsageError for a negative prompt where the U-Net embeds the guidance."""
    if negative and geometry.guidance_embedding_dim is not None:
        raise _usage(
            "negative prompt",
            "none: a model with a guidance embedding (LCM) was distilled with the empty one",
            repr(negative),
            "leave it out, or say in the prompt what should be there",
        )


def latent_shape(
    geometry: Geometry, unet: Any, height: int | None, width: int | None
) -> tuple[int, ...]:
    """[1, C, height/f, width/f] of a picture of so many pixels (None: the model's own size).

    Raises UsageError for sizes that the model, or the session `unet`, does not take.
    """
    height = geometry.native_height_pixels if height is None else height
    width = geometry.native_width_pixels if width is None else width
    multiple = geometry.pixel_multiple_of
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise _usage(
            "picture size",
            f"height and width that are multiples of {multiple}",
            f"{height} × {width}",
            "choose another size",
        )
    _check_range(unet, {"batch": 1, "height": height, "width": width})
    sides = (height // geometry.vae_factor, width // geometry.vae_factor)
    return (1, geometry.latent_channels, *sides)


def unet_takes(geometry: Geometry, unet: Any, batch: int, shape: tuple[int, ...]) -> bool:
    """Whether the U-Net's engine allows this batch (one that does not say so does)."""
    contract, policy = getattr(unet, "contract", None), getattr(unet, "policy", None)
    sides = (side * geometry.vae_factor for side in shape[2:])
    values = dict(zip(("batch", "height", "width"), (batch, *sides), strict=True))
    if contract is not None:
        axes = [axis for axis in contract.axes if axis.name in values]
        values = {axis.name: values[axis.name] for axis in axes}
        if "batch" not in values or any(axis.problem_with(values[axis.name]) for axis in axes):
            return False
    return policy is None or bool(policy.allows(values))


def _check_range(unet: Any, shape: Mapping[str, int]) -> None:
    """Refuse a size that the U-Net's engine was not built for (sessions that say so)."""
    contract, policy = getattr(unet, "contract", None), getattr(unet, "policy", None)
    axes = contract.axes if contract is not None else ()
    sizes = {axis.name: axis for axis in axes if axis.name in shape}
    allowed = ""
    if any(axis.problem_with(shape[name]) for name, axis in sizes.items()):
        allowed = ", ".join(f"{n} {a.min} to {a.max}" for n, a in sizes.items() if n != "batch")
    elif policy is not None and not policy.allows(shape):
        allowed = "; ".join(
            " × ".join(str(value) for name, value in one if name != "batch")
            for one in policy.shapes
        )
    if allowed:
        raise _usage(
            "picture size",
            f"what these engines were built for: {allowed}",
            f"{shape['height']} × {shape['width']}",
            "choose such a size, or build with other axes in the profile",
        )


def _usage(where: str, expected: str, found: str, remedy: str) -> UsageError:
    return UsageError(where, expected=expected, found=found, remedy=remedy)
