"""Pairs from every kind of file; roles on tokenizers of every kind; what is refused."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import DATA
from kslottery.data import TEMPLATES, Pair, Role, Template, collate, encode, encode_all, get_template, load_pairs

TEXT = ["Translate the following sentence from English to Catalan.", "Good day, world!", "Bon dia, món!", "English: Catalan:", "### Input:\n### Response:"] * 20


def tokenizer(kind):
    "A tokenizer trained on a few lines: byte-level BPE (GPT-2, Llama 3), metaspace Unigram (Llama 1/2, T5) or word pieces (BERT); with or without BOS and EOS of its own."
    special = ["<s>", "</s>", "<unk>"]
    if kind.startswith("bpe"):
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    elif kind == "unigram":
        tok = Tokenizer(models.Unigram())
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=special,
            unk_token="<unk>",
            show_progress=False,
            initial_alphabet=list("abcdefghijklmnopqrstuvwxyz\n.:,!#óABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        )
    else:
        tok = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tok.train_from_iterator(TEXT, trainer)
    if kind == "bpe-closed":  # puts BOS before and EOS after every text
        tok.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    elif kind == "unigram":
        tok.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = ("bpe", "bpe-closed", "unigram", "wordpiece")
TOKENIZERS = {kind: tokenizer(kind) for kind in KINDS}
words = st.lists(st.text("abdgloómnw!,.", min_size=1, max_size=8), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(KINDS), template=st.sampled_from(["alpaca", "explicit", "paraphrase"]), source=words, target=words)
def test_roles_and_labels_follow_from_the_tokens(kind, template, source, target):
    tok = TOKENIZERS[kind]
    example = encode(tok, template, Pair("x", source, target), ("English", "Catalan"))
    n = example.prompt
    assert len(example.ids) == len(example.labels) == len(example.roles)
    assert set(example.labels[:n]) == {-100} and example.labels[n:] == example.ids[n:]
    assert example.ids[-1] == tok.eos_token_id and tok.eos_token_id not in example.ids[:-1]
    assert example.roles[n:-1] == [Role.TARGET] * (len(example.ids) - n - 1) and example.roles[-1] == Role.SPECIAL

    if kind.startswith("bpe"):  # lossless: the tokens of each role spell out the parts
        spelled = lambda role: tok.decode([i for i, r in zip(example.ids, example.roles) if r == role]).strip()
        assert spelled(Role.SOURCE) == source and spelled(Role.TARGET) == target
        full = "".join(t for t, _ in TEMPLATES[template].parts(source, target, ("English", "Catalan")))
        assert tok.decode(example.ids, skip_special_tokens=True) == full


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_what_generation_will_see(kind):
    tok = TOKENIZERS[kind]
    example = encode(tok, "explicit", Pair("x", "Good day, world!", "Bon dia, món!"), ("English", "Catalan"))
    prompt = "Translate the following sentence from English to Catalan.\nEnglish: Good day, world!\nCatalan:"
    plain = tok(prompt)["input_ids"]
    assert example.ids[: example.prompt] == (plain[:-1] if kind == "bpe-closed" else plain)


def test_punctuation_may_merge_with_the_new_line_of_the_template():
    "Llama 3's tokenizer joins '.' and a following new line: the token's visible part is the source's."
    tok = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, ".\n": 3, "T": 4, ":": 5, "b": 6, " ": 7}, unk_token="<s>"))
    tok.pre_tokenizer = pre_tokenizers.Split(__import__("tokenizers").Regex(r"\.\n|."), "isolated")
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")
    example = encode(tok, "T:{source}\nT: {target}", Pair("x", "a.", "b"), ("", ""))
    assert dict(zip(example.ids, example.roles))[3] == Role.SOURCE


def test_padding_with_eos_keeps_the_true_eos():
    tok = TOKENIZERS["bpe"]
    examples = encode_all(tok, "explicit", [Pair("1", "Good day", "Bon dia"), Pair("2", "day", "dia")], "en-ca")
    for left in (False, True):
        batch = collate(examples, tok.eos_token_id, left=left)
        assert (batch["labels"] == tok.eos_token_id).sum(1).tolist() == [1, 1]
        assert batch["attention_mask"].sum(1).tolist() == [len(e.ids) for e in examples]


BAD = {
    "empty.tsv": "",
    "blank.jsonl": "",
    "columns.tsv": "id\ten\tes\n1\ta\tb\n",
    "ragged.tsv": "en\tca\na\tb\tc\n",
    "side.tsv": "en\tca\na\t \n",
    "fields.jsonl": '{"en": "a", "es": "b"}\n',
    "cut.jsonl": '{"en": "a", "ca": "b"}\n{"en": "a", "c',
    "list.jsonl": "[1]\n",
    "notes.txt": "a\n",
}


@pytest.mark.parametrize(
    "name, words",
    [
        ("empty.tsv", ["empty.tsv", "none"]),
        ("blank.jsonl", ["blank.jsonl", "no pairs"]),
        ("columns.tsv", ["id, en, es", "en and ca"]),
        ("ragged.tsv", ["line 2", "3 columns"]),
        ("side.tsv", ["pair 1", "empty target"]),
        ("fields.jsonl", ["line 1", "en and ca"]),
        ("cut.jsonl", ["line 2", "cut short"]),
        ("list.jsonl", ["line 1", "object"]),
        ("notes.txt", ["neither .jsonl nor .tsv"]),
        ("missing.tsv", ["missing.tsv does not exist"]),
        ("a.en,b.ca", ["2 lines", "3"]),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, name, words):
    for file, text in BAD.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "a.en").write_text("a\nb\n")
    (tmp_path / "b.ca").write_text("a\nb\nc\n")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_pairs(",".join(str(tmp_path / n) for n in name.split(",")))
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value)


def test_a_truncated_gzip_and_other_encodings_are_refused(tmp_path):
    whole = gzip.compress(b"en\tca\n" + b"good day\tbon dia\n" * 200)
    (tmp_path / "cut.tsv.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.tsv").write_bytes("en\tca\nday\tmón\n".encode("latin-1"))
    for name in ("cut.tsv.gz", "latin.tsv"):
        with pytest.raises(ValueError, match=name):
            load_pairs(tmp_path / name)


@pytest.mark.parametrize("languages", ["en", "", "en-ca-es", "-ca"])
def test_bad_languages(tmp_path, languages):
    with pytest.raises(ValueError, match="source-target"):
        load_pairs(tmp_path / "x.tsv", languages)


def test_bad_templates():
    with pytest.raises(ValueError, match="0 places {source}"):
        Template("mine", "Say it: {target}")
    with pytest.raises(ValueError, match="unknown: choose alpaca"):
        get_template("alpacca")
    with pytest.raises(ValueError, match="max_length 5"):
        encode_all(TOKENIZERS["bpe"], "explicit", [Pair("1", "Good day", "Bon dia")], "en-ca", max_length=5)


def test_real_text():
    if not DATA.is_dir():
        pytest.skip(f"no real parallel text at {DATA}: set KSLOTTERY_TEST_DATA to the folder that has it")
    pairs = load_pairs(f"{DATA}/ntrex/eng.txt,{DATA}/ntrex/cat.txt")
    assert len(pairs) == 1997
    train = load_pairs(DATA / "train" / "en-ca.tsv.gz", "en-ca")
    assert len(train) == 28427 and not {p.source for p in pairs} & {p.source for p in train}
    for pair in pairs[:50]:
        example = encode(TOKENIZERS["bpe"], "alpaca", pair, ("English", "Catalan"))
        source = [i for i, r in zip(example.ids, example.roles) if r == Role.SOURCE]
        assert TOKENIZERS["bpe"].decode(source).strip() == pair.source
