"""The HTML report: its numbers, and what a real browser makes of it."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from helpers import make_logits
from PIL import Image

from lightning_duo import select_threshold
from lightning_duo.calibration import calibrate
from lightning_duo.cost import Cost
from lightning_duo.evaluation import (
    MEASURES,
    Form,
    Predictions,
    duo_forms,
    evaluate,
    mean_probability,
    measure,
)
from lightning_duo.report import write_report
from lightning_duo.selective.threshold import as_text

LOGITS = make_logits(2000, 5, seed=1, margin=3.0)
CALIBRATION = calibrate(*LOGITS, target_accuracy=0.95, delta=0.1)
PREDICTIONS = evaluate(*LOGITS, CALIBRATION.fit)
COST = Cost(2_000_000_000, 250_000_000, 8_000_000, 1_000_000)
DATA = "samples <of> mine"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    write_report(
        path, PREDICTIONS, CALIBRATION, data=DATA, held_out=False, cost=COST, resamples=200
    )
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path


class Reader(HTMLParser):
    """Text, links, ids and balance of a page."""

    VOID = ("meta", "link", "br", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.ids, self.links, self.open = "", [], [], []
        self.images: list[dict[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if found.get("role") == "img":
            self.images.append(found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_asks_for_nothing_outside(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    reader = Reader(page)
    assert not reader.open
    assert len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith(("#", "data:")) for link in reader.links)
    assert all(link[1:] in reader.ids for link in reader.links if link.startswith("#"))
    assert all(name in reader.ids for name in re.findall(r"url\(#([^)]*)\)", page))
    assert DATA in reader.text  # escaped
    assert len(reader.images) == 3
    assert all(len(image["aria-label"] or "") > 40 for image in reader.images)
    assert len(page) < 300_000


def test_the_numbers_are_those_of_the_metrics(report: Path) -> None:
    text = " ".join(Reader(report.read_text(encoding="utf-8")).text.split())
    for form in duo_forms(CALIBRATION.fit):
        for metric, value in measure(PREDICTIONS[form]).items():
            assert MEASURES[metric].text(value) in text, (form, metric)
    assert f"duo logits = {CALIBRATION.temperatures.base:.4g} " in text
    assert "FLOPs balance: the sidekick adds 12.5 % to the base's operations" in text
    assert "12.5 % to its parameters" in text
    assert "These samples also fitted the temperatures and chose the threshold" in text


def test_the_choices_are_those_of_select_threshold(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="choices">(.*?)</script>', page)
    choices = json.loads(found)
    assert choices["targets"][-1] == 1
    for index in range(0, len(choices["targets"]), 20):
        target = choices["targets"][index]
        for prefix, form in (("", "duo"), ("base_", "base_scaled")):
            model = PREDICTIONS[form]
            for kind, delta in (("measured", None), ("guaranteed", 0.1)):
                if delta is not None and target == 1:
                    continue
                expected = select_threshold(model.confidence, model.correct, target, delta=delta)
                value, coverage = choices[prefix + kind][index] or (torch.inf, 0)
                assert value == pytest.approx(expected.value, rel=1e-7)
                assert np.float32(value) == expected.value
                assert coverage == pytest.approx(expected.coverage, abs=1e-6)


@pytest.mark.parametrize(("margin", "classes"), [(60.0, 3), (-60.0, 3), (0.0, 2)])
def test_degenerate_models_get_a_report_too(margin: float, classes: int, tmp_path: Path) -> None:
    logits = make_logits(60, classes, seed=2, margin=margin)
    found = calibrate(*logits)
    path = tmp_path / "report.html"
    predictions = evaluate(*logits, found.fit)
    write_report(path, predictions, found, data="d", held_out=True, resamples=20)
    text = Reader(path.read_text(encoding="utf-8")).text
    assert "Not known: logits do not tell" in text
    assert "also fitted" not in text
    assert "nan" not in text.lower().replace("nanosecond", "")


def rows_of(page: str, start: str) -> dict[str, list[str]]:
    """Cells of the table rows of the first table behind some text: first cell -> the others."""
    table = page[page.index(start) :].split("</table>")[0].replace("\u00a0", " ")
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    return {first: others for first, *others in rows}


def written(path: Path, predictions: dict[str, Predictions], **options: object) -> str:
    options = {"data": "d", "held_out": True, "resamples": 20, **options}
    return write_report(path, predictions, CALIBRATION, **options).read_text(encoding="utf-8")


def test_a_form_without_temperatures_stands_beside_the_duo(tmp_path: Path) -> None:
    forms = {"mean": Form("mean <of> two", {"base": 1, "sidekick": 0.5}, mean_probability)}
    certain = torch.eye(5)[LOGITS[0].argmax(1)]  # its NLL is infinite
    others = {
        "theirs": Predictions.of(certain, LOGITS[2], label="theirs"),
        "third": Predictions.of(LOGITS[1].softmax(1), LOGITS[2], forwards={"base": 1, "third": 2}),
    }
    found = evaluate(*LOGITS, CALIBRATION.fit, forms=forms) | others
    page = written(tmp_path / "report.html", found, cost=COST)
    reader = Reader(page)
    assert not reader.open
    assert len(reader.ids) == len(set(reader.ids))
    text = " ".join(reader.text.split())
    for metric, value in measure(found["mean"]).items():
        assert MEASURES[metric].text(value) in text, metric
    assert "mean <of> two (AURC" in text
    assert "mean <of> two (ECE" in text
    assert "mean <of> two: right" in text
    assert rows_of(page, "forwards for a sample") == {
        "duo": ["base + sidekick", "2.25 G"],
        "scaled base": ["base", "2 G"],
        "base": ["base", "2 G"],
        "sidekick": ["sidekick", "250 M"],
        "scaled sidekick": ["sidekick", "250 M"],
        "unweighted": ["base + sidekick", "2.25 G"],
        "UQ only": ["base + sidekick", "2.25 G"],
        "mean &lt;of&gt; two": ["base + 0.5 \u00d7 sidekick", "2.12 G"],
        "theirs": ["not known", "not known"],
        "third": ["base + 2 \u00d7 third", "not known"],
    }
    heads = re.findall(r"var\(--(further\d)\)", page)
    assert set(heads) == {"further1", "further2", "further3"}
    assert all(page.count(f"--{role}: #") == 3 for role in heads)  # light, dark, print


def test_a_report_needs_the_duo_and_one_reference_only(tmp_path: Path) -> None:
    some = {name: PREDICTIONS[name] for name in ("base", "duo")}
    page = written(tmp_path / "report.html", some)
    reader = Reader(page)
    assert not reader.open
    assert all(link[1:] in reader.ids for link in reader.links if link.startswith("#"))
    assert "duo minus<br>base<" in page
    assert "scaled base" not in page.split("<footer")[0].split('id="temperatures"')[0]
    for missing in ("duo", "base"):
        with pytest.raises(ValueError, match=r"'duo' with those of 'base_scaled' or 'base'"):
            written(tmp_path / "r.html", {k: v for k, v in some.items() if k != missing})
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_report_is_named_html(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a report is named"):
        write_report(tmp_path / "r.pdf", PREDICTIONS, CALIBRATION, data="d", held_out=True)
    assert not list(tmp_path.iterdir())


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")


@pytest.fixture(scope="module")
def browser(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.open(report)
    yield browser
    browser.close()


def shown(browser: Browser) -> dict[str, str]:
    names = ("threshold", "coverage", "base-coverage", "deferrals")
    texts = {name: browser.run(f"document.getElementById('{name}').textContent") for name in names}
    return {name: text.replace("\u00a0", " ") for name, text in texts.items()}


def enter(browser: Browser, name: str, value: object) -> None:
    browser.run(
        f"{{const field = document.getElementById('{name}'); field.value = '{value}';"
        "field.dispatchEvent(new Event('input', {bubbles: true}))}"
    )


def choose(browser: Browser, kind: str) -> None:
    browser.run(f"document.querySelector('input[value={kind}]').click()")


@needs_chromium
@pytest.mark.parametrize("kind", ["measured", "guaranteed"])
def test_the_control_answers(browser: Browser, kind: str) -> None:
    duo, base = PREDICTIONS["duo"], PREDICTIONS["base_scaled"]
    delta = None if kind == "measured" else 0.1
    choose(browser, kind)
    enter(browser, "count", 20000)
    seen = []
    for target in (0.9, 0.95, 0.98):
        enter(browser, "target", 100 * target)
        found = select_threshold(duo.confidence, duo.correct, target, delta=delta)
        other = select_threshold(base.confidence, base.correct, target, delta=delta)
        now = shown(browser)
        assert found.coverage > 0
        assert now["threshold"] == as_text(found.value)
        assert now["coverage"] == f"{int(1000 * found.coverage + 0.5) / 10:.1f} %"
        assert now["base-coverage"] == f"{int(1000 * other.coverage + 0.5) / 10:.1f} %"
        deferred = int(20000 * (1 - found.coverage) + 0.5)
        assert now["deferrals"] == f"{deferred:,} of 20,000"
        line = browser.run("document.getElementById('chosen-coverage').getBoundingClientRect().x")
        slider = browser.run("document.getElementById('slider').value")
        seen.append((line, -int(slider)))
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == 3


@needs_chromium
def test_the_slider_and_targets_out_of_reach(browser: Browser) -> None:
    choose(browser, "guaranteed")
    browser.run("slider.value = slider.max; slider.dispatchEvent(new Event('input'))")
    assert browser.run("document.getElementById('target').value") == "100"
    now = shown(browser)
    assert now["threshold"] == "none reaches it"
    assert now["coverage"] == "0.0 %"
    enter(browser, "target", 2)  # below what is offered: the field says what is answered
    browser.run("document.getElementById('target').dispatchEvent(new Event('change'))")
    lowest = browser.run("document.getElementById('target').min")
    assert browser.run("document.getElementById('target').value") == lowest
    enter(browser, "target", "")
    enter(browser, "count", "")
    assert shown(browser)["deferrals"] == "0 of 0"


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_figures_and_text_are_seen(
    browser: Browser, width: int, dark: bool, tmp_path: Path
) -> None:
    browser.show(width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    page = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", page))) < 200) == dark
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        picture = image.convert("RGB")
    assert picture.width == width
    boxes = browser.run(
        "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect())"
        ".map(box => [box.left, box.top + scrollY, box.right, box.bottom + scrollY])"
    )
    assert len(boxes) == 3
    for box in boxes:
        assert box[2] - box[0] > 0.8 * min(width, 500)
        assert 0 <= box[0] < box[2] <= width
        drawn = picture.crop(tuple(map(int, box)))
        background = tuple(map(int, re.findall(r"\d+", page)))
        colors = drawn.getcolors(maxcolors=1 << 24)
        other = sum(n for n, color in colors if color != background)
        assert 0.01 < other / (drawn.width * drawn.height) < 0.6
    sizes = browser.run(
        "[...document.querySelectorAll('figure text')].map(t => t.getBoundingClientRect().height)"
    )
    assert min(sizes) > 7


@needs_chromium
def test_it_prints_and_is_read_aloud(browser: Browser) -> None:
    assert len(browser.send("Page.printToPDF")["data"]) > 20_000
    browser.send("Accessibility.enable")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", "").replace("\u00a0", " "))
        for node in nodes
        if "role" in node
    }
    roles = [role for role, _ in named]
    assert ("slider", "Target accuracy of the accepted") in named
    assert ("spinbutton", "Target accuracy, %") in named
    assert ("spinbutton", "Predictions to decide on") in named
    assert sum(role == "image" and len(name) > 40 for role, name in named) == 3
    assert {"heading", "table", "status", "radio"} <= set(roles)
    assert all(name for role, name in named if role in ("slider", "radio", "image", "region"))


@needs_chromium
def test_no_console_message_and_no_request_but_the_file(browser: Browser, report: Path) -> None:
    methods = [event["method"] for event in browser.events]
    bad = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert not [event for event in browser.events if event["method"] in bad]
    requests = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert requests == [report.as_uri()]
    assert "Page.loadEventFired" in methods


def test_rows_that_depend_on_each_other_are_promised_nothing(tmp_path: Path) -> None:
    found = calibrate(*LOGITS, target_accuracy=0.95)
    predictions = evaluate(*LOGITS, found.fit, items=torch.arange(2000) // 4)
    path = tmp_path / "report.html"
    write_report(path, predictions, found, data="d", held_out=True, resamples=20)
    page = path.read_text(encoding="utf-8")
    text = " ".join(Reader(page).text.split())
    exact = measure(predictions["duo"])["exact"]
    assert "share of items with every decision right, %" in text
    assert f"<span>{MEASURES['exact'].text(exact)}</span>" in page
    assert "20 resamples of the items, each with all of its samples" in text
    assert "several samples belong to one item" in text
    assert 'value="guaranteed"' not in page
    assert "(95 % interval" not in text
    (choices,) = re.findall(r'<script type="application/json" id="choices">(.*?)</script>', page)
    assert {key for key in json.loads(choices) if "guaranteed" in key} == set()
