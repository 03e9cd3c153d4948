"""Odd input of six kinds: each must give a result or one sentence; no traceback, no bare Python message, no hang.

    python tests/fuzz.py --minutes 5 --seed 7                # all kinds
    python tests/fuzz.py --cases 100000 --jobs 2             # so many, over the kinds by their shares
    python tests/fuzz.py --seed 7 --kind tables --case 1234  # one case again, with its traceback
    python tests/fuzz.py --engine hypothesis --kind tickets  # the same generators, and hypothesis makes failures small

A case is drawn by a `random.Random` of its kind, the seed and its number. Cases run in forks of this process, hundreds
in each: what hangs, dies or takes too much memory ends its fork only, and is a failure of that case.
"""

import argparse
import contextlib
import fcntl
import gc
import gzip
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = map(str, (ROOT, ROOT / "tests", ROOT / "benchmarks"))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "0"}

import huggingface_hub.constants  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
import yaml  # noqa: E402
from safetensors.numpy import save as to_safetensors  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from conftest import TOY, tiny_model  # noqa: E402
from kslottery.certificate import certify_agreement  # noqa: E402
from kslottery.checkpoints import Checkpoint, scan_all, scan_checkpoints  # noqa: E402
from kslottery.cli import app  # noqa: E402
from kslottery.core import load_model, quiet_transformers  # noqa: E402
from kslottery.data import TEMPLATES, Pair, Prompt, encode, language_names, load_pairs  # noqa: E402
from kslottery.evaluation import Generation  # noqa: E402
from kslottery.ks import ks_scan  # noqa: E402
from kslottery.rows import TunedRows  # noqa: E402
from kslottery.ticket import Provenance, Selection, Ticket, versions  # noqa: E402
from kslottery.tuning import Recipe  # noqa: E402

HANG, MEMORY = 20.0, 3 * 2**30  # seconds for a case; bytes beyond what the fork starts with
ALLOWED = (ValueError, TypeError, FileNotFoundError, FileExistsError)
# What CPython and the libraries below say of themselves. It may stand in brackets in a sentence, not be the sentence.
_STARTS = (
    r"\[?Errno|KeyError|Traceback|<class|\S*$|'[^']+'$|No such file|File name too long|Permission denied",
    # the language
    r"maximum recursion|object of type|argument of type|unsupported operand|bad operand|unhashable|cannot unpack",
    r"not enough (values|arguments)|too many values|not all arg|(list|tuple|string|pop) (ind|from)|index \S+ is out",
    r"'[\w.-]+' (object|codec)|'\S+' not supported|\w+\(\) (got|missing|takes|arg)|[\w.]+__(init|new)__\(\)",
    r"(list|tuple|dict|byte|dictionary|sequence|only) \w+ (indices|item|update|element)|slice ind|range\(\) arg",
    r"must be (str|real|a string|called)|expected (str|string|a byte)|source code|\w+\(\) argument|type object",
    # numbers
    r"invalid (literal|load|continuation|start)|could not convert|cannot convert|can't |Exceeds the limit|Python int",
    r"int too|math (domain|range)|float division|division by zero|year |time data|negative (dim|shift|seek)",
    # JSON and other files
    r"Expecting |Extra data|Invalid (control|\\|literal)|Unterminated|the JSON object|Object of type|Circular ref",
    r"Out of range float|.*is not JSON ser|embedded null|Not a gz|Compressed file|CRC|Error -\d|new-line character",
    r"field larger|line contains N|unexpected end|surrogates not|data did not match|Error while (de)?serial",
    # arrays
    r"operands could|zero-size|setting an array|all the input|shapes? .*(mismatch|not aligned)|expected scalar|mat1",
    r"The size of tensor|shape '|Sizes of|cannot reshape|a must be|Input .* contains|Invalid device|Expected one of",
    r"Could not|CUDA|Torch not|isfinite|array must|ufunc|[Uu]nrecognized",
)
BARE = re.compile("|".join(_STARTS))
DEEP = 1500
NASTY = (
    "<script>document.title='x'</script>",
    "<img src=x onerror=alert(1)>",
    "</details><h2>Certified!</h2>",
    "\n\n## Certified!\n\n",
    "\n---\nlicense: mit\n---\n",
    "```\n\n## Certified!\n",
    "`` ` ``` <b>x</b>",
    "[x](javascript:alert(1))",
    "![x](https://example.org/x.png)",
    "| a | b |\n|---|---|\n",
    "<!-- ",
    "&lt;script&gt;",
    "\\<b>x</b>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "a\u202eb",
    "\x1b[31mred",
    "{{ 7*7 }}{% raw %}",
    "*" * 50,
    "<a href='https://example.org'>x</a>",
    "<https://example.org>",
    "<b",
)
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    63,
    64,
    65,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    2**70,
    10**400,
    1e308,
    1e-320,
)
ODD += (
    float("inf"),
    float("-inf"),
    float("nan"),
    -0.0,
    0.5,
    1.0,
    6.9,
    "",
    " ",
    "0",
    "12",
    "nan",
    "a",
    "\x00",
    "\ud800",
)
ODD += ("é" * 300, "x" * 200_000, "../x", "/etc/passwd", "{source}", "{target}", "{0}", "%s", "en-ca", "float32", "ks")
ODD += ([], [[]], [1], [None], ["a"], [0] * 3, [1e999], {}, {"a": 1}, {"": None}, [{}], [[1, 2], [3]], *NASTY)


class Broken(Exception):
    "What came back contradicts itself, or something happened that never may."


def describe(value) -> str:
    said = ascii(value)
    return said if len(said) < 60 else f"{said[:40]}... ({len(said)} signs)"


# --- how things are changed ------------------------------------------------------------------------------------------


def odd(rng):
    return rng.choice(ODD)


def rarely(rng, chance):
    "For what takes seconds: hypothesis, which likes the ends of a range, never does it."
    return type(rng) is random.Random and rng.random() < chance


def _places(value, here=()):
    found, todo = [], [(value, here)]
    while todo and len(found) < 400:
        one, at = todo.pop()
        found.append(at)
        inner = one.items() if isinstance(one, dict) else enumerate(one[:4]) if isinstance(one, list) else ()
        todo += [(v, (*at, k)) for k, v in inner]
    return found


def _at(value, place):
    for step in place:
        value = value[step]
    return value


def change_json(rng, value):
    "Change one place of a JSON value; the value and what was done."
    if not isinstance(value, dict | list) or not value or rng.random() < 0.03:
        new = odd(rng)
        return new, f"all of it = {describe(new)}"
    value = json.loads(json.dumps(value))
    place = rng.choice([p for p in _places(value) if p])
    within, key = _at(value, place[:-1]), place[-1]
    old, name = within[key], ".".join(map(str, place))
    how = rng.choice(("odd", "odd", "odd", "delete", "add", "retype", "number", "repeat", "swap", "nest"))
    if how == "delete":
        del within[key]
        return value, f"{name} deleted"
    if how == "add":
        new = odd(rng)
        if isinstance(within, list):
            within.insert(rng.randrange(len(within) + 1), new)
        else:
            within[rng.choice(("", "extra", "__class__", "id", "schema_version", "rows"))] = new
        return value, f"beside {name}: {describe(new)}"
    new = {
        "odd": lambda: odd(rng),
        "retype": lambda: rng.choice(
            (str(old), [old], {"a": old}, bool(old), [*old] if isinstance(old, dict | str) else 1)
        ),
        "number": lambda: old + rng.choice((-1, 1, 0.5, 1000, -1000)) if isinstance(old, int | float) else odd(rng),
        "repeat": lambda: old * 2 if isinstance(old, list | str) else [old, old],
        "swap": lambda: _at(value, rng.choice(_places(value))),
        "nest": lambda: [old],
    }[how]()
    within[key] = json.loads(json.dumps(new))
    return value, f"{name} = {describe(new)}"


def change_bytes(rng, whole):
    "Change bytes; the bytes and what was done."
    a, b = sorted((rng.randrange(len(whole) + 1), rng.randrange(len(whole) + 1)))
    b = min(b, a + rng.choice((1, 2, 8, 100, 10**6)))
    ways = {
        "cut at": lambda: whole[:a],
        "without": lambda: whole[:a] + whole[b:],
        "noise at": lambda: whole[:a] + rng.randbytes(rng.randrange(1, 6)) + whole[b:],
        "a bit at": lambda: (
            whole[:a] + bytes([whole[a] ^ (1 << rng.randrange(8))]) + whole[a + 1 :] if a < len(whole) else b""
        ),
        "twice": lambda: whole[:b] + whole[a:],
        "empty": lambda: b"",
        "NUL at": lambda: whole[:a] + b"\0" + whole[a:],
        "bare CR at": lambda: whole[:a] + b"\r" + whole[a:],
        "CRLF": lambda: whole.replace(b"\n", b"\r\n"),
        "all CR": lambda: whole.replace(b"\n", b"\r"),
        "mark": lambda: b"\xef\xbb\xbf" + whole,
        "UTF-16": lambda: whole.decode("latin-1").encode("utf-16"),
        "not UTF-8 at": lambda: whole[:a] + rng.choice((b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe9")) + whole[a:],
        "a quote at": lambda: whole[:a] + b'"' + whole[a:],
        "a tab at": lambda: whole[:a] + b"\t" + whole[a:],
        "separator at": lambda: whole[:a] + rng.choice(("\u2028", "\x85", "\x0b", "\x1c")).encode() + whole[a:],
        "long at": lambda: whole[:a] + b"y" * rng.choice((131_073, 1_000_000)) + whole[a:],
        "digits at": lambda: whole[:a] + b"9" * 5000 + whole[a:],
        "deep": lambda: rng.choice((b"[", b'{"a":')) * rng.choice((DEEP, 200_000)),
        "surrogate at": lambda: whole[:a] + b"\\ud800" + whole[a:],
    }
    name = rng.choice(list(ways))
    return ways[name](), f"{name} {a}" + (f":{b}" if name in ("without", "noise at") else "")


def change_tensors(rng, whole):
    "Change a safetensors file: its arrays, its header, or what the header claims."
    from safetensors.numpy import load

    size = int.from_bytes(whole[:8], "little")
    if rng.random() < 0.5:
        header, said = change_json(rng, json.loads(whole[8 : 8 + size]))
        text = json.dumps(header).encode()
        claimed = rng.choice((len(text), len(text), len(text), 0, len(text) + 7, 2**40, 2**63))
        return claimed.to_bytes(8, "little") + text + whole[8 + size :], f"header: {said}, {claimed - len(text):+} long"
    try:
        arrays = load(whole)
        about = json.loads(whole[8 : 8 + size]).get("__metadata__")
        name = rng.choice(sorted(arrays))
    except Exception:  # it was changed before
        return change_bytes(rng, whole)
    old = arrays[name]
    kind = rng.choice((np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_, np.float32))
    shape = rng.choice(((), (0,), (1,), (64,), (0, 16), (64, 0), (1, 1), (63, 16), (64, 15), (2, 2, 2), (64, 16, 1)))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new, said = rng.choice(
            (
                (old.astype(kind), f"as {kind.__name__}"),
                (np.zeros(shape, old.dtype), f"zeros of {shape}"),
                (old[:-1], "one short") if old.ndim else (old, "as it was"),
                (old[::-1], "reversed"),
                (old + 1, "plus 1"),
                (np.zeros_like(old), "all 0"),
                (-old if old.dtype.kind == "f" else old, "negative"),
                (
                    np.full_like(old, rng.choice((np.nan, np.inf)) if old.dtype.kind == "f" else 2**62),
                    "not finite, or huge",
                ),
                (old.reshape(-1), "flat"),
                (None, "left out"),
            )
        )
    arrays = {n: a for n, a in arrays.items() if n != name} | ({} if new is None else {name: np.ascontiguousarray(new)})
    if rng.random() < 0.2:
        arrays |= {rng.choice(("extra", "model.embed_tokens.weight", "lm_head.weight")): np.ones((64, 16), np.float32)}
        said += ", one more"
    return to_safetensors(arrays, about), f"{name} {said}"


def change_file(rng, files, name):
    "Change one of some files, a dictionary from name to bytes; None stands for one that is a folder, a link or a pipe."
    if rng.random() < 0.04:
        new = rng.choice(("missing", "folder", "loop", "link to /etc/passwd", *["pipe"] * rarely(rng, 0.05)))
        files[name] = new
        return f"{name}: {new}"
    whole = files.get(name, b"")
    if not isinstance(whole, bytes):
        return f"{name}: {whole}"
    way = change_bytes
    if name.endswith(".safetensors") and rng.random() < 0.7 and len(whole) > 8:
        way = change_tensors
    elif name.endswith(".json") and rng.random() < 0.85:
        with contextlib.suppress(Exception):  # it was changed before
            value, said = change_json(rng, json.loads(whole))
            files[name] = json.dumps(value).encode()
            return f"{name}: {said}"
    with contextlib.suppress(Exception):
        files[name], said = way(rng, whole)
        return f"{name}: {said}"
    files[name], said = change_bytes(rng, whole)
    return f"{name}: {said}"


def put(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "loop":
            path.symlink_to(path.name)
        elif content == "pipe":
            os.mkfifo(path)
        elif content.startswith("link"):
            path.symlink_to("/etc/passwd")


def some(rng, most=4):
    "How many changes: mostly one."
    return rng.choice((1, 1, 1, 1, 2, 2, 3, most))


# --- the fixtures ----------------------------------------------------------------------------------------------------


def toy_ticket(model, name="base", ids=(9, 4)):
    "A ticket with everything that one can hold."
    embed = TunedRows(range(3, 12), torch.randn(9, 16, generator=torch.Generator().manual_seed(0)))
    pairs = [Pair(f"x:{n}", f"t{n} t5", "t7") for n in range(20, 23)]
    facts = Provenance.of(model, TOY, ids, selection=Selection(), prompt=Prompt("{source} t8 {target}", "en-ca"))
    origin = {"data": "pairs.tsv", "languages": None, "limit": 3}
    more = dict(recipe=Recipe(lr_embed=1e-3), generation=Generation(4, 1, 4), counts=(3, 4), train=origin, test=origin)
    ticket = Ticket(
        ids,
        replace(facts, model=name, license="mit", base_model="owner/name", **more),
        embed.restrict(ids),
        embed,
        ks_scan(model.get_input_embeddings().weight, embed.matrix(model)),
        tuple(one for pair in pairs for one in (pair.hash, pair.loose)),
    )
    ticket.certificates = [certify_agreement(np.zeros(60), 0.05, epsilon=0.2, vouched=True)]
    ticket.audit = {
        "verdict": "content",
        "sentence": "The gain is content.",
        "report": "# Audit\n\n| a | b |\n|---|---|\n",
    }
    return ticket


def world(room):
    "A base, a tuned copy, tickets, an adapter and data, in a folder."
    base, tuned = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        tuned.get_input_embeddings().weight[torch.tensor([9, 4])] += 1.0
    for name, model in (("base", base), ("tuned", tuned)):
        with quiet_transformers():
            model.save_pretrained(room / name)
            TOY.save_pretrained(room / name)
    toy_ticket(base).save(room / "ticket")
    scan_checkpoints(room / "base", room / "tuned").ticket().save(room / "bare")
    toy_ticket(base).save_peft(room / "adapter")
    toy_ticket(base).save_peft(room / "lora", "lora", model=base, tokenizer=TOY)
    lines = [f"t{i} t5\tt7 t{i}" for i in range(20, 28)]
    (room / "pairs.tsv").write_text("\n".join(["source\ttarget", *lines]) + "\n")
    (room / "fresh.tsv").write_text("\n".join(["source\ttarget", *(line.replace("t5", "t6") for line in lines)]) + "\n")
    return base


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


class Kind:
    "What can be changed, in how many ways; `case` gives what was done and a function that must keep the contract."

    def __init__(self, room):
        self.room = room
        self.base = world(room)
        self.prepare()

    def prepare(self):
        pass


class Tickets(Kind):
    def prepare(self):
        self.files = [contents(self.room / name) for name in ("ticket", "ticket", "bare")]
        old = ROOT / "tests" / "fixtures" / "ticket-0.1"
        self.files += [contents(old)] * old.is_dir()
        self.model = tiny_model("llama")
        put(self.room / "plain" / "t", self.files[0])
        self.use(self.room / "plain", True)  # unchanged it works, and every fork has what is imported late

    def case(self, rng, here):
        files = dict(rng.choice(self.files))
        read = [n for n in files if not n.startswith(("README", "adapter"))]
        names = [rng.choice(["ticket.json"] * 3 + read) for _ in range(some(rng))]
        done = [change_file(rng, files, name) for name in names]
        put(here / "t", files)
        return done, partial(self.use, here, rng.random() < 0.3)

    def use(self, here, wholly):
        ticket = Ticket.load(here / "t")
        facts, ids = ticket.provenance, ticket.ids
        for holds, what in (
            (ids.dtype == np.int64 and ids.ndim == 1, f"ids are {ids.dtype} of {ids.shape}"),
            (all(0 <= i < facts.V for i in ids) and len({*ids.tolist()}) == len(ids), f"ids are {ids}"),
            (ticket.rows is None or sorted(ids) == ticket.rows.ids.tolist(), "rows of other ids"),
            (all(r is None or r.weight.shape[1] == facts.d for r in (ticket.rows, ticket.embed_rows)), "width"),
            (ticket.scan is None or np.shape(ticket.scan.statistic) == (facts.V,), "scan of another length"),
            (
                ticket.scan is None or ticket.scan.d == facts.d,
                f"scan of d = {getattr(ticket.scan, 'd', 0)}, not {facts.d}",
            ),
            (re.fullmatch("[0-9a-f]{64}", str(facts.fingerprints.get("embedding"))), "no fingerprint"),
            (all(type(n) is int and n >= 0 for n in facts.counts or ()), f"counts are {facts.counts}"),
            (type(facts.changed) in (int, type(None)) and not 0 > (facts.changed or 0), f"changed is {facts.changed}"),
            (all(r is None or r.weight.isfinite().all() for r in (ticket.rows, ticket.embed_rows)), "rows not finite"),
            (all(isinstance(v, str) for v in (*facts.versions, *facts.versions.values())), "versions are no text"),
            (all(_sane(c) for c in ticket.certificates), "a certificate with fields that none has"),
        ):
            if not holds:
                raise Broken(f"a ticket loads that contradicts itself: {what}")
        if wholly:
            repr(ticket), ticket._repr_html_(), ticket.advice, ticket.to_frame()
            [(str(c), c.markdown(), c.to_json()) for c in ticket.certificates]
            ticket.card()
            ticket.save(here / "again")
            again = Ticket.load(here / "again")
            if again.ids.tolist() != ids.tolist() or again.provenance != facts:
                raise Broken("a ticket that was saved and loaded is another")
            if ticket.peft_obstacle is None:
                ticket.save_peft(here / "adapter")
            for name in ("prompt", "recipe"):
                with contextlib.suppress(ValueError):
                    getattr(ticket, name)
            ticket.check(self.model, TOY)


def _sane(c):
    kinds = (str, str, bool, float | int | None, float | int, int, str, tuple, bool, int | None, tuple, dict)
    return all(isinstance(v, k) for v, k in zip(vars(c).values(), kinds)) and all(
        isinstance(a, str) for a in c.assumptions
    )


class Tables(Kind):
    def prepare(self):
        pairs = [(f"The cat no. {n} sat.", f"El gat núm. {n} seia.") for n in range(12)]
        tsv = lambda head: "\n".join([*head, *("\t".join(p) for p in pairs)]) + "\n"
        rows = lambda make: "".join(json.dumps(make(a, b), ensure_ascii=False) + "\n" for a, b in pairs)
        self.texts = {
            "tsv": [tsv(["source\ttarget"]), tsv(["en\tca"]), tsv([])],
            "jsonl": [
                rows(lambda a, b: {"source": a, "target": b}),
                rows(lambda a, b: {"translation": {"en": a, "ca": b}}),
                rows(lambda a, b: {"id": "1", "prompt": a, "completion": b}),
            ],
            "txt": ["\n".join(a for a, _ in pairs), "\n".join(b for _, b in pairs)],
        }

    def case(self, rng, here):
        here.mkdir()
        kind = rng.choice(("tsv", "tsv", "jsonl", "jsonl", "txt"))
        text, packed = rng.choice(self.texts[kind]), rng.random() < 0.25
        done, whole = [f"{kind}{'.gz' * packed} {text[:24]!r}"], text.encode()
        for _ in range(some(rng)):
            if kind == "jsonl" and rng.random() < 0.6:
                lines = whole.decode("utf-8", "replace").split("\n")
                n = rng.randrange(len(lines))
                with contextlib.suppress(Exception):
                    value, said = change_json(rng, json.loads(lines[n]))
                    lines[n] = json.dumps(value)
                    whole = "\n".join(lines).encode("utf-8", "surrogatepass")
                    done.append(f"line {n + 1}: {said}")
                continue
            whole, said = change_bytes(rng, whole)
            done.append(said)
        if packed:
            whole = gzip.compress(whole, 1)
            if rng.random() < 0.5:
                whole, said = change_bytes(rng, whole)
                done.append(f"packed: {said}")
            if rarely(rng, 0.001):
                whole = gzip.compress(b"t1\tt2\n" + b"x" * 2**26) * 64
                done.append("4 GB packed")
        names = [f"data.{kind}" + ".gz" * packed]
        if kind == "txt" or rng.random() < 0.05:
            names += [rng.choice(("other.txt", "missing.txt", names[0]))]
            (here / "other.txt").write_text(rng.choice(self.texts["txt"]))
        put(here, {names[0]: "folder" if rarely(rng, 0.002) else whole})
        data = rng.choice((",".join(str(here / n) for n in names), [here / n for n in names]))
        if rarely(rng, 0.02):
            data = rng.choice(
                ("", ",", "a,b,c", str(here), "~nosuchuser/x.tsv", "a\0.tsv", "x" * 5000 + ".tsv", "/dev/null,")
            )
            done = [f"data = {describe(data)}"]
        languages = rng.choice((*[None] * 6, *["en-ca"] * 2, "source-target", *map(str, (odd(rng),))))
        limit = rng.choice((*[None] * 8, *[1] * 3, *[5] * 3, 0, -1, 2**70))
        return [*done, f"languages = {describe(languages)}, limit = {limit}"], partial(self.use, data, languages, limit)

    def use(self, data, languages, limit):
        pairs = load_pairs(data, languages, limit)
        if not pairs or (limit is not None and len(pairs) > limit):
            raise Broken(f"{len(pairs)} pairs for a limit of {limit}")
        for pair in pairs:
            if not all(isinstance(side, str) and side.strip() for side in pair):
                raise Broken(f"a pair without two texts: {describe(pair)}")
            pair.hash, pair.loose  # noqa: B018
        json.dumps(pairs.origin)
        for pair in pairs[:2]:
            if len(pair.source) + len(pair.target) < 10_000:
                encode(TOY, Prompt(), pair)


class Templates(Kind):
    PIECES = (
        "{source}",
        "{target}",
        "{source_language}",
        "{target_language}",
        "\n",
        "\\n",
        " ",
        "{",
        "}",
        "{x}",
        "t1",
        "é",
    )
    PIECES += ("\ue000", "\ud800", "\0", "{{", "}}", "{source!r}", "t63", "{ source }", *NASTY[:6])
    CHAT = (
        "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<bot>",
        "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}",
        "{{ messages[1].content }}",
        "{{ messages[0]['content'] }}{{ messages[0]['content'] }}",
        "{{ raise_exception('no') }}",
        "{% for m in %}",
        "{{ nothing.here }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 'x' * 10**5 }}{{ messages[0].content }}",
        "{{ messages }}",
        "",
        "constant",
    )

    def case(self, rng, here):
        text = "".join(rng.choice(self.PIECES) for _ in range(rng.randrange(8)))
        template = rng.choice((*TEMPLATES, text, text + "{source}" + text[:3] + "{target}", text + "{source} {target}"))
        languages = rng.choice(("-", "en-", "a-b-c", text, *map(str, (odd(rng),))))
        if rng.random() < 0.85:
            languages = rng.choice((None, "en-ca", "en-ca", "Aldan-Borel"))
        word = lambda: " ".join(
            rng.choice(("t5", "t6", "é", "t63", "\0", "\ud800", "😀", "{target}", "x" * 5000)) for _ in "abc"
        )
        sound = ("t5 t6", "t7")
        pair = Pair("x:1", *rng.choice((sound, sound, sound, ("t5", ""), ("", "t7"), (word(), word()), (word(), "t5"))))
        chat = rng.choice(self.CHAT) if rng.random() < 0.3 else None
        record = rng.random() < 0.2
        done = [f"template = {describe(template)}, languages = {describe(languages)}, pair = {describe(pair[1:])}"]
        if record:
            whole, said = change_json(rng, Prompt("explicit", "en-ca").as_dict())
            return [f"Prompt.from_dict: {said}"], partial(self.read, whole, pair)
        return done + [f"chat = {chat}"] * (chat is not None), partial(self.use, template, languages, pair, chat)

    def read(self, whole, pair):
        if isinstance(whole, dict):
            self.encoded(Prompt.from_dict(whole), pair)

    def use(self, template, languages, pair, chat):
        if chat is not None:
            template = "chat"
        TOY.chat_template = chat
        if languages is not None:
            language_names(languages)
        self.encoded(Prompt(template, languages), pair)

    def encoded(self, prompt, pair):
        prompt.text, prompt.names  # noqa: B018
        if Prompt.from_dict(json.loads(json.dumps(prompt.as_dict()))) != prompt:
            raise Broken("a prompt that was written and read is another")
        made = encode(TOY, prompt, pair)
        if not len(made.ids) == len(made.labels) == len(made.roles) or made.labels[made.prompt] == -100:
            raise Broken(f"an example of {len(made.ids)} ids, {len(made.labels)} labels, {len(made.roles)} roles")


class Checkpoints(Kind):
    def prepare(self):
        self.files = {name: contents(self.room / name) for name in ("base", "tuned", "adapter", "lora")}
        self.evil = b"import os\nopen(os.environ['KSLOTTERY_FUZZ_RAN'], 'w').close()\n"
        config = json.loads(self.files["base"]["config.json"])
        own = {
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Model",
            "AutoTokenizer": ["evil.Tok", "evil.Tok"],
        }
        self.evils = [{"config.json": {**config, "auto_map": own, "model_type": rng}} for rng in ("evil", "llama")] + [
            {"tokenizer_config.json": {"auto_map": own, "tokenizer_class": "EvilTokenizer"}}
        ]
        for what in ("load", "open", "all", "scan"):  # unchanged it works, and every fork has what is imported late
            self.use(self.room, "base", what, dict(criterion="ks", tensor=None, round=False, device=None, counts=None))
        for name in ("adapter", "lora"):
            Ticket.from_peft(self.room / name, self.base, TOY)

    def case(self, rng, here):
        if rng.random() < 0.15:
            name = rng.choice(("adapter", "lora"))
            files = dict(self.files[name])
            done = change_file(rng, files, rng.choice(sorted(files)))
            put(here / name, files)
            return [f"{name}/{done}"], partial(Ticket.from_peft, here / name, self.base, TOY)
        base, tuned = dict(self.files["base"]), dict(self.files["tuned"])
        which, done = rng.choice((base, tuned, base)), []
        for _ in range(some(rng)):
            if rng.random() < 0.15:
                places = rng.choice(
                    (
                        *({}, [], {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": ["a"]}),
                        *(
                            {"weight_map": {"a": v}}
                            for v in (1, None, "../other.safetensors", "/etc/passwd", "", ".", "x\0y")
                        ),
                        *(
                            {"weight_map": {"a": v}}
                            for v in ("../tuned/model.safetensors", "config.json", ["a"], "sub/../a")
                        ),
                    )
                )
                which["model.safetensors.index.json"] = json.dumps(places).encode()
                done.append(f"index: {places}")
            elif rng.random() < 0.1:
                which |= {"evil.py": self.evil}
                which |= {n: json.dumps(v).encode() for n, v in rng.choice(self.evils).items()}
                done.append("with code of its own")
            else:
                name = rng.choice([*["model.safetensors"] * 4, "config.json", "config.json", *which])
                done.append(change_file(rng, which, name))
                if name == "model.safetensors" and rng.random() < 0.4:  # in both: they are compared
                    (tuned if which is base else base)[name] = which[name]
                    done[-1] += " (both)"
        put(here / "base", base)
        put(here / "tuned", tuned)
        how = dict(
            criterion=rng.choice(
                ("ks", "ks", "ks", "l2", "relative", "max", "wasserstein", "sign", "lota", "frequency")
            ),
            tensor=rng.choice(
                (None, None, None, "lm_head.weight", "model.norm.weight", "", "model.embed_tokens.weight", "no")
            ),
            round=rng.random() < 0.3,
            device=rng.choice((*[None] * 8, "auto", "cpu", "cpu", "cuda", "x", "")),
            counts=rng.choice((*[None] * 6, *[[1] * 64] * 6, [1], [[1]], ["a"], [-1] * 64, [1e300] * 64, {}, 5)),
        )
        what = rng.choice(("scan", "scan", "scan", "all", "load", "open"))
        return [*done, f"{what} {how}"], partial(self.use, here, "base" if which is base else "tuned", what, how)

    def use(self, here, name, what, how):
        if what == "load":
            return load_model(here / name, device="cpu")
        if what == "open":
            opened = Checkpoint(here / name)
            for tensor in opened.names:
                opened[tensor].shape  # noqa: B018
            return opened.tied, opened.tokenizer()
        if what == "all":
            return scan_all(here / "base", here / "tuned", round=how["round"])
        ticket = scan_checkpoints(here / "base", here / "tuned", **how).ticket(top_k=2)
        ticket.save(here / "t")
        if Ticket.load(here / "t").ids.tolist() != ticket.ids.tolist():
            raise Broken("the ticket of a scan that was saved and loaded is another")


class Page(HTMLParser):
    "What a reader's browser would make of a page: tags, attributes, headings."

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.links, self.headings, self.level = Counter(), [], [], None
        self.strange = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        for name, value in attributes:
            if name in ("href", "src"):
                self.links.append((tag, value or ""))
            elif (tag, name) not in (
                ("code", "class"),
                ("th", "style"),
                ("td", "style"),
                ("img", "alt"),
                ("ol", "start"),
            ):
                self.strange.append(f"<{tag} {name}=>")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append([tag, ""])
            self.level = self.headings[-1]

    def handle_endtag(self, tag):
        if re.fullmatch("h[1-6]", tag):
            self.level = None

    def handle_data(self, data):
        if self.level:
            self.level[1] += data

    def handle_comment(self, data):
        self.strange.append("a comment")


@cache
def markdown():
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable("table")


class Cards(Kind):
    OWN = {
        "a",
        "blockquote",
        "br",
        "code",
        "details",
        "em",
        "h1",
        "h2",
        "h3",
        "hr",
        "img",
        "li",
        "ol",
        "p",
        "pre",
        "strong",
    }
    OWN |= {"summary", "table", "tbody", "td", "th", "thead", "tr", "ul"}
    HEADINGS = ["How it was made", "Scores, controls and verdict", "Certificates", "Licence and citation"]
    FACTS = (
        "model",
        "base_model",
        "license",
        "revision",
        "tensor",
        "tuned",
        "embedding_module",
        "output_module",
    )

    def prepare(self):
        self.ticket = toy_ticket(self.base)

    def case(self, rng, here):
        ticket = replace(self.ticket, certificates=list(self.ticket.certificates), audit=dict(self.ticket.audit))
        text = lambda: "".join(rng.choice((*NASTY, "plain", " ")) for _ in range(rng.choice((1, 1, 2, 4))))
        done, report, figures = [], False, []
        for _ in range(some(rng)):
            place, said = (
                rng.choice((*self.FACTS, "tokens", "template", "languages", "versions", "certificate", "audit")),
                text(),
            )
            facts = ticket.provenance
            if place in self.FACTS:
                ticket.provenance = replace(facts, **{place: said})
            elif place == "tokens":
                ticket.provenance = replace(facts, tokens=(said, "t4"))
            elif place == "versions":
                ticket.provenance = replace(facts, versions={"kslottery": said, said: said})
            elif place in ("template", "languages"):
                languages = said.replace("-", "") + "-ca" if place == "languages" else "en-ca"
                form = said.replace("{", "") + "{source}{target}" if place == "template" else "{source}{target}"
                with contextlib.suppress(ValueError):  # no prompt has it, and so no card
                    ticket.provenance = replace(facts, prompt=Prompt(form, languages))
            elif place == "certificate":
                place = rng.choice(("claim", "unit", "assumptions", "kind", "facts"))
                new = (said,) if place == "assumptions" else {said: said, "loss": said} if place == "facts" else said
                ticket.certificates = [replace(c, **{place: new}) for c in ticket.certificates]
            else:
                place = rng.choice(("sentence", "report", "verdict", "decomposition", "figure"))
                report |= place == "report"
                figures += [said] if place == "figure" else []
                ticket.audit[place] = {"metric": said} if place == "decomposition" else said
            done.append(f"{place} = {describe(said)}")
        return done, partial(self.use, ticket, report, figures)

    def use(self, ticket, report, figures):
        text = ticket.card(figures)
        header, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()  # as the Hub takes it apart
        try:
            about = yaml.safe_load(header)
        except yaml.YAMLError:
            about = {}
        if about.get("license") != ticket.provenance.license or about.get("library_name") != "peft":
            raise Broken("the card's header is another than its ticket says")
        page = Page(markdown().render(body))
        strange = [*({*page.tags} - self.OWN), *page.strange]
        strange += [
            f"{tag} {to[:40]}" for tag, to in page.links if re.match(r"\s*(javascript|data|vbscript):", to, re.I)
        ]
        strange += [f"image {to[:40]}" for tag, to in page.links if tag == "img" and "//" in to]
        strange += [
            f"link {to[:40]}" for t, to in page.links if t == "a" and not to.startswith("https://arxiv.org/abs/2402.")
        ]
        if page.tags["details"] != len(ticket.certificates):
            strange.append("details")
        if strange:
            raise Broken(
                f"{'the report in ' * report}the card holds what is not its own: {', '.join(map(str, strange[:3]))}"
            )
        found = [words for tag, words in page.headings if tag == "h2"]
        if found != self.HEADINGS and not report:
            raise Broken(f"the card's headings are {describe(found)}")


class Options(Kind):
    VALUES = (
        "",
        " ",
        "-1",
        "0",
        "1",
        "2",
        "0.5",
        "1e999",
        "nan",
        "inf",
        "-inf",
        "9" * 30,
        "9" * 5000,
        "x",
        "é",
        "😀",
        "\ud800",
    )
    VALUES += (
        "a\x00b",
        "a\nb",
        "\x1b[31m",
        "none",
        "null",
        "true",
        "auto",
        "cpu",
        "cuda",
        "cuda:99",
        "meta",
        "ks",
        "l2",
        "bh",
    )
    VALUES += (
        "frequency",
        "exact",
        "tokens",
        "quality_shortfall",
        "transfer",
        "tuning",
        "en-ca",
        "explicit",
        "chat",
        "bleu",
    )
    VALUES += (
        "chrf",
        "spbleu",
        "{source} {target}",
        "{source}",
        "small",
        "quickstart",
        "seed=1",
        "seed",
        "=",
        "seed=x",
        "out=o",
    )
    VALUES += (
        ".",
        "..",
        "new",
        "new/deep/er",
        "base",
        "ticket",
        "bare",
        "adapter",
        "pairs.tsv",
        "fresh.tsv",
        "missing",
        "~",
    )
    VALUES += (
        "~nosuchuser",
        "~nosuchuser/x",
        "/",
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "/dev/null/x",
        "strange",
        "empty",
    )
    VALUES += (
        "odd.json",
        "odd.txt",
        "odd.bin",
        "nb.ipynb",
        "pairs.tsv,fresh.tsv",
        "a" * 300,
        "a/" * 3000,
        "x" * 70_000,
        "owner/name",
    )
    VALUES += (
        "--help",
        "--",
        "-",
        "-x",
        "a,b",
        ",",
        "ticket/ticket.json",
        "link",
        "loop",
        "pairs.tsv/x",
        "a:b:c",
        *NASTY[:3],
    )
    WORDS = {
        "scan": ["base", "tuned", "--out", "new"],
        "certify": ["ticket", "--calibration", "fresh.tsv", "--epsilon", "0.5", "--vouched"],
        "audit": ["ticket", "--train", "none", "--test", "fresh.tsv", "--fast", "--samples", "20"],
        "merge": ["ticket", "--out", "new"],
        "peft": ["ticket", "--out", "new"],
        "card": ["ticket"],
        "babel": ["--out", "new"],
        "stops": ["base", "--data", "pairs.tsv", "--limit", "2"],
        "run": ["nb.ipynb"],
        "doctor": [],
    }

    def prepare(self):
        self.command, self.runner = typer.main.get_command(app), CliRunner()
        typer.testing._get_command = lambda app: self.command  # it is made anew for every call, in 20 ms
        cell = dict(cell_type="code", id="a", execution_count=None, outputs=[], source="seed = 0\nout = 'runs'")
        book = dict(cells=[cell | {"metadata": {"tags": ["parameters"]}}], metadata={}, nbformat=4, nbformat_minor=5)
        (self.room / "nb.ipynb").write_text(json.dumps(book))
        (self.room / "home").mkdir()
        os.environ |= {"HOME": str(self.room / "home"), "KSLOTTERY_CACHE": str(self.room / "cache")}
        base = self.room / "base"

        def build(folder, seed, **more):  # in place of a minute of training
            shutil.copytree(base, folder, dirs_exist_ok=True)
            for name in ("train", "dev", "test", "calibration"):
                (folder / f"{name}.jsonl").write_text('{"source": "t1", "target": "t2"}\n')
            (folder / "babel.json").write_text('{"parameters": 1}')

        import matplotlib.pyplot  # noqa: F401

        import kslottery.audit
        import kslottery.babel
        import kslottery.checkpoints
        import kslottery.cli

        kslottery.babel._build = build
        kslottery.checkpoints.png = kslottery.audit.png = lambda *a, **k: b"png"  # seconds of drawing
        kslottery.cli.execute = lambda path, executed, chosen: shutil.copy(
            path, executed
        )  # a kernel is another process
        self.lay(self.room / "plain")
        for name, words in self.WORDS.items():  # unchanged they work, and every fork has what is imported late
            with contextlib.chdir(self.room / "plain"):
                done = self.runner.invoke(app, [name, *words])
            if done.exit_code > (name == "stops"):  # whose 1 says that a fault was found
                raise RuntimeError(f"{name} does not even work: {done.stderr}")
            shutil.rmtree(self.room / "plain" / "new", ignore_errors=True)
        self.json = [
            b"[]",
            b"{}",
            b"null",
            b"[1]",
            b'["a"]',
            b"[[1, 2]]",
            b'{"a": 1}',
            b"[" * DEEP,
            b"[1e999]",
            b"",
            b"9" * 5000,
        ]
        self.json += [
            json.dumps([1] * 64).encode(),
            b"\xff\xfe",
            b'"',
            b"seed: 1",
            b"- a",
            b"a: &a [*a]",
            b"seed: !!python/x 1",
        ]

    def lay(self, here):
        here.mkdir()
        for name in ("base", "tuned", "adapter", "pairs.tsv", "fresh.tsv", "nb.ipynb"):
            (here / name).symlink_to(self.room / name)
        for name in ("ticket", "bare"):
            shutil.copytree(self.room / name, here / name)

    def case(self, rng, here):
        self.lay(here)
        put(here / "strange", {"thesis.tex": b"mine"})
        (here / "empty").mkdir()
        content = rng.choice(self.json)
        put(here, {"odd.json": content, "odd.txt": content, "odd.bin": rng.randbytes(50), "loop": "loop"})
        (here / "link").symlink_to("empty")
        name = rng.choice([*self.WORDS, "scan", "certify", "certify", "audit", "merge"])
        words = list(self.WORDS[name])
        if name == "certify" and rng.random() < 0.3:
            words = ["--plan", "--epsilon", "0.1", "--sd", "0.2"]
        options = [p for p in self.command.commands[name].params if p.param_type_name == "option"]
        for _ in range(some(rng)):
            if words and rng.random() < 0.3:
                at = rng.randrange(len(words))
                if rng.random() < 0.8:
                    words[at] = rng.choice(self.VALUES)
                else:
                    del words[at]
            else:
                option = rng.choice(options)
                flag = rng.choice(option.opts)
                words += [flag] if option.is_flag else [flag, rng.choice(self.VALUES)]
        if rng.random() < 0.2:
            words.append("--json")
        done = [f"{name} {' '.join(describe(w) for w in words)}"]
        return done + [f"odd.* = {content[:30]}"] * any("odd." in w for w in words), partial(
            self.use, here, [name, *words]
        )

    def use(self, here, words):
        os.chdir(here)
        before = self.listing(here)
        done = self.runner.invoke(app, words)
        os.chdir(self.room)
        error = done.exception
        if error is not None and not isinstance(error, SystemExit):
            raise error
        said = [line for line in done.stderr.split("\n") if line.strip()]
        if done.exit_code not in (0, 1, 2):
            raise Broken(f"exit status {done.exit_code}")
        found = words[0] == "stops" and done.exit_code == 1 and done.stdout.strip()  # an answer, as that of a test
        if done.exit_code == 0 or found:
            if words[-1] == "--json" and words[-2][:2] != "--" and "--help" not in words:
                with contextlib.suppress(ValueError):
                    json.loads(done.stdout)
                    return
                raise Broken("--json gave no JSON")
            return
        if not any(line.startswith("kslottery: ") for line in said):
            if done.exit_code == 2 and "Error" in done.stderr or words[0] == "doctor":  # the words themselves
                return
            raise Broken(f"exit status {done.exit_code} without a sentence: {describe(done.stderr)}")
        if not said[-1].startswith("kslottery: "):
            raise Broken(f"more than one line: {describe(said[-1])}")
        self.told = said[-1].removeprefix("kslottery: ")
        wrote = self.listing(here) ^ before
        if wrote and done.exit_code == 2 and not {"audit", "--until"} & {*words}:
            raise Broken(f"it was refused and yet wrote or removed {sorted(wrote)[:3]}")
        raise ValueError(self.told)

    def listing(self, here):
        return {str(p.relative_to(here)) for p in here.rglob("*")}


KINDS = {k.__name__.lower(): k for k in (Tickets, Tables, Templates, Checkpoints, Cards, Options)}
SHARES = {"tickets": 24, "tables": 24, "templates": 20, "checkpoints": 12, "cards": 10, "options": 10}


def shares(cases, names):
    "How many of some cases each kind gets; cheap ones get more."
    whole = sum(SHARES[name] for name in names)
    return {name: -(-cases * SHARES[name] // whole) for name in names}


# --- the contract ----------------------------------------------------------------------------------------------------


def place_of(error):
    "The deepest frame in the library, else the deepest of all."
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if f"{os.sep}kslottery{os.sep}" in f.filename and f.name not in ("must", "one_of")
    ] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].name}" if own else ""


OUTCOMES = Counter()  # of this process: a kind that refuses nothing, or everything, tests nothing


def judge(act):
    "Run it: None, or the rule that was broken, the message, where, and the traceback."
    ran = Path(os.environ["KSLOTTERY_FUZZ_RAN"])
    ran.unlink(missing_ok=True)
    rule = None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            act()
        error, said = None, ""
    except (KeyboardInterrupt, SystemExit) as end:
        error, said, rule = end, repr(end), "exit"
    except Broken as broken:
        error, said, rule = broken, str(broken), "contract"
    except BaseException as raised:
        error, said = raised, str(raised)
        OUTCOMES["refused"] += 1
        if not isinstance(raised, ALLOWED):
            rule = "traceback"
        elif "\n" in said.strip():
            rule = "many lines"
        elif BARE.match(said):
            rule = "bare"
        elif len(said) > 1500:
            rule = "long"
        elif re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said):
            rule = "control signs"
    if ran.exists():
        rule, said = "code ran", "code out of a checkpoint ran"
    if rule is None:
        return None
    name = type(error).__name__
    told = "".join(traceback.format_exception(error)) if error else ""
    return {"rule": rule, "message": f"{name}: {said}"[:300], "place": place_of(error) if error else "", "trace": told}


def rng_of(kind, seed, number):
    return random.Random(f"{kind} {seed} {number}")


def one(kind, rng, here, told=None):
    shutil.rmtree(here, ignore_errors=True)
    done, act = kind.case(rng, here)
    if told:
        told(done)
    fault = judge(act)
    TOY.chat_template = None
    return done, fault


def key_of(fault):
    plain = re.sub(r"/\S+", "PATH", fault["message"])
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "Q", plain)
    return fault["rule"], fault["place"], re.sub(r"-?\d+(\.\d+)?", "N", plain)[:40]


# --- batches in forks ------------------------------------------------------------------------------------------------


def limited(memory=MEMORY):
    "In a fork: no question is answered, nobody listens, and there is an end to memory."
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def ask(*words):
        raise Broken("it asked a question on standard input")

    import builtins

    builtins.input = ask
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # where it was imported before this file
    torch.set_num_threads(1)


def batch(kind, name, seed, numbers, pipe, until):
    "The work of a fork: a line for each case begun, and one for each failure."
    limited()
    OUTCOMES.clear()
    gc.freeze()  # a collection would copy all that the fork shares
    here = kind.room / f"case-{os.getpid()}"
    os.environ["KSLOTTERY_FUZZ_RAN"] = str(kind.room / f"ran-{os.getpid()}")
    write = lambda record: os.write(pipe, json.dumps(record).encode() + b"\n")
    for number in numbers:
        if time.time() > until:
            break
        write({"case": number})
        # before it runs: a fork that dies cannot say what it was about
        done, fault = one(kind, rng_of(name, seed, number), here)
        if fault:
            write({"case": number, "done": done, **fault, "trace": fault["trace"][-1500:]})
    write({"end": True, "refused": OUTCOMES["refused"]})
    shutil.rmtree(here, ignore_errors=True)
    os._exit(0)


def watch(kind, name, seed, start, count, until, hang=HANG):
    "Fork for some cases: how many were tried, how many of them refused (in forks that lived), failures, the last."
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        try:
            batch(kind, name, seed, range(start, start + count), write, until)
        except BaseException:
            with contextlib.suppress(OSError):
                os.write(write, json.dumps({"harness": traceback.format_exc()[-1500:]}).encode() + b"\n")
        os._exit(9)
    os.close(write)
    rest, tried, refused, faults, last, ended = b"", 0, 0, [], None, False
    while True:
        if not select.select([read], [], [], hang)[0]:
            os.kill(child, signal.SIGKILL)
            faults.append(
                {"case": last, "rule": "hang", "message": f"over {hang:g} s", "place": "", "trace": "", "done": []}
            )
            break
        got = os.read(read, 2**16)
        if not got:
            break
        *lines, rest = (rest + got).split(b"\n")
        for record in map(json.loads, lines):
            if "harness" in record:
                raise RuntimeError(f"the harness itself failed in {name} {last}: {record['harness']}")
            ended, refused = ended or "end" in record, refused + record.get("refused", 0)
            if "rule" in record:
                faults.append(record)
            elif "case" in record:
                last, tried = record["case"], tried + 1
    os.close(read)
    _, status = os.waitpid(child, 0)
    if not ended and (not faults or faults[-1]["rule"] != "hang"):
        code = os.waitstatus_to_exitcode(status)
        faults.append({"case": last, "rule": "died", "message": f"status {code}", "place": "", "trace": "", "done": []})
    for fault in faults:
        if not fault["done"]:  # say what the case was, without running it
            with contextlib.suppress(Exception):
                here = kind.room / "told"
                shutil.rmtree(here, ignore_errors=True)
                fault["done"] = kind.case(rng_of(name, seed, fault["case"]), here)[0]
    return tried, refused, faults, -1 if last is None else last


def mutated(name, seed, seconds, start=0, most=None, size=1000, room=None):
    "Cases of one kind, from `start`, for some seconds: how many were tried and refused, all failures, seconds."
    with tempfile.TemporaryDirectory(prefix="kslottery-fuzz-", dir=room) as folder:
        kind, tried, refused, faults = KINDS[name](Path(folder)), 0, 0, []
        began, number = time.time(), start
        while (left := began + seconds - time.time()) > 0 and (most is None or tried < most):
            count = size if most is None else min(size, most - tried)
            n, no, found, last = watch(kind, name, seed, number, count, time.time() + left)
            tried, refused, faults, number = tried + n, refused + no, faults + found, max(last, number - 1) + 1
        return tried, refused, faults, time.time() - began


def shared_out(jobs, name, seed, seconds, start, most, room):
    "The same by several processes, a million case numbers apart."
    if jobs == 1:
        return mutated(name, seed, seconds, start, most, room=room)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        asked = [(name, seed, seconds, start + j * 10**6, most and -(-most // jobs), 1000, room) for j in range(jobs)]
        tried, refused, faults, took = zip(*pool.starmap(mutated, asked))
    return sum(tried), sum(refused), [f for found in faults for f in found], max(took)


def shrunk(name, seed, seconds, room=None):
    "The same cases drawn by hypothesis, which makes a failure small; one failure for each run."
    from hypothesis import HealthCheck, Phase, given, settings, strategies
    from hypothesis import seed as seeded
    from hypothesis.errors import HypothesisException

    with tempfile.TemporaryDirectory(prefix="kslottery-fuzz-", dir=room) as folder:
        kind, tried, least = KINDS[name](Path(folder)), 0, {}
        os.environ["KSLOTTERY_FUZZ_RAN"] = str(Path(folder, "ran"))
        began = time.time()

        def late(number, frame):
            raise Broken(f"over {HANG:g} s")

        signal.signal(signal.SIGALRM, late)

        def trial(rng):
            nonlocal tried
            if time.time() > began + seconds:
                raise KeyboardInterrupt  # the one exception after which hypothesis draws and shrinks no more
            tried += 1
            signal.setitimer(signal.ITIMER_REAL, HANG)
            try:
                done, fault = one(kind, rng, Path(folder, "case"))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if fault:
                if (key := key_of(fault)) not in known:
                    least[key] = {"case": None, "done": done, **fault}
                    raise AssertionError(key)

        for turn in itertools.count():
            known = {*least}
            if time.time() > began + seconds:
                break
            run = settings(
                max_examples=300,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )(given(strategies.randoms(note_method_calls=False))(trial))
            ends = (AssertionError, HypothesisException, KeyboardInterrupt)
            with contextlib.suppress(*ends), contextlib.redirect_stdout(io.StringIO()):
                seeded(seed + turn)(run)()
        return tried, OUTCOMES["refused"], list(least.values()), time.time() - began


def distinct(faults):
    "One failure for each rule, place and message: the one with the shortest story, and how often."
    found = {}
    for fault in faults:
        key = key_of(fault)
        kept, n = found.get(key, (fault, 0))
        short = lambda f: (len(f["done"]), len("".join(f["done"])))
        found[key] = (min(kept, fault, key=short), n + 1)
    return sorted(({**fault, "times": n} for fault, n in found.values()), key=lambda f: -f["times"])


def store(path, part, row):
    "Write a part's tallies into a file, beside those of other parts that it holds."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # both of `make fuzz` and `make faults` may be at it
        file.seek(0)
        known = json.loads(file.read() or "{}")
        for name, rows in row.items():
            known[part] = known.get(part, {}) | {name: rows | {"versions": versions()}}
        file.truncate(0)
        file.write(json.dumps(known, indent=1, sort_keys=True) + "\n")


def unplaced(text):
    "Without paths, which are of this machine and this run."
    return re.sub(r"(?<![\w.<])/[^\s'\",)]+", "PATH", text)


def memory_room():
    "A folder in memory, where there is one."
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(words=None):
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--minutes", type=float, help="for all kinds together (default: 5; with --cases a limit of 25)")
    ask.add_argument("--cases", type=int, help="how many, over the kinds by their shares")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--kind", default=",".join(KINDS), help="one or more, joined by commas")
    ask.add_argument("--case", type=int, help="run this one again, here, and show its traceback")
    ask.add_argument("--start", type=int, default=0, help="the first case")
    ask.add_argument("--jobs", type=int, default=1, help="processes")
    ask.add_argument("--engine", choices=("mutation", "hypothesis"), default="mutation")
    ask.add_argument("--out", type=Path, help="a JSON file for tallies, beside those of tests/faults.py")
    given = ask.parse_args(words)
    names = given.kind.split(",")
    room = memory_room()
    torch.set_num_threads(1)
    if given.case is not None:
        with tempfile.TemporaryDirectory(prefix="kslottery-fuzz-", dir=room) as folder:
            os.environ["KSLOTTERY_FUZZ_RAN"] = str(Path(folder, "ran"))
            show = lambda done: print(
                f"{names[0]} --seed {given.seed} --case {given.case}: {'; '.join(done)}", flush=True
            )
            kind = KINDS[names[0]](Path(folder))
            _, fault = one(kind, rng_of(names[0], given.seed, given.case), Path(folder, "case"), show)
            print(f"{fault['trace']}\n{fault['rule']}: {fault['message']}" if fault else "it keeps the contract")
            return int(fault is not None)
    minutes = given.minutes or (25 if given.cases else 5)
    most = shares(given.cases, names) if given.cases else dict.fromkeys(names)
    end, total = time.time() + 60 * minutes, Counter()
    print(f"seed {given.seed}, {given.cases or 'any number of'} cases, {minutes:g} minutes, {given.engine}", flush=True)
    for n, name in enumerate(names):
        seconds = max(1.0, end - time.time()) / (1 if most[name] else len(names) - n)
        if given.engine == "mutation":
            found = shared_out(given.jobs, name, given.seed, seconds, given.start, most[name], room)
        else:
            with multiprocessing.get_context("fork").Pool(1, limited) as pool:  # it may fail in any way
                found = pool.apply(shrunk, (name, given.seed, seconds, room))
        tried, refused, faults, took = found
        rows = distinct(faults)
        total += Counter(tried=tried, failed=len(faults), missing=max(0, (most[name] or 0) - tried))
        print(
            f"{name:12} {tried:8} tried {refused:8} refused {len(faults):6} failed, {len(rows):3} distinct, "
            f"{tried / took:6.0f} a second",
            flush=True,
        )
        for row in rows:
            at = "" if row["case"] is None else f" (--kind {name} --seed {given.seed} --case {row['case']})"
            print(f"  {row['times']:5} x {row['rule']} in {row['place']}: {describe(row['message'])[:110]}{at}")
            print(f"          {describe('; '.join(row['done'])) if row['done'] else ''}")
        if given.out:
            kept = ("rule", "place", "times", "case")
            told = [{k: row[k] for k in kept} | {"message": unplaced(row["message"])} for row in rows]
            how = {"seed": given.seed, "engine": given.engine, "jobs": given.jobs, "seconds": round(took, 1)}
            tally = {"tried": tried, "refused": refused, "failed": len(faults)}
            store(given.out, "fuzz", {name: tally | how | {"faults": told}})
    print(f"{total['tried']} tried / {total['failed']} failed")
    if total["missing"]:
        print(f"{total['missing']} of {given.cases} cases were not reached in {minutes:g} minutes: give more")
    return int(total["failed"] + total["missing"] > 0 or not total["tried"])


if __name__ == "__main__":
    sys.exit(main())
