"""Many tickets over one model: cost per request against merged models and LoRA adapters, in one process, interleaved.

python benchmarks/bench_bank.py [--hidden 512] [--layers 8] [--vocabulary 32000] [--requests 32] [--repeats 3]
                                [--out benchmarks/results/bank.json]

A random Llama and random rows: the time does not depend on what they say. On a CPU one thread works, and its own
processor time counts, so that other work on a shared machine does not; the ratios of one run are what to quote. Two
mixes: every request with a ticket of its own (the worst case for all that is switched), and a ticket for every four
requests.

The ways: "bank" runs one batch, each request with its ticket; "base, one batch" is the plain model on that batch, the
floor; "tickets in turn" and "merged models" run a batch for each ticket, with the rows applied and with a merged copy
(made outside the clock; two models are in memory at a time). PEFT holds LoRA adapters of two kinds: the very tickets
(`Ticket.save_peft` with form "lora", on the input embedding), and the usual LoRA of rank 8 on queries and values. "In
turn" switches them, a batch for each, and "mixed batch" is PEFT's one batch with `adapter_names`. All ways of a ticket
must give the same tokens, or there is no ratio; so must the two of the usual LoRA.
"""

import argparse
import copy
import json
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from kslottery import TicketBank, TunedRows
from kslottery.adapters import lora_rank, write_adapter
from kslottery.core import write_json


def built(args):
    "The frozen model, a ticket for each request (one set of ids, rows of its own), and prompts in which the ids occur."
    torch.manual_seed(0)
    shape = dict(
        hidden_size=args.hidden,
        intermediate_size=int(2.6875 * args.hidden),
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
    )
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=args.vocabulary, initializer_range=0.05, tie_word_embeddings=False, **shape)
    )
    model = model.to(args.device, torch.float32).eval().requires_grad_(False)
    prompts, ids = (
        torch.randint(3, args.vocabulary, (args.requests, args.prompt)),
        torch.randperm(args.vocabulary)[: args.rows],
    )
    prompts[:, -args.rows :] = ids[-args.prompt :]  # the template, shared by all
    own = TunedRows.of(model, ids).weight.detach()
    tickets = {f"t{n}": TunedRows(ids, own + 0.05 * torch.randn(own.shape).to(own)) for n in range(args.requests)}
    return model, TicketBank(model, tickets), prompts.to(args.device)


def with_lora(model, names):
    "A copy of the model with a LoRA adapter for each name."
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    return adapted.eval()


def with_tickets(model, bank):
    "A copy of the model with each ticket as a LoRA, as PEFT loads it."
    facts, adapted = SimpleNamespace(model="", revision=None), None
    with tempfile.TemporaryDirectory() as room:
        for name, rows in bank.rows.items():
            (folder := Path(room, name)).mkdir()
            write_adapter(folder, facts, rows, model)
            if adapted is None:
                adapted = PeftModel.from_pretrained(copy.deepcopy(model), folder, adapter_name=name)
            else:
                adapted.load_adapter(folder, name)
    return adapted.eval()


def clock(function, device):
    "Seconds, and what the function returned."
    wait, now = (torch.cuda.synchronize, time.perf_counter) if device == "cuda" else (lambda: None, time.process_time)
    wait()
    start = now()
    result = function()
    wait()
    return now() - start, result


def compare(model, bank, as_lora, adapted, prompts, names, args):
    "Times of all ways, relative to the bank: the median of interleaved repeats."
    groups = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}

    def generate(model, who=slice(None), **more):
        x = prompts[who]
        settings = dict(max_new_tokens=args.new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return model.generate(input_ids=x, attention_mask=torch.ones_like(x), **settings, **more)[:, x.shape[1] :]

    def mixed():
        with bank.applied(names):
            return generate(model)

    def in_turn(enter):
        "A batch for each ticket; enter(name) is ready before the clock starts."
        seconds, texts = 0.0, torch.zeros(len(names), args.new, dtype=torch.long, device=prompts.device)
        for name, who in groups.items():
            run = enter(name)
            took, texts[who] = clock(lambda run=run, who=who: run(who), args.device)
            seconds += took
        return seconds, texts

    def applied(name):
        def run(who):
            with bank.rows[name].applied(model):
                return generate(model, who)

        return run

    def merged(name):
        own = bank.rows[name].write(copy.deepcopy(model))
        return lambda who: generate(own, who)

    def switched(adapted):
        def enter(name):
            def run(who):
                adapted.set_adapter(name)
                return generate(adapted, who)

            return run

        return lambda: in_turn(enter)

    def in_one(adapted):
        return lambda: clock(lambda: generate(adapted, adapter_names=names), args.device)

    ways = {
        "bank": lambda: clock(mixed, args.device),
        "base, one batch": lambda: clock(lambda: generate(model), args.device),
        "tickets in turn": lambda: in_turn(applied),
        "merged models": lambda: in_turn(merged),
        "tickets as LoRA, in turn": switched(as_lora),
        "tickets as LoRA, mixed batch": in_one(as_lora),
        "LoRA in turn": switched(adapted),
        "LoRA, mixed batch": in_one(adapted),
    }
    times, texts = {name: [] for name in ways}, {}
    mixed()  # warm up
    for _ in range(args.repeats):
        for name, way in ways.items():
            seconds, texts[name] = way()
            times[name].append(seconds)
    others = [name for name in ways if "ticket" in name or "merged" in name]
    assert all(torch.equal(texts["bank"], texts[name]) for name in others), "the texts differ: no ratio"
    assert torch.equal(texts["LoRA in turn"], texts["LoRA, mixed batch"])
    return {
        "requests": len(names),
        "tickets": len(groups),
        "time_relative_to_bank": {
            name: float(np.median(np.array(t) / np.array(times["bank"]))) for name, t in times.items()
        },
        "seconds_per_request": {name: float(np.median(t)) / len(names) for name, t in times.items()},
        "requests_with_another_text_than_the_base": int((texts["bank"] != texts["base, one batch"]).any(1).sum()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(
        hidden=512, layers=8, vocabulary=32000, requests=32, rows=18, prompt=48, new=8, repeats=3
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers by a name that is going away
    torch.set_num_threads(1)
    model, bank, prompts = built(args)
    names = list(bank.rows)
    as_lora, adapted = with_tickets(model, bank), with_lora(model, names)
    with torch.inference_mode():
        comparisons = [
            compare(model, bank, as_lora, adapted, prompts, mix, args)
            for mix in (names, [names[n // 4] for n in range(len(names))])
        ]
    result = {
        "machine": platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "shape": {k: getattr(args, k) for k in ("hidden", "layers", "vocabulary", "rows", "prompt", "new", "repeats")},
        "comparisons": comparisons,
        "numbers_to_keep_for_each": {
            "a merged model": sum(p.numel() for p in model.parameters()),
            "a LoRA adapter": sum(p.numel() for n, p in adapted.named_parameters() if f".{names[0]}." in n),
            "a ticket": args.rows * args.hidden,
            "a ticket as LoRA": lora_rank(args.rows) * (args.vocabulary + args.hidden),
        },
    }
    print(
        f"Llama shape {args.hidden} x {args.layers}, V = {args.vocabulary}, fp32, {result['machine']}, "
        f"{result['threads']} threads"
    )
    for c in comparisons:
        print(f"\n{c['requests']} requests, {c['tickets']} tickets, time per request relative to the bank's:")
        for name, ratio in c["time_relative_to_bank"].items():
            print(f"  {name:30s}{ratio:8.2f}")
    print(
        "\nnumbers to keep for each: " + ", ".join(f"{k} {v:,}" for k, v in result["numbers_to_keep_for_each"].items())
    )
    print(
        json.dumps(
            {
                f"{c['tickets']} tickets": {k: round(v, 2) for k, v in c["time_relative_to_bank"].items()}
                for c in comparisons
            }
        )
    )
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
