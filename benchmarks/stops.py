"""Mending: which handful of rows stops a real-language model that never stops, and how surely.

python benchmarks/stops.py [--model FOLDER] [--data FOLDER] [--fast] [--out benchmarks/results/stops.json]

The model is en-de-short, its sentences are those of short/ (`make stops`, where KSLOTTERY_MODELS and KSLOTTERY_DATA say
where they are). For each seed all candidates are tuned, compared and one is chosen and certified, as `kslottery stops
--mend` does; then each is measured on the test sentences, which decided nothing. A seed that is in the file already is
taken over. A seed takes about four minutes on one core. With --fast the built-in small world stands in for model and
data, and everything is tiny.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from shared import shared

from kslottery import Generation, Prompt, Recipe, build_world, decompose, load_model, load_pairs, score, translate
from kslottery.core import fingerprint, write_json
from kslottery.rows import weights_fingerprint
from kslottery.stops import MendSettings, mend_stops


@dataclass(frozen=True)
class Sizes:
    "How much of everything."

    train: int = 600
    test: int = 400
    fresh: int = 800
    seeds: tuple[int, ...] = (0, 1, 2)
    prompt: tuple[str, str] = ("explicit", "en-de")
    lr: float = 1e-2
    epochs: int = 2
    batch_size: int = 10
    max_new_tokens: int = 60
    rate: float = 0.95
    fast: bool = False


FAST = Sizes(
    train=40,
    test=6,
    fresh=12,
    seeds=(0,),
    prompt=("babel", "Aldan-Borel"),
    epochs=1,
    max_new_tokens=12,
    rate=0.5,
    fast=True,
)


def plain(interval):
    return [None if x is None else float(x) for x in interval]


class Lab:
    "Model, sentences and sizes."

    def __init__(self, args):
        self.sizes = FAST if args.fast else Sizes()
        if args.fast:
            world = build_world(seed=0, size="small", progress=False)
            model, files = world.folder, {name: world.split(name) for name in ("train", "test", "calibration")}
        else:
            model = args.model or shared("models") / "en-de-short"
            data = args.data or shared("data") / "short"
            files = {name: data / f"{name}.tsv.gz" for name in ("train", "test", "calibration")}
        self.model, self.tokenizer = load_model(model, device="cpu")
        self.prompt, sizes = Prompt(*self.sizes.prompt), self.sizes
        limits = {"train": sizes.train, "test": sizes.test, "calibration": sizes.fresh}
        read = {name: list(load_pairs(files[name], sizes.prompt[1], limit)) for name, limit in limits.items()}
        self.train, self.test, self.fresh = read.values()
        self.generation = Generation(sizes.max_new_tokens, batch_size=50)
        self.base = self.translated(None)

    def translated(self, rows):
        read = (self.model, self.tokenizer, self.test, self.prompt, rows)
        return translate(*read, generation=self.generation, progress=False)

    def facts(self):
        "What the results are of."
        data = {"train": self.train, "test": self.test, "calibration": self.fresh}
        return {
            "settings": json.loads(json.dumps(asdict(self.sizes))),
            "model": {
                "name": Path(self.model.name_or_path).name,
                "fingerprint": weights_fingerprint(self.model),
                "rows": list(self.model.get_input_embeddings().weight.shape),
            },
            "data": {name: fingerprint("".join(p.hash for p in pairs)) for name, pairs in data.items()},
        }

    def measured(self, rows):
        "What the model writes for the test sentences with some rows, and where the gain over the base comes from."
        texts = self.translated(rows)
        found = score(texts, self.test)
        gain = decompose(self.base, texts, self.test, metric="chrf", tokenizer=self.tokenizer)
        parts = {"gain": gain.whole, "content": gain.content, "stopping": gain.stopping}
        return {
            **{name: found[name] for name in ("whole", "first_line", "eos_rate", "mean_length")},
            "verdict": gain.verdict,
            "sentence": gain.sentence,
            **{name: plain(interval) for name, interval in parts.items()},
        }

    def mended(self, seed):
        "One seed: all candidates, the choice, its certificate, and all of them on the test sentences."
        s = self.sizes
        recipe = Recipe(lr_partial=s.lr, epochs_partial=s.epochs, batch_size=s.batch_size, seed=seed, progress=False)
        settings = MendSettings(
            rate=s.rate, delta=0.05 / len(s.seeds), generation=self.generation, seed=seed, progress=False
        )
        started = time.perf_counter()
        made = mend_stops(
            self.model, self.tokenizer, self.train, self.fresh, self.prompt, recipe=recipe, settings=settings
        )
        tested = {one.name: self.measured(one.rows) for one in made.candidates}
        if made.ticket:
            tested["ticket"] = self.measured(made.ticket.rows)
        return {"seconds": round(time.perf_counter() - started), **made.as_dict(), "tested": tested}


def completed(lab, out):
    "The results, seed by seed, after those that are in the file already."
    facts = lab.facts()
    results = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else facts
    if {name: results.get(name) for name in facts} != facts:
        raise ValueError(f"{out} holds another run (settings, model or data): name another file")
    cells = {("base",): lambda: lab.measured(None)}
    cells |= {("seeds", str(seed)): lambda seed=seed: lab.mended(seed) for seed in lab.sizes.seeds}
    for (*above, last), make in cells.items():
        here = results
        for name in above:
            here = here.setdefault(name, {})
        if last not in here:
            here[last] = make()
            print(" / ".join([*above, last]), flush=True)
            if out:
                write_json(out, results)
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fast", action="store_true")
    args = parser.parse_args(argv)
    return completed(Lab(args), args.out)


if __name__ == "__main__":
    main()
