"""Which rows of a ticket come back, over seeds: the tutorial "Is the ticket stable?" on the built-in model.

python benchmarks/stability.py [--seeds 0 1 2] [--runs runs/stability] [--out benchmarks/results/stability.json]

A run that is in the folder already is taken over.
"""

import argparse
from pathlib import Path

from audit_worlds import collect, run

from kslottery.core import write_json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/stability"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        runs.append(run("stability", seed, args.runs / f"seed{seed}"))
        print("\n".join(f"seed {seed}: {sentence}" for sentence in runs[-1]["summary"]), flush=True)
    if args.out:
        write_json(args.out, collect(runs, ("ticket", "compared", "membership", "transfer", "summary")))


if __name__ == "__main__":
    main()
