"""How often the verdict is wrong at the boundary of each word, how often it is found, and what its intervals miss.

python benchmarks/verdict.py [--runs 2000] [--sizes 20 50 100 200] [--samples 1000] [--worlds NAME ...]
                             [--corpus FOLDER] [--out benchmarks/results/verdict.json]

Three experiments, each with sentences that are independent and with documents of 4 that are given as groups. In
*worlds*, every sentence has a value for each text that the verdict compares, in points of a metric that is a mean, from
a population whose gain and shares are known exactly. In *arms*, six arms stand each at exactly half of the ticket's
gain. In *BLEU*, the counts of real sentences (spa.txt of NTREX) are sampled, of translations that were spoilt and made
to ramble until exactly half of the gain is stopping; these cells need --corpus, a folder with that file.

A cell that is in the file already, with as many runs, is taken over. All of them take about fifteen minutes; a fast
size is --runs 50 --samples 200 --sizes 20 100.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from kslottery import Translation
from kslottery.core import write_json
from kslottery.decomposition import Bootstrap, _counted, _jackknife, _judged, _shown, _together, _variants, share

DOCUMENT = 4  # sentences
FIRST = 50  # samples
SMALL = "no gain, within delta"  # the stronger of the two sentences that say "no gain"
WHERE = ("stopping", "content", "mixed")
SYSTEMS = ("base", "tuned", "cut", "passage", "base line", "tuned line")


@dataclass(frozen=True)
class World:
    "A population: what is gained, which words are false there, and which word is right."

    gain: float = 30.0
    forced: float = 0.5  # the share of stopping by the forced stop
    line: float | None = None  # by the first line, with errors of its own; None: the two rules see the same
    new: float | None = None  # the share of the gain over the closest passage; None: as much as is content
    changed: float = 1.0  # how many sentences the tuned model changes at all
    losses: float = 0.0  # this share of the sentences loses, the others gain as much; the mean stays
    error: float = 5.0  # points, of each effect
    false: tuple[str, ...] = ()
    right: str = "cannot tell"


WORLDS = {
    "half": World(false=("stopping", "content"), right="mixed"),
    "half, the rules apart": World(line=0.5, false=("stopping", "content"), right="mixed"),
    "half, 30% changed": World(12, changed=0.3, false=("stopping", "content"), right="mixed"),
    "half, 5% changed": World(2, changed=0.05, false=("stopping", "content"), right="mixed"),
    "stopping a fifth": World(40, 0.2, false=("stopping", "mixed"), right="content"),
    "content a fifth": World(40, 0.8, false=("content", "mixed"), right="stopping"),
    "half new": World(40, 0.0, new=0.5, false=("stopping", "content")),
    "a fifth new": World(40, 0.5, new=0.2, false=("stopping", "content", "mixed")),
    "no gain": World(0, false=(*WHERE, "a loss", "negligible"), right="no gain"),
    "no gain, rare losses": World(0, losses=0.1, false=(*WHERE, "a loss", "negligible"), right="no gain"),
    "delta gained": World(1, error=2, false=("no gain", SMALL, "negligible", "a loss")),
    "delta lost": World(-1, error=2, false=(*WHERE, SMALL, "negligible"), right="a loss"),
    "all stopping": World(forced=1.0, false=("content", "mixed"), right="stopping"),
    "all content": World(forced=0.0, false=("stopping", "mixed"), right="content"),
    "six tenths": World(forced=0.6, false=("content",), right="mixed"),
    "a loss of 5": World(-5, false=(*WHERE, SMALL, "negligible"), right="a loss"),
    "half of delta": World(0.5, 1.0, changed=0.2, error=1, false=(*WHERE, "a loss"), right="negligible"),
}


def errors(n, size, rng, draw):
    "Values of mean and variance as drawn; in documents, half of the variance is common to a document's sentences."
    own, common = draw(rng, n), draw(rng, n)[np.arange(n) // size]
    mean, rho = draw.mean, 0.5 * (size > 1)
    return mean + np.sqrt(1 - rho) * (own - mean) + np.sqrt(rho) * (common - mean)


def normal(rng, n):
    return rng.normal(size=n)


def exponential(rng, n):
    return rng.exponential(size=n)


normal.mean, exponential.mean = 0.0, 1.0


def drawn(world, n, size, rng):
    "Values of n sentences, (n, systems), skewed and different from sentence to sentence."
    noise = lambda scale: scale * errors(n, size, rng, normal)
    touched = errors(n, size, rng, normal) < norm.ppf(world.changed)
    weight = touched * errors(n, size, rng, exponential) / world.changed  # of mean 1
    if world.losses:
        lost = errors(n, size, rng, normal) < norm.ppf(world.losses)
        effect = world.gain + 5 * (1 - lost / world.losses)
    else:
        effect = world.gain * weight
    part = lambda share: share * effect + touched * noise(world.error)
    base, base_line = 40 + noise(10), 30 + noise(10)
    cut = base + part(world.forced)
    tuned = cut + part(1 - world.forced)
    passage = cut if world.new is None else tuned - part(world.new)
    if world.line is None:
        return np.stack([base, tuned, cut, passage, cut, tuned], 1)
    return np.stack([base, tuned, cut, passage, base_line, base_line + part(1 - world.line)], 1)


def means(sums):
    return sums[:, 0] / sums[:, 1]


def measured(values, names, size):
    "What `decompose` measures of a metric that is a mean of these values."
    counts = np.stack([values, np.ones_like(values)], 2)
    return _jackknife({s: (counts[:, i], values[:, i, None], means) for i, s in enumerate(names)}, units(values, size))


def units(values, size):
    return np.arange(len(values)) // size


class Said(NamedTuple):
    "What came out of one sample."

    word: str
    missed: list[str]  # printed intervals that do not hold the truth
    known: bool  # whether a share is printed
    half: str  # what is surely more than half of the gain, whether or not it is called so


def said(look, truth, bootstrap):
    "The verdict on one sample, whose truth is (gain, content by rule)."
    word, sentence, found, _ = _judged(look, 1.0, 0, False, bootstrap)
    if word == "no gain" and "within" in sentence:
        word = SMALL
    rule, (gain, contents) = _shown(found), truth
    stopping, content = found[f"{rule}: stopping"], found[f"{rule}: content"]
    true = {"gain": gain, "content": contents[rule], "stopping": gain - contents[rule]}
    printed = {"gain": found["gain"], "content": content, "stopping": stopping}
    of_it = share(stopping, content, found["gain"])
    if of_it.value is not None:
        printed["share"], true["share"] = of_it, true["stopping"] / gain if gain else np.inf
    missed = [k for k, i in printed.items() if not i.low - 1e-6 <= true[k] <= i.high + 1e-6]
    halves = [found[f"{rule}: half"] for rule in contents]
    stops, tells = any(h.low > 0 for h in halves), all(h.high < 0 for h in halves)
    return Said(word, missed, of_it.value is not None, "stopping" if stops else "content" if tells else "")


def cell(name, n, size, runs, bootstrap, seed=0):
    "How often each word was said, and in how many runs an interval missed."
    world, rng = WORLDS[name], np.random.default_rng([seed, n, size, *name.encode()])
    line = world.forced if world.line is None else world.line
    truth = world.gain, {"forced stop": world.gain * (1 - world.forced), "first line": world.gain * (1 - line)}
    samples = (measured(drawn(world, n, size, rng), SYSTEMS, size) for _ in range(runs))
    return summed([said(look, truth, bootstrap) for look in samples], world.false, world.right)


def summed(found, false, right):
    words, first = Counter(s.word for s in found), Counter(s.word for s in found[:FIRST])
    missed, halves = Counter(k for s in found for k in s.missed), Counter(s.half for s in found)
    return {
        "words": dict(words.most_common()),
        "false": sum(words[w] for w in false),
        "right": sum(words[w] for w in (right, SMALL if right == "no gain" else "")),
        "over half": {part: halves[part] for part in ("stopping", "content")},
        "missed": {"any": sum(bool(s.missed) for s in found), **missed},
        "shares": sum(s.known for s in found),
        "first": dict(first.most_common()),  # of the first samples, so that a few can be made again and held against it
    }


def arms(n, size, runs, bootstrap, seed=0, grouped=True):
    "Six arms at exactly half of a gain of 30: how often any is said to do at least half, or less."
    rng, names = np.random.default_rng([seed, n, size]), ("base", "tuned", *"abcdef")
    half = {arm: {arm: 1.0, "base": -0.5, "tuned": -0.5} for arm in "abcdef"}
    same = less = 0
    for _ in range(runs):
        effect = 30 * errors(n, size, rng, exponential)
        base = 40 + 10 * errors(n, size, rng, normal)
        noise = lambda: 5 * errors(n, size, rng, normal)
        values = [base, base + effect + noise(), *(base + effect / 2 + noise() for _ in half)]
        found = _together(measured(np.stack(values, 1), names, size if grouped else 1), half, bootstrap).values()
        same += any(i.low > 0 for i in found)
        less += any(i.high < 0 for i in found)
    return {"words": {"does at least half": same, "does less": less}, "false": max(same, less)}


@cache
def corpus(folder):
    "Real sentences: their references and, for each, two spoilt translations and words to ramble on with."
    references = (Path(folder) / "spa.txt").read_text(encoding="utf-8").splitlines()
    rng, words = np.random.default_rng(0), np.array(" ".join(references).split())
    rate = np.clip(rng.normal(0, 0.15, len(references) // DOCUMENT + 1), -0.2, 0.2)[units(references, DOCUMENT)]

    def spoilt(share):
        chance = share + rate
        wrong = lambda text, p: " ".join(rng.choice(words) if rng.random() < p else w for w in text.split())
        return [wrong(text, p) for text, p in zip(references, chance)]

    more = [" ".join(rng.choice(words, rng.integers(10, 60))) for _ in references]
    return references, spoilt(0.42), spoilt(0.3), more, rng.permutation(len(references))


@cache
def population(folder, rambling):
    "What BLEU counts of each text of each sentence if this share of the base's texts rambles on, on its line or not."
    references, before, after, more, order = corpus(folder)
    rambles = order < rambling * len(order)
    texts = [f"{b}{' ' if i % 2 else chr(10)}{m}" if r else b for i, (b, m, r) in enumerate(zip(before, more, rambles))]
    base, tuned = ([Translation(str(i), t, True) for i, t in enumerate(said)] for said in (texts, after))
    variants, _ = _variants(base, tuned, None)
    wholes = {"base": base, "tuned": tuned, "cut": variants["cut"], "passage": variants["passage"]}
    systems = {k: (v, "whole") for k, v in wholes.items()}
    systems |= {"base line": (base, "first_line"), "tuned line": (tuned, "first_line")}
    return {k: _counted(*system, references, "bleu") for k, system in systems.items()}


def true_split(counted):
    "The gain of the whole population, and its content by each rule."
    base, tuned, cut, _, base_line, tuned_line = (scored(c.sum(0)[None])[0] for c, _, scored in counted.values())
    return tuned - base, {"forced stop": tuned - cut, "first line": tuned_line - base_line}


@cache
def half_stopping(folder):
    "The share of rambling texts at which half of the gain is stopping by the rule that sees more of it."
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        gain, contents = true_split(population(folder, middle))
        low, high = (middle, high) if gain - min(contents.values()) < gain / 2 else (low, middle)
    return low  # at most half, by a hair


def bleu(folder, n, size, runs, bootstrap, seed=0):
    "Samples of the corpus, by sentence or by document, with BLEU."
    counted, rng = population(folder, half_stopping(folder)), np.random.default_rng([seed, n, size])
    truth, found = true_split(counted), []
    for _ in range(runs):
        chosen = some(counted, n, size, rng)
        taken = {k: (counts[chosen], seen[chosen], scored) for k, (counts, seen, scored) in counted.items()}
        found.append(said(_jackknife(taken, units(chosen, size)), truth, bootstrap))
    return {
        **summed(found, ("stopping", "content"), "mixed"),
        "truth": [float(truth[0]), *map(float, truth[1].values())],
    }


def bleu_without_gain(folder, n, size, runs, bootstrap, seed=0):
    "The same with base and tuned model changed over in half of the units, so that neither is better; none rambles."
    counted, rng = population(folder, 0.0), np.random.default_rng([seed, n, size])
    (one, _, scored), (other, _, _), found = counted["base"], counted["tuned"], []
    for _ in range(runs):
        chosen = some(counted, n, size, rng)
        swap = np.repeat(rng.random(n // size) < 0.5, size)[:, None]
        base, tuned = np.where(swap, other[chosen], one[chosen]), np.where(swap, one[chosen], other[chosen])
        taken = {k: (v, v, scored) for k, v in zip(SYSTEMS, (base, tuned, base, base, base, tuned))}
        found.append(
            said(_jackknife(taken, units(chosen, size)), (0.0, {"forced stop": 0.0, "first line": 0.0}), bootstrap)
        )
    return summed(found, (*WHERE, "a loss", "negligible"), "no gain")


def some(counted, n, size, rng):
    "The numbers of n sentences of the corpus, drawn as documents of this size."
    documents = len(counted["base"][0]) // size
    return (rng.integers(0, documents, n // size)[:, None] * size + np.arange(size)).ravel()


def cells(args):
    "Name, n and size of every cell, and what fills it."
    for size in (1, DOCUMENT):
        for n in args.sizes:
            for world in args.worlds:
                yield world, n, size, lambda w=world, n=n, size=size: cell(w, n, size, args.runs, args.bootstrap)
            yield "six arms", n, size, lambda n=n, size=size: arms(n, size, args.runs, args.bootstrap)
            if args.corpus:
                real = (str(args.corpus), n, size, args.runs, args.bootstrap)
                yield "BLEU, half", n, size, lambda real=real: bleu(*real)
                yield "BLEU, no gain", n, size, lambda real=real: bleu_without_gain(*real)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 100, 200])
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/verdict.json"))
    args = parser.parse_args()
    args.bootstrap = Bootstrap(args.samples)
    done = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    for world, n, size, fill in cells(args):
        asked = {"world": world, "n": n, "size": size, "runs": args.runs, "samples": args.samples}
        if any(asked.items() <= found.items() for found in done):
            continue
        done.append({**asked, **fill()})
        write_json(args.out, done)
        print(f"{world:22s} n={n:3d} documents of {size}: {done[-1]}", flush=True)


if __name__ == "__main__":
    main()
