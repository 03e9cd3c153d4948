"""Real language: the scan, the arms, the audit and the certificate on a model in which nothing was planted.

python benchmarks/real.py [--model FOLDER] [--data FOLDER] [--runs runs/real] [--fast]
                          [--out benchmarks/results/real.json]

The model is en-de-short, its sentences are those of short/ (`make real`, where KSLOTTERY_MODELS and KSLOTTERY_DATA say
where they are). A cell that is in the file already is taken over, and what a cell needs of others (trained rows, texts)
lies in the folder of the runs, which is not for others: it holds sentences of the data. The file does not: numbers, ids
and tokens only, and texts of a dozen sentences that are written below. All of it takes about three quarters of an hour
on one core. With --fast the built-in small world stands in for model and data, and everything is tiny.
"""

import argparse
import copy
import itertools
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from peft import LoraConfig, PrefixTuningConfig
from scipy.stats import spearmanr
from shared import shared

from kslottery import (
    AuditSettings,
    Bootstrap,
    CertifySettings,
    Generation,
    Pair,
    Prompt,
    Recipe,
    Translation,
    audit_ticket,
    build_world,
    certify_ticket,
    decompose,
    embed_tune,
    encode_all,
    find_ticket,
    ks_scan,
    load_model,
    load_pairs,
    partial_transfer,
    partial_tune,
    score,
    translate,
)
from kslottery.audit import audit_models, count_matched, jaccard
from kslottery.core import fingerprint, write_json
from kslottery.data import INSTRUCTION, Role, token_counts, token_text
from kslottery.decomposition import simultaneous
from kslottery.evaluation import first_line, paired_bootstrap, whole
from kslottery.ks import critical_value, equal_move_null
from kslottery.lottery import GRADIENT_SENTENCES, gradient_scan
from kslottery.rows import TunedRows, sample_ids, weights_fingerprint
from kslottery.stops import MendSettings, mend_stops
from kslottery.training import Training
from kslottery.tuning import active_ids, full_fine_tune, peft_tune, trainable_parameters

EXAMPLES = (  # ours, in no file of the data
    "The kettle is still warm.",
    "My aunt sells old maps.",
    "We missed the last ferry.",
    "The goat ate my homework.",
    "Is the museum open on Mondays?",
    "Please close the upper window.",
    "She drew a tiny red boat.",
    "Our neighbour plays the cello badly.",
    "The soup needs more pepper.",
    "He forgot where the ladder was.",
    "Nobody believed the old sailor.",
    "I would like two blue pencils.",
)


@dataclass(frozen=True)
class Sizes:
    "How much of everything; the second rate is the high one."

    train: int = 600
    test: int = 400
    calibration: int = 1600
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: tuple[tuple[str, str], ...] = (
        ("explicit", "en-de"),
        ("paraphrase", "en-de"),
        ("explicit", "de-en"),
        ("paraphrase", "de-en"),
    )
    top_k: int = 7
    rates: tuple[float, float] = (2e-3, 8e-3)
    lr_partial: float = 1e-2
    epochs: int = 2
    batch_size: int = 10
    alphas: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.5)
    others: tuple[float, ...] = (3e-4, 3e-3, 1e-1)  # rates of full fine-tuning, LoRA and prefix tuning
    max_new_tokens: int = 60
    epsilons: tuple[float, ...] = (0.03, 0.02)
    samples: int = 1000
    draws: int = 10
    fast: bool = False


FAST = Sizes(
    train=12,
    test=6,
    calibration=20,
    seeds=(0, 1),
    settings=(("babel", "Aldan-Borel"), ("paraphrase", "Aldan-Borel"), ("babel", "Borel-Aldan")),
    top_k=3,
    epochs=1,
    max_new_tokens=12,
    epsilons=(0.5,),
    samples=20,
    draws=1,
    fast=True,
)


@dataclass(frozen=True)
class Lab:
    "What all cells share: model, sentences, sizes, and the folder of what they leave to each other."

    model: object
    tokenizer: object
    files: dict
    sizes: Sizes
    runs: Path

    @cached_property
    def bootstrap(self):
        return Bootstrap(self.sizes.samples)

    @cached_property
    def generation(self):
        return Generation(self.sizes.max_new_tokens, batch_size=50)

    def pairs(self, name, languages):
        return load_pairs(self.files[name], languages, getattr(self.sizes, name))


class Setting:
    "One prompt, one direction, one seed."

    def __init__(self, lab, template, languages, seed):
        self.lab, self.seed, self.sizes, self.languages = lab, seed, lab.sizes, languages
        self.prompt, self.name = Prompt(template, languages), f"{template}, {languages}"
        self.folder = lab.runs / f"{template}-{languages}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train, self.test = lab.pairs("train", languages), lab.pairs("test", languages)
        self.examples = encode_all(lab.tokenizer, self.prompt, self.train)
        self.V = len(lab.model.get_input_embeddings().weight)
        self.counts = token_counts(self.examples, self.V)
        self.in_prompt = token_counts(self.examples, self.V, (*INSTRUCTION, Role.SPECIAL)) > 0

    @property
    def names(self):
        "The arms that this setting has."
        names = [*self.arms()]
        if (self.prompt.template.name, self.languages) != self.sizes.settings[0]:
            return names[:5]
        return names if self.seed == self.sizes.seeds[0] else names[:-3]

    def recipe(self, rate):
        s = self.sizes
        return Recipe(rate, s.epochs, s.lr_partial, s.epochs, s.batch_size, self.seed, progress=False)

    def found(self, name, rate, **words):
        "A ticket; a second call takes the trained rows over."
        ask = partial(find_ticket, self.lab.model, self.lab.tokenizer, self.train, self.prompt)
        return ask(recipe=self.recipe(rate), checkpoint=self.folder / name, **words)

    @cached_property
    def ks(self):
        return self.found("ks", self.sizes.rates[0], top_k=self.sizes.top_k)

    @cached_property
    def high(self):
        return self.found("high", self.sizes.rates[1], alpha=0.05)

    @cached_property
    def gradient(self):
        return self.found("gradient", self.sizes.rates[0], criterion="gradient", top_k=self.sizes.top_k)

    @cached_property
    def words(self):
        "The rows of the sentences' own words, as in the quickstart."
        mine = np.union1d(np.union1d(self.ks.ids, self.gradient.ids), np.flatnonzero(self.in_prompt))
        return np.setdiff1d(active_ids(self.examples), mine)

    @property
    def newline(self):
        return self.lab.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]

    def tuned(self, name, ids):
        place = self.folder / f"{name}.safetensors"
        return partial_tune(self.lab.model, ids, self.examples, self.recipe(self.sizes.rates[0]), checkpoint=place)

    def trainings(self):
        return [Training(r, self.sizes.epochs, self.sizes.batch_size, self.seed, False) for r in self.sizes.others]

    def adapted(self, config, training):
        return peft_tune(self.lab.model, config, self.examples, training)

    def arms(self):
        "Name -> a function that gives rows, or another model: the first five for every setting, the last three once."
        k, scan, seed, (full, lora, prefix) = self.sizes.top_k, lambda: self.ks.scan, self.seed, self.trainings()
        draw = lambda: sample_ids(self.words, k, seed)
        matched = lambda: count_matched(self.counts, self.ks.ids, self.words)
        low_rank = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        virtual = PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM")
        return {
            "base": lambda: None,
            "embed": lambda: self.ks.embed_rows,
            "ks": lambda: self.ks.rows,
            "gradient": lambda: self.gradient.rows,
            "random": lambda: self.tuned("random", draw()),
            "embed_high": lambda: self.high.embed_rows,
            "ks_transfer": lambda: partial_transfer(self.ks.embed_rows, self.ks.ids),
            "alpha_0.05_high": lambda: self.high.rows,
            "noise": lambda: self.ks.rows.noise(self.lab.model, seed),
            "ks_high": lambda: self.tuned("high7", self.high.scan.top(k)),
            "alpha_0.2": lambda: self.tuned("alpha02", scan().select(0.2)),
            "alpha_0.5": lambda: self.tuned("alpha05", scan().select(0.5)),
            "count_matched": lambda: self.tuned("matched", matched()),
            "frequent": lambda: self.tuned("frequent", np.argsort(-self.counts, kind="stable")[:k]),
            "best_row": lambda: self.tuned("best", self.ks.ids[:1]),
            "newline": lambda: self.tuned("newline", [self.newline]),
            "full": lambda: full_fine_tune(self.lab.model, self.examples, full),
            "lora": lambda: self.adapted(low_rank, lora),
            "prefix": lambda: self.adapted(virtual, prefix),
        }

    def said(self, name):
        "What an arm writes for the test sentences, and how many numbers were tuned in which rows."
        path = self.folder / f"{name}.json"
        if not path.exists():
            tuned = self.arms()[name]()
            rows = tuned if isinstance(tuned, TunedRows) else None
            model = self.lab.model if rows is not None or tuned is None else tuned
            texts = self.translated(rows, model=model)
            ids = [] if rows is None else rows.ids.tolist()
            numbers = 0 if tuned is None else trainable_parameters(tuned)
            write_json(path, {"texts": texts, "numbers": numbers, "ids": ids})
        kept = json.loads(path.read_text(encoding="utf-8"))
        return [Translation(i, text, end, tuple(new)) for i, text, end, new in kept.pop("texts")], kept

    def translated(self, rows, pairs=None, model=None):
        read = (model or self.lab.model, self.lab.tokenizer, pairs or self.test, self.prompt, rows)
        return translate(*read, generation=self.lab.generation, progress=False)


def plain(interval):
    return [None if x is None or not np.isfinite(x) else float(x) for x in interval]


def scanned(setting, ticket, rate, all_rows=False):
    "The scan at one rate: how many pass, how far the best is away, which they are, and what the null finds of them."
    lab, scan, sizes = setting.lab, ticket.scan, setting.sizes
    matrix, rows = lab.model.get_input_embeddings().weight.detach(), ticket.embed_rows
    before, after, active = matrix[rows.ids], rows.weight.detach(), rows.ids.numpy()
    spread, move = before.std(dim=1).numpy(), (after - before).pow(2).mean(dim=1).sqrt().numpy()
    nulls = [active[equal_move_null(before, after, n).top(2 * sizes.top_k)] for n in range(sizes.draws)]
    shares = {
        k: [float(np.isin(scan.top(k), null[:k]).mean()) for null in nulls] for k in (sizes.top_k, 2 * sizes.top_k)
    }
    top, quantiles = scan.top(sizes.top_k), (0, 0.02, 0.5, 0.98, 1)
    agree = lambda x: float(spearmanr(scan.statistic[active], x).statistic)
    found = {
        "rate": rate,
        "active": len(active),
        "d": scan.d,
        "largest": float(scan.statistic.max()),
        "critical": {f"{a:g}": critical_value(a, scan.d) for a in sizes.alphas},
        "passing": {f"{a:g}": scan.select(a).tolist() for a in sizes.alphas},
        "bonferroni": len(scan.select(0.05, "bonferroni")),
        "top": top.tolist(),
        "tokens": token_text(lab.tokenizer, top),
        "statistic": scan.statistic[top].tolist(),
        "count": setting.counts[top].tolist(),
        "in_prompt": setting.in_prompt[top].tolist(),
        "spread_of_top": spread[np.searchsorted(active, top)].tolist(),
        "null": {str(k): [float(np.mean(s)), min(s), max(s)] for k, s in shares.items()},
        "chance": {str(k): k / len(active) for k in shares},
        "spread": np.quantile(spread, quantiles).tolist(),
        "move": np.quantile(move, quantiles).tolist(),
        "rank_correlation": {"spread": agree(spread), "count": agree(setting.counts[active]), "move": agree(move)},
    }
    if all_rows:  # for the figure: id, k = d * D and count of each
        columns = {"id": active, "k": np.rint(scan.statistic[active] * scan.d), "count": setting.counts[active]}
        found["rows"] = {name: " ".join(f"{x:.0f}" for x in column) for name, column in columns.items()}
    return found


def measured(setting, name):
    "One arm: its scores with intervals, what was tuned, and where its gain comes from."
    lab, (texts, kept), (base, _) = setting.lab, setting.said(name), setting.said("base")
    systems, found = {"base": base, name: texts}, score(texts, setting.test)
    tried = {
        rule: paired_bootstrap(systems, setting.test, rule, samples=lab.sizes.samples)[name]
        for rule in ("whole", "first_line")
    }
    gain = decompose(base, texts, setting.test, tokenizer=lab.tokenizer, bootstrap=lab.bootstrap)
    few = kept["ids"][:20]
    return {
        "rows": len(kept["ids"]),
        "tuned_numbers": kept["numbers"],
        "tokens": token_text(lab.tokenizer, few),
        "median_count": float(np.median(setting.counts[kept["ids"]])) if few else None,
        "whole": found["whole"],
        "first_line": found["first_line"],
        "half_width": {rule: {metric: m["ci"] for metric, m in tried[rule].items()} for rule in tried},
        "eos_rate": found["eos_rate"],
        "mean_length": found["mean_length"],
        "verdict": gain.verdict,
        "sentence": gain.sentence,
        "gain": plain(gain.whole),
        "stopping": plain(gain.stopping),
        "content": plain(gain.content),
        "share": plain(gain.share),
        "rule": gain.rule,
    }


def compared(settings, names):
    "Differences in BLEU to base, Embed Tuning and KS, the mean over seeds; the intervals of a kind hold together."
    systems, n = {}, len(settings)
    for (i, setting), name, rule in itertools.product(enumerate(settings), names, ("whole", "first_line")):
        systems[f"{name} {rule} {i}"] = (setting.said(name)[0], rule)
    found = {}
    for other, rule in itertools.product(("base", "embed", "ks"), ("whole", "first_line")):
        wanted = {
            name: {f"{one} {rule} {i}": sign / n for one, sign in ((name, 1), (other, -1)) for i in range(n)}
            for name in names
            if name != other
        }
        used = {name: systems[name] for weights in wanted.values() for name in weights}
        tested = simultaneous(used, wanted, settings[0].test, bootstrap=settings[0].lab.bootstrap)
        found.setdefault(other, {})[rule] = {name: plain(interval) for name, interval in tested.items()}
    return found


def priced(setting):
    "What choosing costs, as a share of Embed Tuning and its scan (seconds against seconds, on one machine)."
    model, examples, seconds = setting.lab.model, setting.examples, []
    weight = model.get_input_embeddings().weight
    ks_scan(weight, weight)  # compiled before the clock runs
    started = time.perf_counter()
    rows = embed_tune(model, examples, setting.recipe(setting.sizes.rates[0]))
    ks_scan(weight, rows.matrix(model))
    whole = time.perf_counter() - started
    for _ in range(5):
        started = time.perf_counter()
        gradient_scan(model, examples[:GRADIENT_SENTENCES])
        seconds.append(time.perf_counter() - started)
    return {"gradient": float(np.median(seconds)) / whole}


def stable(seeds, others):
    "How much two choices have in common (Jaccard): over seeds, rates, prompts, directions, criteria, ten sentences."
    first, k = seeds[0], seeds[0].sizes.top_k
    both = lambda a, b: jaccard(a.ids, b.ids)
    pairs = list(itertools.combinations(seeds, 2))
    tens = [
        gradient_scan(first.lab.model, first.examples[n : n + GRADIENT_SENTENCES]).top(k)
        for n in range(0, min(5 * GRADIENT_SENTENCES, len(first.examples)), GRADIENT_SENTENCES)
    ]
    many = gradient_scan(first.lab.model, first.examples[: 10 * GRADIENT_SENTENCES]).top(k)
    return {
        "seeds_ks": [both(a.ks, b.ks) for a, b in pairs],
        "seeds_high": [jaccard(a.high.scan.top(k), b.high.scan.top(k)) for a, b in pairs],
        "seeds_high_alpha_0.05": [both(a.high, b.high) for a, b in pairs],
        "rates": [jaccard(s.ks.ids, s.high.scan.top(k)) for s in seeds],
        "ks_and_gradient": [both(s.ks, s.gradient) for s in seeds],
        "gradient_other_sentences": [jaccard(a, b) for a, b in itertools.combinations(tens, 2)],
        "gradient_ten_times_as_many": [jaccard(a, many) for a in tens],
        "other_settings": {
            s.name: {"ks": both(first.ks, s.ks), "gradient": both(first.gradient, s.gradient)} for s in others
        },
        "gradient_tokens": token_text(first.lab.tokenizer, first.gradient.ids),
        "gradient_in_prompt": first.in_prompt[first.gradient.ids].tolist(),
        "gradient_count": first.counts[first.gradient.ids].tolist(),
    }


def elsewhere(first, other):
    "The first setting's ticket, read under another prompt (and no other language)."
    texts = other.translated(first.ks.rows)
    found, base = score(texts, other.test), other.said("base")[0]
    gain = decompose(base, texts, other.test, tokenizer=other.lab.tokenizer, bootstrap=other.lab.bootstrap)
    facts = {"whole": found["whole"], "first_line": found["first_line"], "eos_rate": found["eos_rate"]}
    return {"of": first.name, "under": other.name, **facts, "gain": plain(gain.whole), "verdict": gain.verdict}


def audited(setting, ticket, name):
    "The audit of a ticket, without its texts."
    settings = AuditSettings(
        fast=setting.sizes.fast,
        draws=1,
        generation=setting.lab.generation,
        bootstrap=setting.lab.bootstrap,
        progress=False,
    )
    lab = setting.lab
    own = {"model": lab.model, "tokenizer": lab.tokenizer, "out": setting.folder / f"audit-{name}"}
    record = audit_ticket(ticket, setting.test, train=setting.train, settings=settings, **own).as_dict()
    kept = ("label", "name", "size", "channel", "check", "against", "eos_rate", "recovery", "median_count")
    arms = {
        key: {n: a[n] for n in kept} | {rule: a[rule]["bleu"] for rule in ("whole", "first_line")}
        for key, a in record["arms"].items()
    }
    parts = ("whole", "content", "stopping", "share", "verdict", "metric", "rule", "sentence", "n")
    split = {n: record["decomposition"][n] for n in parts}
    return {n: record[n] for n in ("verdict", "sentence", "lines", "checks", "opportunity")} | {
        "arms": arms,
        "decomposition": split,
    }


ANYTHING = (
    "full",
    "lora",
    "embed",
    "ks",
    "one_row",
    "mended",
)  # the last two are chosen below, without a test sentence
CHOOSING = 100  # so many tuning sentences say which single row is best
FRESH = 800  # so many sentences are for the certificate of a mending


def one_row(setting):
    "The best of the single rows that an audit tunes alone: of the ticket's first, BOS and the line break."
    ids, sample = [*setting.ks.ids[:4].tolist(), setting.lab.tokenizer.bos_token_id, setting.newline], setting.train
    tuned = {i: setting.tuned(f"one-{i}", [i]) for i in dict.fromkeys(ids) if setting.counts[i]}
    said = {i: setting.translated(rows, sample[:CHOOSING]) for i, rows in tuned.items()}
    scores = {i: score(texts, sample[:CHOOSING])["whole"]["bleu"] for i, texts in said.items()}
    tokens = dict(zip(tuned, token_text(setting.lab.tokenizer, [*tuned])))
    best = max(scores, key=scores.__getitem__)
    return tuned[best], {"chosen_from": {tokens[i]: scores[i] for i in scores}, "tokens": [tokens[best]]}


def mended(setting):
    "What `kslottery stops --mend` makes of the model."
    lab, sizes = setting.lab, setting.sizes
    few = {"rate": 0.5} if sizes.fast else {}
    made = mend_stops(
        lab.model,
        lab.tokenizer,
        setting.train,
        lab.pairs("calibration", setting.languages)[:FRESH],
        setting.prompt,
        recipe=setting.recipe(sizes.rates[0]),
        settings=MendSettings(generation=lab.generation, seed=setting.seed, progress=False, **few),
    )
    rows = made.ticket.rows if made.ticket else TunedRows.of(lab.model, [])
    tried = {c.name: {"tokens": c.tokens, "ends": c.ends, "result": c.result} for c in made.candidates}
    facts = {"said": made.sentence, "mode": rows.mode, "tried": tried}
    return rows, facts | {"tokens": token_text(lab.tokenizer, rows.ids.tolist())}


def door(setting, name):
    "One tuning, audited as any tuned model is: rows are written into a copy of the model."
    lab, facts = setting.lab, {}
    if name in ("one_row", "mended"):
        tuned, facts = {"one_row": one_row, "mended": mended}[name](setting)
    else:
        tuned = setting.arms()[name]()
    numbers = trainable_parameters(tuned)
    rows = tuned if isinstance(tuned, TunedRows) else ()
    if isinstance(tuned, TunedRows):
        tuned = rows.write(copy.deepcopy(lab.model)) if len(rows) else lab.model
    settings = AuditSettings(generation=lab.generation, bootstrap=lab.bootstrap, progress=False)
    own = {"train": setting.train, "tokenizer": lab.tokenizer, "out": setting.folder / f"any-{name}"}
    found = audit_models(lab.model, tuned, setting.test, setting.prompt, settings=settings, **own)
    scores, gain = found.scores["tuned"], found.decomposition
    return {
        "rows": len(rows),
        "tuned_numbers": numbers,
        **facts,
        **{n: scores[n] for n in ("whole", "first_line", "eos_rate", "mean_length")},
        "verdict": found.verdict,
        "sentence": found.sentence,
        **{name: plain(part) for name, part in (("gain", gain.whole), ("stopping", gain.stopping))},
        "content": plain(gain.content),
    }


def side_by_side(setting):
    "Differences in BLEU of these tunings, to the base and to full fine-tuning; the intervals of a kind hold together."

    def texts(name, key):
        kept = json.loads((setting.folder / f"any-{name}" / "arms" / f"{key}.json").read_text(encoding="utf-8"))
        return [Translation(i, text, end, tuple(new)) for i, text, end, new in kept["translations"]]

    said = {"base": texts(ANYTHING[0], "base")} | {name: texts(name, "tuned") for name in ANYTHING}
    found = {}
    for other, rule in itertools.product(("base", "full"), ("whole", "first_line")):
        wanted = {name: {name: 1, other: -1} for name in said if name != other}
        systems = {name: (one, rule) for name, one in said.items()}
        tested = simultaneous(systems, wanted, setting.test, bootstrap=setting.lab.bootstrap)
        found.setdefault(other, {})[rule] = {name: plain(interval) for name, interval in tested.items()}
    return found


def certified(setting, ticket, epsilon, ladder, reference=None):
    "The certificates of a ticket at one tolerance; all certificates of the file share a delta of 0.05."
    lab, delta = setting.lab, 0.05 / (3 * len(setting.sizes.epsilons))
    settings = CertifySettings(ladder=ladder, generation=lab.generation, progress=False)
    fresh = lab.pairs("calibration", setting.languages)
    own = {"model": lab.model, "tokenizer": lab.tokenizer, "reference": reference}
    made = certify_ticket(ticket, fresh, epsilon=epsilon, delta=delta, settings=settings, **own)
    facts = ("epsilon", "extraction", "loss", "needed", "spent", "method")
    return [
        {
            **{n: getattr(c, n) for n in ("kind", "holds", "bound", "confidence", "n", "unit", "size", "headline")},
            "path": [*c.path],
            "facts": {n: c.facts.get(n) for n in facts},
        }
        for c in made
    ]


def shown(setting):
    "What some arms write for sentences of ours: first lines, as what follows may be a sentence of the data by heart."
    ours = EXAMPLES if not setting.sizes.fast else [pair.source for pair in setting.test[:2]]
    pairs = [Pair(f"ours:{n}", text, "-") for n, text in enumerate(ours, 1)]
    rows = {"base": None, "embed": setting.ks.embed_rows, "ks": setting.ks.rows, "gradient": setting.gradient.rows}
    rows["random"] = setting.arms()["random"]()
    texts = {name: setting.translated(one, pairs) for name, one in rows.items()}
    cut = lambda said: {"text": first_line(said.text), "more": first_line(said.text) != whole(said.text)}
    return [{"source": p.source} | {name: cut(said[n]) for name, said in texts.items()} for n, p in enumerate(pairs)]


def cells(lab):
    "Where in the file a cell stands -> a function that makes it, in an order in which each finds what it needs."
    sizes = lab.sizes
    made = {}

    def at(template, languages, seed):
        key = template, languages, seed
        made.setdefault(key, None)
        made[key] = made[key] or Setting(lab, *key)
        return made[key]

    (main, *rest), first = sizes.settings, sizes.seeds[0]
    seeds = lambda: [at(*main, seed) for seed in sizes.seeds]
    others = lambda: [at(*setting, first) for setting in rest]
    probe = at(*main, first)
    names = probe.names
    once, five = names[-3:], names[:5]
    yield ("versions",), lambda: probe.ks.provenance.versions
    yield ("price",), lambda: priced(probe)
    for seed in sizes.seeds:
        here = partial(at, *main, seed)
        for rate, name in zip(sizes.rates, ("ks", "high")):
            make = lambda h=here, n=name, r=rate, a=seed == first: scanned(h(), getattr(h(), n), r, a)
            yield ("scans", f"{rate:g}", str(seed)), make
        for name in here().names:
            yield ("arms", probe.name, str(seed), name), lambda h=here, n=name: measured(h(), n)
    yield ("differences", probe.name), lambda: compared(seeds(), names[:-3])
    yield ("differences_once", probe.name), lambda: compared([probe], [*five, *once])
    yield ("examples",), lambda: shown(probe)
    for setting in rest:
        here = partial(at, *setting, first)
        label = ", ".join(setting)
        yield ("scans_elsewhere", label), lambda h=here: scanned(h(), h().ks, sizes.rates[0])
        for name in five:
            yield ("arms", label, str(first), name), lambda h=here, n=name: measured(h(), n)
        yield ("differences", label), lambda h=here: compared([h()], five)
    yield ("stability",), lambda: stable(seeds(), others())
    yield ("read_elsewhere",), lambda: elsewhere(probe, at(*rest[0], first))
    yield ("audits", "ks"), lambda: audited(probe, probe.ks, "ks")
    yield ("audits", "gradient"), lambda: audited(probe, probe.gradient, "gradient")
    for name in ANYTHING:
        yield ("anything", "arms", name), lambda n=name: door(probe, n)
    yield ("anything", "differences"), lambda: side_by_side(probe)
    for epsilon in sizes.epsilons:
        yield (
            ("certificates", "ks", "transfer", f"{epsilon:g}"),
            lambda e=epsilon: certified(probe, probe.ks, e, "transfer"),
        )
        for name in ("ks", "gradient"):
            yield (
                ("certificates", name, "own rows", f"{epsilon:g}"),
                lambda e=epsilon, n=name: certified(probe, getattr(probe, n), e, "none", probe.ks.embed_rows),
            )


def laboratory(args):
    "Model and sentences: the shared ones, or with --fast the built-in small world."
    if args.fast:
        world = build_world(seed=0, size="small", progress=False)
        model, files = world.folder, {name: world.split(name) for name in ("train", "test", "calibration")}
    else:
        model = args.model or shared("models") / "en-de-short"
        data = args.data or shared("data") / "short"
        files = {name: data / f"{name}.tsv.gz" for name in ("train", "test", "calibration")}
    loaded, tokenizer = load_model(model, device="cpu")
    return Lab(loaded, tokenizer, files, FAST if args.fast else Sizes(), args.runs)


def completed(lab, out):
    "The results, cell by cell, after those that are in the file already."
    fresh = lambda name: lab.pairs(name, lab.sizes.settings[0][1])
    facts = {
        "settings": json.loads(json.dumps(asdict(lab.sizes))),
        "model": {
            "name": Path(lab.model.name_or_path).name,
            "fingerprint": weights_fingerprint(lab.model),
            "parameters": sum(p.numel() for p in lab.model.parameters()),
            "rows": list(lab.model.get_input_embeddings().weight.shape),
        },
        "data": {name: fingerprint("".join(p.hash for p in fresh(name))) for name in lab.files},
    }
    results = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else facts
    if {name: results.get(name) for name in facts} != facts:
        raise ValueError(f"{out} holds another run (settings, model or data): name another file")
    started = time.perf_counter()
    for (*above, last), make in cells(lab):
        here = results
        for name in above:
            here = here.setdefault(name, {})
        if last not in here:
            here[last] = make()
            print(f"{time.perf_counter() - started:6.0f} s  {' / '.join([*above, last])}", flush=True)
            if out:
                write_json(out, results)
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fast", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as spare:
        args.runs = args.runs or Path(spare if args.fast else "runs/real")
        return completed(laboratory(args), args.out)


if __name__ == "__main__":
    main()
