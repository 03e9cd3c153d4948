"""The site: built without a warning, complete, without dead links, and looked at in a real browser.

With KSLOTTERY_TEST_SHOTS=1 screenshots go to _build/screenshots.
"""

import base64
import contextlib
import html.parser
import importlib
import inspect
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import _render as render
from conftest import ROOT
from kslottery._modidx import d as INDEX
from test_library import MODULES, NOTEBOOKS

SITE, SHOTS = ROOT / "_docs", ROOT / "_build" / "screenshots"
DESKTOP, PHONE = 1300, 390  # pixels


def sidebar(contents=None):
    "The notebooks that the sidebar names, in order."
    if contents is None:
        contents = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    for item in contents:
        if isinstance(item, dict) and "contents" in item:
            yield from sidebar(item["contents"])
        else:
            yield item if isinstance(item, str) else item["href"]


def address(path):
    "nbs/02_ks.ipynb is at ks.html, as nbdev has it: without the number that orders it."
    folder, name = posixpath.split(path)
    return posixpath.join(folder, re.sub(r"^\d+[a-zA-Z0-9]*_", "", posixpath.splitext(name)[0]) + ".html")


PAGES = [address(path) for path in sidebar()]


class Reader(html.parser.HTMLParser):
    "What a page links, loads, names and says; `entries` are the words of each reference entry, by its id."

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.images, self.entries, self.at, self.skip = [], [], set(), [], {}, None, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loads.append(given["href"])
        if tag == "img":
            self.images.append(given)
        if re.fullmatch("h[1-6]", tag):
            self.at = self.entries.setdefault(given["id"], []) if "reference" in given.get("class", "") else None
        if tag in ("details", "pre", "script"):
            self.skip += 1

    def handle_endtag(self, tag):
        self.skip -= tag in ("details", "pre", "script")

    def handle_data(self, data):
        if self.at is not None and not self.skip:
            self.at += re.findall(r"\w+", data)


def exported():
    "Every public function and class of the library, and every public method with a docstring: (module, name, object)."
    for module in MODULES:
        lib = importlib.import_module(f"kslottery.{module}")
        for name in lib.__all__:
            thing = (
                inspect.unwrap(getattr(lib, name)) if callable(getattr(lib, name)) else None
            )  # what a cache wraps is a function too
            if inspect.isfunction(thing) or inspect.isclass(thing):
                yield module, name, thing
            if inspect.isclass(thing):
                for method, _, function in render.methods(thing):
                    if function.__doc__:
                        yield module, f"{name}.{method}", function


@pytest.fixture(scope="module")
def built():
    "What the build said. The tests are of our renderer, also where Quarto is installed."
    done = subprocess.run(
        [sys.executable, ROOT / "nbs" / "_render.py", "mkdocs"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pages(built):
    return {p.relative_to(SITE).as_posix(): Reader(p.read_text()) for p in SITE.rglob("*.html") if p.name != "404.html"}


def test_the_build_is_silent_and_complete(built, pages):
    assert len(built.strip().split("\n")) == 1 and "WARNING" not in built, built
    assert set(pages) == set(PAGES) and len(set(PAGES)) == len(PAGES)
    assert {address(n.relative_to(ROOT / "nbs").as_posix()) for n in NOTEBOOKS} <= set(pages), (
        "a notebook is missing in the sidebar of _quarto.yml"
    )


def test_addresses_are_those_of_nbdev(pages):
    from nbdev.doclinks import _nbpath2html

    for path in sidebar():
        assert posixpath.join(posixpath.dirname(path), os.path.basename(_nbpath2html(ROOT / "nbs" / path))) == address(
            path
        )
    for symbols in INDEX["syms"].values():  # where back-ticks link to
        for symbol, (target, _) in symbols.items():
            page, anchor = target.split("#")
            name = symbol.split(".", 2)[2]
            if not any(part.startswith("_") for part in name.split(".")):
                assert page in pages
                assert "." in name or anchor in pages[page].ids, f"{symbol} has no entry at {target}"


def test_every_exported_function_is_in_the_reference_with_its_docstring(pages):
    checked = 0
    for module, name, thing in exported():
        said = " ".join(pages[f"{module}.html"].entries[name.lower()])
        assert " ".join(re.findall(r"\w+", inspect.getdoc(thing))) in said, (
            f"kslottery.{module}.{name}: the page says {said}"
        )
        checked += 1
    assert checked > len(MODULES)


def test_the_reference_shows_parameters_as_a_table(pages):
    text = (SITE / "ks.html").read_text()
    entry = text[text.index('id="ks_scan"') :]
    shown = re.search(r'<div class="listed"[^>]*>.*?</table>', entry, re.DOTALL)[0]
    heads = re.findall(r"<th>(\w*)</th>", shown)
    assert heads[0] == "Parameters" and "<code>before</code>, <code>after</code>" in shown


def test_no_dead_link_and_nothing_from_elsewhere(pages):
    dead = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            )
            target = "index.html" if target == "." else target
            if not (SITE / target).is_file() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids
            ):
                dead.append(f"{name}: {link}")
        assert [x for x in page.loads if urlsplit(x).scheme not in ("", "data")] == [], f"{name} needs a network"
    assert dead == []


def test_every_image_has_alt_text(pages):
    assert [
        f"{name}: {image['src']}"
        for name, page in pages.items()
        for image in page.images
        if not image.get("alt", "").strip()
    ] == []
    assert sum(len(page.images) for page in pages.values()) > 0


def test_every_figure_says_what_it_shows():
    mute = []
    for notebook in NOTEBOOKS:
        for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
            if any("image/png" in o.get("data", {}) for o in cell.get("outputs", [])) and not re.search(
                r"^#\| fig-(alt|cap):", "".join(cell["source"]), re.MULTILINE
            ):
                mute.append(f"{notebook.relative_to(ROOT)} cell {number}")
    assert mute == [], "add a line '#| fig-alt: what the figure shows' to these cells"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("::: {.callout-note}\n## Why\nBecause.\n:::", '!!! note "Why"\n\n    Because.'),
        ('::: {.callout-warning title="Mind"}\nthe\n\ngap\n:::', '!!! warning "Mind"\n\n    the\n\n    gap'),
        ("no call-out", "no call-out"),
    ],
)
def test_call_outs(text, shown):
    assert render.callouts(text) == shown


def test_options_of_cells(tmp_path, monkeypatch):
    "What Quarto would do with echo, include, output, code-fold, fig-alt; markup in outputs is shown, not obeyed."
    figure = {"output_type": "display_data", "data": {"image/png": base64.b64encode(b"png").decode()}}
    said = {"output_type": "stream", "name": "stdout", "text": ["<script>alert(1)</script> ``` [x](y.ipynb)\n"]}
    cells = [
        ("raw", "---\ntitle: T\noutput-file: a.html\n---\n", []),
        ("code", "#| echo: false\nhidden()", [said]),
        ("code", "#| include: false\nboth_hidden()", [said]),
        ("code", "#| output: false\nshown()", [said]),
        ("code", "#| code-fold: true\nfolded()", []),
        ("markdown", "## A heading\n\n[other](../b.ipynb#c) `[x](../b.ipynb)` and [web](https://example.org)", []),
        ("code", '#| fig-alt: "A line: it rises"\nplot()', [figure]),
        ("code", "plot()", [figure]),
    ]
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "01_a.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": t, "source": s, "outputs": o} for t, s, o in cells]}))
    monkeypatch.setattr(render, "PROCESSED", tmp_path)
    page = render.Page(path)
    text = page.markdown(lambda page, target: "../b.md#c" if target.startswith("../b") else target)
    assert page.target == "d/a.md" and text.startswith("# T\n")
    assert "hidden()" not in text and text.count("<script>") == 1 and "````" in text and "[x](y.ipynb)" in text
    assert "shown()" in text and "<summary>Code</summary>\n\n```python\nfolded()" in text
    assert "[other](../b.md#c)" in text and "[web](https://example.org)" in text
    assert "![A line: it rises](a_files/figure-1.png)" in text and "![A heading: figure](a_files/figure-2.png)" in text
    assert list(page.figures) == ["d/a_files/figure-1.png", "d/a_files/figure-2.png"] and page.without_alt == [
        (7, "A heading")
    ]


def test_an_option_that_is_no_yaml_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "PROCESSED", tmp_path)
    (tmp_path / "a.ipynb").write_text(
        json.dumps({"cells": [{"cell_type": "code", "source": "#| fig-alt: a: b\nplot()", "outputs": []}]})
    )
    with pytest.raises(ValueError, match="a.ipynb.* put its text in quotes"):
        render.Page(tmp_path / "a.ipynb").markdown(lambda page, target: target)


def test_a_sidebar_with_an_unknown_page_is_refused():
    with pytest.raises(ValueError, match="nowhere.ipynb, which is not in nbs/"):
        list(render.navigation(["nowhere.ipynb"], {}))


# In a browser


class Browser:
    "Headless Chromium on the built site, served on a free port."

    def __init__(self, driver, port, refused):
        self.driver, self.root, self.refused = driver, f"http://127.0.0.1:{port}/", refused

    def show(self, page, width, scheme="light"):
        phone = width < 600
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone},
        )
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        self.refused.clear()
        self.driver.get_log("browser")
        self.driver.get(self.root + page)

    def run(self, code, *given):
        return self.driver.execute_script(code, *given)

    def until(self, code):
        "Wait for a JavaScript expression to be true, and return it."
        end = time.monotonic() + 10
        while not (found := self.run(f"return {code}")):
            assert time.monotonic() < end, f"{code} does not become true"
            time.sleep(0.05)
        return found

    def keep(self, name, most=12000):
        "A picture of the page, whole unless it is very long: for people, who ask for it."
        if not os.environ.get("KSLOTTERY_TEST_SHOTS"):
            return
        width, height = self.run("return [document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, most), "scale": 1}
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "jpeg", "quality": 80, "captureBeyondViewport": True, "clip": clip}
        )
        SHOTS.mkdir(parents=True, exist_ok=True)
        (SHOTS / f"{name}.jpg").write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(built, tmp_path_factory):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        missing = "no Chromium with its driver here: make setup-browser"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    refused = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=str(SITE))

        def log_request(self, code="-", size="-"):
            if int(code) >= 400:
                refused.append(f"{code} {self.path}")

        def log_message(self, *given):
            pass

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-quic no-first-run "
        "disable-background-networking disable-component-update disable-sync"
    )
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        driver = webdriver.Chrome(options=options, service=Service(chromedriver))
        stack.callback(driver.quit)
        yield Browser(driver, server.server_port, refused)


TOO_WIDE = """return [...document.querySelectorAll('article *')].filter(e => {
  const box = e.getBoundingClientRect();
  if (box.width == 0 || box.right <= innerWidth + 1) return false;
  for (let p = e.parentElement; p && p.tagName != 'ARTICLE'; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)
        && p.getBoundingClientRect().right <= innerWidth + 1) return false;
  return !['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
}).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40))"""


@pytest.mark.parametrize("page", PAGES)
def test_page(browser, page):
    "No console errors, no failed requests; math and figures visible; on a phone nothing is wider than the screen."
    name = page.replace("/", "-").removesuffix(".html")
    for width in (DESKTOP, PHONE):
        browser.show(page, width)
        browser.until("document.fonts.status == 'loaded'")
        assert [m for m in browser.driver.get_log("browser") if m["level"] == "SEVERE"] == [] and browser.refused == []
        assert browser.run("return document.querySelector('article h1').getBoundingClientRect().height") > 0
        blank = "!(i.complete && i.naturalWidth && i.getBoundingClientRect().width)"
        blank = f"return [...document.querySelectorAll('article img')].filter(i => {blank}).map(i => i.src)"
        assert browser.run(blank) == []
        unset = "!m.querySelector('.katex-html') || !m.getBoundingClientRect().height"
        unset = f"return [...document.querySelectorAll('.arithmatex')].filter(m => {unset}).map(m => m.textContent)"
        assert browser.run(unset) == []
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.run(TOO_WIDE) == []
        browser.keep(f"{name}-{'phone' if width == PHONE else 'desktop'}")


def test_math_is_set_in_its_own_fonts(browser):
    browser.show("ks.html", DESKTOP)
    assert browser.run("return document.querySelectorAll('.katex').length") > 5
    assert browser.until("document.fonts.check('16px KaTeX_Main') && document.fonts.check('italic 16px KaTeX_Math')")


@pytest.mark.parametrize(
    "name, where",
    [
        ("ks_scan", "ks.html#ks_scan"),
        ("partial_tune", "tuning.html#partial_tune"),
        ("TunedRows", "rows.html#tunedrows"),
    ],
)
def test_search_finds_a_function_by_its_name(browser, name, where):
    browser.show("index.html", DESKTOP)
    browser.run("document.querySelector('.md-search__input').focus()")
    browser.driver.find_element("css selector", ".md-search__input").send_keys(name)
    browser.until("document.querySelector('.md-search-result__link')")
    found = browser.until("[...document.querySelectorAll('.md-search-result__link')].map(a => a.href)")
    found = [link.removeprefix(browser.root).split("?")[0] + "#" + urlsplit(link).fragment for link in found]
    assert found[0] == where.split("#")[0] + "#" and where in found[:12], found  # its page; a class, among its methods


def test_light_and_dark(browser):
    lightness = {}
    for scheme in ("light", "dark"):
        browser.show("styles.css", DESKTOP, scheme)  # a page that remembers nothing
        browser.run("localStorage.clear()")
        browser.show("ks.html", DESKTOP, scheme)
        paper, ink = (
            browser.run("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", *x)
            for x in (("body", "backgroundColor"), ("article p", "color"))
        )
        lightness[scheme] = [sum(map(int, re.findall(r"\d+", c)[:3])) / 3 for c in (paper, ink)]
        browser.keep(f"ks-{scheme}", 3000)
    assert (
        lightness["light"][0] > 200 > 100 > lightness["light"][1]
        and lightness["dark"][0] < 70 < 150 < lightness["dark"][1]
    ), lightness
