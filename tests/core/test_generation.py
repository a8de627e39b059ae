"""Generation over sessions makes the pictures that the diffusers pipelines make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.errors import ContractError, StageError, UsageError
from diffoundry.formats import step_table
from diffoundry.generation import Picture, TextToImage, save_png, to_uint8
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import open_pipeline
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.sampling.noise import draw_initial, draw_step_noise
from diffoundry.sampling.probing import probe_scheduler, quiet
from diffoundry.sampling.schedulers import fitting
from diffoundry.sessions import CheckedSession, SessionOnDemand
from diffoundry.types import Axis
from tests.mini_pipelines import make_named

PROMPT = "a small red circle"


class TorchSession:
    """A component of a diffusers pipeline as a session; counts and keeps its calls."""

    def __init__(self, component: str, pipe: Any) -> None:
        self.component, self.pipe = component, pipe
        self.calls: list[dict[str, np.ndarray]] = []

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        self.calls.append(dict(feeds))
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
        with torch.no_grad():
            name, value = self._run(tensors)
        return {name: value.numpy()}

    def _run(self, x: dict[str, Any]) -> tuple[str, Any]:
        if self.component == "text_encoder":
            return "prompt_embeds", self.pipe.text_encoder(x["input_ids"])[0]
        if self.component == "unet":
            return "model_output", self.pipe.unet(**x, return_dict=False)[0]
        return "image", self.pipe.vae.decode(x["latent"], return_dict=False)[0]


class Mini:
    """A mini pipeline: diffusers' own, and ours over the same modules."""

    def __init__(self, folder: Path, name: str) -> None:
        import diffusers
        import torch

        source = open_pipeline(make_named(folder, name))
        self.source, self.geometry = source, source.geometry
        options = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        loader = getattr(diffusers, source.pipeline_class)
        with quiet(), torch.random.fork_rng(devices=[]):
            self.pipe = loader.from_pretrained(
                folder, requires_safety_checker=False, low_cpu_mem_usage=False, **options
            )
        self.pipe.set_progress_bar_config(disable=True)
        fits = fitting(source.geometry, source.scheduler)
        tables = folder / "tables"
        tables.mkdir()
        for one in {fits.default, fits.names[-1]}:
            default = one == fits.default
            probed = probe_scheduler(one, source.scheduler, source.pipeline_class, default)
            step_table.save(probed, tables)
        names = ("text_encoder", "unet", "vae_decoder")
        self.sessions = {name: TorchSession(name, self.pipe) for name in names}
        self.engine = TextToImage(
            self.sessions,
            Tokenizer.open(source.tokenizer_path, source.geometry.tokens),
            step_table.open_tables(tables),
            source.geometry,
        )
        side = source.geometry.native_height_pixels // source.geometry.vae_factor
        self.shape = (1, source.geometry.latent_channels, side, side)

    def real(self, noise: np.ndarray | None = None, **options: Any) -> np.ndarray:
        """What diffusers' __call__ makes from injected latents and step noise."""
        import torch

        module = __import__(type(self.pipe.scheduler).__module__, fromlist=["randn_tensor"])
        draws = iter([] if noise is None else noise)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), quiet():
            if hasattr(module, "randn_tensor"):
                patch.setattr(module, "randn_tensor", lambda *a, **o: torch.from_numpy(next(draws)))
            return np.asarray(self.pipe(PROMPT, **options).images)


@pytest.fixture(scope="module")
def minis(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Mini] = {}

    def get(name: str) -> Mini:
        if name not in made:
            made[name] = Mini(tmp_path_factory.mktemp(name) / name, name)
        for session in made[name].sessions.values():
            session.calls.clear()
        return made[name]

    return get


def check_same(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", ["lcm", "tokens_24", "autoencoder_tiny"])
@pytest.mark.parametrize("steps", [1, 4])
def test_denoise_and_decode_are_latent_consistency_pipelines_call(
    minis: Any, name: str, steps: int
) -> None:
    import torch

    mini = minis(name)
    initial = draw_initial(3, mini.shape)
    noise = draw_step_noise(3, steps, mini.shape)
    options = {"steps": steps, "guidance": 3.0, "initial_latents": initial, "step_noise": noise}
    latent = mini.engine.denoise(PROMPT, **options)
    real = {
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "latents": torch.from_numpy(initial),
    }
    check_same(latent, mini.real(noise, output_type="latent", **real))
    check_same(mini.engine.decode(latent), mini.real(noise, output_type="np", **real))


@pytest.mark.parametrize("name", ["sd", "sd2", "odd_widths"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_denoise_and_decode_are_stable_diffusion_pipelines_call(
    minis: Any, name: str, guidance: float
) -> None:
    import torch

    mini = minis(name)
    initial = draw_initial(3, mini.shape)
    latent = mini.engine.denoise(
        PROMPT, "green", steps=5, guidance=guidance, initial_latents=initial
    )
    real = {
        "negative_prompt": "green",
        "num_inference_steps": 5,
        "guidance_scale": guidance,
        "latents": torch.from_numpy(initial),
    }
    check_same(latent, mini.real(output_type="latent", **real))
    check_same(mini.engine.decode(latent), mini.real(output_type="np", **real))


def test_an_lcm_is_called_once_a_step_with_its_guidance(minis: Any) -> None:
    mini = minis("lcm")
    mini.engine.generate([PROMPT], steps=2, guidance=4.0)
    calls = mini.sessions["unet"].calls
    assert len(calls) == 2
    assert all(call["sample"].shape[0] == 1 for call in calls)
    assert calls[0]["timestep_cond"].shape == (1, mini.geometry.guidance_embedding_dim)
    assert calls[0]["timestep"].dtype == np.float32


def test_guidance_of_one_or_less_needs_no_second_half(minis: Any) -> None:
    mini = minis("sd")
    mini.engine.generate([PROMPT], steps=2, guidance=1.0)
    assert {call["sample"].shape[0] for call in mini.sessions["unet"].calls} == {1}
    assert len(mini.sessions["text_encoder"].calls) == 1


def test_guidance_falls_back_to_two_calls_where_the_engine_takes_no_doubled_batch(
    minis: Any,
) -> None:
    mini = minis("sd2")
    geometry = mini.geometry
    pixels = geometry.native_height_pixels
    sides = [
        Axis(n, pixels, pixels, pixels, geometry.pixel_multiple_of) for n in ("height", "width")
    ]
    made = {}
    for largest in (1, 2):
        contract = contract_for(mini.source, "unet", (Axis("batch", 1, 1, largest), *sides))
        unet = TorchSession("unet", mini.pipe)
        sessions = {**mini.sessions, "unet": CheckedSession(unet, contract)}
        engine = replace(mini.engine, sessions=sessions)
        options = {"steps": 3, "guidance": 5.0, "initial_latents": draw_initial(1, mini.shape)}
        made[largest] = engine.denoise(PROMPT, "green", **options)
        assert {call["sample"].shape[0] for call in unet.calls} == {largest}
    check_same(made[1], made[2])


def test_a_picture_does_not_depend_on_those_made_with_it(minis: Any) -> None:
    engine = minis("lcm").engine
    done: list[Picture] = []
    many = engine.generate([PROMPT, "a cat"], steps=2, seed=5, count=2, done=done.append)
    assert done == many
    assert [picture.seed for picture in many] == [5, 6, 5, 6]
    assert [picture.parameters["prompt"] for picture in many] == [PROMPT] * 2 + ["a cat"] * 2
    alone = engine.generate([PROMPT], steps=2, seed=6)[0]
    assert np.array_equal(alone.image, many[1].image)
    assert not np.array_equal(many[0].image, many[1].image)
    assert not np.array_equal(many[0].image, many[2].image)


def test_a_batch_of_latents_is_denoised_as_each_alone(minis: Any) -> None:
    mini = minis("sd")
    initial = np.concatenate([draw_initial(seed, mini.shape) for seed in (1, 2)])
    options = {"steps": 3, "guidance": 4.0}
    both = mini.engine.denoise(PROMPT, initial_latents=initial, **options)
    alone = mini.engine.denoise(PROMPT, initial_latents=initial[1:], **options)
    check_same(both[1:], alone)


def test_pictures_have_the_size_asked_for(minis: Any) -> None:
    mini = minis("sd")
    multiple = mini.geometry.pixel_multiple_of
    picture = mini.engine.generate([PROMPT], steps=1, height=3 * multiple, width=4 * multiple)[0]
    assert picture.image.shape == (3 * multiple, 4 * multiple, 3)
    assert picture.image.dtype == np.uint8
    assert picture.parameters["height"] == 3 * multiple


def test_a_picture_in_tiles_says_so_and_is_nearly_the_same(minis: Any) -> None:
    mini = minis("sd")
    size = {"height": 64, "width": 48}
    whole = mini.engine.generate([PROMPT], steps=1, **size)[0]
    fits = mini.engine.generate([PROMPT], steps=1, tile=64, **size)[0]
    assert np.array_equal(fits.image, whole.image) and "tiles" not in fits.parameters
    mini.sessions["vae_decoder"].calls.clear()
    tiled = mini.engine.generate([PROMPT], steps=1, tile=40, **size)[0]
    assert tiled.parameters["tiles"] == "2 × 2 tiles of 36 × 28"
    assert len(mini.sessions["vae_decoder"].calls) == 4
    assert tiled.image.shape == whole.image.shape
    error = np.mean((tiled.image.astype(float) - whole.image) ** 2)
    assert error < np.var(whole.image.astype(float)) / 10


def test_an_engine_of_one_size_decodes_larger_pictures_in_tiles(minis: Any) -> None:
    mini = minis("sd")
    sides = [Axis(name, 32, 32, 32, 8) for name in ("height", "width")]
    contract = contract_for(mini.source, "vae_decoder", (Axis("batch", 1, 1, 1), *sides))
    decoder = CheckedSession(TorchSession("vae_decoder", mini.pipe), contract)
    engine = replace(mini.engine, sessions={**mini.sessions, "vae_decoder": decoder})
    picture = engine.generate([PROMPT], steps=1, height=48, width=32)[0]
    assert picture.image.shape == (48, 32, 3)
    assert picture.parameters["tiles"] == "2 × 1 tiles of 32 × 32"
    with pytest.raises(ContractError):
        engine.generate([PROMPT], steps=1, height=48, width=32, tile="off")


class OpenEngines:
    """Sessions on demand that write down what is opened, and what is open with it."""

    def __init__(self, mini: Mini) -> None:
        self.log: list[frozenset[str]] = []
        self.open: set[str] = set()
        self.sessions = {name: SessionOnDemand(*self.opening(mini, name)) for name in mini.sessions}

    def opening(self, mini: Mini, name: str) -> tuple[Any, Any]:
        contract = contract_for(
            mini.source, name, native_axes(mini.source, {"height": Twice, "width": Twice})
        )

        def open_it() -> CheckedSession:
            self.open.add(name)
            self.log.append(frozenset(self.open))
            session = TorchSession(name, mini.pipe)
            session.close = lambda: self.open.discard(name)  # type: ignore[attr-defined]
            return CheckedSession(session, contract)

        return open_it, contract


class Twice:
    unit, min, opt, max = "native", 1, 1, 2


def test_a_picture_needs_one_engine_at_a_time(minis: Any) -> None:
    mini = minis("lcm")
    engines = OpenEngines(mini)
    engine = replace(mini.engine, sessions=engines.sessions)
    found = engine.generate([PROMPT], steps=2, seed=3)[0]
    assert engines.log == [{"text_encoder"}, {"unet"}, {"vae_decoder"}]
    assert np.array_equal(found.image, mini.engine.generate([PROMPT], steps=2, seed=3)[0].image)


def test_several_pictures_take_their_engines_in_turn_only_where_asked(minis: Any) -> None:
    mini = minis("lcm")
    made = {}
    for in_turn in (True, False):
        engines = OpenEngines(mini)
        engine = replace(mini.engine, sessions=engines.sessions)
        made[in_turn] = engine.generate([PROMPT, "a cat"], steps=1, count=2, in_turn=in_turn)
        last = {"vae_decoder"} if in_turn else {"unet", "vae_decoder"}
        assert engines.log == [{"text_encoder"}, {"unet"}, last]
    pairs = zip(made[True], made[False], strict=True)
    assert all(np.array_equal(one.image, other.image) for one, other in pairs)


def test_an_engine_that_paused_opens_again(minis: Any) -> None:
    engines = OpenEngines(minis("lcm"))
    engine = replace(minis("lcm").engine, sessions=engines.sessions)
    first = engine.generate([PROMPT], steps=1)[0]
    again = engine.generate([PROMPT], steps=1)[0]
    assert np.array_equal(first.image, again.image) and len(engines.log) == 6


def test_usual_steps_and_guidance_are_filled_in(minis: Any) -> None:
    parameters = minis("lcm").engine.generate([PROMPT])[0].parameters
    assert (parameters["steps"], parameters["scheduler"]) == (4, "lcm")
    assert parameters["guidance"] == 8.5


def test_words_that_did_not_fit_are_reported(minis: Any) -> None:
    engine = minis("sd").engine
    long = " ".join(["red"] * 30) + " cat"
    picture = engine.generate([long], "blue", steps=1)[0]
    assert picture.lost.endswith("cat") and picture.lost_negative == ""
    assert engine.generate([PROMPT], long, steps=1)[0].lost_negative.endswith("cat")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lcm", {"negative": "green"}, "(?s)negative prompt.*guidance embedding"),
        ("sd", {"negative": "green", "guidance": 1.0}, "(?s)negative prompt.*guidance above 1"),
        ("lcm", {"steps": 9}, "1 to 8 steps"),
        ("lcm", {"steps": 0}, "1 to 8 steps"),
        ("sd", {"steps": 51}, "1 to 50 steps"),
        ("lcm", {"scheduler": "euler"}, "lcm, tcd"),
        ("lcm", {"height": 17}, "multiples of"),
        ("lcm", {"width": 0}, "multiples of"),
        ("lcm", {"count": 0}, "1 or more"),
        ("lcm", {"seed": -1}, "0 or more"),
    ],
)
def test_arguments_that_the_model_cannot_take_are_refused(
    minis: Any, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        minis(name).engine.generate([PROMPT], **options)


def test_a_picture_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(StageError, match="NaN"):
        to_uint8(np.full((1, 2, 2, 3), np.nan))


def test_a_png_says_what_it_was_made_from(tmp_path: Path) -> None:
    from PIL import Image

    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    save_png(
        Picture(image, 7, {"prompt": "красный \N{CAT}", "seed": 7}), tmp_path / "a.png", "sha256:12"
    )
    with Image.open(tmp_path / "a.png") as png:
        assert np.array_equal(np.asarray(png), image)
        assert json.loads(png.text["parameters"]) == {"prompt": "красный \N{CAT}", "seed": 7}
        assert png.text["bundle"] == "sha256:12"
    assert b"tEXtparameters" in (tmp_path / "a.png").read_bytes()
