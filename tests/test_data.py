"""Pairs from every kind of file; roles on tokenizers of every kind; what is refused."""

import gzip
import json

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
    "side.tsv": "en\tca\na\tb\na\t \n",
    "bare.tsv": "a\tb\n\tc\n",
    "misspelt.tsv": "en\tcat\na\tb\n",
    "capital.tsv": "Source\tTarget\na\tb\n",
    "names.tsv": "English\tCatalan\na\tb\n",
    "gap.jsonl": '{"en": "a", "ca": "b"}\n{"en": "a", "ca": ""}\n',
    "fields.jsonl": '{"en": "a", "es": "b"}\n',
    "cut.jsonl": '{"en": "a", "ca": "b"}\n{"en": "a", "c',
    "list.jsonl": "[1]\n",
    "notes.txt": "a\n",
}


@pytest.mark.parametrize(
    "name, words",
    [
        ("empty.tsv", ["empty.tsv", "no pairs"]),
        ("blank.jsonl", ["blank.jsonl", "no pairs"]),
        ("columns.tsv", ["id, en, es", "en and ca"]),
        ("ragged.tsv", ["line 2", "3 columns"]),
        ("side.tsv", ["line 3", "empty target"]),  # lines as an editor counts them, the header too
        ("bare.tsv", ["line 2", "empty source"]),
        ("gap.jsonl", ["line 2", "empty target"]),
        ("misspelt.tsv", ["en, cat", "en and ca"]),  # a header that is not the one asked for is no sentence
        ("capital.tsv", ["Source, Target", "source and target"]),
        ("names.tsv", ["English, Catalan", "en and ca"]),
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


def test_a_pair_knows_its_line(tmp_path):
    (tmp_path / "head.tsv").write_bytes(b"\xef\xbb\xbfen\tca\r\nday\tdia\r\nrain\tpluja\r\n")  # as a spreadsheet writes it
    (tmp_path / "none.tsv").write_text("day\tdia\nrain\tpluja\n")
    for name, first in (("head.tsv", 2), ("none.tsv", 1)):
        assert load_pairs(tmp_path / name) == [(f"{name}:{first}", "day", "dia"), (f"{name}:{first + 1}", "rain", "pluja")]


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


def jsonl(path, records):
    text = "".join(json.dumps(r) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


PROMPTED = [{"prompt": "Is this good?\nVery bad.\nAnswer: ", "completion": "no\n"}, {"prompt": "The sky is", "completion": " blue."}]


def test_prompts_and_completions_are_kept_as_they_are(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a.jsonl", "a.jsonl.gz", "set/train.jsonl"):
        path = jsonl(tmp_path / name, PROMPTED)
        pairs = load_pairs(path.parent if name.startswith("set/") else path)  # a folder is read as a data set of the Hub
        assert [{"prompt": p.source, "completion": p.target} for p in pairs] == PROMPTED, name
    (tmp_path / "a.tsv").write_text("completion\tprompt\n blue.\tThe sky is\n")
    assert load_pairs(tmp_path / "a.tsv")[0][1:] == ("The sky is", " blue.")
    both = jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c", "en": " day ", "ca": "dia"}])
    assert load_pairs(both, "en-ca")[0][1:] == ("day", "dia")  # the languages asked for come first


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), prompt=words, completion=words, gap=st.sampled_from(["", " ", "\n", ":\n\n"]))
def test_any_prompt_and_completion(kind, prompt, completion, gap):
    "The prompt's tokens are those that generation will see; labels are the completion and the EOS; a space may stand on either side of the boundary."
    tok = TOKENIZERS[kind]
    example = encode(tok, "prompt", Pair("x", prompt + gap, completion))
    seen = tok((prompt + gap).rstrip(" "))["input_ids"]
    assert example.ids[: example.prompt] == (seen[:-1] if kind == "bpe-closed" else seen)
    assert set(example.labels[: example.prompt]) == {-100} and example.labels[example.prompt :] == example.ids[example.prompt :]
    assert example.ids[-1] == tok.eos_token_id and tok.eos_token_id not in example.ids[:-1]
    special = set(tok.all_special_ids) - {tok.unk_token_id}
    assert all(r == Role.SOURCE for i, r in zip(example.ids[: example.prompt], example.roles) if i not in special)
    if gap == " ":
        assert example == encode(tok, "prompt", Pair("x", prompt, " " + completion))
    if kind.startswith("bpe"):
        assert tok.decode(example.ids, skip_special_tokens=True) == prompt + gap + completion


def test_a_boundary_that_would_merge_keeps_the_prompt():
    "The joint text 'Answer:yes' begins with a token ':y' that the open prompt never holds: the completion is tokenised alone."
    tok = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "A": 2, ":": 3, "y": 4, "e": 5, "s": 6, ":y": 7}, [(":", "y")]))
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")
    assert tok("A:yes")["input_ids"] == [2, 7, 5, 6]
    example = encode(tok, "prompt", Pair("x", "A:", "yes"))
    assert example.ids == [2, 3, 4, 5, 6, 1] and example.labels == [-100, -100, 4, 5, 6, 1] and example.prompt == 2


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "a", "completion": " \n"}, ["line 2", "empty completion"]),
        ({"prompt": " ", "completion": "b"}, ["line 2", "empty prompt"]),
        ({"prompt": "a", "answer": "b"}, ["line 2", "prompt, answer", "prompt and completion"]),
        ({"prompt": "a", "completion": None}, ["line 2", "prompt and completion"]),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, ["line 2", "prompt", "list", "chat template"]),
    ],
)
def test_bad_prompts_get_one_sentence(tmp_path, record, words):
    with pytest.raises(ValueError) as caught:
        load_pairs(jsonl(tmp_path / "a.jsonl", [PROMPTED[0], record]))
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value)


def test_languages_are_needed_only_where_the_template_says_them():
    pair = Pair("x", "Good day", "Bon dia")
    with pytest.raises(ValueError, match="'explicit' says the languages"):
        encode_all(TOKENIZERS["bpe"], "explicit", [pair])
    assert encode_all(TOKENIZERS["bpe"], "Say {source}: {target}", [pair]) == encode_all(TOKENIZERS["bpe"], "Say {source}: {target}", [pair], "en-ca")


def test_a_limit_reads_no_more_of_the_hub_than_it_needs(monkeypatch):
    def records(spec):
        yield from [{"en": "a", "ca": "b"}, {"en": "c", "ca": "d"}]
        pytest.fail("it read on")

    monkeypatch.setattr("kslottery.data._hub_records", records)
    assert [p.source for p in load_pairs("some/set", "en-ca", limit=2)] == ["a", "c"]
