"""The form of the code, read off the code itself: docstrings as numpydoc has them, signatures, widths, cells.

What is checked is structure, not English: every parameter has its entry with a type, every array its shape and dtype,
nothing is explained that is not there. A new function falls under the rules without being listed here.
"""

import ast
import builtins
import dataclasses
import enum
import inspect
import json
import re
import typing
from functools import cache

import pytest

from _render import entries, methods, sections
from conftest import ROOT
from house import rooms
from kslottery.cli import app
from test_docs import exported
from test_library import MODULES, NOTEBOOKS

WIDTH, MOST_PARAMETERS, MOST_LINES = 120, 8, 60
TITLES = "Parameters Attributes Returns Yields Raises Notes References Examples".split()
COMMANDS = {c.callback.__name__ for c in app.registered_commands}  # their options explain themselves, in --help
THINGS = {f"{module}.{name}": thing for module, name, thing in exported()}
PLAIN = {name: thing for name, thing in THINGS.items() if name not in {f"cli.{c}" for c in COMMANDS}}


def parts(thing):
    "The sections of a docstring by their titles."
    return dict(sections(inspect.getdoc(thing)))


def described(thing, *titles):
    "The entries of some sections: [(name, type, explanation)], one for each name."
    found = [entry for title in titles for entry in entries(parts(thing).get(title, ""))]
    return [(name.strip("* "), kind, said) for names, kind, said in found for name in names.split(",")]


def parameters(thing):
    "What a function is called with, or a class is made with; [] where a class leaves that to one from elsewhere."
    if inspect.isclass(thing):
        made = {"__init__", "__new__"} & vars(thing).keys() or dataclasses.is_dataclass(thing)
        if not made and not hasattr(thing, "_fields") or issubclass(thing, enum.Enum):
            return []
    given = [p for n, p in inspect.signature(thing).parameters.items() if n not in ("self", "cls")]
    return [p for p in given if not p.name.startswith("_")]


def returned(thing):
    "The annotation of what a function returns, as text; None for nothing."
    back = "None" if inspect.isclass(thing) else thing.__annotations__.get("return", "None")
    text = inspect.formatannotation(back) if not isinstance(back, str) else back
    return None if text in ("None", "NoReturn", "typing.NoReturn") else text


def none(what, names):
    names = sorted(names)
    assert not names, "\n  ".join([f"{what}:", *names])


# Docstrings


def test_every_public_thing_has_a_sentence():
    bad = []
    for name, thing in THINGS.items():
        first, _, rest = (inspect.getdoc(thing) or "").partition("\n")
        made_up = first.startswith(f"{name.split('.')[-1]}(")  # by dataclasses and named tuples
        if not re.search(r"[.?]$", first) or made_up or (rest and not rest.startswith("\n")):
            bad.append(f"kslottery.{name}: {first!r}")
    none("begin these with one sentence on a line of its own, with a full stop", bad)


def test_every_public_method_has_a_docstring():
    "A method without one is not in the reference."
    mute = []
    for name, thing in THINGS.items():
        for method, _, function in methods(thing) if inspect.isclass(thing) else ():
            if not function.__doc__ and method not in ("forward", "extra_repr"):
                mute.append(f"kslottery.{name}.{method}")
    none("say what these do", mute)


def test_sections_are_those_of_numpydoc():
    bad = [f"kslottery.{n}: {t}" for n, thing in THINGS.items() for t in parts(thing) if t and t not in TITLES]
    for name, thing in THINGS.items():
        order = [TITLES.index(t) for t in parts(thing) if t in TITLES]
        if order != sorted(order):
            bad.append(f"kslottery.{name}: the order is {', '.join(TITLES)}")
    none(f"sections are {', '.join(TITLES)}", bad)


def test_every_parameter_has_its_entry_and_nothing_else_has():
    bad = []
    for name, thing in PLAIN.items():
        wanted = [p.name for p in parameters(thing)]
        found = [n for n, _, _ in described(thing, "Parameters")]
        if inspect.isclass(thing):  # some fields are better called attributes; others are only read
            read = [n for n, _, _ in described(thing, "Attributes")]
            found += [n for n in read if n in wanted and n not in found]
            above = {f for c in thing.__mro__[1:] for f in getattr(c, "__dataclass_fields__", {})}
            wanted = [n for n in wanted if n in found or n not in above]  # what a class inherits stands there
        if wanted != found:
            bad.append(
                f"kslottery.{name}: takes {', '.join(wanted) or 'nothing'}; explains {', '.join(found) or 'nothing'}"
            )
    none("Parameters is what the signature has, in its order", bad)


def test_every_attribute_is_there():
    bad = []
    for name, thing in THINGS.items():
        if inspect.isclass(thing):
            source, bases = inspect.getsource(thing), [b for c in thing.__mro__ for b in vars(c)]
            hints = [h for c in thing.__mro__ for h in vars(c).get("__annotations__", {})]
            for attribute, _, _ in described(thing, "Attributes"):
                if attribute not in (*bases, *hints) and f"self.{attribute}" not in source:
                    bad.append(f"kslottery.{name}: {attribute}")
    none("Attributes that are not there", bad)


def test_every_entry_has_a_type():
    bad = [
        f"kslottery.{name}: {entry}"
        for name, thing in THINGS.items()
        for entry, kind, said in described(thing, "Parameters", "Attributes")
        if not kind or not said
    ]
    none("entries are `name : type` and an indented explanation", bad)


SHAPE = re.compile(r"\((?:\.\.\.|[\w +*-]+),(?: ?[\w +*-]+,?)*\)|\bof (?:any|the same|every) shape|\bscalar\b")
DTYPE = re.compile(
    r"\b(u?int\d*|integers?|whole numbers?|b?float\d*|floats?|floating|fp\d+|bool(ean)?s?|bytes|any dtype|numbers?)\b"
)
ARRAY = re.compile(r"ndarray|NDArray|Tensor\b|ArrayLike|array_like|\barrays?\b")


def test_every_array_has_a_shape_and_a_dtype():
    bad = []
    for name, thing in PLAIN.items():
        hints = {p.name: str(p.annotation) for p in parameters(thing)}
        for entry, kind, said in described(thing, "Parameters", "Attributes", "Returns"):
            if not ARRAY.search(f"{kind} {hints.get(entry, '')}") or re.search(r"Callable|Iterat", kind):
                continue
            if not SHAPE.search(f"{kind} {said}") or not DTYPE.search(f"{kind} {said}"):
                bad.append(f"kslottery.{name}: {entry} : {kind}")
        back = returned(thing) or ""
        if ARRAY.search(back) and not SHAPE.search(inspect.getdoc(thing) or ""):
            bad.append(f"kslottery.{name}: what it returns")
    none("give a shape such as (V, d), and a dtype", bad)


def test_what_is_returned_is_described():
    bad = []
    for name, thing in PLAIN.items():
        said = parts(thing)
        if inspect.isfunction(thing):
            gives, tells = returned(thing), "Returns" in said or "Yields" in said
            quiet = not parameters(thing) or str(gives).endswith("Iterator[None]")  # then the sentence is enough
            if tells != bool(gives) and (tells or not quiet):
                bad.append(f"kslottery.{name}: {'tells of a result' if tells else f'returns {gives}'}")
    none("Returns where something is returned, and only there", bad)


# Sources

METHODS = "ks tuning evaluation decomposition certificate lottery audit calibration".split()  # somebody's inventions
PLUMBING = {  # functions of these that hand on, look up or count
    *("ks.map_rows", "tuning.active_ids", "tuning.trainable_parameters", "evaluation.get_extraction"),
    *("evaluation.signatures", "evaluation.exact_match", "calibration.ladder"),
}


def test_every_method_says_where_it_comes_from():
    functions = {n for n, thing in PLAIN.items() if n.split(".")[0] in METHODS and inspect.isfunction(thing)}
    functions = {n for n in functions if n.count(".") == 1}
    mute = {n for n in functions if "References" not in parts(PLAIN[n])}
    none("References: a paper, the study of 2026, or this project", mute - PLUMBING)
    assert PLUMBING <= mute, "not plumbing, or gone"


# Errors

KNOWN = {n for n, thing in vars(builtins).items() if isinstance(thing, type) and issubclass(thing, Exception)}
KNOWN |= {thing.__name__ for thing in THINGS.values() if inspect.isclass(thing) and issubclass(thing, Exception)}
FROM_ELSEWHERE = {  # errors that another library raises; by the name of the function
    "PapermillExecutionError": {"run.execute"},
    "Exception": {"core.must"},  # whatever it is given
    "OSError": {"core.told", "core.whole_folder", "core.whole_file", "core.whole_files"},  # the system's, in our words
}


@cache
def code():
    "Every function, class and table of the library by its bare name: (errors that it raises, names that it uses)."
    found = {}
    for module in MODULES:
        tree = ast.parse((ROOT / "kslottery" / f"{module}.py").read_text())
        tables = [(ast.unparse(n.targets[0]), n) for n in tree.body if isinstance(n, ast.Assign)]
        functions = [(n.name, n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        for name, node in tables + functions:
            raised = (n.exc for n in ast.walk(node) if isinstance(n, ast.Raise) and n.exc)
            errors = {getattr(e.func if isinstance(e, ast.Call) else e, "id", "") for e in raised}
            rules = (n.args for n in ast.walk(node) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "must")
            errors |= {getattr(args[2], "id", "") if args[2:] else "ValueError" for args in rules}
            uses = {getattr(n, "id", None) or getattr(n, "attr", "") for n in ast.walk(node)}
            before = found.get(name, (set(), set()))
            found[name] = before[0] | errors, before[1] | uses
    return found


@cache
def can_raise(name):
    "The errors that a function raises, or anything of the library that has a name which it uses: at most all."
    seen, new = set(), {name}
    while new:
        seen |= new
        new = {use for n in new for use in code()[n][1] if use in code()} - seen
    return set().union(*(code()[n][0] for n in seen))


def test_errors_can_come():
    false = []
    for name, thing in THINGS.items():
        for error, kind, said in entries(parts(thing).get("Raises", "")):
            for one in re.split(r",\s*|\s+or\s+", error):
                own = name.split(".")[-1]
                if one not in KNOWN | FROM_ELSEWHERE.keys() or kind or not said:
                    false.append(
                        f"kslottery.{name}: {one} {kind} is no entry: the name of an error, then what brings it"
                    )
                elif one not in can_raise(own) and name not in FROM_ELSEWHERE.get(one, ()):
                    false.append(f"kslottery.{name}: nothing in its code raises {one}")
    none("Raises", false)


# Signatures


def test_signatures_are_short():
    bad = []
    for name, thing in PLAIN.items():
        given = parameters(thing)
        made = not inspect.isclass(thing) or "__init__" in vars(thing) and not dataclasses.is_dataclass(thing)
        if made and len(given) > MOST_PARAMETERS and name != "lottery.find_ticket":
            bad.append(f"kslottery.{name}: {len(given)}")
    none(f"more than {MOST_PARAMETERS} parameters", bad)


def test_signatures_are_annotated():
    bad = []
    for name, thing in THINGS.items():
        bare = [p.name for p in parameters(thing) if p.annotation is p.empty]
        if inspect.isfunction(thing) and "return" not in thing.__annotations__:
            bare.append("return")
        if bare:
            bad.append(f"kslottery.{name}: {', '.join(bare)}")
    none("annotate these", bad)


def test_no_keywords_are_hidden():
    bad = [
        f"kslottery.{name}: **{p.name}"
        for name, thing in THINGS.items()
        for p in parameters(thing)
        if p.kind is p.VAR_KEYWORD and p.name not in [n for n, _, _ in described(thing, "Parameters")]
    ]
    none("say to which library these are handed", bad)


# Widths and cells


def wide(place, text):
    "Lines that are too wide. A row of a table and a line that is one word cannot be broken."
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > WIDTH and not line.startswith("|") and len(line.split()) > 1:
            yield f"{place}:{number}: {len(line)}"


def sources(notebook):
    return [(n, c, "".join(c["source"])) for n, c in enumerate(json.loads(notebook.read_text())["cells"])]


def test_no_line_is_wide():
    folders = [ROOT / "kslottery", ROOT / "tests", ROOT / "benchmarks", ROOT / "nbs"]
    files = [p for f in folders for p in f.glob("*.py") if p.name != "_modidx.py"] + [ROOT / "setup.py"]
    files += [ROOT / n for n in ("Makefile", "pyproject.toml", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
    bad = [w for path in files for w in wide(path.relative_to(ROOT), path.read_text())]
    for notebook in NOTEBOOKS:
        for number, _, source in sources(notebook):
            bad += wide(f"{notebook.relative_to(ROOT)} cell {number}", source)
    none(f"lines over {WIDTH} columns", bad)


def test_no_rule_of_width_is_switched_off():
    off = r"fmt: ?(skip|off)|noqa:[^\n]*E501"
    bad = [
        p.name
        for p in (ROOT / "tests").glob("*.py")
        if p.name != "test_docstrings.py" and re.search(off, p.read_text())
    ]
    bad += [n.name for n in NOTEBOOKS if re.search(off, n.read_text())]
    assert not bad and "E501" not in (ROOT / "pyproject.toml").read_text()


def lines_of_code(source):
    "How many lines of a cell are code: no blank line, no directive, no docstring."
    said = set()
    for node in ast.walk(ast.parse(source)):
        first = node.body[0] if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            said |= {*range(first.lineno, first.end_lineno + 1)}
    lines = enumerate(source.split("\n"), 1)
    return sum(bool(line.strip()) and not line.startswith("#|") and n not in said for n, line in lines)


def exports():
    "The exported cells: (where, source)."
    for path in rooms().values():
        for number, cell, source in sources(path):
            if cell["cell_type"] == "code" and re.search(r"^#\| ?exporti?\b", source, re.M):
                yield f"{path.name} cell {number}", source


def test_exported_cells_are_short():
    long = [f"{place}: {lines_of_code(source)}" for place, source in exports() if lines_of_code(source) > MOST_LINES]
    none(f"more than {MOST_LINES} lines of code", long)


def test_lines_of_code():
    assert lines_of_code('#| export\ndef f():\n    """One.\n\n    Two.\n    """\n\n    return 1  # three\n# four') == 3


@pytest.mark.parametrize("module", MODULES)
def test_no_class_is_put_together_from_outside(module):
    "No @patch, and nothing is assigned to a class after it was made."
    tree = ast.parse((ROOT / "kslottery" / f"{module}.py").read_text())
    classes = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert "patch" not in [ast.unparse(d).split("(")[0] for d in node.decorator_list], node.name
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in getattr(node, "targets", None) or [node.target]:
                owner = getattr(getattr(target, "value", None), "id", "") if isinstance(target, ast.Attribute) else ""
                assert owner not in classes, ast.unparse(node)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            assert getattr(node.args[0], "id", "") not in classes, ast.unparse(node)


# The rules see what is in the code


def example(ids: "np.ndarray", n: int = 1) -> list[int]:  # noqa: F821
    """One sentence.

    More.

    Parameters
    ----------
    ids : array of shape (k,), int64
        Which rows.

        * a list
    n : int, default 1
        How often.

    Returns
    -------
    list of int
        The ids.

    Raises
    ------
    ValueError
        If there is none.
    """
    raise ValueError


def test_a_docstring_is_taken_apart():
    assert [*parts(example)] == ["", "Parameters", "Returns", "Raises"]
    assert described(example, "Parameters") == [
        ("ids", "array of shape (k,), int64", "Which rows.\n\n* a list"),
        ("n", "int, default 1", "How often."),
    ]
    assert entries(parts(example)["Raises"]) == [("ValueError", "", "If there is none.")]
    assert returned(example) == "list[int]" and [p.name for p in parameters(example)] == ["ids", "n"]
    assert typing.get_origin(example.__annotations__["return"]) is list


def test_errors_are_found_through_helpers_methods_and_tables():
    assert "ValueError" in can_raise("ks_scan") and can_raise("cache_dir") == set()
