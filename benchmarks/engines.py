"""Tickets in llama.cpp: the adapters that `Ticket.save_gguf` writes, against transformers with the same rows in place.

python benchmarks/engines.py [--out benchmarks/results/engines.json]

Needs llama_cpp and gguf (make setup-llama). The models are tiny and random, without a vocabulary: token ids go in, and
logits come out, in fp32 on one thread. The engine runs in a process of its own, since it aborts where it cannot go on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

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


def base_file(model, file):
    "A model of transformers as a GGUF without a vocabulary; its output is a tensor of its own, unless it is tied."
    import gguf

    config, state = model.config, model.state_dict()
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
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
        if name == "lm_head.weight" and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
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
        writer.add_tensor(found, np.ascontiguousarray(w))
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
