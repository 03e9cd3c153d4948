"""The audit in two worlds with a known answer, over seeds: the tutorial "Is the ticket real?" run for each seed, and its numbers in one file.

python benchmarks/audit_worlds.py [--seeds 0 1 2] [--runs runs/audit_worlds] [--out benchmarks/results/audit_worlds.json]

A seed that does not come out as its world was built is kept, with its numbers. A run that is in the folder already is taken over.
"""

import argparse
import json
from pathlib import Path

import papermill

from kslottery.core import write_json

TUTORIAL = Path(__file__).resolve().parent.parent / "nbs" / "tutorials" / "audit.ipynb"


def run(seed: int, folder: Path) -> dict:
    "The results of one seed, from the folder or from a new run of the tutorial."
    if not (folder / "results.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        parameters = {"seed": seed, "out": str(folder.resolve())}
        papermill.execute_notebook(str(TUTORIAL), str(folder / "audit.ipynb"), parameters, kernel_name="python3", progress_bar=False)
    found = json.loads((folder / "results.json").read_text())
    if (found["seed"], found["fast"]) != (seed, False):
        raise ValueError(f"{folder} holds a run of seed {found['seed']}{' at the fast size' if found['fast'] else ''}, not of seed {seed}: name another folder")
    return found


def collect(runs: list[dict]) -> dict:
    "The numbers of some runs, and which of them came out as built."
    if any(r["settings"] != runs[0]["settings"] for r in runs):
        raise ValueError("the runs have different settings: run them again")
    as_built = {name: {str(r["seed"]): r["worlds"][name]["as_built"] for r in runs} for name in runs[0]["worlds"]}
    shared = ("settings", "versions", "sentences")
    return {
        **{k: runs[0][k] for k in shared},
        "as_built": as_built,
        "seeds": {str(r["seed"]): {k: v for k, v in r.items() if k not in (*shared, "seed", "fast")} for r in runs},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/audit_worlds"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = collect([run(seed, args.runs / f"seed{seed}") for seed in args.seeds])
    for name, seeds in results["as_built"].items():
        for seed, found in seeds.items():
            world = results["seeds"][seed]["worlds"][name]
            share, channels = world["decomposition"]["share"]["value"], {c: world["recoveries"][f"only_{c}"]["value"] for c in ("instruction", "source", "history", "sentences")}
            numbers = ", ".join(f"{k} {'unknown' if v is None else f'{v:.2f}'}" for k, v in {"share of stopping": share, **channels}.items())
            print(f"{name} world, seed {seed}: {world['verdict']}; {numbers}; {'as built' if all(found.values()) else f'NOT as built: {found}'}")
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    main()
