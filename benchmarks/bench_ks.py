"""The KS scan against a scipy loop, in one process, interleaved: ratios, memory, growth in V and d.

python benchmarks/bench_ks.py [--rows 32000] [--columns 4096] [--repeats 3] [--out benchmarks/results/ks.json]

A scipy loop over all rows would take minutes, so it runs on a sample of them and is scaled up. Times on a shared
machine are noise; the ratios of one run are what to quote. Two kinds of rows: "independent" moves of every row (nothing
is settled early) and "tuned" ones (90% of the rows untouched, as after a fine-tuning).
"""

import argparse
import ctypes
import json
import os
import platform
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy import stats
from shared import memory

from kslottery import ks_scan
from kslottery.core import write_json


def rows(kind, V, d, seed=0):
    "Two (V, d) float32 matrices at the scale of a language model's embedding."
    rng = np.random.default_rng(seed)
    before = rng.standard_normal((V, d), dtype=np.float32) * np.float32(0.02)
    after = before.copy()
    moved = np.arange(V) if kind == "independent" else rng.choice(V, V // 10, replace=False)
    for i in np.array_split(moved, max(1, len(moved) // 1000)):
        after[i] = before[i] * rng.uniform(0.85, 1.25, (len(i), 1)).astype(np.float32) + np.float32(
            0.002
        ) * rng.standard_normal((len(i), d), dtype=np.float32)
    return before, after


def clock(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def scipy_loop(before, after, sample):
    chosen = np.linspace(0, len(before) - 1, sample).astype(int)
    for i in chosen:
        stats.ks_2samp(before[i], after[i])


def peak_extra(function):
    "Peak anonymous memory above the start, in MB, while `function` runs (sampled every 2 ms)."
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before must not hide what is needed now
    start, peak, done = memory("RssAnon"), [0.0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], memory("RssAnon") - start)

    thread = threading.Thread(target=watch)
    thread.start()
    function()
    done.set()
    thread.join()
    return peak[0]


def compare(kind, V, d, repeats, sample=200):
    "Ratios to the scipy loop, the median of interleaved repeats."
    before, after = rows(kind, V, d)
    ways = {
        "read both (floor)": lambda: (before.sum(), after.sum()),
        "np.sort both (floor)": lambda: [
            np.sort(m[i : i + 256], axis=1) for m in (before, after) for i in range(0, V, 256)
        ],
        "exact D and p, all rows": lambda: ks_scan(before, after),
        "the ticket only": lambda: ks_scan(before, after, decide=0.05),
    }
    ks_scan(before[:64], after[:64])  # compile
    times = {name: [] for name in ("scipy loop", *ways)}
    for _ in range(repeats):
        times["scipy loop"].append(clock(lambda: scipy_loop(before, after, min(sample, V))) * V / min(sample, V))
        for name, function in ways.items():
            times[name].append(clock(function))
    ratios = {name: float(np.median(np.array(times["scipy loop"]) / np.array(t))) for name, t in times.items()}
    exact = [stats.ks_2samp(before[i], after[i]).statistic for i in range(0, V, max(1, V // 50))]
    assert ks_scan(before, after).statistic[:: max(1, V // 50)].tolist() == exact  # the same numbers, or no ratio
    extra = {name: peak_extra(ways[name]) for name in ("exact D and p, all rows", "the ticket only")}
    return {
        "kind": kind,
        "V": V,
        "d": d,
        "ratio_to_scipy_loop": ratios,
        "seconds": {n: float(np.median(t)) for n, t in times.items()},
        "peak_extra_MB": extra,
    }


def on_gpu(V, d, repeats):
    "The torch engine on a GPU against the CPU engine, inputs on their own device."
    import torch

    if not torch.cuda.is_available():
        return None
    before, after = rows("independent", V, d)
    a, b = (torch.from_numpy(x).cuda() for x in (before, after))
    ks_scan(a[:64], b[:64])
    pairs = [(clock(lambda: ks_scan(before, after)), clock(lambda: ks_scan(a, b))) for _ in range(repeats)]
    assert np.array_equal(ks_scan(a, b).statistic, ks_scan(before, after).statistic)
    return {
        "device": torch.cuda.get_device_name(),
        "V": V,
        "d": d,
        "ratio_to_cpu_engine": float(np.median([c / g for c, g in pairs])),
    }


def growth(V, d, repeats):
    "Seconds of the exact scan as V and d grow."
    sweep = []
    for v, w in [(V // 8, d), (V // 4, d), (V // 2, d), (V // 4, d // 16), (V // 4, d // 4), (V // 4, d * 2)]:
        before, after = rows("independent", v, w)
        ks_scan(before[:64], after[:64])
        sweep.append(
            {
                "V": v,
                "d": w,
                "seconds": float(np.median([clock(lambda b=before, a=after: ks_scan(b, a)) for _ in range(repeats)])),
            }
        )
    return sweep


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32000)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {
        "threads": os.cpu_count(),
        "machine": platform.machine(),
        "engine": "binned (numba)" if find_spec("numba") else "plain (numpy)",
        "comparisons": [compare(kind, args.rows, args.columns, args.repeats) for kind in ("independent", "tuned")],
        "growth": growth(args.rows, args.columns, args.repeats),
        "gpu": on_gpu(args.rows, args.columns, args.repeats),
    }
    for c in result["comparisons"]:
        print(
            f"\n{c['V']} x {c['d']} fp32, {c['kind']} rows, {result['threads']} threads, times as fast as a scipy loop:"
        )
        for name, ratio in c["ratio_to_scipy_loop"].items():
            extra = f"   {c['peak_extra_MB'][name]:.0f} MB extra" if name in c["peak_extra_MB"] else ""
            print(f"  {name:28s}{ratio:8.1f}{extra}")
    print("\ngrowth of the exact scan:")
    for s in result["growth"]:
        print(f"  {s['V']:6d} x {s['d']:5d}: {s['seconds'] / (s['V'] * s['d']) * 1e9:6.2f} ns a number")
    print(json.dumps({"gpu": result["gpu"]}))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
