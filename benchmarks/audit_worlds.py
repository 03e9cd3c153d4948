"""The audit in two worlds with a known answer, over seeds.

The tutorial "Is the ticket real?" at its own settings and at the quickstart's rates.

python benchmarks/audit_worlds.py [--seeds 0 1 2] [--runs runs/audit_worlds]
                                  [--out benchmarks/results/audit_worlds.json]

A seed that does not come out as its world was built is kept, with its numbers. A run that is in the folder already is
taken over.
"""

import argparse
import json
from pathlib import Path

import papermill

from kslottery.core import write_json

SETTINGS = {"tutorial": {}, "quickstart rates": {"lr_embed": 1.5e-3, "lr_partial": 1e-2, "epochs": 2}}
CHANNELS = ("instruction", "source", "history", "sentences")
TUTORIALS = Path(__file__).resolve().parent.parent / "nbs" / "tutorials"


def run(tutorial: str, seed: int, folder: Path, **settings) -> dict:
    "The results of one seed of a tutorial, from the folder or from a new run."
    if not (folder / "results.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        parameters = {"seed": seed, "out": str(folder.resolve()), **settings}
        notebook = f"{tutorial}.ipynb"
        papermill.execute_notebook(
            str(TUTORIALS / notebook), str(folder / notebook), parameters, kernel_name="python3", progress_bar=False
        )
    found = json.loads((folder / "results.json").read_text())
    if (found["seed"], found["fast"]) != (seed, False) or any(found["settings"][k] != v for k, v in settings.items()):
        raise ValueError(
            f"{folder} holds another run (seed {found['seed']}, fast: {found['fast']}, {found['settings']}): "
            "name another folder"
        )
    return found


def collect(runs: list[dict], kept=("worlds", "ending_row", "planted", "summary")) -> dict:
    "What is kept of each run, by its seed, and the settings that all of them have in common."
    if any(r["settings"] != runs[0]["settings"] for r in runs):
        raise ValueError("the runs have different settings: run them again")
    seeds = {str(r["seed"]): {k: r[k] for k in kept} for r in runs}
    return {**{k: runs[0][k] for k in ("settings", "sentences", "versions")}, "seeds": seeds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/audit_worlds"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {}
    for name, settings in SETTINGS.items():
        runs = []
        for seed in args.seeds:
            runs.append(run("audit", seed, args.runs / f"{name.replace(' ', '_')}_seed{seed}", **settings))
            for world, r in runs[-1]["worlds"].items():
                numbers = {
                    "stopping": r["decomposition"]["share"],
                    **{c: r["recoveries"][f"only_{c}"] for c in CHANNELS},
                }
                said = ", ".join(
                    f"{k} {'unknown' if v['value'] is None else round(v['value'], 2)}" for k, v in numbers.items()
                )
                built = "as built" if all(r["as_built"].values()) else "NOT as built"
                print(f"{name}, {world} world, seed {seed}: {r['verdict']}; {said}; {built}", flush=True)
        results[name] = collect(runs)
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    main()
