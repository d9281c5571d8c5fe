"""The report: text stays text, no path of the machine, and in a real browser it does what it should."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from captum_scoremap.audit import audit
from captum_scoremap.audit.report import _script
from captum_scoremap.models import LoadedModel
from tests.audit_pictures import Digits, tiny_model, write_digits, write_odd_files
from tests.test_audit_analysis import MARKED, train_on_digits

EVIL = "<script>document.title='broken'</script>\N{LINE SEPARATOR}</title>&\"'"


@pytest.fixture(scope="module")
def odd_report(tmp_path_factory) -> Path:
    """Report on files and labels whose names are markup."""
    folder = tmp_path_factory.mktemp("odd")
    write_odd_files(folder / EVIL.replace("/", "_"))
    (folder / EVIL.replace("/", "_") / "bomb.png").unlink()
    model = tiny_model()
    model = LoadedModel(EVIL, model.module, model.preprocessing, (EVIL,) * 10)
    return audit(folder / EVIL.replace("/", "_"), model, out=folder / "out", progress=False).report


@pytest.fixture(scope="module")
def digits_report(tmp_path_factory) -> Path:
    """Report on the planted shortcut, in several shards."""
    model = LoadedModel("digits", train_on_digits(MARKED), labels=tuple(f"digit {label}" for label in range(10)))
    out = tmp_path_factory.mktemp("digits") / "out"
    data = Digits(1200, 1500, MARKED)
    return audit(data, model, out=out, layers=["1", "3", "4"], shard_size=64, progress=False).report


def texts(report: Path) -> list[str]:
    """Everything of a report that a browser reads as text."""
    files = [report, *(path for path in (report.parent / "report").rglob("*") if path.suffix in {".js", ".css"})]
    return [path.read_text(encoding="utf-8") for path in files]


def test_names_with_markup_stay_text(odd_report):
    page, *scripts = texts(odd_report)
    assert "<script>document" not in page
    assert "&lt;script&gt;document" in page
    assert "<img src=x" not in page
    assert not any("<script" in script or "<img" in script for script in scripts)
    assert "truncated" in page


def test_no_path_of_the_machine_unless_asked_for(tmp_path, odd_report):
    assert not any(str(odd_report.parent.parent) in text for text in texts(odd_report))
    write_digits(tmp_path / "in", 2)
    report = audit(tmp_path / "in", tiny_model(), out=tmp_path / "out", show_paths=True, progress=False).report
    assert json.dumps(str(tmp_path / "in" / "0001.png")) in (report.parent / "report" / "index.js").read_text()


def test_everything_the_page_names_is_beside_it_and_nothing_is_elsewhere(digits_report):
    page = digits_report.read_text(encoding="utf-8")
    assert "http" not in re.sub(r"http-equiv", "", page)
    named = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert len(named) > 20
    for name in named:
        assert name.startswith("data:image/png") or (digits_report.parent / name).is_file()


def test_json_in_scripts_cannot_end_them():
    text = _script({"name": "</script><!-- & \N{LINE SEPARATOR}"})
    assert not set(text) & {"<", ">", "&", "\N{LINE SEPARATOR}"}
    assert json.loads(text) == {"name": "</script><!-- & \N{LINE SEPARATOR}"}


def test_a_set_without_labels_has_a_report(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    report = audit([torch.rand(3, 8, 8)] * 3, module, out=tmp_path, progress=False).report
    assert "Confused pairs" not in report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(request):
    """A headless Chromium without a network."""
    path = request.config.getoption("browser")
    if path is None:
        pytest.skip("needs a Chromium: pytest -m browser --browser PATH")
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page; errors and requests that leave the disk fail the test."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    yield page
    page.close()
    assert complaints == []


PIXELS = """() => { const canvas = document.getElementById("overlay");
return [canvas.width, ...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data].join(); }"""


def shown_map(page, before: str = "") -> str:
    """The pixels of the map, once they differ from ``before``."""
    page.wait_for_function(f"before => ({PIXELS})() !== before", arg=before)
    return page.evaluate(PIXELS)


@pytest.mark.browser
def test_layers_labels_and_zoom_change_the_picture(page, digits_report):
    page.goto(digits_report.as_uri())
    page.locator("#thumbs button").nth(3).click()
    page.wait_for_selector("#numbers tr:has-text('residual')")
    last = shown_map(page)
    assert "whose map is shown" in page.locator("#numbers-of").text_content()
    assert page.locator("#layer-name").text_content() == "4"
    page.locator("#layer").focus()
    page.keyboard.press("ArrowLeft")
    middle = shown_map(page, last)
    assert page.locator("#layer-name").text_content() == "3"
    assert page.locator("#layer").get_attribute("aria-valuetext") == "3"
    page.locator("#role").select_option(label=page.locator("#role option").nth(1).text_content())
    runner_up = shown_map(page, middle)
    assert "not of the map shown" in page.locator("#numbers-of").text_content()
    page.locator("#role").select_option(index=2)
    contrast = shown_map(page, runner_up)
    assert len({last, middle, runner_up, contrast}) == 4
    size = page.locator("#stage").bounding_box()["width"]
    page.locator("#zoom").fill("3")
    assert page.locator("#stage").bounding_box()["width"] == pytest.approx(3 * size, rel=0.01)
    page.locator("#opacity").fill("0.2")
    assert page.locator("#overlay").evaluate("canvas => canvas.style.opacity") == "0.2"
    before = page.screenshot()
    page.locator("#opacity").fill("1")
    assert page.screenshot() != before


@pytest.mark.browser
def test_gallery_filters_and_orders(page, digits_report):
    page.goto(digits_report.as_uri())
    index = json.loads((digits_report.parent / "report" / "index.js").read_text().partition("= ")[2].rstrip(";\n"))
    columns = index["columns"]
    wrong = sum(a != b for a, b in zip(columns["true"], columns["predicted"], strict=True))
    assert page.locator("#count").text_content() == "300 of 300 images"
    page.locator("#filter-correct").select_option("0")
    page.wait_for_function(f"() => document.getElementById('count').textContent === '{wrong} of 300 images'")
    assert page.locator("#thumbs button").count() == wrong
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("() => document.getElementById('count').textContent === '300 of 300 images'")
    page.locator("#order").select_option("unusual-")
    known = [(unusual, -place) for place, unusual in enumerate(columns["unusual"]) if unusual is not None]
    most = str(-max(known)[1])
    page.wait_for_function(f"() => document.querySelector('#thumbs button').dataset.index === '{most}'")
    page.locator(f"button.link[data-label='{MARKED}']").click()
    expected = sum(MARKED in labels for labels in zip(columns["true"], columns["predicted"], strict=True))
    page.wait_for_function(f"() => document.getElementById('count').textContent === '{expected} of 300 images'")
    page.locator("#filter-score").fill("1000000")
    page.wait_for_function("() => document.getElementById('count').textContent === '0 of 300 images'")


@pytest.mark.browser
def test_viewer_works_by_keyboard_alone(page, digits_report):
    page.goto(digits_report.as_uri())
    page.locator("#thumbs button").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#viewer[open]")
    first = page.locator("#viewer-title").text_content()
    page.locator("#close").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("first => document.getElementById('viewer-title').textContent !== first", arg=first)
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer:not([open])", state="attached")
    assert page.evaluate("document.activeElement.dataset.index") == "0"


@pytest.mark.browser
def test_screen_readers_find_a_name_for_every_control(page, digits_report):
    page.goto(digits_report.as_uri())
    page.locator("#thumbs button").first.click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, canvas")].filter((element) =>
        !(element.labels && element.labels.length) && !element.getAttribute("aria-label") &&
        !element.textContent.trim()).map((element) => element.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("[...document.images].every((image) => image.hasAttribute('alt'))")


@pytest.mark.browser
def test_the_mark_is_on_the_page(page, digits_report):
    page.goto(digits_report.as_uri())
    first = page.locator("#labels tbody tr").first
    assert first.locator("th").text_content() == f"digit {MARKED}"
    darkest = (
        first
        .locator("img.heat")
        .nth(1)
        .evaluate(
            """(image) => { const canvas = document.createElement("canvas"); canvas.width = image.naturalWidth;
        canvas.height = image.naturalHeight; const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
        const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
        let best = 0; for (let i = 0; i < data.length; i += 4) if (data[i + 1] < data[best + 1]) best = i;
        return best / 4; }"""
        )
    )
    assert darkest == 0  # the upper left corner


@pytest.mark.browser
def test_markup_in_names_does_nothing_in_a_browser(page, odd_report):
    page.goto(odd_report.as_uri())
    page.locator("#thumbs button").first.click()
    page.wait_for_selector("#numbers tr:has-text('residual')")
    assert page.title().startswith("<script>document.title='broken'")
    assert page.locator("#numbers td").first.text_content() == EVIL
    assert page.locator("img[src='x']").count() == 0


@pytest.mark.browser
def test_ten_thousand_images_stay_usable(page, tmp_path):
    """Time to the first picture, and how many pictures are read for it."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)).eval()
    data = [(image, int(label)) for image, label in Digits(0, 1000)] * 10
    report = audit(data, module, out=tmp_path, layers=["1"], progress=False, batch_size=500, shard_size=500).report
    read: list[str] = []
    page.on("request", lambda request: read.append(request.url) if "/views/" in request.url else None)
    page.goto(report.as_uri())
    page.wait_for_selector("#thumbs button")
    assert page.locator("#count").text_content() == "10000 of 10000 images"
    assert len(read) < 1000
    page.locator("#filter-name").fill("9999")
    page.wait_for_function("() => document.getElementById('count').textContent === '1 of 10000 images'")
    page.locator("#thumbs button").first.click()
    page.wait_for_selector("#numbers tr:has-text('residual')")
