"""Kills, signals, races, full disks and refused permissions: an artefact is old or new and whole, and nothing is left.

    python tests/faults.py --seed 7                       # all parts (`--scale 1` is what benchmarks/results holds)
    python tests/faults.py --only kills,races --scale 0.2
    python tests/faults.py --only kills --acts certify    # one operation (of kills), or one race

Victims are forks of this process, which has imported everything. A kill comes before the n-th thing that an operation
does to a file (every n, by an audit hook), and at random moments.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

import fuzz
import kslottery
import kslottery.babel
import kslottery.checkpoints
import kslottery.cli
from conftest import talker
from fuzz import ALLOWED, BARE, TOY, toy_ticket
from kslottery.certificate import certify_agreement
from kslottery.core import settle, whole_file, whole_files, whole_folder
from kslottery.data import Pair, Prompt
from kslottery.evaluation import Generation, translate
from kslottery.rows import TunedRows
from kslottery.ticket import Ticket, TicketBank

TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
TOUCHES |= {"fcntl.flock", "shutil.rmtree"}
PLANS = r"plan-\w+\.json|ledger"  # a certificate's plan is entered before anything is measured, and stays
PROVEN = certify_agreement(np.zeros(70), 0.05, epsilon=0.2, vouched=True)
AUDIT = {"verdict": "habit", "sentence": "The gain is a habit.", "report": "# Audit\n\nIt is.\n", "more": "x" * 20_000}


# --- forks -----------------------------------------------------------------------------------------------------------


class Victim:
    "A fork that does one thing in a folder; what it says goes into files beside it."

    def __init__(self, act, here, out=None, gate=None):
        self.said = Path(tempfile.mkdtemp(prefix="said-", dir=here.parent))
        ready, tell = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(ready)
            self.live(act, here, out, gate, tell)
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        self.pid, self.began = pid, time.time()

    def live(self, act, here, out, gate, tell):
        status = 1
        gc.freeze()  # a collection would copy all that the fork shares
        try:
            os.chdir(here)
            names = (os.devnull, out or str(self.said / "out"), str(self.said / "err"))
            for number, (name, flag) in enumerate(
                zip(names, (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT))
            ):
                os.dup2(os.open(name, flag), number)
            sys.stdin, sys.stdout, sys.stderr = (open(n, mode, encoding="utf-8") for n, mode in enumerate("rww"))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            os.write(tell, b"r")
            if gate is not None:
                os.close(gate[1])
                os.read(gate[0], 1)
            act(here)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except (*ALLOWED, OSError) as error:
            print(f"kslottery: {error}", file=sys.stderr)
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(status)

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self, most=60):
        "Status (below 0: a signal), standard output, the lines of standard error, seconds; a hang is killed."
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.time() > self.began + most:
                self.kill()
            time.sleep(0.0005)
        out, err = (
            (self.said / n).read_text(errors="replace") if (self.said / n).exists() else "" for n in ("out", "err")
        )
        shutil.rmtree(self.said)
        lines = [line for line in re.split("[\r\n]", err) if line.strip()]
        return os.waitstatus_to_exitcode(found[1]), out, lines, time.time() - self.began


def command(*words):
    "The command line as a user gives it, for a victim."

    def act(here):
        sys.argv = ["kslottery", *map(str, words)]
        kslottery.cli.main()

    return act


def silent(act):
    "Refusals of a next command are no matter here."

    def done(here):
        with contextlib.suppress(*ALLOWED):
            act(here)

    return done


def counted(act, stop=None):
    "Do it, and count what it does to files; or die before number `stop`."
    count = 0

    def watch(event, arguments):
        nonlocal count
        if event in TOUCHES and watching:
            if event == "open":
                _, mode, flags = arguments  # `os.open` has no mode
                if not (set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)):
                    return
            count += 1
            if count - 1 == stop:
                os.kill(os.getpid(), signal.SIGKILL)

    def done(here):
        nonlocal watching
        sys.addaudithook(watch)
        watching = True
        try:
            act(here)
        finally:
            watching = False
            print(f"\ncounted {count}")

    watching = False
    return done


# --- states ----------------------------------------------------------------------------------------------------------


def state(path):
    "What is at a path: file names and hashes; None if nothing is."
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not hidden(p.relative_to(path)))
        return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return {"": hashlib.sha256(path.read_bytes()).hexdigest()} if path.exists() else None


def hidden(path):
    return any(part.startswith(".") or part.endswith((".part", ".tmp", ".lock")) for part in Path(path).parts)


def unplanned(found):
    return {name: hashed for name, hashed in (found or {}).items() if not re.search(PLANS, name)} or None


def named(found, old, new):
    "The state in a word."
    if found == new:
        return "new"
    if found == old:
        return "old"
    if found is None:
        return "lost"
    either = [{(old or {}).get(name), (new or {}).get(name)} for name in found]
    return "mixed" if all(h in known for h, known in zip(found.values(), either)) else "torn"


def listing(here):
    return {str(p.relative_to(here)) for p in here.rglob("*")}


class Act:
    """An operation: what was there before, what it does, where; and how somebody reads that afterwards.

    Who reads a model does not settle (transformers reads it); then only who writes there again clears up.
    """

    def __init__(self, name, act, place, old=True, read=None, settles=True):
        self.name, self.act, self.place, self.old, self.settles = name, act, place, old, settles
        self.read = read or (lambda here: Ticket.load(here / place))

    def prepare(self, home, here):
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        for name in ("base", "tuned"):
            (here / name).symlink_to(home / name)
        for name in ("pairs.tsv", "fresh.tsv"):
            (here / name).symlink_to(home / name)
        shutil.copytree(home / "ticket", here / "ticket")
        if self.old is True and self.place != "ticket":
            (here / self.place).write_text("old " * 1000)
        elif callable(self.old):
            self.old(here)


def _texts(here):
    with whole_folder(here / "many", is_own=lambda path: True) as work:
        for n in range(20):
            (work / f"{n}.txt").write_text(f"new {n} " * 500)


def _journal(here):
    with whole_files(here / "many") as work:
        for n in range(0, 20, 2):
            (work / f"{n}.txt").write_text(f"new {n} " * 500)


def _old_texts(here):
    (here / "many").mkdir()
    for n in range(20):
        (here / "many" / f"{n}.txt").write_text(f"old {n} " * 500)


def _file(here):
    with whole_file(here / "one.txt") as part:
        for mode in "waaa":
            with open(part, mode) as file:
                file.write("new " * 25_000)


def _save(here):
    ticket = Ticket.load(here / "ticket")
    ticket.provenance = replace(ticket.provenance, license="apache-2.0")
    ticket.save(here / "ticket")


def _is_checkpoint(here):
    kslottery.load_model(here / "new", device="cpu")


def _settled(here, place):
    settle(here / place)
    assert state(here / place)


ACTS = [
    Act("save", _save, "ticket"),
    Act("audit", lambda here: Ticket.load(here / "ticket").add_audit(AUDIT, b"figure" * 1000), "ticket"),
    Act("certify", lambda here: Ticket.load(here / "ticket").add_certificates([PROVEN]), "ticket"),
    Act("card", command("card", "ticket", "--license", "apache-2.0"), "ticket"),
    Act("scan", command("scan", "base", "tuned", "--out", "new"), "new", False, lambda here: Ticket.load(here / "new")),
    Act("merge", command("merge", "ticket", "--out", "new"), "new", False, _is_checkpoint, settles=False),
    Act("peft", command("peft", "ticket", "--out", "new"), "new", False, lambda here: None, settles=False),
    Act("whole_file", _file, "one.txt", True, lambda here: _settled(here, "one.txt")),
    Act("whole_folder", _texts, "many", _old_texts, lambda here: _settled(here, "many")),
    Act("whole_files", _journal, "many", _old_texts, lambda here: _settled(here, "many")),
]


def chosen(known, names):
    "Those of some names; all, if none is named."
    called = lambda one: one if isinstance(one, str) else getattr(one, "name", None) or one.__name__
    return [one for one in known if not names or called(one) in names]


class Part:
    "A tally: *tried / failed*, and what failed, a line for each sort."

    def __init__(self, name):
        self.name, self.tried, self.sorts, self.examples = name, 0, Counter(), {}
        self.began, self.seconds, self.failed, self.skipped = time.time(), 0.0, 0, ""

    def count(self, faults, example=""):
        self.tried += 1
        self.failed += bool(faults)
        for fault in faults:
            self.sorts[fault] += 1
            self.examples.setdefault(fault, example)

    def as_dict(self):
        faults = [
            {"fault": fuzz.unplaced(f), "times": n, "example": fuzz.unplaced(self.examples[f])}
            for f, n in self.sorts.most_common()
        ]
        tally = {"tried": self.tried, "failed": self.failed, "seconds": round(self.seconds, 1)}
        return tally | {"skipped": self.skipped, "faults": faults}

    def show(self):
        print(f"{self.name:14} {self.tried:5} tried {self.failed:5} failed {self.skipped}", flush=True)
        for fault, n in self.sorts.most_common():
            print(f"   {n:5} x {fault}: {self.examples[fault][:150]}", flush=True)


def sentence(status, lines):
    "What is wrong with how a command refused."
    if any("Traceback" in line for line in lines):
        return [f"traceback: {lines[-1][:70]}"]
    own = [line for line in lines if line.startswith("kslottery: ")]
    if (
        status == 2 and not own and any("Error" in line for line in lines)
    ):  # typer's own: the words themselves are wrong
        return []
    if status not in (0, 1, 2, 129, 130, 143):
        return [f"ended by {status} without a word" if not own else f"ended by {status}"]
    if status and not own:
        return [f"status {status} without a sentence"]
    return [f"bare: {shape(one)}" for one in own if BARE.match(one.removeprefix("kslottery: "))]


def shape(line):
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|/\S+", "…", line))[:70]


# --- the parts -------------------------------------------------------------------------------------------------------


def kills(part, home, seed, scale, acts):
    """kill -9 before every touch of a file, at random moments, and once more while the next command puts things right.

    At once no file may be torn: each that lies at its place is one of before or one of afterwards, and whole. Several
    files of a folder change by a journal, so the next command that reads finishes or undoes what was interrupted
    (`core.settle`, which `Ticket.load` calls). After it all files are of before or all of afterwards, none is lost, and
    nothing is left; and so after the same command again, which then has done what it does.
    """
    here = home / "here"
    for act in chosen(ACTS, acts):
        rng = random.Random(f"kills {act.name} {seed}")
        act.prepare(home, here)
        old = state(here / act.place)
        status, out, lines, took = Victim(counted(act.act), here).end()
        assert status == 0, (act.name, status, lines)
        touches, new = int(out.rsplit("counted ", 1)[1]), state(here / act.place)
        assert new != old and touches, f"{act.name} changes nothing: this tests nothing"
        Victim(silent(act.act), here).end()
        usual = listing(here)
        moments = [("touch", n, None) for n in range(touches)]
        rng.shuffle(moments)
        moments = moments[: max(4, round(touches * min(1, scale)))]
        some = lambda most: range(max(1, round(most * scale)))
        moments += [("touch", rng.randrange(touches), rng.randrange(8)) for _ in some(16)]
        moments += [("time", rng.uniform(0, 1.02 * took), None) for _ in some(35)]
        for kind, when, again in moments:
            act.prepare(home, here)
            victim = Victim(counted(act.act, when) if kind == "touch" else act.act, here)
            if kind == "time":
                time.sleep(when)
                victim.kill()
            status, _, lines, _ = victim.end()
            told = f"{act.name} killed before {f'touch {when}' if kind == 'touch' else f'{when:.3f} s'} of {touches}"
            faults = [f"failed by itself: {shape(''.join(lines[-1:]))}"] * (status not in (0, -9))
            faults += ["torn"] * (named(state(here / act.place), old, new) == "torn")
            if again is not None:
                Victim(counted(silent(act.read), again), here).end()
                told += f", and its reader before touch {again}"
                faults += ["torn after a second kill"] * (named(state(here / act.place), old, new) == "torn")
            status, _, lines, _ = Victim(act.read, here).end()  # the next command: one that reads
            found = named(state(here / act.place), old, new)
            faults += [f"{found} after the next command"] * (found not in ("old", "new"))
            faults += [f"the next command cannot read it ({found}): {shape(''.join(lines[-1:]))}"] * (
                status != 0 and (old is not None or found == "new")
            )
            left = listing(here) - usual
            faults += ["leftovers after the next command"] * bool(left and act.settles)
            Victim(silent(act.act), here).end()  # and one that writes
            again = named(state(here / act.place), old, new)
            faults += [f"{again} after the same command again"] * (again != "new")
            left |= (late := listing(here) - usual)
            faults += ["leftovers after the same command again"] * bool(late)
            part.count([f"{act.name}: {f}" for f in faults], f"{told} {sorted(left)[:2] if left else ''}")


def slow_build(folder, seed, **more):
    "In place of a minute of training."
    for name in ("train", "dev", "test", "calibration"):
        (folder / f"{name}.jsonl").write_text('{"source": "t1", "target": "t2"}\n')
        time.sleep(0.05)
    (folder / "config.json").write_text("{}")
    (folder / "babel.json").write_text(json.dumps({"parameters": 1}))
    with open(Path(os.environ["HOME"], "built"), "a") as f:
        f.write("1")


PROVING = ("certify", "ticket", "--calibration", "fresh.tsv", "--epsilon", "0.9", "--vouched", "--ladder", "none")
COMMANDS = {
    "scan": ("scan", "base", "tuned", "--out", "new"),
    "merge": ("merge", "ticket", "--out", "new"),
    "peft": ("peft", "ticket", "--out", "new"),
    "card": ("card", "ticket", "--license", "apache-2.0"),
    "certify": PROVING,
    "audit": ("audit", "ticket", "--train", "none", "--test", "fresh.tsv", "--fast", "--samples", "50"),
    "babel": ("babel", "--out", "new"),
}


def signals(part, home, seed, scale, acts):
    "SIGINT, SIGTERM and SIGHUP at random moments: 130, 143 or 129, one sentence, nothing left."
    here = home / "here"
    wanted = {signal.SIGINT: {130}, signal.SIGTERM: {130, 143}, signal.SIGHUP: {129, 130, 143}}
    for name in chosen(COMMANDS, acts):
        rng, words = random.Random(f"signals {name} {seed}"), COMMANDS[name]
        place = "new" if "new" in words else "ticket"
        act = Act(name, command(*words), place, False)
        act.prepare(home, here)
        old = state(here / place)
        shutil.rmtree(home / "cache", ignore_errors=True)
        status, _, lines, took = Victim(act.act, here).end()
        assert status == 0, (name, status, lines[-3:])
        new, usual = state(here / place), listing(here)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            for _ in range(max(2, round(8 * scale))):
                act.prepare(home, here)
                shutil.rmtree(home / "cache", ignore_errors=True)
                victim = Victim(act.act, here)
                time.sleep(when := rng.uniform(0.01, took))
                victim.kill(number)
                status, _, lines, _ = victim.end()
                what, faults = f"{name} {number.name}", []
                if status != 0:
                    if status == -number:
                        faults.append(f"{number.name}: it ended without a word")
                    elif status not in wanted[number]:
                        faults.append(f"{number.name}: status {status}")
                    elif not lines or "interrupted" not in lines[-1]:
                        faults.append(f"{number.name}: the last line is {shape(lines[-1] if lines else '')}")
                    faults += [f"{number.name}: traceback"] * any("Traceback" in line for line in lines)
                left = {p for p in listing(here) - usual if not p.startswith("ticket/audit/arms")}
                left |= {str(p) for p in (home / "cache").glob(".*")} if (home / "cache").exists() else set()
                faults += [f"{number.name}: leftovers"] * bool(left)
                if place == "ticket":  # a journal may have been interrupted, and whoever reads goes on with it
                    Victim(silent(lambda here: Ticket.load(here / "ticket")), here).end()
                found = named(unplanned(state(here / place)), unplanned(old), unplanned(new))
                untrue = "nothing was written" in "".join(lines[-1:]) and state(here / place) != old
                faults += [f"{number.name}: it says that nothing was written, and it was"] * untrue
                if name != "audit":  # which keeps its arms
                    faults += [f"{number.name}: {found}"] * (found not in ("old", "new"))
                part.count(faults, f"{what} after {when:.3f} of {took:.3f} s: {status} {lines[-1:]} {sorted(left)[:2]}")


def together(here, *acts):
    "Start all at one moment; what each gave."
    gate = os.pipe()
    victims = [Victim(act, here, gate=gate) for act in acts]  # each waits until nobody holds the gate's other end
    for end in gate:
        os.close(end)
    return [victim.end() for victim in victims]


def reading(place, seconds, read):
    "A reader that looks all the time; it prints what it could not read."

    def act(here):
        until, seen, n = time.time() + seconds, Counter(), 0
        while time.time() < until:
            n += 1
            try:
                read(here / place)
            except Exception as error:
                seen[f"{type(error).__name__}: {shape(str(error))}"] += 1
        print(json.dumps({"reads": n, "faults": dict(seen)}))

    return act


def races(part, home, seed, scale, acts):
    "Two or three at once: whole ends, nobody's work lost in silence, and who reads meanwhile reads something whole."
    here = home / "here"
    plain = Act("race", None, "ticket")

    def add(first):
        def act(here):
            for n in range(first, first + 6):
                proven = certify_agreement(np.zeros(60 + n), 0.05, epsilon=0.2, vouched=True)
                Ticket.load(here / "ticket").add_certificates([proven])

        return act

    def save(number):
        def act(here):
            ticket = Ticket.load(here / "ticket")
            ticket.provenance = replace(ticket.provenance, license=f"licence-{number}", revision=f"{number}" * 5000)
            for _ in range(8):
                ticket.save(here / "ticket")

        return act

    def audit(number):
        def act(here):
            for _ in range(4):
                Ticket.load(here / "ticket").add_audit({**AUDIT, "sentence": f"Audit {number}."}, b"%d" % number * 5000)

        return act

    def fill(letter):
        def act(here):
            for _ in range(10):
                with whole_file(here / "one.txt") as file:
                    file.write_text(letter * 500_000)

        return act

    def one_letter(path):
        if path.exists() and (len(text := path.read_text()) != 500_000 or len({*text}) > 1):
            raise ValueError("it is torn")

    def consistent(here):
        ticket, card = Ticket.load(here / "ticket"), (here / "ticket" / "README.md").read_text()
        wrong = ["the card's licence is another than the ticket's"] * (
            f"license: {ticket.provenance.license}" not in card
        )
        wrong += ["the card's audit is another than the ticket's"] * (ticket.audit["sentence"] not in card)
        return wrong + ["the card's certificates are fewer"] * (card.count("<details>") != len(ticket.certificates))

    def certificates():
        done = together(here, add(10), add(30), reading("ticket", 0.4, Ticket.load))
        kept = {c.n for c in Ticket.load(here / "ticket").certificates}
        lost = sum(n + 60 not in kept for first, d in zip((10, 30), done) if d[0] == 0 for n in range(first, first + 6))
        return done, [f"{lost and 'some'} certificates were lost in silence"] * bool(lost)

    def saves():
        return together(here, save(1), save(2), reading("ticket", 0.4, Ticket.load)), []

    def audits():
        return together(here, audit(1), audit(2), reading("ticket", 0.4, Ticket.load)), []

    def files():
        return together(here, fill("a"), fill("b"), reading("one.txt", 0.3, one_letter)), []

    def cards():
        words = [command("card", "ticket", "--license", name) for name in ("mit", "apache-2.0")]
        return together(here, *words, reading("ticket", 0.2, Ticket.load)), []

    def merges():
        done = together(here, *[command("merge", "ticket", "--out", "new")] * 3)
        won = sum(d[0] == 0 for d in done)
        return done, [f"{won} of 3 merges into one folder said that they succeeded"] * (won != 1)

    def scans():
        done = together(here, *[command("scan", "base", "tuned", "--out", "new")] * 2)
        won = sum(d[0] == 0 for d in done)
        return done, [f"{won} of 2 scans into one folder said that they succeeded"] * (won != 1)

    def worlds():
        shutil.rmtree(home / "cache", ignore_errors=True)
        (home / "built").unlink(missing_ok=True)
        done = together(here, *[command("babel")] * 2)
        n = len((home / "built").read_text())
        return done, [f"built {n} times"] * (n != 1)

    def planted():
        (here / "victim").write_text("mine")
        for name in (".one.txt.part", "ticket/.ticket.json.part", "ticket/.README.md.part"):
            (here / name).symlink_to(here / "victim")
        done = [Victim(fill("a"), here).end(), Victim(command("card", "ticket", "--refresh"), here).end()]
        for name in (".one.txt.part", "ticket/.ticket.json.part", "ticket/.README.md.part"):
            (here / name).unlink(missing_ok=True)
        return done, ["a planted link was followed"] * ((here / "victim").read_text() != "mine")

    for race in chosen((certificates, saves, audits, files, cards, merges, scans, worlds, planted), acts):
        for _ in range(max(1, round(23 * scale))):
            plain.prepare(home, here)
            done, faults = race()
            for status, out, lines, _ in done:
                faults += [] if status == 0 else sentence(status, lines)
                if '"reads"' in out:
                    faults += [f"a read failed: {f}" for f in json.loads(out.strip().split("\n")[-1])["faults"]]
            if race not in (files, merges, scans, worlds):
                try:
                    faults += consistent(here)
                except Exception as error:
                    faults.append(f"what is left cannot be read: {shape(str(error))}")
            faults += ["leftovers"] * any(map(hidden, listing(here)))
            faults = list(dict.fromkeys(f"{race.__name__}: {f}" for f in faults))
            part.count(faults, str([(d[0], d[2][-1:]) for d in done if d[0]]))


def can_mount(place):
    return (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
        ).returncode
        == 0
    )


def full(part, home, seed, scale, acts):
    "A disk of 1 MB with a little room: the old stands, the sentence names path and need, results are printed."
    disk = home / "disk"
    disk.mkdir(exist_ok=True)
    certify, rng = Act("certify (command)", command(*PROVING), "ticket"), random.Random(f"full {seed}")
    for act in (*ACTS, certify):
        for _ in range(max(2, round(11 * scale))):
            if not can_mount(disk):
                part.skipped = "(skipped: no tmpfs can be mounted here)"
                return
            try:
                here = disk / "here"
                act.prepare(home, here)
                old, before = state(here / act.place), listing(here)
                room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
                leave = rng.choice((0, 4096, 8192, 12288, 16384, 24576, 32768, 65536, 131072))
                (disk / "ballast").write_bytes(b"x" * max(0, room - leave))
                victim = Full(act.act, here, home)
                status, out, lines, _ = victim.end()
                faults = [] if status == 0 else sentence(status, lines)
                if status:
                    told = next((line for line in reversed(lines) if line.startswith("kslottery: ")), "")
                    if not faults and not (re.search(f"{act.place}|{PLANS}", told) and re.search("space|room", told)):
                        faults.append(f"the sentence does not name place and need: {shape(told)}")
                    now = unplanned(state(here / act.place))
                    faults += [f"the old one is {named(now, old, None)}"] * (now != old)
                    left = {path for path in listing(here) - before if not re.search(PLANS, path)}
                    faults += ["leftovers"] * bool(left)
                    early = re.search(PLANS, told)  # before anything was certified
                    if act is certify and not early and "robability" not in out and "ertif" not in out:
                        faults.append("the certificate was not printed")
                part.count([f"{act.name}: {f}" for f in faults], f"{leave} bytes left: {status} {lines[-1:]}")
            finally:
                subprocess.run(["umount", "-l", str(disk)], capture_output=True)
    here = home / "here"
    for words in (
        ("card", "ticket"),
        ("card", "ticket", "--json"),
        PROVING,
        ("doctor",),
        ("scan", "base", "tuned", "--out", "new"),
    ):
        ACTS[0].prepare(home, here)
        status, _, lines, _ = Victim(command(*words), here, out="/dev/full").end()
        faults = sentence(status, lines) + ["status 0 although nothing could be printed"] * (status == 0)
        part.count([f"> /dev/full: {words[0]}: {f}" for f in faults], str((status, lines[-1:])))


class Full(Victim):
    "One whose words go elsewhere than onto the full disk."

    def __init__(self, act, here, home):
        self.said = Path(tempfile.mkdtemp(prefix="said-", dir=home))
        ready, tell = os.pipe()
        if (pid := os.fork()) == 0:
            self.live(act, here, None, None, tell)
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        self.pid, self.began = pid, time.time()


def permissions(part, home, seed, scale, acts):
    "As another user who may not: one sentence, and nothing changes."
    if os.geteuid() != 0:
        part.skipped = "(skipped: only root can become another user)"
        return
    here = home / "here"

    def as_nobody(act):
        def done(here):
            os.setgid(65534)
            os.setuid(65534)
            act(here)

        return done

    for path in (home, *home.parents):
        if not path.stat().st_mode & 0o005:
            path.chmod(path.stat().st_mode | 0o055)
    for path in (p for name in ("base", "tuned", "ticket") for p in (home / name).rglob("*")):
        path.chmod(path.stat().st_mode | 0o044)
    cases = {
        "ticket.json unreadable": ("ticket/ticket.json", 0o000, ("card", "ticket")),
        "rows unreadable": ("ticket/rows.safetensors", 0o000, ("card", "ticket", "--license", "mit")),
        "ticket closed": ("ticket", 0o000, ("card", "ticket")),
        "ticket read-only, card": ("ticket", 0o555, ("card", "ticket", "--license", "mit")),
        "folder read-only, scan": (".", 0o555, ("scan", "base", "tuned", "--out", "new")),
        "folder read-only, merge": (".", 0o555, ("merge", "ticket", "--out", "new")),
        "folder read-only, peft": (".", 0o555, ("peft", "ticket", "--out", "new")),
        "cache read-only": (".", 0o555, ("babel",)),
        "data unreadable": ("mine.tsv", 0o000, ("certify", "ticket", "--calibration", "mine.tsv", "--epsilon", "0.5")),
        "counts unreadable": ("mine.tsv", 0o000, ("scan", "base", "tuned", "--counts", "mine.tsv", "--out", "new")),
    }
    for name, (place, mode, words) in cases.items():
        ACTS[0].prepare(home, here)
        shutil.rmtree(home / "cache", ignore_errors=True)
        (here / "mine.tsv").write_text("source\ttarget\nt5 t6\tt7\n")
        (here / place).chmod(mode)
        before = listing(here)
        said = home / "said"
        said.mkdir(exist_ok=True, mode=0o777)
        said.chmod(0o777)
        status, _, lines, _ = Full(as_nobody(command(*words)), here, home).end()
        (here / place).chmod(0o755)
        faults = sentence(status, lines) + ["status 0"] * (status == 0) + ["it wrote"] * (listing(here) != before)
        part.count([f"{name}: {f}" for f in faults], str((status, lines[-1:])))


def soak(part, home, seed, scale, acts):
    "Generations with changing tickets: the same texts at the end, and no more memory."
    from shared import memory  # its folder is on the path since fuzz is here

    base = talker("llama")
    bank = TicketBank(
        base,
        {f"t{n}": TunedRows([9, 4], torch.randn(2, 16, generator=torch.Generator().manual_seed(n))) for n in range(8)},
    )
    names = [None, *bank.rows]
    ids = torch.tensor([[1, 9, 4, 5]])
    pair = [Pair("x:1", "t9 t4 t5", "t7")]
    more = dict(generation=Generation(4, 1, 4), progress=False)

    def text(n):
        name = names[n % len(names)]
        if n % 2:
            return translate(base, TOY, pair, Prompt(), name and bank.rows[name], **more)[0].tokens
        with bank.applied([name]):
            made = base.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
            )
        return tuple(made[0, 4:].tolist())

    total, first, warm = round(10_000 * scale), {}, None
    for n in range(total):
        found = text(n)
        faults = [] if first.setdefault(n % (2 * len(names)), found) == found else ["a ticket's text has changed"]
        if n == total // 5:
            warm = memory("RssAnon")
        if n == total - 1 and (grown := memory("RssAnon") - warm) > 8:
            faults.append(f"memory grew by {grown:.0f} MB")
        part.count(faults, f"generation {n}")
    if len({*first.values()}) < 4:
        part.count(["the tickets all say the same: this tests nothing"])


PARTS = {p.__name__: p for p in (kills, signals, races, full, permissions, soak)}


def run(only, seed, scale, acts=()):
    "The tallies of some parts; of kills, signals and races only those of some names."
    found = {}
    with tempfile.TemporaryDirectory(prefix="kslottery-faults-") as folder:
        home = Path(folder)
        fuzz.world(home)
        ticket = toy_ticket(fuzz.tiny_model("llama"), name="base")
        ticket.save(home / "ticket")
        os.environ |= {"KSLOTTERY_CACHE": str(home / "cache"), "HOME": str(home)}
        kslottery.babel._build = slow_build
        kslottery.checkpoints.png = lambda *a, **k: b"png" * 1000  # seconds of drawing
        late = [COMMANDS[name] for name in chosen(COMMANDS, acts)] if {*only} != {"soak"} else []
        for words in late:  # whatever is imported late is there in every fork
            ACTS[0].prepare(home, home / "here")
            with contextlib.chdir(home / "here"):
                done = CliRunner().invoke(kslottery.cli.app, list(words))
            assert done.exit_code == 0, (words, done.stderr, done.exception)
        for name in only:
            part = found[name] = Part(name)
            try:
                PARTS[name](part, home, seed, scale, acts)
            finally:
                part.seconds = time.time() - part.began
                part.show()
    return found


def main(words=None):
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--scale", type=float, default=1.0, help="how many of each, as a part of the full size")
    ask.add_argument("--only", default=",".join(PARTS), help="parts, joined by commas")
    ask.add_argument("--acts", default="", help="of kills, signals and races only these, joined by commas")
    ask.add_argument("--out", type=Path, help="a JSON file for tallies, beside those of tests/fuzz.py")
    given = ask.parse_args(words)
    torch.set_num_threads(1)
    print(f"seed {given.seed}, scale {given.scale:g}", flush=True)
    acts = [name for name in given.acts.split(",") if name]
    parts = run(given.only.split(","), given.seed, given.scale, acts)
    found = {name: part.as_dict() | {"seed": given.seed, "scale": given.scale} for name, part in parts.items()}
    total = {n: sum(part[n] for part in found.values()) for n in ("tried", "failed")}
    print(f"{total['tried']} tried / {total['failed']} failed")
    if given.out:
        fuzz.store(given.out, "faults", found)
    return int(total["failed"] > 0 or not total["tried"])


if __name__ == "__main__":
    sys.exit(main())
