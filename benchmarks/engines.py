"""Tickets in llama.cpp: the adapter files that `Ticket.save_gguf` writes, against transformers with the same rows.

python benchmarks/engines.py [--out benchmarks/results/engines.json]

Needs llama_cpp and gguf (make setup-llama). The models are small and random, without a vocabulary: token ids go in, and
logits come out, in fp32 on one thread. The engine runs in a process of its own, since it aborts where it cannot go on.

For each type of model and each mode: the largest difference of a logit between the engine and transformers without a
ticket ("base") and with it ("ticket"), between adapter and merged file in the engine ("merged"), and what the ticket
changes at all ("effect"). Engines compute GELU out of a table of 16-bit numbers, which is what the base shows.
"""

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kslottery import TunedRows
from kslottery.adapters import write_gguf
from kslottery.core import write_json
from kslottery.rows import is_tied

V, D = 512, 64
LLAMA = dict(hidden_size=D, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
GPT = dict(n_embd=D, hidden_size=D, n_layer=2, n_head=4, n_positions=256)
KINDS = {  # how each is made; untied unless its own nature or the caller says otherwise
    **{kind: LLAMA | {"num_key_value_heads": 2} for kind in ("llama", "mistral", "qwen2")},
    "qwen3": LLAMA | {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": LLAMA | {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16},
    **{kind: GPT for kind in ("gpt2", "bloom")},
}
CASES = [(kind, mode, False) for kind in KINDS for mode in ("input_only", "head", "both")]
CASES += [(kind, mode, True) for kind in ("llama", "gemma3_text", "gpt2") for mode in ("input_only", "shared")]


# Reads a request from standard input, {base, adapters, passes: [[ids, [[adapter, scale], ...], reset], ...], out}, and
# writes the logits of each pass. An adapter that does not fit is null: its number is printed, and status is 3.
ENGINE = """
import ctypes, json, sys, time
import numpy as np
from llama_cpp import llama_cpp as c

ask = json.load(sys.stdin)
said = []
quiet = c.llama_log_callback(lambda level, text, data: said.append(text))
c.llama_log_set(quiet, None)
c.llama_backend_init()
settings = c.llama_model_default_params()
settings.use_mmap, settings.n_gpu_layers = False, 0
model = c.llama_model_load_from_file(ask["base"].encode(), settings)
if not model:
    sys.exit(b"".join(said).decode()[-1500:])
settings = c.llama_context_default_params()
settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
settings.n_threads = settings.n_threads_batch = 1
settings.type_k = settings.type_v = 0
settings.flash_attn_type = 0
context = c.llama_init_from_model(model, settings)
adapters = [c.llama_adapter_lora_init(model, one.encode()) for one in ask["adapters"]]
for n, one in enumerate(adapters):
    if not one:
        print(n)
        sys.exit(3)
size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
found, switching, place = {}, [], 0
for n, (ids, use, reset) in enumerate(ask["passes"]):
    start = time.perf_counter()
    many = (c.llama_adapter_lora_p_ctypes * len(use))(*(adapters[i] for i, _ in use))
    c.llama_set_adapters_lora(context, many, len(use), (ctypes.c_float * len(use))(*(s for _, s in use)))
    switching.append(time.perf_counter() - start)
    if reset:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        place = 0
    batch = c.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place + i, 1, True
        batch.seq_id[i][0] = 0
    assert c.llama_decode(context, batch) == 0
    place += len(ids)
    found[str(n)] = np.stack([np.ctypeslib.as_array(c.llama_get_logits_ith(context, i), (size,)).copy()
                              for i in range(len(ids))])
np.savez(ask["out"], switching=switching, **found)
"""


def made(kind, tied=False, seed=0, size=V):
    "A random model of a type, whose matrices are large enough for every row to matter."
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, vocab_size=size, initializer_range=0.1, tie_word_embeddings=tied, **KINDS[kind])
    return AutoModelForCausalLM.from_config(config).eval()


def moved(model, mode, k=7, seed=0):
    "Rows of a ticket."
    generator = torch.Generator().manual_seed(seed)
    own = TunedRows.of(model, torch.randperm(V, generator=generator)[:k], mode)
    return TunedRows(own.ids, own.weight.detach() + 0.1 * torch.randn(own.weight.shape, generator=generator), mode)


@torch.no_grad()
def logits(model, ids):
    return model(torch.tensor([ids])).logits[0].numpy()


def base_file(model, file, quantised=False):
    "A model of transformers as a GGUF without a vocabulary, in fp32 or with its matrices in 8 bits (Q8_0)."
    import gguf

    config, state = model.config, model.state_dict()
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    small = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(file), arch)
    layers, heads, d = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    kv = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or d // heads
    writer.add_context_length(getattr(config, "n_positions", 256))
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * d)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(10000.0)
        writer.add_rope_dimension_count(width)
        writer.add_key_length(width)
        writer.add_value_length(width)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), layers)
    for name, tensor in state.items():
        if name == "lm_head.weight" and is_tied(model):
            continue
        w = tensor.float().numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # its pairs for RoPE are neighbours
            n = heads if "q_proj" in name else kv
            w = w.reshape(n, 2, len(w) // n // 2, -1).swapaxes(1, 2).reshape(w.shape)
        if arch == "gpt2" and any(f".{part}.weight" in name for part in ("c_attn", "c_proj", "c_fc")):
            w = w.T
        if arch == "bloom" and "query_key_value" in name:
            w = w.reshape(heads, 3, width, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)
        if arch == "gemma3" and name.endswith("norm.weight"):
            w = w + 1
        name = name.removeprefix("transformer.") if arch == "bloom" else name
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found, name
        w = np.ascontiguousarray(w)
        if quantised and w.ndim == 2:
            writer.add_tensor(found, gguf.quants.quantize(w, small), raw_dtype=small)
        else:
            writer.add_tensor(found, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_engine(base, adapters, passes):
    "(exit status, what it printed, the logits of each pass, seconds of switching)."
    with tempfile.TemporaryDirectory() as room:
        ask = {"base": str(base), "adapters": [*map(str, adapters)], "passes": passes, "out": f"{room}/logits.npz"}
        done = subprocess.run([sys.executable, "-c", ENGINE], input=json.dumps(ask), capture_output=True, text=True)
        if done.returncode:
            return done.returncode, done.stdout + done.stderr, [], []
        stored = np.load(ask["out"])
        return 0, done.stdout, [stored[str(n)] for n in range(len(passes))], stored["switching"].tolist()


def apart(a, b):
    return float(np.abs(a - b).max())


def compare(kind, mode, room, tied=False):
    "One type and mode; a tied model is given an output of its own in the engine's file."
    model = made(kind, tied)
    rows = moved(model, mode)
    ids = [1, *rows.ids.tolist(), 5, *rows.ids.tolist()[::-1], 9]
    with rows.applied(model):
        with_rows = logits(model, ids)
    plain, own = logits(model, ids), copy.deepcopy(model)
    if tied:
        head = own.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    base_file(own, room / "base.gguf")
    merged = copy.deepcopy(own)
    for side, table in ((rows.input, merged.get_input_embeddings()), (rows.output, merged.get_output_embeddings())):
        if side is not None:
            table.weight.data[rows.ids] = side.detach()
    base_file(merged, room / "merged.gguf")
    write_gguf(room / "adapter.gguf", rows, model)
    status, said, found, _ = run_engine(room / "base.gguf", [room / "adapter.gguf"], [[ids, [], 1], [ids, [[0, 1]], 1]])
    assert status == 0, said[-1000:]
    in_one = run_engine(room / "merged.gguf", [], [[ids, [], 1]])[2][0]
    return {
        "type": kind,
        "tied": tied,
        "mode": mode,
        "base": apart(found[0], plain),
        "ticket": apart(found[1], with_rows),
        "merged": apart(found[1], in_one),
        "effect": apart(with_rows, plain),
        "same_greedy_tokens": bool((found[1].argmax(1) == with_rows.argmax(1)).all()),
    }


def several(room):
    "Two adapters in one context: in turn, at half strength, together; and without a reset after a switch."
    model = made("llama")
    first, second = (moved(model, "input_only", seed=seed) for seed in (1, 2))
    base_file(model, room / "base.gguf")
    files = [room / "first.gguf", room / "second.gguf"]
    for file, rows in zip(files, (first, second)):
        write_gguf(file, rows, model)
    ids = [*first.ids.tolist(), *second.ids.tolist()]
    start, rest = ids[:-1], ids[-1:]
    passes = [[ids, [[0, 1]], 1], [ids, [[1, 1]], 1], [ids, [[0, 0.5]], 1], [ids, [[0, 1], [1, 1]], 1], [ids, [], 1]]
    again = [[start, [[0, 1]], 1], [rest, [[1, 1]], 0]]  # the second goes on where the first was
    status, said, found, seconds = run_engine(room / "base.gguf", files, passes + again)
    assert status == 0, said[-1000:]
    both = torch.cat([first.delta(model), second.delta(model)]), torch.cat([first.ids, second.ids])
    summed = model.get_input_embeddings().weight.detach().index_add(0, both[1], both[0])
    wanted = []
    for rows in (first, second, first.scale(model, 0.5), TunedRows(range(V), summed), TunedRows([], torch.ones(0, D))):
        with rows.applied(model):
            wanted.append(logits(model, ids))
    return {
        **{
            name: apart(a, b)
            for name, a, b in zip(("first", "second", "half of the first", "sum", "none again"), found, wanted)
        },
        "without a reset": apart(found[6][-1], wanted[1][-1]),
        "microseconds of a switch": 1e6 * float(np.median(seconds[:5])),
    }


def refused(room):
    "What the engine does with an adapter for another vocabulary, and with one for a tied base."
    model, wide, tied = made("llama"), made("llama", size=V + 64), made("llama", tied=True)
    for name, one in (("base", model), ("wide", wide), ("tied", tied)):
        base_file(one, room / f"{name}.gguf")
    found = {}
    for name, one in (("wide", wide), ("tied", tied)):
        write_gguf(room / "adapter.gguf", moved(one, "input_only"), one)
        base = room / ("base.gguf" if name == "wide" else "tied.gguf")
        found[name] = run_engine(base, [room / "adapter.gguf"], [[[1, 2, 3], [[0, 1]], 1]])[0]
    return {"another vocabulary": {3: "not loaded"}.get(found["wide"]), "tied": {-6: "abort"}.get(found["tied"])}


def quantised(room):
    "RMS of logit differences, base in 8 bits: adapter against merged and then quantised, and the ticket's effect."
    model = made("llama")
    rows = moved(model, "input_only")
    ids = [1, *rows.ids.tolist(), 5]
    base_file(model, room / "base.gguf", quantised=True)
    base_file(rows.write(copy.deepcopy(model)), room / "merged.gguf", quantised=True)
    write_gguf(room / "adapter.gguf", rows, model)
    plain, with_rows = run_engine(room / "base.gguf", [room / "adapter.gguf"], [[ids, [], 1], [ids, [[0, 1]], 1]])[2]
    merged = run_engine(room / "merged.gguf", [], [[ids, [], 1]])[2][0]
    rms = lambda a, b: float(np.sqrt(np.mean((a - b) ** 2)))
    return {"adapter to merged": rms(with_rows, merged), "effect": rms(with_rows, plain)}


def measure():
    "All of it."
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        return {
            "machine": platform.machine(),
            "versions": {name: version(name) for name in ("llama_cpp_python", "gguf", "torch", "transformers")},
            "shape": {"vocabulary": V, "hidden": D, "layers": 2, "rows": 7},
            "cases": [compare(kind, mode, room, tied) for kind, mode, tied in CASES],
            "several": several(room),
            "refused": refused(room),
            "quantised": quantised(room),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = measure()
    for one in result["cases"]:
        numbers = "  ".join(f"{name} {one[name]:.1e}" for name in ("base", "ticket", "merged", "effect"))
        print(f"{one['type']:12s}{'tied' if one['tied'] else 'untied':8s}{one['mode']:12s}{numbers}")
    print(json.dumps({name: result[name] for name in ("several", "refused", "quantised")}, indent=1))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
