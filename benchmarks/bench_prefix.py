"""A step of row tuning with the template's prefix run once per batch, against the same step without: ratio of time.

python benchmarks/bench_prefix.py [--repeats 5] [--out benchmarks/results/prefix.json]

The model of bench_step.py at V = 32,000; batches of 8 and 32, 60-70 tokens of prompt, of which the first 30, 37 or 45
are the same in all examples, and 20-30 of target. Both variants take turns on the same batches; a ratio is the median
over the rounds. Time is processor time: use one thread (OMP_NUM_THREADS=1).
"""

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
from bench_step import SMALL, TICKET, build, examples

from kslottery import TunedRows
from kslottery.core import write_json
from kslottery.data import collate
from kslottery.training import _Learner

V = 32000


def compare(model, size, prefix, repeats):
    "Interleaved forward and backward passes with and without sharing."
    data = examples(V, size * (repeats + 1), seed=prefix)
    for e in data:
        e.ids[:prefix] = data[0].ids[:prefix]
    rows = TunedRows.of(model, np.arange(5, 5 + TICKET))
    learners = {share: _Learner(model, rows, share) for share in (False, True)}
    seconds, losses, gradients = ({share: [] for share in learners} for _ in range(3))
    with rows.applied(model):
        for i in range(0, len(data), size):
            batch = collate(data[i : i + size], 0)
            for share, learner in learners.items():
                start = time.process_time()
                loss = learner(**batch)
                gradients[share].append(torch.autograd.grad(loss, rows.weight)[0])
                seconds[share].append(time.process_time() - start)
                losses[share].append(float(loss.detach()))
    ratios = np.array(seconds[True][1:]) / seconds[False][1:]  # the first is a warm-up
    return {
        "batch": size,
        "prefix": prefix,
        "time_ratio": float(np.median(ratios)),
        "time_ratio_range": [float(ratios.min()), float(ratios.max())],
        "seconds_without": float(np.median(seconds[False][1:])),
        "loss_difference": float(np.max(np.abs(np.array(losses[True]) / losses[False] - 1))),
        "gradient_difference": max(float((a - b).norm() / b.norm()) for a, b in zip(gradients[True], gradients[False])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, comparisons = build(V, SMALL).requires_grad_(False).train(), []
    for size in (8, 32):
        for prefix in (30, 37, 45):
            c = compare(model, size, prefix, args.repeats)
            low, high = c["time_ratio_range"]
            difference = f"gradients differ by {c['gradient_difference']:.0e}"
            ratio = f"time {c['time_ratio']:.2f} ({low:.2f} to {high:.2f}) of the step without"
            print(f"batch {size:2}, prefix {prefix}: {ratio}, {difference}", flush=True)
            comparisons.append(c)
    if args.out:
        about = {
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "V": V,
            "shape": SMALL,
        }
        write_json(args.out, about | {"comparisons": comparisons})


if __name__ == "__main__":
    main()
