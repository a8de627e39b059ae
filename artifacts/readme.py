"""README.md of a bundle, for a person who receives it and has never heard of Diffoundry.

It is made from the manifest alone, so it is as deterministic as the manifest.
"""

from __future__ import annotations

from diffoundry.artifacts.manifest import EngineRecord, Manifest, VariantRecord
from diffoundry.types import Contract, Limits, TensorSpec

WHAT = {
    "text_encoder": "turns token ids into text features",
    "unet": "predicts, at every step, what to remove from the latent",
    "vae_encoder": "turns a picture into a latent",
    "vae_decoder": "turns the last latent into the picture",
    "preview_decoder": "a small stand-in for it: previews, quick and less like",
}
LEVELS = {
    "call": "each component, on recorded inputs",
    "drift": "each compressed component against the original that it was made from",
    "trajectory": "the final latent of the whole loop",
    "image": "the decoded picture",
}


def readme_text(manifest: Manifest) -> str:
    """The README of the bundle that `manifest` describes; its `files` are not read."""
    parts = [
        _head(manifest),
        _variants(manifest),
        _start(manifest),
        _proof(manifest),
        _engines(manifest),
        _layout(manifest),
        _notes(manifest),
        _licence(manifest),
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _head(manifest: Manifest) -> str:
    geometry = manifest.model.geometry
    height, width = geometry.native_height_pixels, geometry.native_width_pixels
    deferred = tuple(variant.name for variant in manifest.variants if _is_deferred(variant))
    by_stand_in = f" ({_code_list(deferred)}: by a stand-in, see below)" if deferred else ""
    return f"""
# {manifest.model.name}: engines, and the proof that they are right

This folder makes pictures from text. It was compiled by
Diffoundry from a `{manifest.model.pipeline_class}` made
for {width}×{height} pixels, with the profile `{manifest.profile}`. It needs no PyTorch. The
engines were compared with the PyTorch original before this folder was published{by_stand_in},
and you can repeat that comparison on your machine, from the golden vectors that are included.
"""


def _is_deferred(variant: VariantRecord) -> bool:
    """Whether the variant's runtime says that its engines are made at the receiving end."""
    return any(note.startswith("deferred:") for note in variant.notes)


def _variants(manifest: Manifest) -> str:
    lines = ["## What is in it", ""]
    lines += ["| variant | precision | runtime | device | needs | engines |"]
    lines += ["|---|---|---|---|---|---|"]
    for variant in manifest.variants:
        needs = ", ".join(f"{r.distribution} ≥ {r.at_least}" for r in variant.requires) or "—"
        size = sum(engine.size_bytes for engine in variant.engines.values())
        lines.append(
            f"| `{variant.name}` | {variant.precision} | {variant.runtime} | {variant.device} "
            f"| {needs} | {len(variant.engines)}, {_megabytes(size)} |"
        )
    return "\n".join(lines)


def _start(manifest: Manifest) -> str:
    extras = sorted({variant.extra for variant in manifest.variants if variant.extra})
    package = f'"diffoundry[{",".join(extras)}]"' if extras else "diffoundry"
    sampling = manifest.sampling
    return f"""
## Make a picture

```sh
pip install {package}
diffoundry verify .                            # is everything intact, and right, on this machine?
diffoundry generate . "your prompt" --out pictures
{_preview(manifest)}```

By default `generate` takes {sampling.steps} steps of `{sampling.scheduler}` with guidance
{sampling.guidance:g}. Schedulers in this bundle: {_code_list(sampling.schedulers)}.
The same seed gives the same picture on every machine, up to rounding: noise is drawn by NumPy's
PCG64, not by a framework.
{_powers(manifest)}"""


def _preview(manifest: Manifest) -> str:
    if "preview_decoder" not in manifest.contracts:
        return ""
    return 'diffoundry generate . "your prompt" --preview  # quick pictures, by a small decoder\n'


def _powers(manifest: Manifest) -> str:
    named = {v.power: v.name for v in reversed(manifest.variants) if v.power is not None}
    if not named:
        return ""
    words = ", ".join(f"`--power {power}` takes `{name}`" for power, name in sorted(named.items()))
    return f"Variants were built for different power: {words}.\n"


def _proof(manifest: Manifest) -> str:
    lines = ["## What was proven", ""]
    lines += ["Each variant was published only after it kept these limits, against the original:"]
    lines += ["", "| variant | level | compared | limits |", "|---|---|---|---|"]
    for variant in manifest.variants:
        for level, limits in variant.limits.items():
            lines.append(f"| `{variant.name}` | {level} | {LEVELS[level]} | {_limits(limits)} |")
    lines += [
        "",
        "It was also shown that every input has its effect (nothing dropped), that every declared",
        "shape works, and that no NaN or infinity appears. The figures measured, with seconds and",
        "memory, stand in `evidence/`, one file for each machine that checked this bundle.",
        "`diffoundry verify . --complete` adds yours: checks that the builder's machine could not",
        "run (deferred) are completed there.",
    ]
    return "\n".join(lines)


def _engines(manifest: Manifest) -> str:
    variant = manifest.variants[0]
    parts = ["## The engines themselves", ""]
    parts += [
        "Without Diffoundry, any program can call them. These are the tensors of each component;",
        "what a `*` marks follows an axis, whose range is given below.",
        "",
    ]
    for component, engine in variant.engines.items():
        contract = engine.contract or manifest.contracts[component]
        parts += _component(component, contract)
    parts += _axes(manifest)
    onnx = [v for v in manifest.variants if _onnx_engine(v)]
    if onnx:
        parts += _onnx_example(manifest, onnx[0])
    parts += _recipe(manifest)
    return "\n".join(parts)


def _component(component: str, contract: Contract) -> list[str]:
    lines = [f"**{component}**: {WHAT.get(component, 'a component')}", ""]
    lines += ["| | name | dtype | shape |", "|---|---|---|---|"]
    rows = [("in", spec) for spec in contract.inputs] + [("out", spec) for spec in contract.outputs]
    lines += [f"| {way} | `{s.name}` | {s.dtype} | {_shape(s)} |" for way, s in rows]
    return [*lines, ""]


def _axes(manifest: Manifest) -> list[str]:
    axes = {axis for contract in manifest.contracts.values() for axis in contract.axes}
    lines = ["| axis | from | to | usual | multiple of |", "|---|---|---|---|---|"]
    for axis in sorted(axes, key=lambda a: (a.name, a.min, a.max)):
        lines.append(
            f"| `{axis.name}` | {axis.min} | {axis.max} | {axis.opt} | {axis.multiple_of} |"
        )
    policies = {v.name: v.shape_policy for v in manifest.variants if v.shape_policy.shapes}
    for name, policy in policies.items():
        shapes = "; ".join(
            ", ".join(f"{axis}={size}" for axis, size in shape) for shape in policy.shapes
        )
        lines += ["", f"`{name}` runs only at: {shapes}."]
    return [*lines, ""]


def _onnx_engine(variant: VariantRecord) -> EngineRecord | None:
    """An ONNX engine of the variant: the decoder where there is one, since it is simplest."""
    engines = [e for e in variant.engines.values() if e.type.kind == "onnx"]
    decoder = variant.engines.get("vae_decoder")
    return decoder if decoder in engines else (engines[0] if engines else None)


def _onnx_example(manifest: Manifest, variant: VariantRecord) -> list[str]:
    engine = _onnx_engine(variant)
    if engine is None:
        return []
    component = next(name for name, e in variant.engines.items() if e is engine)
    contract = engine.contract or manifest.contracts[component]
    usual = contract.opt_shape()
    feeds = ", ".join(
        f'"{spec.name}": np.zeros({list(spec.shape(usual))}, np.{spec.dtype})'
        for spec in contract.inputs
    )
    outputs = ", ".join(spec.name for spec in contract.outputs)
    return [
        "```python",
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{engine.path}/model.onnx")',
        f"feeds = {{{feeds}}}",
        f"{outputs}{',' if ',' not in outputs else ''} = session.run(None, feeds)",
        "```",
        "",
    ]


def _recipe(manifest: Manifest) -> list[str]:
    geometry = manifest.model.geometry
    shift = f" + {geometry.latent_shift_factor:g}" if geometry.latent_shift_factor else ""
    return [
        f"From text to picture: token ids (`tokenizer/`, {geometry.tokens} of them) →",
        "`text_encoder` → a latent of unit normal noise, scaled and stepped as the table in",
        "`steps/` says, with one `unet` call each →",
        f"latent / {geometry.latent_scaling_factor!r}{shift} → `vae_decoder` → (image + 1) / 2.",
        "A step table holds timesteps, input scales and coefficients as plain safetensors arrays,",
        "so that a dozen lines in any language run every scheduler.",
    ]


def _layout(manifest: Manifest) -> str:
    compressed = any(variant.compression for variant in manifest.variants)
    records = (
        "\n| `compression/` | what was made smaller on purpose: quantization plans, prune records |"
        if compressed
        else ""
    )
    return f"""
## Folders

| | |
|---|---|
| `manifest.json` | everything above for programs: contracts, requirements, digest of every file |
| `engines/` | one folder a variant, one engine a component |{records}
| `golden/` | recorded inputs and outputs of the PyTorch original |
| `steps/` | step tables: the schedulers as numbers |
| `tokenizer/` | vocabulary |
| `evidence/` | what was measured, where; the only folder that may change |
"""


def _notes(manifest: Manifest) -> str:
    lines = [f"- left out: {name}" for name in manifest.model.left_out]
    lines += [f"- {note}" for note in manifest.notes]  # may repeat what was left out
    lines = list(dict.fromkeys(lines))
    lines += [f"- `{v.name}`: {note}" for v in manifest.variants for note in v.notes]
    return "\n".join(["## Good to know", "", *lines]) if lines else ""


def _licence(manifest: Manifest) -> str:
    known = f"The model's licence: {manifest.model.licence}." if manifest.model.licence else ""
    return f"""
## Licence

The engines are a compiled form of the model's weights: the model's own licence applies to them.
{known or "It is not recorded here: ask whoever gave you this folder."}
"""


def _limits(limits: Limits) -> str:
    """Limits in words; what is not limited is left out."""
    words = []
    if limits.peak_factor is not None:
        words.append(
            f"max_abs ≤ max({limits.peak_factor:g} × peak, {limits.floor_factor:g} × floor)"
        )
    if limits.max_abs is not None:
        words.append(f"max_abs ≤ {limits.max_abs:g}")
    for name, text in (
        ("cosine", "cosine ≥ {:g}"),
        ("psnr_db", "PSNR ≥ {:g} dB"),
        ("sqnr_db", "SQNR ≥ {:g} dB"),
        ("ssim", "SSIM ≥ {:g}"),
        ("prompt_accuracy_drop", "prompt accuracy falls by ≤ {:g}"),
    ):
        value = getattr(limits, name)
        if value is not None:
            words.append(text.format(value))
    return ", ".join(words) or "none"


def _shape(spec: TensorSpec) -> str:
    dims = [str(dim) if isinstance(dim, int) else f"{dim}*" for dim in spec.dims]
    return "[" + ", ".join(dims) + "]"


def _code_list(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
