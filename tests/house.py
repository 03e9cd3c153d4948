"""The house: its rooms are the modules, in the order of their notebooks' names, and what each imports.

`make house` (python tests/house.py) draws it into nbs/images/house.svg, which CONTRIBUTING.md shows.
"""

import ast
import html
import json
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "nbs" / "images" / "house.svg"
BENCHMARKS = "benchmarks"  # counted as one room, above all others


def cells(notebook: Path, kind: str) -> list[str]:
    "The source of a notebook's cells of one kind (code, markdown)."
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == kind]


def rooms() -> dict[str, Path]:
    "The modules and their notebooks. The order is that of the notebooks' names, from nothing else."
    found = {}
    for notebook in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        exported = re.search(r"^#\| ?default_exp (\w+)", "\n".join(cells(notebook, "code")), re.M)
        found[exported[1]] = notebook
    return found


def at_run_time(tree: ast.AST):
    "All nodes of a tree, without what stands under `if TYPE_CHECKING`."
    yield tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from at_run_time(other)
        else:
            yield from at_run_time(node)


def imports(path: Path, known: set[str]) -> set[str]:
    "The modules of the library that a file imports, also inside functions."
    found = set()
    for node in at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("kslottery.") for a in node.names if a.name.startswith("kslottery.")}
        elif isinstance(node, ast.ImportFrom):
            module = f"kslottery.{node.module or ''}".rstrip(".") if node.level else node.module
            if module == "kslottery":
                found |= {a.name for a in node.names}
            elif module.startswith("kslottery."):
                found.add(module.removeprefix("kslottery."))
    return found & known


def arrows() -> dict[str, set[str]]:
    "What each room imports, in the order of the rooms; the benchmarks are the last one."
    known = set(rooms())
    graph = {name: imports(ROOT / "kslottery" / f"{name}.py", known) - {name} for name in rooms()}
    benches = (imports(path, known) for path in sorted((ROOT / "benchmarks").glob("*.py")))
    return graph | {BENCHMARKS: set().union(*benches)}


def purpose(notebook: Path) -> str:
    "A notebook's description up to its first stop, shortened to what fits beside the stairs."
    said = re.search(r"^> (.+)$", cells(notebook, "markdown")[0], re.M)[1]
    words = re.sub(r"[`*]", "", re.split(r"(?<=\w)[.;?](?: |$)", said)[0])
    return textwrap.shorten(words, 74, placeholder=" ...")


def picture() -> str:
    "The house as SVG: a floor for each room, `core` the lowest, with a dot above each room that it imports."
    graph, step, left, top = arrows(), 26, 12, 12
    names, notes = list(graph), {name: purpose(path) for name, path in rooms().items()}
    notes[BENCHMARKS] = "speed and memory, against what users have without it"
    width, height = left + step * len(names) + 640, 2 * top + step * len(names)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        '  font-family="sans-serif" font-size="13">',
        f"<title>{len(names)} rooms and {sum(map(len, graph.values()))} imports</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, name in enumerate(names):
        x, y = left + step * i, height - top - step * (i + 1)
        lines.append(f'<path d="M{left} {y + step // 2}H{x + step // 2}V{top}" fill="none" stroke="#e8e8e8"/>')
        lines.append(f'<rect x="{x + 4}" y="{y + 4}" width="{step - 8}" height="{step - 8}" rx="3" fill="#b8860b"/>')
        for j, other in enumerate(names):
            if other in graph[name]:
                spot = f'cx="{left + step * j + step // 2}" cy="{y + step // 2}" r="5"'
                lines.append(f'<circle {spot} fill="#1f4e79"><title>{name} imports {other}</title></circle>')
        text = f'<tspan font-weight="bold">{name}</tspan>  <tspan fill="#666">{html.escape(notes[name])}</tspan>'
        lines.append(f'<text x="{x + step + 6}" y="{y + 18}" xml:space="preserve" fill="#000">{text}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
