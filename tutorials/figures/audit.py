"""Draw ``audit.png``: the report of an audit of the photographs that scikit-image and scikit-learn carry.

``python tutorials/figures/audit.py /usr/bin/chromium`` writes it here, with the extra dev.
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from captum_scoremap.audit import audit
from captum_scoremap.models import SAMPLES, read_image

LABELS = {"chelsea.png": "Egyptian cat", "coffee.png": "espresso", "china.png": "palace", "flower.png": "daisy"}

with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
    photographs = Path(folder, "photographs")
    photographs.mkdir()
    for name in SAMPLES:
        read_image(f"sample:{name}").save(photographs / f"{name}.png")
    report = audit(photographs, labels=LABELS, out=Path(folder, "audit")).report
    browser = play.chromium.launch(executable_path=sys.argv[1], args=["--no-sandbox", "--disable-gpu"])
    page = browser.new_page(viewport={"width": 1200, "height": 740})
    page.goto(report.as_uri())
    page.locator("#thumbs button", has_text="Egyptian cat").click()
    page.locator("#opacity").fill("0.8")
    page.locator("#show-crops").check()
    page.wait_for_selector("#numbers tr:has-text('residual')")
    page.wait_for_function("() => document.getElementById('overlay').width === 7")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=Path(__file__).with_name("audit.png"))
    browser.close()
