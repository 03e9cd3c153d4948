"""The site: `python nbs/_render.py` turns the notebooks into `_docs/` (make docs).

Two steps. nbdev processes the notebooks into `_proc/`, as `nbdev_docs` does. Then Quarto renders them where it is
installed; elsewhere mkdocs-material does, from the same `_quarto.yml`, to the same addresses (`python nbs/_render.py
mkdocs` asks for it). nbdev and Quarto ignore this file for its underscore. Keep the notebooks to what both can show:
directives (echo, include, output, code-fold, fig-alt, fig-cap), call-outs, tables, math, links to other notebooks.
"""

import base64
import html
import importlib
import inspect
import json
import logging
import os
import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import yaml

NBS = Path(__file__).resolve().parent
ROOT = NBS.parent
PROCESSED, SOURCE = ROOT / "_proc", ROOT / "_build" / "docs"
QUARTO = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
PAGE = (".ipynb", ".md", ".qmd")

# Step 1: nbdev's processing, with reference entries read from the library


def plain(text):
    "Text of a docstring as Markdown that shows it as it is; `code` and *emphasis* keep their meaning."
    parts = text.replace("``", "`").split("`")
    for i in range(0, len(parts), 2):
        parts[i] = (
            re.sub(r"[\\_\[\]]|(?<!\S)\*(?=\s)|-(?=-)|(?<=-)-", r"\\\g<0>", parts[i])
            .replace("<", "&lt;")
            .replace("$", "&#36;")
            .replace("{", "&#123;")
        )
    return "`".join(parts)


def sections(text):
    "A numpydoc docstring taken apart: [(title, text)]; what stands before the first title has none."
    parts = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}\n", text or "", flags=re.MULTILINE)
    return [("", parts[0].strip()), *((title, body.strip("\n")) for title, body in zip(parts[1::2], parts[2::2]))]


def entries(text):
    "What a section lists: [(name, type, explanation)]. A line that is not indented begins an entry."
    found = []
    for item in re.split(r"^(?=\S)", textwrap.dedent(text), flags=re.MULTILINE):
        head, _, said = item.partition("\n")
        name, _, kind = head.partition(" : ")
        if name.strip():
            found.append((name.strip(), kind.strip(), textwrap.dedent(said).strip()))
    return found


def cell(text):
    "Text as one cell of a table: its paragraphs and the items of its lists stand below each other."
    parts = re.split(r"\n\s*\n|\n(?=\s*[-*] )", text)
    said = "<br>".join(" ".join(plain(re.sub(r"^\s*[-*] ", "• ", part)).split()) for part in parts)
    said = re.sub(r"`([^`]*\|[^`]*)`", lambda code: f"<code>{code[1].replace('|', '&#124;')}</code>", said)
    return said.replace("|", "\\|")


def options(command):
    """What a command takes, as entries: its arguments and options under the names that they have on the command line.

    None for a function that is no command.
    """
    found = []
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        if name != "return":
            if type(info := getattr(hint, "__metadata__", [None])[0]).__name__ not in ("OptionInfo", "ArgumentInfo"):
                return None
            given = inspect.signature(command).parameters[name].default
            decls = [d for d in (info.default, *(info.param_decls or ())) if str(d).startswith("-")]
            decls = decls or [f"--{name.replace('_', '-')}" if type(info).__name__ == "OptionInfo" else name.upper()]
            kind = info.metavar or re.sub(r" \| None$", "", spelled(inspect.formatannotation(hint.__origin__)))
            kind = (
                ""
                if kind == "bool"
                else kind + (f", default {given}" if given and given is not inspect.Parameter.empty else "")
            )
            found.append((", ".join(decls), kind, info.help or ""))
    return found


def listed(title, text):
    "A section of a docstring, or entries, as a table, the title as its head: names, types if any, explanations."
    rows = entries(text) if isinstance(text, str) else text
    if title in ("Returns", "Yields", "Raises"):  # a line by itself is a type
        rows = [(name, kind, said) if kind else ("", name, said) for name, kind, said in rows]
    named = lambda name: re.sub(r"[^,\s]+", r"<code>\g<0></code>", name)  # in back-ticks it would become a link
    rows = [(named(name), cell(kind), cell(said)) for name, kind, said in rows]
    kept = [column for column in zip(*rows) if any(column)]
    widths = {2: (26, 74), 3: (20, 26, 54)}.get(len(kept), (100,))  # in per cent; Quarto reads them off the dashes
    head = [[title] + [" "] * (len(kept) - 1), ["-" * width for width in widths]]
    lines = [" | ".join(row) for row in (*head, *zip(*kept))]
    return "\n\n".join(['<div class="listed" markdown="1">', "\n".join(f"| {line} |" for line in lines), "</div>"])


def docstring(thing):
    "A numpydoc docstring as Markdown: prose as it is, what is listed as tables."
    parts = []
    for title, text in sections(inspect.getdoc(thing)):
        if title in ("Parameters", "Attributes", "Returns", "Yields", "Raises"):
            parts.append(listed(title, text))
        elif title == "Examples":
            parts.append(f"**Examples**\n\n{fenced(text, 'python')}")
        else:
            prose = "\n\n".join(plain(paragraph) for paragraph in re.split(r"\n\s*\n", text))
            parts.append(f"**{title}**: {prose}" if title else prose)
    return "\n\n".join(part for part in parts if part)


def spelled(text):
    "An annotation or a default without the modules that go without saying."
    text = re.sub(r"\b(kslottery\.\w+|typing|collections\.abc|pathlib|numpy)\.(?=[A-Za-z])", "", text)
    text = text.replace("<factory>", "...").replace("NoneType", "None")
    return re.sub(r"PosixPath\(('[^']*')\)", r"\1", text)


class Spelled(str):
    "An annotation as it is written."

    def __repr__(self):
        return str(self)


def signature(thing, name):
    """The call as Python, one parameter a line where it is long.

    What an annotation says only to a command line is left out.
    """
    try:
        given = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    of = thing.__init__ if inspect.isclass(thing) and not hasattr(thing, "_fields") else thing  # a NamedTuple has none
    try:
        hints = typing.get_type_hints(of)
    except NameError:  # a type that only type checkers import
        hints = {n: Spelled(a) for n, a in of.__annotations__.items() if isinstance(a, str)}
    show = [
        p.replace(annotation=hints.get(n, p.annotation))
        for n, p in given.parameters.items()
        if n not in ("self", "cls")
    ]
    back = inspect.Signature.empty if inspect.isclass(thing) else hints.get("return", given.return_annotation)
    text = spelled(str(given.replace(parameters=show, return_annotation=back)))
    if len(name + text) > 88 and show:
        arrow = spelled(str(inspect.Signature(return_annotation=back)))[2:]
        text = "(\n" + "".join(f"    {spelled(p)},\n" for p in parameters(show)) + f"){arrow}"
    return name + text


def parameters(given):
    "The text of each parameter, with the lone star before those that go by name."
    starred = False
    for p in given:
        starred |= p.kind is p.VAR_POSITIONAL
        if p.kind is p.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        yield str(p)


def fenced(text, kind):
    "Text as a code block of a kind: a language, or attributes."
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{ticks}{kind}\n{text.strip(chr(10)).rstrip()}\n{ticks}"


def folded(block, summary, shown=False):
    "A block behind a word to click; Quarto and mkdocs read the same HTML."
    opening = f'<details class="code" data-search-exclude markdown="1"{" open" * shown}>'
    return f"{opening}\n<summary>{summary}</summary>\n\n{block}\n\n</details>"


def methods(thing):
    """The public methods of a class: (name, as the class has it, its function).

    They are its own and those of its private bases, which are parts of it that other cells explain.
    """
    of_us = [c for c in thing.__mro__[::-1] if c is thing or c.__name__[0] == "_" and c.__module__ == thing.__module__]
    for method, raw in {name: raw for c in of_us for name, raw in vars(c).items()}.items():
        of = getattr(raw, "fget", None) or getattr(raw, "func", None) or getattr(raw, "__func__", raw)
        own = inspect.isfunction(of) and of.__qualname__ in [f"{c.__name__}.{method}" for c in of_us]
        if own and not method.startswith("_"):
            yield method, raw, of


def entry(thing, name, level=3, source=True):
    """The reference entry of one function or class.

    Heading, signature, docstring, a class's public methods, and the code to unfold.
    """
    heading = f"{'#' * level} {name} {{#{name.lower()} .reference}}"
    if thing.__module__ == "kslottery.cli" and (taken := options(thing)):
        parts = [heading, docstring(thing), listed("Arguments and options", taken)]
    else:
        parts = [heading, fenced(signature(thing, name), "python"), docstring(thing)]
    if inspect.isclass(thing):
        for method, raw, of in methods(thing):
            if of.__doc__ and (isinstance(raw, (staticmethod, classmethod)) or inspect.isfunction(raw)):
                parts.append(entry(getattr(thing, method), f"{name}.{method}", level + 1, source=False))
            elif of.__doc__:  # a property is read, not called
                parts += [
                    f"{'#' * (level + 1)} {name}.{method} {{#{name.lower()}.{method.lower()} .reference}}",
                    docstring(of),
                ]
    if source:
        parts.append(folded(fenced(inspect.getsource(thing), "python"), "Code"))
    return "\n\n".join(p for p in parts if p)


def process():
    """nbs/ -> _proc/, as nbdev's proc_nbs does, without running a notebook's cells.

    The reference entries come from the library as it is imported.
    """
    from execnb.nbio import mk_cell, read_nb, write_nb
    from nbdev.process import Processor
    from nbdev.processors import FilterDefaults, exec_show_docs

    class FromLibrary(Processor):
        def begin(self):
            cells, shown = self.nb.cells, []
            for i, cell in enumerate(cells):
                found = re.search(r"^show_doc\(([\w.]+)", cell.source or "", re.MULTILINE)
                if found:
                    module = importlib.import_module(f"kslottery.{self.module}")
                    cells[i] = mk_cell(entry(getattr(module, found[1]), found[1]), "markdown")
                    shown.append(i)
                if shown and (not found or i + 1 == len(cells)):  # nbdev shows what one cell defines in the wrong order
                    cells[shown[0] : shown[-1] + 1] = cells[shown[0] : shown[-1] + 1][::-1]
                    shown = []

        def __init__(self, nb):
            super().__init__(nb)
            self.module = next(
                (c.directives_["default_exp"][0] for c in nb.cells if "default_exp" in c.directives_), None
            )

    class Filter(FilterDefaults):
        def base_procs(self):
            return [FromLibrary if p is exec_show_docs else p for p in super().base_procs()]

    shutil.rmtree(PROCESSED, ignore_errors=True)
    for path in sorted(NBS.rglob("*")):
        place = path.relative_to(NBS)
        if (
            path.is_dir()
            or any(p.startswith(".") or p in ("runs", "__pycache__") for p in place.parts)
            or (path.name.startswith("_") and path.suffix == ".py")
        ):
            continue
        (PROCESSED / place).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            notebook = read_nb(path)
            Filter()(notebook)
            for made in notebook.cells:  # a link whose text is a name of the library: nbdev puts a link into it
                if made.cell_type == "markdown":
                    made.source = re.sub(r"\[\[(`[^`]*`)\]\([^)]*\)\]\(", r"[\1](", made.source)
            write_nb(notebook, PROCESSED / place)
        else:
            shutil.copyfile(path, PROCESSED / place)


# Step 2: one processed notebook -> Markdown


class Page:
    "One page: where it comes from, its address, and its text as Markdown for mkdocs."

    def __init__(self, path):
        self.path = path.relative_to(PROCESSED).as_posix()
        if path.suffix == ".ipynb":
            self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        else:
            self.cells = [{"cell_type": "markdown", "source": path.read_text(encoding="utf-8")}]
        front = re.match(r"\s*---\n(.*?)\n---\s*", "".join(self.cells[0]["source"]), re.DOTALL) if self.cells else None
        self.front = yaml.safe_load(front[1]) if front else {}
        if front:
            rest = "".join(self.cells[0]["source"])[front.end() :]
            self.cells[0] = {"cell_type": "markdown", "source": rest}
        self.target = posixpath.join(
            posixpath.dirname(self.path), Path(self.front.get("output-file", path.stem)).stem + ".md"
        )
        self.figures = {}  # file name beside the page -> bytes
        self.without_alt = []  # (cell number, nearest heading) of figures that have no text of their own

    @property
    def title(self):
        heading = re.search(r"^# (.+)$", "".join(self.cells[0]["source"]), re.MULTILINE)
        return self.front.get("title") or (heading[1] if heading else self.path)

    def markdown(self, links):
        """The page as Markdown.

        `links(page, target)` gives the target of a link in mkdocs' terms, or None for no link.
        """
        parts = [f"# {self.front['title']}"] if "title" in self.front else []
        if "description" in self.front:
            parts.append(f"{self.front['description']}\n{{ .lead }}")
        heading = self.title
        for number, cell in enumerate(self.cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                heading = (re.findall(r"^#+ (.+?)(?: \{.*)?$", source, re.MULTILINE) or [heading])[-1]
                parts.append(self._linked(callouts(source), links))
            elif cell["cell_type"] == "code":
                parts += self._code(cell, source, heading, number, links)
        return "\n\n".join(p for p in parts if p.strip()) + "\n"

    def _code(self, cell, source, heading, number, links):
        "A code cell: what was written, folded if asked for, and what it gave."
        lines = source.split("\n")
        try:
            options = (
                yaml.safe_load("\n".join(line[2:].strip() for line in lines if line.startswith("#|") and ":" in line))
                or {}
            )
        except yaml.YAMLError as error:
            raise ValueError(
                f"{self.path}, under {heading!r}: a #| line is no YAML ({error.problem}): put its text in quotes"
            ) from None
        source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        if options.get("include") is False:
            return
        if source and options.get("echo") is not False:
            block = fenced(source, cell.get("metadata", {}).get("language", "python"))
            if options.get("code-fold") in (True, "true", "show"):
                block = folded(
                    block, html.escape(str(options.get("code-summary", "Code"))), options["code-fold"] == "show"
                )
            yield block
        if options.get("output") is False:
            return
        for output in merged(cell["outputs"]):
            data = output.get("data", {})
            if "application/vnd.jupyter.widget-view+json" in data:  # a progress bar
                continue
            if output["output_type"] == "stream":
                yield fenced("".join(output["text"]), "{.text .output .no-copy}")
            elif "image/png" in data:
                name = f"{Path(self.target).stem}_files/figure-{len(self.figures) + 1}.png"
                self.figures[posixpath.join(posixpath.dirname(self.path), name)] = base64.b64decode(
                    "".join(data["image/png"])
                )
                caption = options.get("fig-cap")
                alt = options.get("fig-alt") or caption
                if not alt:
                    self.without_alt.append((number, heading))
                    alt = f"{re.sub(r'[`*$]', '', heading)}: figure"
                figure = f"![{alt}]({name})"
                yield (
                    f'<figure markdown="1">\n\n{figure}\n\n<figcaption>{html.escape(caption)}</figcaption>\n\n</figure>'
                    if caption
                    else figure
                )
            elif "text/markdown" in data:
                yield self._linked("".join(data["text/markdown"]), links)
            elif "text/html" in data:
                yield f'<div class="output">\n{table("".join(data["text/html"]))}\n</div>'
            elif "text/plain" in data:
                yield fenced("".join(data["text/plain"]), "{.text .output .no-copy}")

    def _linked(self, text, links):
        def link(match):
            target = links(self, match[2])
            return match[1] if target is None else f"[{match[1]}]({target})"

        return outside_code(text, lambda prose: re.sub(r"(?<!!)\[([^\[\]]+)\]\(([^)\s]+)\)", link, prose))


def merged(outputs):
    "Outputs with neighbouring pieces of one stream put together; blank ones left out."
    kept = []
    for output in outputs:
        text = "".join(output.get("text", ""))
        if kept and output["output_type"] == "stream" and kept[-1].get("name") == output["name"]:
            kept[-1]["text"] += text
        elif output["output_type"] == "stream":
            kept.append({**output, "text": text})
        elif output["output_type"] in ("display_data", "execute_result"):
            kept.append(output)
    return [o for o in kept if o["output_type"] != "stream" or o["text"].strip()]


def table(text):
    "A table as pandas writes it, without its own looks."
    text = re.sub(r"<style.*?</style>\s*", "", text, flags=re.DOTALL)
    return re.sub(r' (?:id|class|border|style)="[^"]*"', "", re.sub(r"\n\s*\n", "\n", text)).strip()


def callouts(text):
    "Quarto's call-outs as admonitions."

    def admonition(match):
        title, body = re.search(r'title="([^"]*)"', match[2]), match[3].strip()
        heading = re.match(r"#+ (.+)\n", body)  # Quarto's other way to give a title
        if heading and not title:
            body = body[heading.end() :].strip()
        kind = {"caution": "warning", "important": "danger"}.get(match[1], match[1])
        words = (title or heading or ["", match[1].capitalize()])[1]
        return f'!!! {kind} "{words}"\n\n' + "\n".join(f"    {line}".rstrip() for line in body.split("\n"))

    return re.sub(r"^:::+ ?\{\.callout-(\w+)([^}]*)\}\n(.*?)\n:::+$", admonition, text, flags=re.DOTALL | re.MULTILINE)


def outside_code(text, change):
    "Apply `change` to the text outside fenced code."
    parts = re.split(r"(^(`{3,})[^\n]*\n.*?^\2$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(change(p) if i % 3 == 0 else p if i % 3 == 1 else "" for i, p in enumerate(parts))


# Step 3: Markdown -> the site


def anchor(text, separator="-"):
    "The id of a heading as Pandoc makes it, so that links hold in both renderers."
    return (
        re.sub(r"\s+", separator, re.sub(r"^[^a-z]+", "", re.sub(r"[^\w\s.-]", "", text.lower())).strip()) or "section"
    )


def links_between(pages, site):
    """The function that rewrites links.

    Notebooks become their pages, addresses on the site the pages that they mean; a name without an entry gets no link.
    """
    by_path = (
        {p.path: p for p in pages}
        | {p.target: p for p in pages}
        | {posixpath.splitext(p.target)[0] + ".html": p for p in pages}
    )

    def rewrite(page, target):
        path, hash_, place = target.partition("#")
        if path.startswith(site):
            path = path[len(site) :].lstrip("/")
            if place.split(".")[-1].startswith("_"):  # private names have no entry
                return None
        elif not path or ":" in path or not path.endswith(PAGE):
            return target
        else:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page.path), path))
        if path not in by_path:
            return target  # mkdocs says that this is a dead link
        return posixpath.relpath(by_path[path].target, posixpath.dirname(page.target) or ".") + hash_ + place

    return rewrite


def navigation(contents, pages):
    "The sidebar of _quarto.yml in mkdocs' terms."
    for item in contents:
        if isinstance(item, dict) and "contents" in item:
            yield {item["section"]: list(navigation(item["contents"], pages))}
            continue
        path, text = (item, None) if isinstance(item, str) else (item.get("href") or item["file"], item.get("text"))
        if path not in pages:
            raise ValueError(f"the sidebar of _quarto.yml names {path}, which is not in nbs/: mend its contents")
        yield {text or pages[path].title: pages[path].target}


def write_pages():
    "_proc/ -> Markdown and figures in _build/docs; returns the pages by their path in nbs/."
    from configparser import ConfigParser

    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    site = config["DEFAULT"]["doc_host"] + config["DEFAULT"]["doc_baseurl"]
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = []
    for path in sorted(PROCESSED.rglob("*")):
        place = SOURCE / path.relative_to(PROCESSED)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif path.suffix in PAGE:
            pages.append(Page(path))
        elif not path.suffix == ".yml":
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    links = links_between(pages, site)
    for page in pages:
        (SOURCE / page.target).parent.mkdir(parents=True, exist_ok=True)
        (SOURCE / page.target).write_text(page.markdown(links), encoding="utf-8")
        for name, image in page.figures.items():
            (SOURCE / name).parent.mkdir(exist_ok=True)
            (SOURCE / name).write_bytes(image)
    math = QUARTO["format"]["html"]["html-math-method"]["url"].strip("/")
    (SOURCE / "math.js").write_text(
        'for (const e of document.querySelectorAll(".arithmatex")) {\n'
        "  const text = e.textContent, display = text.startsWith('\\\\[');\n"
        "  katex.render(text.slice(2, -2), e, {displayMode: display, throwOnError: true});\n}\n",
        encoding="utf-8",
    )
    return {p.path: p for p in pages}, site, math


def scheme(preferred, name, primary, other):
    "A colour scheme: for whom, and the button that leads to the other one."
    toggle = {"icon": f"material/weather-{other}", "name": "Light or dark"}
    return {"media": f"(prefers-color-scheme: {preferred})", "scheme": name, "primary": primary, "toggle": toggle}


def mkdocs():
    "_build/docs -> _docs. Any warning of mkdocs ends the build."
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    from mkdocs.commands.build import build
    from mkdocs.config.base import load_config

    pages, site, math = write_pages()
    shutil.copyfile(NBS / "styles.css", SOURCE / "styles.css")
    website = QUARTO["website"]
    source = website["repo-url"]
    strict = dict.fromkeys(("anchors", "not_found", "unrecognized_links"), "warn")
    settings = {
        "site_name": website["title"],
        "site_description": website["description"],
        "site_url": site + "/",
        "docs_dir": str(SOURCE),
        "site_dir": str(ROOT / "_docs"),
        "use_directory_urls": False,
        "strict": True,
        "copyright": f'<a href="{source}">Source</a> · <a href="{source}/issues/new">Report an issue</a>',
        "nav": list(navigation(website["sidebar"]["contents"], pages)),
        "validation": {"nav": {"omitted_files": "warn"}, "links": strict},
        "theme": {
            "name": "material",
            "font": False,
            "features": [
                *("navigation.sections", "navigation.footer", "navigation.top", "toc.follow"),
                *("content.code.copy", "search.highlight"),
            ],
            "palette": [scheme("light", "default", "white", "night"), scheme("dark", "slate", "black", "sunny")],
        },
        "plugins": [{"search": {"separator": r"[\s\-,:!=\[\]()\"/.]+"}}],
        "extra": {"generator": False},
        "extra_css": [f"{math}/katex.min.css", "styles.css"],
        "extra_javascript": [f"{math}/katex.min.js", "math.js"],
        "markdown_extensions": [
            *("tables", "attr_list", "md_in_html", "admonition", "footnotes", "def_list", "pymdownx.superfences"),
            {"toc": {"permalink": True, "slugify": anchor, "toc_depth": "2-4"}},
            {"pymdownx.highlight": {"use_pygments": True}},
            {"pymdownx.arithmatex": {"generic": True}},
        ],
    }
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    configuration = SOURCE.with_name("mkdocs.yml")
    configuration.write_text("{}", encoding="utf-8")
    build(load_config(str(configuration), **settings))
    return pages


def quarto():
    from nbdev.quarto import refresh_quarto_yml

    refresh_quarto_yml()
    shutil.copyfile(NBS / "nbdev.yml", PROCESSED / "nbdev.yml")
    subprocess.run(["quarto", "render", "--no-cache", "--no-execute"], cwd=PROCESSED, check=True)
    if (PROCESSED / "_docs").is_dir():  # where nbdev.yml puts it
        shutil.rmtree(ROOT / "_docs", ignore_errors=True)
        shutil.move(PROCESSED / "_docs", ROOT / "_docs")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    renderer = sys.argv[1] if len(sys.argv) > 1 else "quarto" if shutil.which("quarto") else "mkdocs"
    process()
    {"quarto": quarto, "mkdocs": mkdocs}[renderer]()
    print(f"{len(list((ROOT / '_docs').rglob('*.html')))} pages in _docs/: make docs-serve shows them")
