"""The pictures of the report, and what the model gets right in them."""

from __future__ import annotations

from diffoundry.quality.differences import DB_CAP
from diffoundry.reporting.attributes import REFERENCE, TOGETHER, Reading, readings
from diffoundry.reporting.charts import bar
from diffoundry.reporting.gathering import Report
from diffoundry.reporting.markup import Html, code, el, join, section, table
from diffoundry.reporting.pictures import EnginePicture, Pair, Pictures, data_uri, difference_map

PIXELATED_BELOW = 200
"""A smaller picture is shown enlarged, each pixel a square, so that nothing is smoothed over."""


def pictures_section(report: Report) -> Html:
    """Every judged pair: reference, each variant's engine, and their difference."""
    pictures = report.pictures
    shown = list(dict.fromkeys(e.variant for p in pictures.pairs for e in p.engines))
    intro = el(
        "p",
        "The same prompt and the same noise, through the PyTorch original (recorded when the "
        "bundle was built) and through the engines (run for this report). A difference map shows, "
        "for each pixel, how far its worst channel is off: black is equal, brighter is more.",
    )
    notes = [_amplified(pictures, name) for name in shown]
    lent = [
        el("p", el("strong", code(name), ": "), text, class_="notice")
        for name, text in pictures.lent.items()
    ]
    absent = [
        el("p", el("strong", "No pictures of ", code(name), " here. "), text, class_="notice")
        for name, text in pictures.absent.items()
    ]
    cards = [_card(pair, pictures) for pair in pictures.pairs]
    if not cards:
        cards = [el("p", "The bundle holds no recorded picture.")]
    box = el("div", cards, class_="cards")
    return section("pictures", "Pictures", intro, notes, _unread(report), lent, absent, box)


def _amplified(pictures: Pictures, variant: str) -> Html:
    found = [e.largest for p in pictures.pairs for e in p.engines if e.variant == variant]
    largest = max((one for one in found if one is not None), default=None)
    if largest is None:
        return el("p", code(variant), ": no picture came out.", class_="small")
    if largest == 0.0:
        return el("p", code(variant), ": equal to the last bit.", class_="small")
    levels = 255 * largest
    words = f"{levels:.1f} of 255 levels" if levels >= 0.1 else "far below one of 255 levels"
    return el(
        "p",
        code(variant),
        f": differences are amplified {pictures.factor(variant):,} times. "
        f"The largest anywhere is {largest:.1e} of full scale, {words}.",
        class_="small",
    )


def _card(pair: Pair, pictures: Pictures) -> Html:
    read = readings(pair)
    recorded = pair.recorded
    figures = [
        _figure(
            data_uri(pair.reference),
            f"Picture of the PyTorch original for: {recorded.prompt}",
            pair,
            join(el("b", "PyTorch"), _reads(read.get(REFERENCE))),
            kind="reference",
        )
    ]
    for one in pair.engines:
        figures += _engine(one, pair, pictures.factor(one.variant), read.get(one.variant))
    facts = f"seed {recorded.seed} · {recorded.steps} steps · guidance {recorded.guidance:g}"
    negative = el("p", f"negative: {recorded.negative}", class_="facts")
    return el(
        "article",
        el("h3", recorded.prompt or "(the empty prompt)"),
        el("p", f"{facts} · {recorded.scheduler or 'the model’s scheduler'}", class_="facts"),
        negative if recorded.negative else None,
        el("div", figures, class_="figures"),
        class_="card",
    )


def _engine(one: EnginePicture, pair: Pair, factor: int, read: Reading | None) -> list[Html]:
    name = el("b", one.variant)
    if one.image is None:
        text = el("p", name, " ", one.error, class_="notice wide")
        return [text]
    prompt = pair.recorded.prompt
    picture = _figure(
        data_uri(one.image),
        f"Picture of {one.variant} for: {prompt}",
        pair,
        join(name, _reads(read)),
    )
    difference = _figure(
        data_uri(difference_map(pair.reference, one.image, factor)),
        f"Map of the differences between {one.variant} and the original for: {prompt}",
        pair,
        join(el("b", "difference × ", _power(factor)), _figures(one)),
    )
    return [picture, difference]


def _figures(one: EnginePicture) -> list[Html]:
    """PSNR and SSIM, a line each."""
    if one.psnr_db is not None and one.psnr_db >= DB_CAP:
        return [el("span", "identical", class_="line-of-its-own")]
    parts = [] if one.psnr_db is None else [f"PSNR {one.psnr_db:.1f} dB"]
    if one.ssim is not None:
        parts.append(f"SSIM {one.ssim:.4f}")
    return [el("span", part, class_="line-of-its-own") for part in parts]


def _power(factor: int) -> Html | str:
    """A power of ten, short enough for a caption."""
    zeros = len(str(factor)) - 1
    return str(factor) if zeros < 4 else join("10", el("sup", zeros))


def _reads(reading: Reading | None) -> Html | None:
    if reading is None:
        return None
    sign, kind = ("✓", "passed") if reading.right else ("✗", "failed")
    text = "reads as asked" if reading.right else f"reads: {reading.words}"
    if reading.scene is None:
        text = "unreadable"
    return el("span", el("span", sign, class_="sign", aria_hidden="true"), text, class_=kind)


def _figure(source: str, alt: str, pair: Pair, caption: Html, kind: str = "") -> Html:
    height, width = pair.reference.shape[:2]
    small = "pixelated" if max(height, width) < PIXELATED_BELOW else None
    image = el("img", src=source, alt=alt, width=width, height=height, class_=small)
    return el("figure", image, el("figcaption", caption), class_=kind or None)


def attributes_section(report: Report) -> Html | None:
    """Accuracy per attribute of the reference and each variant; None without a recogniser."""
    if not report.scores:
        return None
    who = list(report.scores[TOGETHER])
    count = report.scores[TOGETHER][who[0]].count
    body = []
    for name, scores in report.scores.items():
        for number, (one, score) in enumerate(scores.items()):
            label = "PyTorch" if one == REFERENCE else one
            first = el("th", name, scope="rowgroup", rowspan=len(scores)) if not number else None
            cells = [
                el("td", label, class_="who"),
                el("td", bar(score.accuracy, 1.0, number), class_="barcell"),
                el("td", f"{100 * score.accuracy:.1f} %", class_="number"),
                el("td", f"{score.hits} of {score.count}", class_="number"),
            ]
            body.append(el("tr", first, cells, class_="first" if not number else None))
    intro = el(
        "p",
        f"A recogniser reads the {count} pictures above back by geometry and colour; "
        f"what it cannot read counts as wrong throughout. {_abstentions(report)}",
    )
    head = ("attribute", "who", "", "right", "pictures")
    whole = table(head, body, "Accuracy per attribute", kind="bars", numbers=(3, 4))
    return section("attributes", "What the model gets right", intro, whole)


def _abstentions(report: Report) -> str:
    """Who drew how many pictures that the recogniser would not read."""
    counts: dict[str, int] = {}
    for pair in report.pictures.pairs:
        for who, one in readings(pair).items():
            counts[who] = counts.get(who, 0) + (one.scene is None)
    if not any(counts.values()):
        return "It could read every one."
    named = (f"{n} of {'PyTorch' if who == REFERENCE else who}" for who, n in counts.items())
    return f"Unreadable: {', '.join(named)}."


def _unread(report: Report) -> Html | None:
    """Why no accuracy is given, where it is not."""
    if report.scores or not report.pictures.pairs:
        return None
    text = "What they show is not judged: there is a recogniser for the embedded model only."
    return el("p", text, class_="small")
