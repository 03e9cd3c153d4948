"""README.md from nbs/index.ipynb, figures included: python tests/readme.py. (nbdev_readme would need Quarto.)"""

import base64
import json
import re
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent


def figures(notebook: Path) -> dict[str, bytes]:
    "The figures stored in a notebook, by the name of the file that README links."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    stored = [
        o["data"]["image/png"]
        for c in cells
        if c["cell_type"] == "code"
        for o in c["outputs"]
        if "image/png" in o.get("data", {})
    ]
    return {f"nbs/images/{notebook.stem}-{n}.png": base64.b64decode(image) for n, image in enumerate(stored, 1)}


def badges() -> str:
    "What settings.ini says about the package, and the paper. Pictures from elsewhere, so the site does without."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    package, picture = config["DEFAULT"], "https://img.shields.io/badge/{}-{}-{}"
    shown = (
        ("version", package["version"], "blue", "settings.ini"),
        ("python", f"{package['min_python']}+", "blue", "settings.ini"),
        ("licence", {"apache2": "Apache 2.0"}[package["license"]], "green", "LICENSE"),
        ("paper", "arXiv 2402.02801", "b31b1b", "https://arxiv.org/abs/2402.02801"),
    )
    return "\n".join(
        f"[![{name}: {text}]({picture.format(name, quote(text), colour)})]({link})"
        for name, text, colour, link in shown
    )


def render(notebook: Path) -> str:
    "The notebook as Markdown: links to notebooks made relative to the repository, badges under the title."
    names, parts = iter(figures(notebook)), ["<!-- Generated from nbs/index.ipynb by `make export`. Do not edit. -->"]
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if number == 1:
            parts.append(badges())
        source = "".join(cell["source"])
        options = dict(re.findall(r"^#\| ([\w-]+): (.+)\n", source, re.MULTILINE))
        source = re.sub(r"^#\|.*\n", "", source, flags=re.MULTILINE)
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?!http|#)([^)]+)\)", r"](nbs/\1)", source))
            continue
        if options.get("echo") != "false":
            parts.append(f"```python\n{source}\n```")
        text = ""
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![{options['fig-alt']}]({next(names)})")
            else:
                text += "".join(output.get("text") or data.get("text/plain", "")).rstrip() + "\n"
        if text.strip():
            parts.append("\n".join(f"    {line}" for line in text.rstrip().split("\n")))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    index = ROOT / "nbs" / "index.ipynb"
    for name, image in figures(index).items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(image)
    (ROOT / "README.md").write_text(render(index), encoding="utf-8")
