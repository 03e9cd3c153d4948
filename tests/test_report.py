"""The report: one page that loads nothing and runs nothing, whatever a notebook shows.

Readable by day and night, on paper and on a phone. Looked at in a real browser.
"""

import base64
import configparser
import contextlib
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nbformat
import pytest
from typer.testing import CliRunner

from conftest import ROOT
from kslottery import __version__
from kslottery.cli import app
from kslottery.run import SITE, write_report

TOKEN = "<script>document.title = 'taken over'</script>"
SHOTS = ROOT / "_build" / "screenshots"


@pytest.fixture(scope="module")
def asked():
    "A server that counts what it is asked for: (its address, the requests)."
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *given):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


@pytest.fixture(scope="module")
def report(asked, tmp_path_factory):
    "The report of a notebook with a hostile vocabulary, by `kslottery run`."
    folder = tmp_path_factory.mktemp("report")
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    cells = [
        text(
            "# A hostile <vocabulary>\n\n> What a token can do.\n\n"
            "[worlds](../19_babel.ipynb#the-world), [mine](mine.ipynb)\n\n"
            f"<BASE href='{asked[0]}/base/'><meta/http-equiv=refresh content='0;url={asked[0]}/refresh'>"
        ),
        code(f"token = {TOKEN!r}\nout = 'out'  # where to", metadata={"tags": ["parameters"]}),
        code("print(token, 'printed')"),
        code("token"),
        code(
            "import pandas as pd\nlong = 'a long cell of a table ' * 4\n"
            "numbers = {f'number {i}': 1 / 3**i for i in range(8)}\n"
            "pd.DataFrame([{'token': t, 'note': long, **numbers} for t in (token, 'the', 'of')])"
        ),
        code(
            "#| fig-alt: Two lines that cross\nimport matplotlib.pyplot as plt\n"
            "fig, ax = plt.subplots(figsize=(9, 5))\nax.plot([[1, 2], [2, 1]], label=token);"
        ),
        code(
            f"from IPython.display import HTML\nloads = '<img src=\"{asked[0]}/image\"><link rel=stylesheet'\n"
            f"away = '<form action={asked[0]}/form><svg><metadata></metadata></svg><input name=password></form>'\n"
            f"HTML('<p id=raw>raw</p>' + token + away + loads + ' href=\"{asked[0]}/style\">')"
        ),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "hostile.ipynb")
    done = CliRunner().invoke(
        app, ["run", str(folder / "hostile.ipynb"), "-p", f"out={folder / 'out'}", "-p", f"token={TOKEN}"]
    )
    assert done.exit_code == 0, done.stderr
    return folder / "out" / "report.html"


def test_the_site_is_where_the_settings_say():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert SITE == f"{settings['DEFAULT']['doc_host']}{settings['DEFAULT']['doc_baseurl']}/"


def test_what_the_page_says(report):
    page = report.read_text()
    assert (
        page.count("<script") == 1
    )  # the one that a cell showed as raw HTML, which the page's policy keeps from running
    assert page.count("&lt;script&gt;document.title") >= 4  # printed, shown, in the table, in the command
    assert "<title>A hostile &lt;vocabulary&gt;</title>" in page and 'alt="Two lines that cross"' in page
    footer = re.sub("<.*?>", "", page[page.index("<footer>") :])
    assert (
        re.search(
            rf"Made by kslottery {re.escape(__version__)} on \d{{4}}-\d\d-\d\d \d\d:\d\d UTC, in \d+ seconds", footer
        )
        and "kslottery run " in footer
        and "-p out=" in footer
    )
    assert len(page) < 500_000


def test_nothing_leads_away(report):
    "Not by itself, and not by a form: what would is shown as text, and the policy forbids it, too."
    head, body = report.read_text().split("<body>")
    assert (
        re.findall(r"<(/?(?:meta|base|form|link)[\s/>])", body, re.IGNORECASE) == [] and "<metadata></metadata>" in body
    )
    for tag in ("&lt;base href", "&lt;meta content", "&lt;form action", "&lt;/form>", "&lt;link rel"):
        assert tag in body
    assert re.search("content=\"default-src 'none';[^\"]* base-uri 'none'; form-action 'none'\"", head)


@pytest.mark.parametrize("name", ["quickstart", "audit", "tasks"])
def test_links_of_a_tutorial_lead_to_the_site(name, tmp_path):
    notebook = nbformat.read(ROOT / "nbs" / "tutorials" / f"{name}.ipynb", as_version=4)
    notebook.metadata["papermill"] = {
        "input_path": str(ROOT / "nbs" / "tutorials" / f"{name}.ipynb"),
        "parameters": {"seed": 7},
    }
    nbformat.write(notebook, tmp_path / "done.ipynb")
    write_report(tmp_path / "done.ipynb", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    links = re.findall(r'<a [^>]*href="([^"]*)"', page)
    assert links and [link for link in links if not re.match("https?://|#", link)] == []
    assert (
        any(link.startswith(SITE) and link.endswith(".html") for link in links)
        and f"kslottery run {name} -p seed=7" in page
    )
    pages = {re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem) + ".html" for p in (ROOT / "nbs").rglob("*.ipynb")}
    assert all(
        link.split("#")[0].rsplit("/", 1)[1] in pages for link in links if link.startswith(SITE) and link != SITE
    )


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        missing = "no Chromium with its driver here: make setup-browser"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-quic no-first-run"
    flags += " disable-background-networking disable-component-update disable-sync"
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{flag}")
    with contextlib.ExitStack() as stack:
        driver = webdriver.Chrome(options=options, service=Service(chromedriver))
        stack.callback(driver.quit)
        yield driver


def show(driver, report, width=1200, scheme="light", medium="screen"):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"media": medium, "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    driver.get(report.as_uri())
    height = driver.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "jpeg", "quality": 80, "captureBeyondViewport": True, "clip": clip}
    )
    SHOTS.mkdir(parents=True, exist_ok=True)
    (SHOTS / f"report-{medium}-{scheme}-{width}.jpg").write_bytes(base64.b64decode(shot["data"]))


def test_nothing_runs_and_nothing_is_loaded(driver, report, asked):
    show(driver, report)
    assert (
        driver.title == "A hostile <vocabulary>"
        and driver.execute_script("return document.getElementById('raw').textContent") == "raw"
    )
    assert asked[1] == [] and driver.current_url == report.as_uri()
    assert driver.execute_script("return [document.baseURI, document.forms.length]") == [report.as_uri(), 0]
    text = driver.execute_script("return document.querySelector('main').innerText")
    assert f"{TOKEN} printed" in text and driver.execute_script(
        "return [...document.querySelectorAll('td')].some(t => t.textContent == arguments[0])", TOKEN
    )
    figure = "document.querySelector('img[alt=\"Two lines that cross\"]')"
    assert driver.execute_script(
        f"return {figure}.naturalWidth > 1.9 * {figure}.getBoundingClientRect().width"
    )  # crisp
    assert (
        driver.execute_script(
            "return [...document.querySelectorAll('details.code pre')].some(p => p.checkVisibility())"
        )
        is False
    )  # folded
    driver.execute_script("document.querySelectorAll('details.code')[1].open = true")
    assert (
        driver.execute_script(
            "return [...document.querySelectorAll('details.code pre')].filter(p => p.checkVisibility()).length"
        )
        == 1
    )


def test_the_settings_stand_open_and_the_columns_fit(driver, report):
    show(driver, report, width=1200)
    seen = "[...document.querySelectorAll('.highlight pre')].filter(p => p.checkVisibility()).map(p => p.textContent)"
    settings = driver.execute_script(f"return {seen}")
    assert len(settings) == 1 and "# where to" in settings[0] and "out = 'out'" not in settings[0]  # but the run's
    fits = "const t = document.querySelector('table'), p = t.parentElement.closest('.output_html'); "
    fits += "[...t.rows].forEach(r => r.deleteCell(2)); return t.scrollWidth <= p.clientWidth"
    assert driver.execute_script(fits)  # nine columns, without the one of long texts


def colours(driver, element, *names):
    "Lightness, 0 to 255, of colours of the first element that a selector finds."
    said = driver.execute_script(
        "const s = getComputedStyle(document.querySelector(arguments[0])); return arguments[1].map(n => s[n])",
        element,
        names,
    )
    return [sum(map(int, re.findall(r"\d+", c)[:3])) / 3 for c in said]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_day_and_night(driver, report, scheme):
    show(driver, report, scheme=scheme)
    for element in ("main p", "td", ".output_stdout pre", "summary", ".highlight"):
        ink, paper = colours(driver, element, "color")[0], colours(driver, "body", "backgroundColor")[0]
        assert (ink < 130 and paper > 240) if scheme == "light" else (ink > 130 and paper < 40), element
    assert colours(driver, "img[alt^=Two]", "backgroundColor") == [255]  # a figure keeps its white card


def test_on_a_phone(driver, report):
    show(driver, report, width=390)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    box = driver.execute_script(
        "const b = document.querySelector('img[alt^=Two]').getBoundingClientRect(); "
        "return [b.left, b.right, b.width / b.height]"
    )
    assert box[0] >= 0 and box[1] <= 390 and 1.6 < box[2] < 2
    wide = "const t = document.querySelector('table'), p = t.parentElement.closest('.output_html'); "
    wide += "return [t.scrollWidth > 390, getComputedStyle(p).overflowX]"
    assert driver.execute_script(wide) == [True, "auto"]  # a wide table scrolls by itself


def test_on_paper(driver, report):
    show(driver, report, medium="print", scheme="dark", width=700)
    assert (
        driver.execute_script(
            "return [...document.querySelectorAll('details.code')].filter(d => d.checkVisibility()).length"
        )
        == 0
    )
    assert colours(driver, "h1", "color")[0] < 60 and colours(driver, "body", "backgroundColor") == [
        255
    ]  # also for who reads at night
    assert (
        driver.execute_script("return getComputedStyle(document.querySelector('img[alt^=Two]')).breakInside") == "avoid"
    )
    pdf = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 3
