"""Models and sentences as strangers bring them, from a run to every command: 16 bits, tied, resized, byte-level."""

import itertools
import json
import re
import warnings

import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conftest import given, invoke
from kslottery.data import Pair, Prompt, encode_all, token_text
from kslottery.rows import is_tied
from kslottery.ticket import Ticket
from kslottery.training import Training
from kslottery.tuning import full_fine_tune

WHO = {"The old dog": "Der alte Hund", "My brother": "Mein Bruder", "A little girl": "Ein kleines Mädchen"}
WHO |= {"The king": "Der König", "Our teacher": "Unser Lehrer", "The tired nurse": "Die müde Pflegerin"}
DOES = {"sleeps": "schläft", "waits": "wartet", "sings": "singt", "reads": "liest", "eats": "isst", "calls": "ruft"}
WHERE = {"in Königsberg": "in Königsberg", "in the garden": "im Garten", "at the door": "vor der Tür"}
WHERE |= {"on the street": "auf der Straße", "in the kitchen": "in der Küche", "by the river": "am Fluß"}
PAIRS = [
    (" ".join(english) + ".", " ".join(german) + ".")
    for english, german in (zip(*words) for words in itertools.product(*(x.items() for x in (WHO, DOES, WHERE))))
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLIT = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")


def byte_level(special, split=None):
    tok, whole = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), whole]) if split else whole
    tok.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(itertools.chain(*PAIRS), trainer)
    return tok


def metaspace(special):
    "As SentencePiece makes them: pieces with a bar for a space, and bytes for what it never saw."
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    letters = sorted({*"".join(itertools.chain(*PAIRS)), *map(chr, range(33, 127)), "\n"} - {" "})
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=special, unk_token="<unk>", show_progress=False, initial_alphabet=letters
    )
    tok.train_from_iterator(itertools.chain(*PAIRS), trainer)
    return tok


def qwen(dtype=torch.bfloat16):
    "Tied, of 16 bits, the embedding padded beyond its tokenizer; a chat template; padding is no end."
    tok = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], SPLIT)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    ends = dict(bos_token_id=None, eos_token_id=0, pad_token_id=None)
    config = Qwen2Config(vocab_size=448, intermediate_size=64, tie_word_embeddings=True, **shape, **ends)
    return Qwen2ForCausalLM(config).to(dtype), tokenizer


def gpt2(dtype=torch.float32):
    "Tied; one control token for everything, and none for padding."
    end = "<|endoftext|>"
    tok = byte_level([end])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=end, eos_token=end, unk_token=end)
    shape = dict(n_embd=32, n_layer=1, n_head=2, n_positions=128)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape))
    return model.to(dtype), tokenizer


def llama(dtype=torch.float32):
    "Untied; three tokens were added, and the embedding was resized."
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=metaspace(["<unk>", "<s>", "</s>"]), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **shape))
    tokenizer.add_tokens(["Königsberg", "<term>", "Fluß"])
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
    return model.to(dtype), tokenizer


STRANGERS = {  # the model, how it is run, and the form of its adapter
    "qwen": (qwen, {"template": "chat", "top_k": 4}, "lora"),
    "gpt2": (gpt2, {"template": "explicit", "alpha": 0.2, "lr_embed": 0.01, "mode": "shared"}, "trainable_tokens"),
    "llama": (llama, {"template": "alpaca", "top_k": 3}, "lora"),
}


def chain(folder, made, settings, form):
    "From a run to every command but the scan; what each said."
    model, tokenizer = made
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    parts = {"train": PAIRS[0::4][:30], "test": PAIRS[1::4][:6], "fresh": PAIRS[2::4][:24]}
    for name, pairs in parts.items():
        (folder / f"{name}.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in [("en", "de"), *pairs]), encoding="utf-8")
    run = {"model": folder / "base", "train": folder / "train.tsv", "test": folder / "test.tsv", "languages": "en-de"}
    run |= {"out": folder / "run", "fast": True, "epochs": 1, "max_new_tokens": 6, "batch_size": 10} | settings
    ticket, said = folder / "run" / "ticket", {}
    for words in (
        ("run", "quickstart", *given(run)),
        ("audit", ticket, "--fast", "--samples", 50),
        ("certify", ticket, "--calibration", folder / "fresh.tsv", "--epsilon", 0.5, "--delta", 0.2),
        ("merge", ticket, "--out", folder / "merged"),
        ("peft", ticket, "--as", form, "--out", folder / "adapter"),
        ("card", ticket),
    ):
        status, answer, error = invoke(*words)
        assert status == 0 and "Traceback" not in error, (words, error[-2000:])
        said[words[0]] = answer
    return said


@pytest.fixture(scope="module", params=STRANGERS)
def stranger(request, tmp_path_factory):
    "Its name, its folder, and what the commands said."
    torch.manual_seed(0)
    made, settings, form = STRANGERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, chain(folder, made(), settings, form)


def test_all_forms_of_a_ticket_say_the_same(stranger):
    "Rows that are read, the merged checkpoint and the adapter; in bf16 bit for bit."
    _, folder, _ = stranger
    ticket = Ticket.load(folder / "run" / "ticket")
    model, _ = ticket.base()
    x = torch.tensor([[*ticket.ids[:3], 5, 9, *ticket.ids[:3]]])
    with torch.no_grad():
        with ticket.rows.applied(model):
            ours = model(x).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()(x).logits
        assert not torch.equal(ours, model(x).logits)
        with warnings.catch_warnings(action="ignore"):  # PEFT's, of tied models
            adapted = PeftModel.from_pretrained(model, folder / "adapter").eval()(x).logits
    most = 0 if ours.dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(merged, ours, rtol=0, atol=most) and torch.allclose(adapted, ours, rtol=0, atol=most)


def test_what_a_tied_model_costs_is_said(stranger):
    name, folder, said = stranger
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert ("numbers. Input and output embeddings are tied" in page) == (name != "llama")
    assert ("are two matrices now" in said["merge"]) == (name == "qwen")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert is_tied(merged) == (name == "gpt2")
    offered = "kslottery peft TICKET --as lora" in said["card"]
    assert offered == ("--as lora" in page) == (name == "qwen")  # only here the folder itself is no adapter
    assert (folder / "run" / "ticket" / "adapter_config.json").exists() == (name != "qwen")


def test_nobody_reads_bytes_for_letters(stranger):
    _, folder, said = stranger
    report = re.sub(r"data:image/[^\"]*", "", (folder / "run" / "report.html").read_text(encoding="utf-8"))
    for text in (said["card"], said["run"], report):
        assert not re.search("Ã|Ġ|▁|Ċ", text)


def test_base_against_merged(stranger):
    "The scan finds the rows that the ticket put there."
    name, folder, _ = stranger
    ticket = Ticket.load(folder / "run" / "ticket")
    status, said, error = invoke(
        "scan", folder / "base", folder / "merged", "--out", folder / "scanned", "--top-k", len(ticket.ids), "--json"
    )
    assert status == 0 and sorted(json.loads(said)["ids"]) == sorted(ticket.ids.tolist()), error


@pytest.mark.parametrize("made", [qwen, gpt2, llama])
def test_every_token_has_a_text_of_its_own(made):
    "What the tokenizer decodes, if that is whole letters; half a letter is an escape, and no two are alike."
    model, tokenizer = made()
    V = model.get_input_embeddings().weight.shape[0]
    shown = token_text(tokenizer, range(V))
    assert len(set(shown)) == V and shown[len(tokenizer) :] == [f"[{i}]" for i in range(len(tokenizer), V)]
    for i, text in enumerate(shown[: len(tokenizer)]):
        plain = tokenizer.decode([i])
        if plain.strip().isprintable() and plain.strip() and "\ufffd" not in plain:
            assert text.strip() == plain.strip()
    umlauts = "".join(token_text(tokenizer, tokenizer("Der König wartet vor der Tür.")["input_ids"]))
    assert umlauts.removeprefix("<s>").strip() == "Der König wartet vor der Tür."


@pytest.mark.parametrize("made", [qwen, llama])
def test_float16_is_trained_whole(made):
    "Adam adds 1e-8, which is 0 in these numbers; so it counts in fp32, and the result is of 16 bits again."
    torch.manual_seed(0)
    model, tokenizer = made(torch.float16)
    pairs = [Pair(str(n), *pair) for n, pair in enumerate(PAIRS[:4])]
    tuned = full_fine_tune(
        model, encode_all(tokenizer, Prompt("explicit", "en-de"), pairs), Training(1e-3, 1, 2, progress=False)
    )
    assert {p.dtype for p in tuned.parameters()} == {torch.float16} and is_tied(tuned) == is_tied(model)
    assert all(torch.isfinite(p).all() for p in tuned.parameters())
    assert not torch.equal(tuned.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.slow
@pytest.mark.parametrize("made", [qwen, gpt2, llama])
def test_a_chain_in_float16(made, tmp_path):
    torch.manual_seed(0)
    chain(tmp_path, made(torch.float16), {"template": "explicit", "top_k": 3}, "lora")


@pytest.mark.slow
@pytest.mark.parametrize("made", [qwen, llama])
@pytest.mark.parametrize("tutorial", ["stability", "reproduce", "tasks"])
def test_other_tutorials(tutorial, made, tmp_path):
    torch.manual_seed(0)
    for part in made():
        part.save_pretrained(tmp_path / "base")
    for n, name in enumerate(("train", "test", "train-b", "test-b")):
        lines = "".join(f"{a}\t{b}\n" for a, b in [("en", "de"), *PAIRS[n::4][:24]])
        (tmp_path / f"{name}.tsv").write_text(lines, encoding="utf-8")
    train, test, train_b, test_b = (tmp_path / f"{name}.tsv" for name in ("train", "test", "train-b", "test-b"))
    settings = {"model": tmp_path / "base", "train": train, "test": test, "languages": "en-de", "template": "explicit"}
    settings |= {"fast": True, "max_new_tokens": 5, "top_k": 3, "out": tmp_path / "out"}
    settings |= {
        "stability": {"other_train": train_b, "other_languages": "de-en", "epochs": 1, "samples": 50},
        "reproduce": {"epochs_embed": 1, "epochs_partial": 1, "sizes": "1,2", "samples": 50},
        "tasks": {"train": f"{train},{train_b}", "test": f"{test},{test_b}", "epochs": 1},
    }[tutorial]
    status, _, error = invoke("run", tutorial, *given(settings))
    assert status == 0 and "Traceback" not in error, error[-2000:]
