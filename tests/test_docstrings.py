"""What a reader of the reference may rely on: every array has a shape and a dtype, every error that can come is named and no other, every method says where it comes from.

The rules are read off the code itself (its syntax trees), so that a new function falls under them without being listed here. What is listed is an exception, with its reason.
"""

import ast
import builtins
import inspect
import re
from functools import cache
from typing import NamedTuple

from test_docs import exported

from conftest import ROOT
from test_library import MODULES

PUBLIC = {f"{module}.{name}": inspect.getdoc(thing) for module, name, thing in exported()}
COMMANDS = {name for name in PUBLIC if re.search(r"^Example: kslottery ", PUBLIC[name], re.M)}  # a command ends with a status and a sentence
ERRORS = {name for name, thing in vars(builtins).items() if isinstance(thing, type) and issubclass(thing, Exception)} | {"PapermillExecutionError"}


class Code(NamedTuple):
    "A function, a class by its constructor, or a table of functions: where it stands, its tree, and the names that its module knows."

    module: str
    owner: str
    tree: ast.AST
    known: dict
    table: bool = False


@cache
def library():
    "Every function of the library by module.name or module.Class.name; a class stands for what making one of it runs."
    codes = {}
    for module in MODULES:
        tree = ast.parse((ROOT / "kslottery" / f"{module}.py").read_text())
        known = {node.name: f"{module}.{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("kslottery.")):
                known |= {alias.asname or alias.name: f"{node.module.removeprefix('kslottery.')}.{alias.name}" for alias in node.names}
            if isinstance(node, ast.Assign) and node in tree.body and isinstance(node.targets[0], ast.Name):  # a table of functions, say
                known[node.targets[0].id] = f"{module}.{node.targets[0].id}"
                codes[known[node.targets[0].id]] = Code(module, "", node.value, known, True)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                codes[f"{module}.{node.name}"] = Code(module, "", node, known)
            elif isinstance(node, ast.ClassDef):
                methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
                made = [m for m in methods if m.name in ("__init__", "__post_init__", "__getitem__")]
                codes[f"{module}.{node.name}"] = Code(module, node.name, ast.Module(made, []), known)
                codes |= {f"{module}.{node.name}.{m.name}": Code(module, node.name, m, known) for m in methods}
    return codes


def raised(code):
    "The errors that a function raises itself."
    calls = (n.exc.func if isinstance(n.exc, ast.Call) else n.exc for n in ast.walk(code.tree) if isinstance(n, ast.Raise) and n.exc)
    return {c.id for c in calls if isinstance(c, ast.Name)} & ERRORS


def used(code, methods=False):
    "The functions of the library that a function names; methods of its own object; with `methods`, every method of the library that has the name of one that it calls."
    found, called = (
        set(),
        {id(n.func) for n in ast.walk(code.tree) if isinstance(n, ast.Call)} if code.table else set(),
    )  # what made a table was called on import
    for node in ast.walk(code.tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in code.known and id(node) not in called:
            found.add(code.known[node.id])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            found.add(f"{code.module}.{code.owner}.{node.attr}")
        if isinstance(node, ast.Name) and node.id == "cls":
            found.add(f"{code.module}.{code.owner}")
        if methods and isinstance(node, ast.Attribute):
            found |= {name for name in library() if name.count(".") == 2 and name.endswith(f".{node.attr}")}
    return found & library().keys()


def reach(name, follow):
    "A function and all that it leads to by `follow` (a function of one name)."
    seen, new = set(), {name}
    while new:
        seen |= new
        new = {n for m in new for n in follow(m)} - seen
    return seen


def errors_of(name, methods=False):
    "What a function raises, or a function that it names. With `methods`, at most all that can come out of it."
    return {error for n in reach(name, lambda n: used(library()[n], methods)) for error in raised(library()[n])}


def sentences(text):
    return re.split(r"(?<=[.:])\s+(?=[A-Z`])|\n", text)


def stated(name, seen=()):
    "The errors that a docstring names, also by way of another's: Raises as `ks_scan` does."
    text, found = PUBLIC[name], set()
    for sentence in sentences(text):
        if not re.search(r"\b[Rr]aises?\b|\berrors?\b|\brefuses?\b", sentence):
            continue
        found |= {word for word in re.findall(r"\w+", sentence) if word in ERRORS}
        for other in re.findall(r"`([\w.]+)`", sentence):
            for candidate in PUBLIC:
                if candidate not in (name, *seen) and (
                    f".{candidate}".endswith(f".{other}") or f".{candidate}".endswith(f".{other.removeprefix('kslottery.')}")
                ):
                    found |= stated(candidate, (name, *seen))
    return found


def listed(what, names):
    return "\n  ".join([f"{what}:", *sorted(names)])


# Errors: named where they can come, and only there

CAUGHT = {  # (function, error) that the function itself catches, or that a caller cannot bring about
    ("rows.TunedRows.conflicts", "ValueError"): "it asks for the ids that both have",
}
FROM_ELSEWHERE = {  # (function, error) that another library raises
    ("core.write_json", "ValueError"): "json, for NaN",
    ("run.execute", "PapermillExecutionError"): "papermill",
}


def test_every_error_that_can_come_is_named():
    silent = []
    for name in PUBLIC.keys() - COMMANDS:
        missing = {e for e in errors_of(name) - stated(name) if (name, e) not in CAUGHT}
        silent += [f"kslottery.{name}: {error}" for error in missing]
    assert not silent, listed("say in the docstring when these come (Raises ...)", silent)


def test_no_error_is_named_that_cannot_come():
    false = []
    for name in PUBLIC.keys() - COMMANDS:
        false += [f"kslottery.{name}: {e}" for e in stated(name) - errors_of(name, methods=True) if (name, e) not in FROM_ELSEWHERE]
    assert not false, listed("nothing in the code raises these", false)


def test_errors_stand_in_a_sentence_that_starts_with_raises():
    "So the reference lists them."
    loose = []
    for name in PUBLIC:
        for sentence in sentences(PUBLIC[name]):
            if set(re.findall(r"\w+", sentence)) & ERRORS and not re.match(r"Raises? ", sentence):
                loose.append(f"kslottery.{name}: {sentence}")
    assert not loose, listed("begin these with Raises", loose)


# Shapes

SHAPE = re.compile(r"\((?:\.\.\.|\w+),(?: ?\w+,?)*\)")
DTYPE = re.compile(r"\b(u?int\d*|integers?|whole numbers?|float\d*|floats?|floating|fp32|bool(ean)?s?|bytes)\b")
TO_ARRAY = {"asarray", "array", "ravel", "as_tensor", "from_numpy", "isin", "nan_to_num", "flatnonzero", "setdiff1d"}
NO_SHAPE = {
    ("core.fingerprint", "value"): "anything goes, of every shape and dtype; both are part of the fingerprint",
    ("ks.ks_pvalue", "statistic"): "one number, or an array of any shape",
}


def parameters(code):
    "The parameters of a function, or of a class's constructor, by position."
    made = [f for f in getattr(code.tree, "body", []) if getattr(f, "name", "") == "__init__"] if isinstance(code.tree, ast.Module) else [code.tree]
    given = made[0].args if made and isinstance(made[0], ast.FunctionDef) else None
    return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")] if given else []


def callees(code, call):
    "The functions of the library that a call may run."
    if isinstance(call.func, ast.Name):
        return {code.known.get(call.func.id)} & library().keys()
    if isinstance(call.func, ast.Attribute):
        return {name for name in library() if name.count(".") == 2 and name.endswith(f".{call.func.attr}")}
    return set()


@cache
def arrays(name, above=()):
    "The parameters that a function treats as arrays: it asks for their shape, takes slices of several axes, makes arrays of them, or hands them to a function of the library that does."
    code, found = library()[name], set()
    known = parameters(code)
    for node in ast.walk(code.tree):
        if isinstance(node, ast.Attribute) and node.attr in ("shape", "ndim", "detach") and isinstance(node.value, ast.Name):
            found.add(node.value.id)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and isinstance(node.value, ast.Name):
            found.add(node.value.id)
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in TO_ARRAY and getattr(node.func.value, "id", "") in ("np", "torch"):
            found |= {a.id for a in node.args if isinstance(a, ast.Name)}
        for callee in callees(code, node) - {name, *above}:
            theirs = parameters(library()[callee])
            given = [*zip(theirs, node.args), *((k.arg, k.value) for k in node.keywords)]
            found |= {v.id for p, v in given if isinstance(v, ast.Name) and v.id in known and p in arrays(callee, (name, *above))}
    return found & set(known)


def explained(text, parameter):
    "What a docstring says about a parameter: name: ..., up to the next one or the end of the paragraph; else the sentences with the name in back-ticks."
    start = re.search(rf"(?:^|(?<=[.;:)] ))(?:`?\w+`?, )*`?{parameter}`?(?:, \w+)*: ", text, re.M)
    if not start:
        return "\n".join(s for s in sentences(text) if f"`{parameter}`" in s)
    rest = text[start.end() :]
    end = re.search(r"\n\n|(?:(?<=[.;] )|\n)(?:(?:\w+, )*\w+: |Returns |Raises |Source: )", rest)
    return rest[: end.start()] if end else rest


def has_shape(name, parameter, seen=()):
    "Whether a docstring gives shape and dtype of a parameter, or names a function that does: as for `ks_scan`."
    said = explained(PUBLIC[name], parameter)
    if SHAPE.search(said) and DTYPE.search(said):
        return True
    others = [re.escape(o.removeprefix("kslottery.")) for o in re.findall(r"\b(?:as|see)\b[^.`]*`([\w.]+)`", said)]
    return any(has_shape(c, parameter, (name, *seen)) for o in others for c in PUBLIC if re.search(rf"(^|\.){o}$", c) and c not in (name, *seen))


def test_every_array_has_a_shape_and_a_dtype():
    bare = []
    for name in PUBLIC.keys() - COMMANDS:
        fields = [
            f for f, kind in getattr(thing_of(name), "__annotations__", {}).items() if "ndarray" in str(kind) and "Callable" not in str(kind) and f != "return"
        ]
        for parameter in {*arrays(name), *fields}:
            if (name, parameter) not in NO_SHAPE and not has_shape(name, parameter):
                bare.append(f"kslottery.{name}: {parameter}")
        returned = getattr(thing_of(name), "__annotations__", {}).get("return", "")
        if "ndarray" in str(returned) and not (SHAPE.search(PUBLIC[name]) and DTYPE.search(PUBLIC[name])):
            bare.append(f"kslottery.{name}: what it returns")
    assert not bare, listed("give a shape such as (V, d) and a dtype, or a function that does (as for `ks_scan`)", bare)


# Sources

METHOD = (
    "ks",
    "criteria",
    "certificate",
    "tuning",
    "evaluation",
    "losses",
    "decomposition",
    "audit",
)  # statistics, trainings, scores: somebody's invention, be it ours
NO_METHOD = {
    "run": "notebooks and their reports", "doctor": "what is installed", "core": "files, fingerprints, progress", "checkpoints": "reading files; the test is that of ks", "data": "reading and writing out sentences", "babel": "a world of our own",
    "rows": "a mechanism, no method", "ticket": "a file format", "bank": "a mechanism, no method", "plots": "pictures of what other modules found", "cli": "commands",
}  # fmt: skip
PLUMBING = {  # functions of the first that hand on, look up or count
    "ks.map_rows", "tuning.active_ids", "tuning.trainable_parameters", "evaluation.get_extraction", "evaluation.signatures", "evaluation.prompt_fields", "evaluation.exact_match", "losses.ladder_sizes",
    "audit.split_template", "audit.judge", "decomposition.plot_decomposition",
}  # fmt: skip
YEAR = re.compile(r"\b(19|20)\d\d\b")


def test_every_method_says_where_it_comes_from():
    assert {*METHOD, *NO_METHOD} == set(MODULES), "a new module: does it hold methods?"
    mute = [
        f"kslottery.{n}"
        for n in PUBLIC
        if n.count(".") == 1 and n.split(".")[0] in METHOD and inspect.isfunction(thing_of(n)) and n not in PLUMBING and not source(n)
    ]
    assert not mute, listed("say where these come from (Source: a reference; the audit; this project)", mute)
    assert not [n for n in PLUMBING if n not in PUBLIC or source(n)], "not plumbing, or gone"


def test_references_stand_in_a_sentence_that_starts_with_source():
    loose = [
        f"kslottery.{n}: {s}"
        for n in PUBLIC.keys() - COMMANDS
        for s in sentences(PUBLIC[n])
        if YEAR.search(s) and not s.startswith("Source: ") and s not in source(n)
    ]
    assert not loose, listed("begin these with Source:", loose)


def source(name):
    "What a docstring says about where something comes from, to the end of the paragraph."
    found = re.search(r"(?:^|(?<=[.;] ))Source: (.+)", PUBLIC[name], re.M)
    return found[0] if found else ""


def test_the_rules_see_what_is_in_the_code():
    "Through private helpers, methods, tables and other modules."
    assert arrays("ks.ks_scan") == {"before", "after"} and arrays("tuning.partial_tune") == {"ids"} and arrays("data.load_pairs") == set()
    assert errors_of("checkpoints.scan_all") == {"ValueError", "TypeError", "FileNotFoundError"} and errors_of("evaluation.get_metric") >= {"ImportError"}
    assert errors_of("core.cache_dir") == set() and "FileExistsError" in errors_of("ticket.Ticket.save")
    assert stated("tuning.embed_tune") == {"ValueError"} and stated("core.cache_dir") == set()


THINGS = {f"{module}.{name}": thing for module, name, thing in exported()}


def thing_of(name):
    return THINGS[name]
