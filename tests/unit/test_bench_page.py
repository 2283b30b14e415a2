"""The page of ``fabric-bench``: one file that opens without a network."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fabric_lite.bench.page import page
from fabric_lite.bench.results import Combination
from fabric_lite.bench.shown import Interval, Shown
from fabric_lite.bench.svg import elided, ticks
from tests.unit.bench_rows import failed, ran, results_of, several

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta"}
HOSTILE = """<script>alert("a & 'b'")</script></svg></style>"""


class Page(HTMLParser):
    """What a browser reads: every tag closed in its order, and the words outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.opened

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.opened):
            self.words.append(data)


def page_of(shown: Sequence[Shown], **given: str) -> str:
    return page(results_of(list(shown)), shown, ["ddp is best."], **given)


def drawings(text: str) -> dict[str, ElementTree.Element]:
    """The plots by their titles."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]
    return {root.findtext(f"{SVG}title") or "": root for root in found}


def words_of(root: ElementTree.Element) -> list[str]:
    return ["".join(part.itertext()) for part in root.iter(f"{SVG}text")]


def test_the_page_has_verdict_command_table_and_plots() -> None:
    text = page_of(several(), command="fabric-run --devices 2 train.py")
    parsed = Page(text)
    assert {"ddp is best.", "fabric-run --devices 2 train.py", "fabric-bench train.py --steps 9"} <= set(parsed.words)
    assert [tag for tag, _ in parsed.tags].count("table") == 2
    assert list(drawings(text)) == [
        "Throughput in samples/s by combination",
        "Phases of a step by combination, in milliseconds",
        "Peak memory of the rank that needs most, by combination, in MiB",
        "Step times over the rounds, against the median of all steps of the same combination",
        "Scaling efficiency over the number of devices",
    ]


def test_a_command_that_a_line_of_the_verdict_has_stands_there_in_a_box_and_only_once() -> None:
    command = "fabric-run --devices 2 train.py"
    verdict = ["ddp is best.", f"Run it: {command}  (with batch_size=8)", "fsdp was not run now."]
    text = page(results_of(several()), several(), verdict, command=command)
    assert text.count(command) == 1
    assert (
        f"<p>ddp is best.</p><p>Run it:</p><pre><code>{command}</code></pre><p>(with batch_size=8)</p>"
        "<p>fsdp was not run now.</p>"
    ) in text


def test_every_combination_is_in_the_tables_and_every_one_that_ran_in_every_plot() -> None:
    shown = several()
    text = page_of(shown)
    assert all(text.count(f'<th scope="row">{one.name}') == 2 for one in shown)
    plots = list(drawings(text).values())
    for one in shown[:-1]:
        for plot in plots[:4]:
            assert any(words.startswith(one.name) for words in words_of(plot)), one.name
    assert "failed: OutOfMemoryError on rank 1: tried to allocate 2.50 GiB" in words_of(plots[0])


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    text = page_of(several())
    assert set(re.findall(r"https?://[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}
    for tag, attributes in Page(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "use", "image")
        assert not {"src", "href", "xlink:href"} & set(attributes)
    assert "default-src 'none'" in text
    assert all(place.startswith("#") for place in re.findall(r"url\((.*?)\)", text))
    assert "@import" not in text


def test_plots_are_read_out_and_their_names_are_their_own() -> None:
    text = page_of(several())
    for title, plot in drawings(text).items():
        assert plot.get("role") == "img"
        assert plot.get("aria-label") == title
        assert plot.findtext(f"{SVG}desc")
    names = re.findall(r'\bid="(.*?)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r"url\(#(.*?)\)", text)) <= set(names)


def test_wrong_rows_are_hatched_and_labeled_and_the_best_is_marked() -> None:
    plot = drawings(page_of(several()))["Throughput in samples/s by combination"]
    hatched = [bar for bar in plot.iter(f"{SVG}rect") if "hatch" in bar.get("style", "")]
    assert [bar.findtext(f"{SVG}title") for bar in hatched if len(bar)] == [
        "ddp_bf16, 32-true, 2 devices: 800 ±8.0 samples/s"
    ]
    words = words_of(plot)
    assert {"800 ±8.0, ★ best", "800 ±8.0, WRONG", "800 ±8.0, not comparable"} <= set(words)
    assert {"best", "WRONG", "not comparable", "95 % interval"} <= set(words)
    assert len([path for path in plot.iter(f"{SVG}path") if path.get("class") == "whisker"]) == 5  # one in the legend


def test_hostile_words_stay_words() -> None:
    one = ran("ddp", 2)
    assert one.row.comparison is not None
    comparison = dataclasses.replace(one.row.comparison, verdict="differs", reason=HOSTILE)
    row = dataclasses.replace(one.row, combination=Combination(HOSTILE, HOSTILE, 2), comparison=comparison)
    shown = [dataclasses.replace(one, name=HOSTILE, row=row), dataclasses.replace(failed("hsdp", HOSTILE), name="b")]
    shown.append(dataclasses.replace(shown[0], row=dataclasses.replace(row, comparison=None)))
    results = results_of(shown, ('a "<&">.py', HOSTILE))
    results = dataclasses.replace(results, about=dataclasses.replace(results.about, command=HOSTILE, processor=HOSTILE))
    text = page(results, shown, [HOSTILE], command=HOSTILE)
    parsed = Page(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert [tag for tag, _ in parsed.tags].count("style") == 1
    assert f'fabric-bench: a "<&">.py {HOSTILE}' in parsed.words
    assert HOSTILE in parsed.words
    assert len(drawings(text)) == 5


@pytest.mark.parametrize("shown", [[], several()[-1:], [ran("single_device", 1)]], ids=["none", "failed", "one"])
def test_few_rows_make_a_page_too(shown: list[Shown]) -> None:
    text = page_of(shown)
    words = Page(text).words
    assert all(f"failed: {one.row.failure}" in words for one in shown if one.row.failure is not None)
    assert len(drawings(text)) == (4 if shown and shown[0].row.failure is None else 0)


def test_bars_stay_within_the_drawing_whatever_their_names_and_numbers() -> None:
    shown = [ran("ddp", 2), *(dataclasses.replace(ran("a" * 40 * size, 2), name="b" * 40 * size) for size in (1, 2, 3))]
    shown[1] = dataclasses.replace(shown[1], throughput=Interval(1e9, 0.0, 3e9))
    shown[2] = dataclasses.replace(shown[2], throughput=Interval(0.0, 0.0, 0.0))
    for plot in drawings(page_of(shown)).values():
        width = float((plot.get("viewBox") or "").split()[2])
        for bar in plot.iter(f"{SVG}rect"):
            assert float(bar.get("x", 0)) + float(bar.get("width", 0)) <= width


def test_throughput_in_steps_has_a_plot_of_its_own() -> None:
    one = ran("ddp", 2)
    shown = [one, dataclasses.replace(one, throughput_unit="steps/s")]
    titles = list(drawings(page_of(shown)))
    assert titles[:2] == ["Throughput in samples/s by combination", "Throughput in steps/s by combination"]


def test_long_names_lose_their_middle() -> None:
    assert elided("ddp, 32-true, 2 devices", 12) == "ddp, 3…vices"
    assert elided("ddp", 3) == "ddp"
    assert [len(elided("abcdef", longest)) for longest in (1, 2, 3, 5)] == [1, 2, 3, 5]


@pytest.mark.parametrize("most", [0.0, 1e-9, 0.3, 1.0, 7.0, 99.0, 1e12, float("inf"), float("nan")])
def test_ticks_are_few_and_not_above(most: float) -> None:
    places = ticks(most)
    assert 2 <= len(places) <= 6
    assert places == [0.0, 1.0] or places[-1] <= most * (1 + 1e-9)


@pytest.mark.parametrize("high", [float("inf"), 1e6])
def test_an_interval_that_says_nothing_is_not_drawn(high: float) -> None:
    """One round alone has none, two have one of any width."""
    shown = [dataclasses.replace(one, throughput=Interval(100.0, 0.0, high)) for one in several() if one.throughput]
    drawing = drawings(page_of(shown))["Throughput in samples/s by combination"]
    assert any("100 ±?" in words for words in words_of(drawing))
    # The legend alone has one.
    assert [part.get("d") for part in drawing.iter() if part.get("class") == "whisker"] == ["M0 2v8M0 6h12M12 2v8"]
