"""The capture stage: everything that needs PyTorch, so that the checks need none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from diffoundry.capture.asked import Asked
from diffoundry.errors import StageError
from diffoundry.formats import recording
from diffoundry.formats.recording import Call, PipelineRecording, Trajectory
from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext

if TYPE_CHECKING:
    from diffoundry.capture.reference import Reference
    from diffoundry.capture.swaps import Ranges
    from diffoundry.capture.trajectories import Denoised, Settings
    from diffoundry.models.pipeline import PipelineSource

COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
T = TypeVar("T")


@dataclass(frozen=True)
class Capture(Asked):
    """Records what the PyTorch original computes on real inputs along real trajectories.

    pairs: (prompt, seed) of each trajectory of the split. texts: prompts that the text encoder
    reads besides, which costs next to nothing beside a trajectory. negative, steps, guidance,
    scheduler ("" is the model's own): how the pictures are made. The rest: see `Asked`.
    """

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy", "tokenizers")
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=1 << 30, weights=1.1, activations=4)

    pairs: tuple[tuple[str, int], ...] = ()
    texts: tuple[str, ...] = ()
    negative: str = ""
    steps: int = 4
    guidance: float = 7.5
    scheduler: str = ""

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        """Each component's folder, and the whole diffusers directory."""
        modules = {name: (ArtifactType("torch_module"),) for name in COMPONENTS}
        return {**modules, "pipeline_files": (ArtifactType("pipeline_files"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        """One recording for each component, and one of the trajectories."""
        return {name: ArtifactType("recording") for name in (*COMPONENTS, "pipeline")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Record. Raises ModelError where the original itself makes NaN or infinity."""
        from diffoundry.models.determinism import deterministic

        if not self.pairs:
            raise StageError(
                f"capture of the {self.split} split",
                expected="at least one (prompt, seed) pair",
                found="none",
                remedy="give the profile prompts",
            )
        with deterministic(context.threads):
            return _Run(self, inputs, context).run()


class _Run:
    """One run of the stage; components are loaded one after the other."""

    def __init__(
        self, stage: Capture, inputs: Mapping[str, Artifact], context: StageContext
    ) -> None:
        from diffoundry.models.pipeline import open_pipeline

        self.stage = stage
        self.inputs = inputs
        self.context = context
        self.source = open_pipeline(inputs["pipeline_files"].path)
        self.settings = _settings(stage, self.source, context)
        self.ranges = _ranges(self.source)
        self.produced: dict[str, Produced] = {}

    def run(self) -> dict[str, Produced]:
        texts = self._visit("text_encoder", self._encode, lambda made: [[c] for c in made.values()])
        denoised = self._visit(
            "unet",
            lambda unet: self._denoise(unet, texts),
            lambda made: [one.calls for one in made],
        )
        decoded = self._visit(
            "vae_decoder",
            lambda decoder: self._decode(decoder, denoised),
            lambda made: [[call] for call in made],
        )
        self._visit(
            "vae_encoder",
            lambda encoder: self._encode_pictures(encoder, decoded),
            lambda made: [[call] for call in made],
        )
        return {**self.produced, "pipeline": self._record_pipeline(denoised, decoded)}

    def _visit(
        self,
        name: str,
        make: Callable[[Reference], T],
        by_trajectory: Callable[[T], Sequence[Sequence[Call]]],
    ) -> T:
        """Load a component, run it, record it, and let go of it before the next is loaded."""
        from diffoundry.capture.reference import Reference
        from diffoundry.models.components import load_component

        self.context.say(f"{name}: loading")
        module = load_component(self.inputs[name].path, name)
        reference = Reference(module, self.context.contracts[name])
        made = make(reference)
        self.produced[name] = self._record(reference, by_trajectory(made))
        return made

    def _encode(self, reference: Reference) -> dict[str, Call]:
        from diffoundry.capture import trajectories

        prompts = [*(prompt for prompt, _ in self.stage.pairs), *self.stage.texts]
        if trajectories.guides_by_two_calls(self.source, self.stage.guidance):
            prompts.insert(0, self.stage.negative)
        return trajectories.encode_prompts(reference, self.source, prompts, self.settings.shape)

    def _denoise(self, unet: Reference, texts: Mapping[str, Call]) -> list[Denoised]:
        from diffoundry.capture.trajectories import denoise

        found = []
        for number, (prompt, seed) in enumerate(self.stage.pairs, 1):
            self.context.say(f"unet: trajectory {number}/{len(self.stage.pairs)}")
            found.append(denoise(unet, self.source, self.settings, texts, prompt, seed))
        return found

    def _decode(self, decoder: Reference, denoised: Sequence[Denoised]) -> list[Call]:
        from diffoundry.capture.trajectories import decode

        return [decode(decoder, self.source, one, self.settings.shape) for one in denoised]

    def _encode_pictures(self, encoder: Reference, decoded: Sequence[Call]) -> list[Call]:
        from diffoundry.capture.trajectories import encode_picture

        return [encode_picture(encoder, call, self.settings.shape) for call in decoded]

    def _record(self, reference: Reference, by_trajectory: Sequence[Sequence[Call]]) -> Produced:
        """Keep the calls of the first trajectories, add what is measured on the reference, save."""
        from diffoundry.capture.recorder import record

        name = reference.contract.component
        pool = [call for calls in by_trajectory for call in calls]
        kept = [call for calls in by_trajectory[: self._kept(name)] for call in calls]
        folder = self.context.work / name
        made = record(reference, kept, pool, self.stage, self.ranges, self.context.say)
        recording.save(made, folder)
        return Produced(folder)

    def _kept(self, name: str) -> int:
        if name != "text_encoder":
            return self.stage.calls_per_component
        # The negative prompt is one text call more.
        extra = self.stage.negative not in dict(self.stage.pairs)
        return self.stage.calls_per_component + int(extra) + len(self.stage.texts)

    def _record_pipeline(self, denoised: Sequence[Denoised], decoded: Sequence[Call]) -> Produced:
        from diffoundry.capture.trajectories import picture, warn_about

        made, notes = [], []
        for one, call in zip(denoised, decoded, strict=True):
            image = picture(call)
            note = warn_about(image, one.prompt)
            if note:
                notes.append(note)
                self.context.say(f"warning: {note}")
            made.append(
                Trajectory(
                    prompt=one.prompt,
                    negative=self.settings.negative,
                    seed=one.seed,
                    scheduler=self.settings.scheduler,
                    steps=self.settings.steps,
                    guidance=self.settings.guidance,
                    shape=self.settings.shape,
                    initial_latents=one.initial,
                    noise=one.noise,
                    final_latents=one.final,
                    image=image,
                )
            )
        folder = self.context.work / "pipeline"
        recording.save(PipelineRecording(tuple(made), self.stage.split, tuple(notes)), folder)
        return Produced(folder)


def _settings(stage: Capture, source: PipelineSource, context: StageContext) -> Settings:
    """The stage's options with the model's own scheduler filled in, at the usual shape."""
    from diffoundry.capture.trajectories import Settings
    from diffoundry.sampling.schedulers import fitting

    shape = {
        axis: value
        for contract in context.contracts.values()
        for axis, value in contract.opt_shape().items()
    }
    return Settings(
        steps=stage.steps,
        guidance=stage.guidance,
        scheduler=stage.scheduler or fitting(source.geometry, source.scheduler).default,
        negative=stage.negative,
        shape=dict(sorted(shape.items())),
    )


def _ranges(source: PipelineSource) -> Ranges:
    """What the model's configs allow as inputs."""
    from diffoundry.capture.swaps import Ranges
    from diffoundry.models.defaults import field

    text = source.components["text_encoder"]
    return Ranges(
        vocabulary=int(field(text.class_name, text.config, "vocab_size")),
        train_timesteps=int(source.scheduler.get("num_train_timesteps", 1000)),
    )
