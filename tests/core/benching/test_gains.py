"""What a compressed engine gains: real sessions in a real process, figures from given seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diffoundry.artifacts.gain import Gain, VariantGain
from diffoundry.benching import gains
from diffoundry.benching.gains import (
    ROUNDS,
    GainAnswer,
    GainOrder,
    Pair,
    Seconds,
    gain_of,
    measure_gains,
    picture_gain,
    run_order,
)
from diffoundry.formats.canonical import tree_size_bytes
from tests.artifacts.working_bundle import CONTRACTS, working_content


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> GainOrder:
    """Another model's engines as the compressed ones; the text encoder is the same."""
    folder = tmp_path_factory.mktemp("engines")
    full, small = (working_content(folder / str(seed), seed) for seed in (0, 9))
    pairs = []
    for name, contract in CONTRACTS.items():
        baseline = full.variants[0].engines[name]
        engine = small.variants[0].engines[name]
        same = name == "text_encoder"
        pairs.append(
            Pair(name, baseline if same else engine, baseline, contract, full.golden[name])
        )
    return GainOrder("onnx_session", "onnx_session", "cpu", 1, tuple(pairs))


def test_a_fresh_process_times_every_pair_round_by_round(order: GainOrder) -> None:
    answer = measure_gains(order)
    assert answer.problem == "" and set(answer.seconds) == set(CONTRACTS)
    for seconds in answer.seconds.values():
        assert ROUNDS[0] <= len(seconds.engine) == len(seconds.baseline) <= ROUNDS[1]
        assert min(*seconds.engine, *seconds.baseline) > 0
    text = answer.seconds["text_encoder"]
    assert text.engine == text.baseline, "the same engine is timed once"
    assert answer.seconds["unet"].engine != answer.seconds["unet"].baseline


def test_an_engine_that_does_not_open_is_a_problem_in_words(
    order: GainOrder, tmp_path: Path
) -> None:
    pair = order.pairs[1]
    (tmp_path / "model.onnx").write_text("not a model")
    broken = dataclasses.replace(pair.engine, path=tmp_path, digest="sha256:0")
    pairs = (dataclasses.replace(pair, engine=broken),)
    answer = measure_gains(dataclasses.replace(order, pairs=pairs))
    assert answer.problem and answer.seconds == {}


def test_long_calls_get_few_rounds(order: GainOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gains, "BUDGET_SECONDS", 0.0)
    answer = run_order(dataclasses.replace(order, pairs=order.pairs[:1]))
    assert len(answer.seconds["text_encoder"].engine) == ROUNDS[0]


def test_a_gain_is_the_ratio_of_medians_with_the_spread_of_the_rounds_own_ratios() -> None:
    gain = gain_of([2.0, 4.0, 3.0], [1.0, 2.0, 1.0], (270_000, 1_000_000_000))
    assert (gain.speed, gain.seconds, gain.baseline_seconds, gain.rounds) == (3.0, 1.0, 3.0, 3)
    assert gain.p10 == pytest.approx(2.0) and gain.p90 == pytest.approx(2.8)
    assert gain.pays and gain.word == "pays 3.00 ×"
    assert gain.figures == "2.00–2.80, 3.00 → 1.00 s, 1000 → 0.27 MB"


@pytest.mark.parametrize(
    ("baseline", "engine", "word"),
    [
        ([1.0, 1.0, 1.0], [1.25, 1.25, 1.25], "DOES NOT PAY 0.80 ×"),
        ([1.0, 1.0, 1.0], [0.99, 0.99, 0.99], "DOES NOT PAY 1.01 ×"),
        ([2.0, 2.0, 2.0], [1.0, 1.0, 9.0], "UNCLEAR 2.00 ×"),
        ([1.2, 3.0, 1.2, 3.0, 1.2], [1.0, 3.1, 1.0, 3.1, 1.1], "UNCLEAR 1.09 ×"),
    ],
    ids=["slower", "hardly faster", "only noise made it faster", "rounds that do not agree"],
)
def test_what_is_not_faster_beyond_doubt_does_not_pay(
    baseline: list[float], engine: list[float], word: str
) -> None:
    gain = gain_of(baseline, engine)
    assert not gain.pays and gain.word == word


def test_a_picture_is_added_up_from_its_calls(order: GainOrder) -> None:
    """Four U-Net calls that are twice as fast, a decoder that is not."""
    seconds = {
        "text_encoder": Seconds((1.0,) * 3, (1.0,) * 3),
        "unet": Seconds((1.0,) * 5, (2.0,) * 5),
        "vae_decoder": Seconds((5.0,) * 3, (5.0,) * 3),
    }
    calls = {"text_encoder": 1, "unet": 4, "vae_decoder": 1}
    gain = picture_gain(order, GainAnswer(seconds), calls)
    assert gain is not None and gain.rounds == 3
    assert (gain.seconds, gain.baseline_seconds) == (10.0, 14.0)
    sizes = {pair.component: tree_size_bytes(pair.engine.path) for pair in order.pairs}
    assert gain.size_bytes == sum(sizes.values())
    assert picture_gain(order, GainAnswer({"unet": seconds["unet"]}), calls) is None


def test_a_verdict_has_a_line_for_every_component() -> None:
    fast = Gain(pays=True, speed=1.8, rounds=3, seconds=0.005, baseline_seconds=0.009)
    slow = fast.model_copy(update={"pays": False, "speed": 0.8})
    whole = VariantGain(
        against="fp32", components={"unet": fast}, unchanged=("text_encoder",), picture=slow
    )
    assert whole.lines("int8") == [
        "does it pay? int8 against fp32, on this host:",
        "  int8 · unet: pays 1.80 × (9 → 5 ms)",
        "  int8 · text_encoder: the same engine",
        "  int8 · a picture: DOES NOT PAY 0.80 × (9 → 5 ms)",
    ]
    noisy = fast.model_copy(update={"p10": 0.9, "p90": 2.7})
    (last,) = VariantGain(components={"unet": noisy}).lines("int8")[2:]
    assert "noisy (unet): other work" in last
    assert VariantGain(deferred="x is not on this host").lines("int8") == [
        "does it pay? int8: deferred: x is not on this host"
    ]
    assert "NOT MEASURED: it died" in VariantGain(problem="it died").lines("int8")[0]
