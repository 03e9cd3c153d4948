"""A step of row tuning against PEFT's TrainableTokens, LoRA, a dense embedding and full fine-tuning: time and memory.

python benchmarks/bench_step.py [--vocabularies 32000,128256] [--repeats 5] [--out benchmarks/results/step.json]

A random Llama of hidden size 512 and 8 layers, untied, fp32; batches of 8 sentences, 60-70 tokens of prompt and 20-30
of target, right-padded. All variants live in one process and take turns, so that a busy machine hits all alike; a ratio
is the median over the rounds. Time is processor time, which waiting for other processes does not inflate; with one
thread (OMP_NUM_THREADS=1) it is what a step takes on a quiet machine. The wall clock is stored too. Peak memory is that
of a process of its own, which builds one model and takes two steps: all of it, libraries included, and what is above
the libraries. (It is read from the process, not from its parent's account: a child that has just been started counts
its parent's memory as its own peak there.)

The whole method is measured too: the peak memory of `find_ticket` on a model of 100 million parameters, half of them
in its embeddings, against Embed Tuning alone. A copy of the model would show. The libraries are loaded in both, numba
with its compiler included, which only the scan needs.

On a machine with CUDA a random Llama of the 7B shape in bf16 follows.
"""

import argparse
import contextlib
import gc
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from kslottery import Recipe, TunedRows, embed_tune, find_ticket
from kslottery.core import write_json
from kslottery.data import Example, Pair, Prompt, collate, encode_all
from kslottery.training import _Learner

PEER = "PEFT TrainableTokens"
VARIANTS = (
    "full fine-tuning",
    "dense embedding",
    "dense embedding, loss at targets",
    "dense embedding, masked",
    "LoRA",
    PEER,
    "partial tuning",
    "partial tuning, frozen bf16",
    "embed tuning",
)
BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # else a bf16 product takes tens of times the fp32 one
TICKET = 18  # rows that learn: as many as the paper's smallest ticket has
SMALL = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
MIDDLE = dict(
    hidden_size=640, intermediate_size=1728, num_hidden_layers=10, num_attention_heads=10
)  # 101M at V = 40,000
LARGE = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)  # 7B


def active(data):
    "The token ids that occur: the rows that Embed Tuning trains."
    return sorted({i for example in data for i in example.ids})


def build(V, shape, dtype=torch.float32, device="cpu"):
    "A random Llama, the same for the same V and shape."
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=V, tie_word_embeddings=False, pad_token_id=0, **shape), dtype=dtype
        )


def examples(V, n, seed=0):
    "Random sentences; every prompt holds some tokens of the ticket, ids 5 ... 5 + TICKET."
    rng, made = np.random.default_rng(seed), []
    for i in range(n):
        prompt, target = int(rng.integers(60, 71)), int(rng.integers(20, 31))
        ids = rng.integers(100, V, prompt + target)
        ids[rng.choice(prompt, 8, replace=False)] = rng.integers(5, 5 + TICKET, 8)
        ids = ids.tolist()
        made.append(Example(str(i), ids, [-100] * prompt + ids[prompt:], [1] * len(ids), prompt))
    return made


def stepper(name, V, shape, data, device="cpu", base=torch.float32):
    "A function of a batch that takes one training step of this variant and returns its loss."
    context = contextlib.ExitStack()  # lives as long as the step
    model = build(V, shape, torch.bfloat16 if "bf16" in name else base, device).train()
    ticket, rows = np.arange(5, 5 + TICKET), None
    if name != "full fine-tuning":
        model.requires_grad_(False)
    if name.startswith("dense"):
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        if name.endswith("masked"):
            mask = torch.zeros(V, 1, device=device).index_fill(0, torch.as_tensor(ticket, device=device), 1)
            weight.register_hook(lambda gradient: gradient * mask)
    elif name == "LoRA":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    elif name == PEER:
        model = get_peft_model(model, TrainableTokensConfig(token_indices=ticket.tolist(), task_type="CAUSAL_LM"))
    elif "tuning" in name and name != "full fine-tuning":
        rows = TunedRows.of(model, active(data) if name == "embed tuning" else ticket)
        context.enter_context(rows.applied(model))
    learner = _Learner(model, rows)
    learner.lean = learner.lean and (rows is not None or name.endswith("targets"))  # the peers keep the plain loss
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)

    def step(batch):
        loss = learner(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    step.context = context
    return step


def batches(data, device="cpu"):
    return [{k: v.to(device) for k, v in collate(data[i : i + 8], 0).items()} for i in range(0, len(data), 8)]


def peak(work):
    "Of some code in a process of its own: (MB above the libraries, MB in all)."
    code = "import sys; sys.path.insert(0, 'benchmarks'); import numba, bench_step as b; "
    code += "start = b.memory('VmHWM'); "
    code += f"b.{work}; end = b.memory('VmHWM'); print(end - start, end)"
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    return [float(x) for x in said.stdout.split()[-2:]]


def take_steps(name, V):
    """Two steps, the second with AdamW's moments in place.

    In bf16 one: there the moments are those of a few rows, and a CPU without bf16 units is slow.
    """
    data = examples(V, 8 if "bf16" in name else 16)
    step = stepper(name, V, SMALL, data)
    return [step(batch) for batch in batches(data)]


def words(V):
    "A tokenizer of V words, w0, w1, ..."
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "=", *(f"w{i}" for i in range(4, V))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def whole_method(what, V=40000):
    "Embed Tuning alone, or `find_ticket`, of 16 sentences on a model of 100 million parameters."
    rng, sentence = np.random.default_rng(0), lambda n: " ".join(f"w{i}" for i in rng.integers(4, V, n))
    pairs = [Pair(str(i), sentence(20), sentence(20)) for i in range(16)]
    model, tokenizer, prompt = build(V, MIDDLE).eval(), words(V), Prompt("{source} = {target}")
    recipe = Recipe(lr_embed=1e-2, epochs_embed=2, epochs_partial=2, batch_size=8, progress=False)
    if what == "embed tuning":
        assert len(embed_tune(model, encode_all(tokenizer, prompt, pairs), recipe)) > 500
    else:
        ticket = find_ticket(model, tokenizer, pairs, prompt, recipe=recipe)
        assert len(ticket.rows) == len(ticket.ids) > 0 and len(ticket.scan.statistic) == V
    return sum(p.numel() for p in model.parameters())


def memory_of_the_method():
    "Peak memory of `find_ticket` against Embed Tuning alone."
    found = {what: peak(f"whole_method({what!r})") for what in ("embed tuning", "find_ticket")}
    (above, whole), (all_above, all_whole) = found.values()
    return {
        "V": 40000,
        "shape": MIDDLE,
        "embed_tuning_peak_MB": whole,
        "find_ticket_peak_MB": all_whole,
        "ratio": all_whole / whole,
        "ratio_above_libraries": all_above / above,
        "limit": 1.15,
    }


def compare(V, repeats):
    "Interleaved steps of all variants: ratios of time and memory, and how far the losses are from the peer's."
    data = examples(V, 8 * (repeats + 1))
    timed = [name for name in VARIANTS if BF16 or "bf16" not in name]
    steps = {name: stepper(name, V, SMALL, data) for name in timed}
    seconds, wall, losses = ({name: [] for name in timed} for _ in range(3))
    for batch in batches(data):
        for name in timed:
            start, clock = time.process_time(), time.perf_counter()
            losses[name].append(steps[name](batch))
            seconds[name].append(time.process_time() - start)
            wall[name].append(time.perf_counter() - clock)
    del steps
    gc.collect()
    seconds = {name: np.array(s[1:]) for name, s in seconds.items()}  # the first is a warm-up
    memory = {name: peak(f"take_steps({name!r}, {V})") for name in VARIANTS}
    share = float(np.mean([(b["labels"] != -100).float().mean() for b in batches(data)]))
    result = {
        "V": V,
        "shape": SMALL,
        "rows": TICKET,
        "active_rows": len(active(data)),
        "positions_with_a_loss": share,
        "variants": {},
    }
    for name in VARIANTS:
        result["variants"][name] = {
            "peak_ratio_to_peft": memory[name][1] / memory[PEER][1],
            "peak_MB": memory[name][1],
            "peak_above_libraries_MB": memory[name][0],
        }
        if name in timed:
            result["variants"][name] |= {
                "time_ratio_to_peft": float(np.median(seconds[name] / seconds[PEER])),
                "seconds": float(np.median(seconds[name])),
                "wall_ratio_to_peft": float(np.median(np.array(wall[name][1:]) / wall[PEER][1:])),
                "loss_difference_to_peft": float(np.max(np.abs(np.array(losses[name]) / losses[PEER] - 1))),
            }
    result["embed_tuning_time_to_dense"] = float(np.median(seconds["embed tuning"] / seconds["dense embedding"]))
    result["embed_tuning_time_to_dense_same_loss"] = float(
        np.median(seconds["embed tuning"] / seconds["dense embedding, loss at targets"])
    )
    return result


def on_gpu(repeats, V=32000):
    "The 7B shape in bf16, one variant after the other: median time of a step and peak memory of the device."
    if not torch.cuda.is_available():
        return None
    data, result = (
        examples(V, 8 * (repeats + 2)),
        {"device": torch.cuda.get_device_name(), "V": V, "shape": LARGE, "variants": {}},
    )
    for name in ("LoRA", PEER, "partial tuning"):
        step = stepper(name, V, LARGE, data, "cuda", torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for batch in batches(data, "cuda"):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step(batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        result["variants"][name] = {
            "seconds": float(np.median(seconds[2:])),
            "peak_MB": torch.cuda.max_memory_allocated() / 2**20,
        }
        del step
        gc.collect()
        torch.cuda.empty_cache()
    for one in result["variants"].values():
        one["time_ratio_to_peft"] = one["seconds"] / result["variants"][PEER]["seconds"]
        one["peak_ratio_to_peft"] = one["peak_MB"] / result["variants"][PEER]["peak_MB"]
    return result


def figure(result, path):
    "Bars of time and peak memory relative to PEFT."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, key, title in zip(
        axes, ("time_ratio_to_peft", "peak_ratio_to_peft"), ("time of a step", "peak memory of the process")
    ):
        for j, c in enumerate(result["comparisons"]):
            values = [c["variants"][name].get(key, np.nan) for name in VARIANTS]
            bars = axis.barh(np.arange(len(VARIANTS)) + 0.4 * j, values, 0.38, label=f"V = {c['V']:,}")
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axis.margins(x=0.1)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{title}, {PEER} = 1", fontsize=10)
        axis.set_yticks(np.arange(len(VARIANTS)) + 0.2, VARIANTS)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", default="32000,128256")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "bf16_units": bool(BF16),
        "batch": "8 sentences, 60-70 tokens of prompt, 20-30 of target",
        "comparisons": [compare(int(V), args.repeats) for V in args.vocabularies.split(",")],
        "find_ticket_memory": memory_of_the_method(),
        "gpu": on_gpu(args.repeats),
    }
    for c in result["comparisons"]:
        share = f"{c['positions_with_a_loss']:.0%} of positions have a loss"
        print(f"\nV = {c['V']}, {result['threads']} threads, {share}; relative to {PEER}:")
        for name, v in c["variants"].items():
            memory = f"peak {v['peak_ratio_to_peft']:5.2f} ({v['peak_MB']:5.0f} MB)"
            speed = (
                f"time {v['time_ratio_to_peft']:5.2f}   loss {v['loss_difference_to_peft']:.0e}"
                if "seconds" in v
                else "time not measured: no bf16 units"
            )
            print(f"  {name:34s} {memory}   {speed}")
        dense, same = c["embed_tuning_time_to_dense"], c["embed_tuning_time_to_dense_same_loss"]
        print(f"  embed tuning takes {dense:.2f} of the dense embedding's time ({same:.2f} with the same loss)")
    print(json.dumps({"gpu": result["gpu"]}))
    m = result["find_ticket_memory"]
    peaks = f"{m['find_ticket_peak_MB']:.0f} MB, Embed Tuning alone {m['embed_tuning_peak_MB']:.0f} MB"
    print(f"peak memory of find_ticket: {peaks}; ratio {m['ratio']:.3f} (limit {m['limit']})")
    if args.out:
        write_json(args.out, result)
        figure(result, args.out.with_suffix(".png"))
    ours = [(c["V"], c["variants"]["partial tuning"]) for c in result["comparisons"]]
    print(
        "partial tuning against PEFT: "
        + "; ".join(f"V = {V}, time {o['time_ratio_to_peft']:.2f}, peak {o['peak_ratio_to_peft']:.2f}" for V, o in ours)
    )


if __name__ == "__main__":
    main()
