"""Pairs from every kind of file; roles on tokenizers of every kind; what is refused."""

import gzip
import json
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import DATA
from kslottery.data import (
    INSTRUCTION,
    TEMPLATES,
    Pair,
    Pairs,
    Prompt,
    Role,
    Template,
    collate,
    encode,
    encode_all,
    load_pairs,
    read_lines,
    seen_before,
    token_counts,
    token_text,
)

TEXT = [
    "Translate the following sentence from English to Catalan.",
    "Good day, world!",
    "Bon dia, món!",
    "English: Catalan:",
    "### Input:\n### Response:",
] * 20


def tokenizer(kind):
    """A tokenizer trained on a few lines, with or without BOS and EOS of its own.

    Byte-level BPE (GPT-2, Llama 3), metaspace Unigram (Llama 1/2, T5) or word pieces (BERT).
    """
    special = ["<s>", "</s>", "<unk>"]
    if kind.startswith("bpe"):
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
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
EXPLICIT = Prompt("explicit", "en-ca")
TOKENIZERS = {kind: tokenizer(kind) for kind in KINDS}
words = st.lists(st.text("abdgloómnw!,.", min_size=1, max_size=8), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    template=st.sampled_from(["alpaca", "explicit", "paraphrase"]),
    source=words,
    target=words,
)
def test_roles_and_labels_follow_from_the_tokens(kind, template, source, target):
    tok = TOKENIZERS[kind]
    prompt = Prompt(template, "en-ca")
    example = encode(tok, prompt, Pair("x", source, target))
    n = example.prompt
    assert len(example.ids) == len(example.labels) == len(example.roles)
    assert set(example.labels[:n]) == {-100} and example.labels[n:] == example.ids[n:]
    assert example.ids[-1] == tok.eos_token_id and tok.eos_token_id not in example.ids[:-1]
    assert example.roles[n:-1] == [Role.TARGET] * (len(example.ids) - n - 1) and example.roles[-1] == Role.SPECIAL

    if kind.startswith("bpe"):  # lossless: the tokens of each role spell out the parts
        spelled = lambda role: tok.decode([i for i, r in zip(example.ids, example.roles) if r == role]).strip()
        assert spelled(Role.SOURCE) == source and spelled(Role.TARGET) == target
        full = prompt.text.replace("{source}", source).replace("{target}", target)
        assert full == "".join(text for text, _ in TEMPLATES[template].parts(source, target, ("English", "Catalan")))
        assert tok.decode(example.ids, skip_special_tokens=True) == full


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_what_generation_will_see(kind):
    tok = TOKENIZERS[kind]
    example = encode(tok, EXPLICIT, Pair("x", "Good day, world!", "Bon dia, món!"))
    prompt = "Translate the following sentence from English to Catalan.\nEnglish: Good day, world!\nCatalan:"
    plain = tok(prompt)["input_ids"]
    assert example.ids[: example.prompt] == (plain[:-1] if kind == "bpe-closed" else plain)


def test_punctuation_may_merge_with_the_new_line_of_the_template():
    "Llama 3's tokenizer joins '.' and a following new line: the token's visible part is the source's."
    tok = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, ".\n": 3, "T": 4, ":": 5, "b": 6, " ": 7}, unk_token="<s>")
    )
    tok.pre_tokenizer = pre_tokenizers.Split(__import__("tokenizers").Regex(r"\.\n|."), "isolated")
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")
    example = encode(tok, Prompt("T:{source}\nT: {target}"), Pair("x", "a.", "b"))
    assert dict(zip(example.ids, example.roles))[3] == Role.SOURCE


def test_padding_with_eos_keeps_the_true_eos():
    tok = TOKENIZERS["bpe"]
    examples = encode_all(tok, EXPLICIT, [Pair("1", "Good day", "Bon dia"), Pair("2", "day", "dia")])
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
        ("side.tsv", ["line 3", "empty ca"]),  # lines as an editor counts them, the header too
        ("bare.tsv", ["line 2", "empty source"]),
        ("gap.jsonl", ["line 2", "empty ca"]),
        ("misspelt.tsv", ["en, cat", "en and ca"]),  # a header that is not the one asked for is no sentence
        ("capital.tsv", ["Source, Target", "source and target"]),
        ("names.tsv", ["English, Catalan", "en and ca"]),
        ("fields.jsonl", ["line 1", "en and ca"]),
        ("cut.jsonl", ["line 2", "cut short"]),
        ("list.jsonl", ["line 1", "object"]),
        ("notes.txt", ["neither .jsonl nor .tsv"]),
        ("missing.tsv", ["missing.tsv cannot be found"]),
        ("a.en,b.ca", ["2 lines", "3"]),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, name, words):
    for file, text in BAD.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "a.en").write_text("a\nb\n")
    (tmp_path / "b.ca").write_text("a\nb\nc\n")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_pairs(",".join(str(tmp_path / n) for n in name.split(",")), "en-ca")
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value)


TABLE = b"en\tca\n" + b"good day\tbon dia\n" * 200
PACKED = gzip.compress(TABLE, mtime=0)


BYTES = [
    ("cut.tsv.gz", PACKED[: len(PACKED) // 2], "cannot be read as UTF-8 text .*complete"),
    ("flipped.tsv.gz", PACKED[:20] + b"\xff\xff" + PACKED[22:], "line 1 of .* cannot be read"),
    ("tail.tsv.gz", PACKED + b"junk", "line 202 of .* cannot be read"),
    ("bare.tsv.gz", TABLE, "line 1 of .* cannot be read"),
    ("packed.tsv", PACKED, "line 1 of .* holds a NUL"),
    ("latin.tsv", "en\tca\nday\tmón\n".encode("latin-1"), "line 2 of .* cannot be read"),
    ("mark.tsv", TABLE.decode().encode("utf-16"), "line 1 of .* holds a NUL"),
    ("wide.tsv", TABLE.decode().encode("utf-16-le"), "line 1 of .* holds a NUL"),
    ("nul.tsv", b"en\tca\nda\0y\tdia\n", "line 2 of .* holds a NUL"),
    ("mac.tsv", TABLE.replace(b"\n", b"\r"), "line 1 of .* a carriage return"),
    ("cr.tsv", b"en\tca\nda\ry\tdia\n", "line 2 of .* a carriage return"),
    ("bomb.tsv.gz", gzip.compress(b"en\tca\n" + b"x" * 2**24, 1), "line 2 of .* more than 1,048,576 bytes"),
    (
        "many.tsv.gz",
        gzip.compress(b"a\tb\n" * 30_000),
        "is past the 65,536 bytes that a text of its size unpacks to",
    ),
    ("deep.jsonl", b"[" * 200_000, "line 1 of .* is not a JSON object"),
    ("nested.jsonl", b'{"a":' * 1500, "line 1 of .* is not a JSON object"),
    ("digits.jsonl", b'{"source": %s}' % (b"9" * 5000), "line 1 of .* is not a JSON object"),
    ("list.jsonl", b'[["source", "a"], ["target", "b"]]', "line 1 of .* is not a JSON object"),
    ("null.jsonl", b'{"translation": null}', "line 1 of .* has the fields translation: expected texts"),
    ("number.jsonl", b'{"translation": 3}', "line 1 of .* has the fields translation: expected texts"),
    ("half.jsonl", b'{"source": "a", "target": "b \\ud800"}', "line 1 of .* half a character .* in its target"),
    ("fields.jsonl", b'{"%s": "a"}' % (b"x" * 900_000), "line 1 of .* expected texts under"),
    ("cells.tsv", b"x\ty\n" + b"a" * 200_000, "line 2 of .* has 1 columns"),
]


@pytest.mark.parametrize("name, whole, words", BYTES, ids=[name for name, *_ in BYTES])
def test_any_bytes_get_one_sentence(tmp_path, monkeypatch, name, whole, words):
    "With the line; in the time and memory of what is read, whatever a packed file unpacks to."
    monkeypatch.setattr("kslottery.data._UNPACKED", 2**16)
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(ValueError, match=words) as caught:
        load_pairs(tmp_path / name)
    assert name in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_what_is_odd_and_no_fault_is_read(tmp_path):
    long = "y" * 200_000  # csv stops at 131,072
    (tmp_path / "a.tsv").write_text(f"id\ten\ttranslation\n1\t{long}\tb \u2028c\n")
    assert load_pairs(tmp_path / "a.tsv")[0][1:] == (long, "b \u2028c")  # a column of that name is one like others
    (tmp_path / "b.tsv.gz").write_bytes(PACKED + PACKED)  # gzip joins files so
    assert len(load_pairs(tmp_path / "b.tsv.gz", limit=2**70)) == 401
    (tmp_path / "c.tsv").write_bytes(TABLE[:30] + b"\xff\0")
    assert len(load_pairs(tmp_path / "c.tsv", limit=1)) == 1  # and no more is read
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo words")
    assert read_lines(tmp_path / "empty.gz") == [] and read_lines(tmp_path / "names") == ["one", "", "two words"]


@pytest.mark.parametrize(
    "data, words",
    [
        ("folder", "folder is neither .jsonl nor .tsv"),
        ("pipe", "pipe is neither .jsonl nor .tsv"),
        ("pipe.tsv", "pipe.tsv is a pipe or a device: name a file"),
        ("pipe,pipe", "pipe is a pipe or a device"),
        ("folder.tsv", "folder.tsv is a folder: name a file"),
        ("/dev/null", "/dev/null is neither .jsonl nor .tsv"),
        ("/no/such/place", "/no/such/place cannot be found"),
        ("~nosuchuser/x.tsv", "~nosuchuser/x.tsv does not exist, nor its user's home"),
        ("a\0.tsv", "a.x00.tsv cannot be found"),
        ("x" * 5000 + ".tsv", "cannot be found .File name too long"),
        ("", "is neither .jsonl nor .tsv"),
        (",", "is a folder"),
        ([], "is neither .jsonl nor .tsv"),
        ("\udcff.tsv", "has a name that is not UTF-8"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kslottery.data._hub_records", lambda spec: pytest.fail("it asked for a data set"))
    for name in ("folder", "folder.tsv"):
        (tmp_path / name).mkdir()
    for name in ("pipe", "pipe.tsv"):
        os.mkfifo(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load_pairs(data)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_data_set_that_cannot_be_loaded_gets_one_sentence(monkeypatch):
    def load(name, config, split):
        raise RuntimeError("\n".join([name, str(config), split]) if config else "")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    for spec, words in (("owner/set:a:test", r"\(owner/set\\na\\ntest\)"), ("set", r"\(\)")):
        with pytest.raises(FileNotFoundError, match=f"{spec} is neither a file here nor a data set .* {words}"):
            load_pairs(spec)


def test_a_comma_may_stand_in_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.tsv", "one, two.en", "one, two.ca"):
        (tmp_path / name).write_text("Good day.\tBon dia.\n")
    for data in (
        "a,b.tsv",
        tmp_path / "a,b.tsv",
        ["a,b.tsv"],
        "one, two.en,one, two.ca",
        ("one, two.en", "one, two.ca"),
    ):
        pairs = load_pairs(data)
        assert len(pairs) == 1 and load_pairs(**pairs.origin) == pairs
    with pytest.raises(FileNotFoundError, match="x.en cannot be found"):
        load_pairs("x.en,x.ca")


def test_a_pair_knows_its_line(tmp_path):
    (tmp_path / "head.tsv").write_bytes(
        b"\xef\xbb\xbfen\tca\r\nday\tdia\r\nrain\tpluja\r\n"
    )  # as a spreadsheet writes it
    (tmp_path / "none.tsv").write_text("day\tdia\nrain\tpluja\n")
    for name, first in (("head.tsv", 2), ("none.tsv", 1)):
        assert load_pairs(tmp_path / name) == [
            (f"{name}:{first}", "day", "dia"),
            (f"{name}:{first + 1}", "rain", "pluja"),
        ]


@pytest.mark.parametrize("languages", ["en", "", "en-ca-es", "-ca", ("en", "ca"), "\ud800-ca", "a\nb-ca", "{source}-x"])
def test_bad_languages(tmp_path, languages):
    for wants in (lambda: load_pairs(tmp_path / "x.tsv", languages), lambda: Prompt("prompt", languages)):
        with pytest.raises(ValueError, match="source-target"):
            wants()


def test_bad_templates():
    for text in (
        "Say it: {target}",
        "{source}{source}{target}",
        "{source}",
        "{source}{target}.",
        "{target}{source}{target}",
    ):
        with pytest.raises(
            ValueError, match="'mine' needs {source} exactly once, and {target} exactly once and at its end"
        ):
            Template("mine", text)
    with pytest.raises(ValueError, match="unknown: choose alpaca"):
        Prompt("alpacca")
    for wrong in (lambda: Template("x", 5), lambda: Template(None, "{source}{target}"), lambda: Prompt(5)):
        with pytest.raises(TypeError, match="is no template: its name and its text|give a name, a text or a Template"):
            wrong()
    for text in ("\ud800{source}{target}", "x" * 100_000):
        with pytest.raises((TypeError, ValueError), match="without surrogates|needs {source} exactly once") as caught:
            Template("mine", text)
        assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()
    with pytest.raises(ValueError, match="max_length 5"):
        encode_all(TOKENIZERS["bpe"], EXPLICIT, [Pair("1", "Good day", "Bon dia")], max_length=5)


def test_real_text():
    if not DATA.is_dir():
        pytest.skip(f"no real parallel text at {DATA}: set KSLOTTERY_DATA to the folder that has it")
    pairs = load_pairs(f"{DATA}/ntrex/eng.txt,{DATA}/ntrex/cat.txt")
    assert len(pairs) == 1997
    train = load_pairs(DATA / "train" / "en-ca.tsv.gz", "en-ca")
    assert len(train) == 28427 and not {p.source for p in pairs} & {p.source for p in train}
    for pair in pairs[:50]:
        example = encode(TOKENIZERS["bpe"], Prompt("alpaca", "en-ca"), pair)
        source = [i for i, r in zip(example.ids, example.roles) if r == Role.SOURCE]
        assert TOKENIZERS["bpe"].decode(source).strip() == pair.source


def jsonl(path, records):
    text = "".join(json.dumps(r) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


PROMPTED = [
    {"prompt": "Is this good?\nVery bad.\nAnswer: ", "completion": "no\n"},
    {"prompt": "The sky is", "completion": " blue."},
]


def test_prompts_and_completions_are_kept_as_they_are(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        pairs = load_pairs(jsonl(tmp_path / name, PROMPTED))
        assert [{"prompt": p.source, "completion": p.target} for p in pairs] == PROMPTED, name
    (tmp_path / "a.tsv").write_text("completion\tprompt\n blue.\tThe sky is\n")
    assert load_pairs(tmp_path / "a.tsv")[0][1:] == ("The sky is", " blue.")
    both = jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c", "en": " day ", "ca": "dia"}])
    assert load_pairs(both, "en-ca")[0][1:] == ("day", "dia")  # the languages asked for come first


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), prompt=words, completion=words, gap=st.sampled_from(["", " ", "\n", ":\n\n"]))
def test_any_prompt_and_completion(kind, prompt, completion, gap):
    """The prompt's tokens are those that generation will see; labels are the completion and the EOS.

    A space may stand on either side of the boundary.
    """
    tok = TOKENIZERS[kind]
    example = encode(tok, Prompt(), Pair("x", prompt + gap, completion))
    seen = tok((prompt + gap).rstrip(" "))["input_ids"]
    assert example.ids[: example.prompt] == (seen[:-1] if kind == "bpe-closed" else seen)
    assert (
        set(example.labels[: example.prompt]) == {-100}
        and example.labels[example.prompt :] == example.ids[example.prompt :]
    )
    assert example.ids[-1] == tok.eos_token_id and tok.eos_token_id not in example.ids[:-1]
    special = set(tok.all_special_ids) - {tok.unk_token_id}
    assert all(r == Role.SOURCE for i, r in zip(example.ids[: example.prompt], example.roles) if i not in special)
    if gap == " ":
        assert example == encode(tok, Prompt(), Pair("x", prompt, " " + completion))
    if kind.startswith("bpe"):
        assert tok.decode(example.ids, skip_special_tokens=True) == prompt + gap + completion


def test_a_boundary_that_would_merge_keeps_the_prompt():
    "The joint text 'A:yes' has a token ':y' that the open prompt never holds: the completion is tokenised alone."
    tok = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "A": 2, ":": 3, "y": 4, "e": 5, "s": 6, ":y": 7}, [(":", "y")]))
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")
    assert tok("A:yes")["input_ids"] == [2, 7, 5, 6]
    example = encode(tok, Prompt(), Pair("x", "A:", "yes"))
    assert example.ids == [2, 3, 4, 5, 6, 1] and example.labels == [-100, -100, 4, 5, 6, 1] and example.prompt == 2


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "a", "completion": " \n"}, ["line 2", "empty completion"]),
        ({"prompt": " ", "completion": "b"}, ["line 2", "empty prompt"]),
        ({"prompt": "a", "answer": "b"}, ["line 2", "prompt, answer", "prompt and completion"]),
        ({"prompt": "a", "completion": None}, ["line 2", "prompt and completion"]),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
            ["line 2", "prompt", "list", "chat template"],
        ),
    ],
)
def test_bad_prompts_get_one_sentence(tmp_path, record, words):
    with pytest.raises(ValueError) as caught:
        load_pairs(jsonl(tmp_path / "a.jsonl", [PROMPTED[0], record]))
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value)


def test_languages_are_needed_only_where_the_template_says_them():
    with pytest.raises(ValueError, match="'explicit' says the languages"):
        Prompt("explicit")
    tok, pair, text = TOKENIZERS["bpe"], Pair("x", "Good day", "Bon dia"), "Say {source}: {target}"
    assert encode_all(tok, Prompt(text), [pair]) == encode_all(tok, Prompt(text, "en-ca"), [pair])


def test_a_limit_reads_no_more_of_the_hub_than_it_needs(monkeypatch):
    def records(spec):
        yield from [{"en": "a", "ca": "b"}, {"en": "c", "ca": "d"}]
        pytest.fail("it read on")

    monkeypatch.setattr("kslottery.data._hub_records", records)
    assert [p.source for p in load_pairs("some/set", "en-ca", limit=2)] == ["a", "c"]


COLUMNS = [  # a file's header, the languages asked for, and the columns that are read (None: one sentence)
    ("id en ca", None, "en ca"),
    ("ca id en", None, "ca en"),  # in their order
    ("en ca", None, "en ca"),
    ("Source Target", None, "Source Target"),
    ("English Catalan", None, "English Catalan"),
    ("pt-BR cat_Latn", None, "pt-BR cat_Latn"),
    ("id en ca", "ca-en", "ca en"),
    ("en ca source target", None, "source target"),
    ("en ca source target", "en-ca", "en ca"),
    ("en ca source target", "en-es", "source target"),
    ("id prompt completion", "en-es", "prompt completion"),
    ("en es ca", None, None),
    ("id en es", "en-ca", None),  # what was asked for is not there: nothing is guessed
    ("source en", None, None),
    ("source es", "en-ca", None),
]


@pytest.mark.parametrize("header, languages, read", COLUMNS)
def test_which_columns_are_read(tmp_path, header, languages, read):
    names = header.split()
    record = {name: f"text of {name}" for name in names}
    (tmp_path / "a.tsv").write_text("\t".join(names) + "\n" + "\t".join(record.values()) + "\n")
    files = [
        tmp_path / "a.tsv",
        jsonl(tmp_path / "a.jsonl", [record]),
        jsonl(tmp_path / "b.jsonl", [{"translation": record}]),
    ]
    for path in files:
        if read is None:
            with pytest.raises(ValueError, match=f"(?s){names[0]}.*{names[-1]}.*source and target"):
                load_pairs(path, languages)
        else:
            assert load_pairs(path, languages)[0][1:] == tuple(f"text of {name}" for name in read.split())


@pytest.mark.parametrize("header", ["en\tnote", "Source\tFont", "English\tAnglès", "day\tprompt"])
def test_a_first_line_that_may_be_a_header_is_not_taken_for_a_sentence(tmp_path, header):
    (tmp_path / "a.tsv").write_text(f"{header}\nday\tdia\n")
    with pytest.raises(ValueError, match="a.tsv has the columns .*: expected a header with source and target, or two"):
        load_pairs(tmp_path / "a.tsv")


def test_all_records_have_the_columns_of_the_first(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"en": "day", "ca": "dia"}, {"ca": "pluja", "en": "rain", "n": 3}])
    assert [p[1:] for p in load_pairs(path)] == [("day", "dia"), ("rain", "pluja")]  # not in the second's order
    path = jsonl(tmp_path / "b.jsonl", [{"en": "day", "ca": "dia"}, {"en": "day", "es": "día"}])
    with pytest.raises(ValueError, match="line 2 of .* has the fields en, es: expected texts under en and ca"):
        load_pairs(path)


def test_pairs_remember_where_they_came_from(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"en": "day", "ca": "dia"}] * 3)
    pairs = load_pairs(path, "en-ca", limit=2)
    assert pairs.origin == {"data": str(path), "languages": "en-ca", "limit": 2} and load_pairs(**pairs.origin) == pairs
    assert Pairs(pairs) == pairs and Pairs(pairs).origin is None and not hasattr(pairs[:1], "origin")
    (tmp_path / "a.en").write_text("day\n")
    (tmp_path / "a.ca").write_text("dia\n")
    two = load_pairs((tmp_path / "a.en", tmp_path / "a.ca"))
    assert two == load_pairs(**two.origin) == [("a.en:1", "day", "dia")]
    with pytest.raises(
        ValueError, match="a.en, a.ca, a.es is neither .jsonl nor .tsv: name one such file, or two aligned"
    ):
        load_pairs("a.en,a.ca,a.es")
    for limit in (0, -5, "3", 1.5):
        with pytest.raises(ValueError, match=f"limit is {limit}"):
            load_pairs(path, limit=limit)


def test_a_prompt_is_checked_when_it_is_made():
    assert Prompt() == Prompt("prompt") and Prompt("{source}{target}").template.name == "custom"
    assert Prompt("Say\\n{source}{target}").text == "Say\n{source}{target}"  # as a command line passes it
    assert EXPLICIT.names == ("English", "Catalan") and Prompt("prompt", "xx-en").names == ("xx", "English")
    assert (
        EXPLICIT.text.endswith("\nEnglish: {source}\nCatalan: {target}") and EXPLICIT.template is TEMPLATES["explicit"]
    )
    for prompt in (
        EXPLICIT,
        Prompt(),
        Prompt("chat", "de-en"),
        Prompt(Template("mine", "{source}:{target}", chat=True)),
    ):
        assert Prompt.from_dict(json.loads(json.dumps(prompt.as_dict()))) == prompt
        assert hash(prompt) == hash(Prompt(prompt.template, prompt.languages))
    old = {"template": {"name": "prompt", "text": "{source}{target}"}, "languages": None}  # as 0.1 wrote it
    assert Prompt.from_dict(old) == Prompt()
    for record in (
        {},
        {"template": None},
        {"template": {"name": "x"}},
        {"template": {"name": "x", "text": "y", "z": 1}},
        {"template": {"name": "x", "text": 1}},
        {"template": {"name": "x", "text": "{source}{target}", "chat": "yes"}},
        {"template": {"name": "x", "text": "{source}{target}"}, "languages": 3},
        [],
    ):
        with pytest.raises(ValueError, match="the prompt is damaged .*: give what Prompt.as_dict gave"):
            Prompt.from_dict(record)
    with pytest.raises(AttributeError):
        EXPLICIT.languages = "en-es"


def test_what_is_no_prompt_gets_the_mend():
    pair = Pair("x", "Good day", "Bon dia")
    for wrong in ("en-ca", "explicit", ("English", "Catalan"), TEMPLATES["explicit"], None):
        for code in (
            lambda tok, prompt: encode(tok, prompt, pair),
            lambda tok, prompt: encode_all(tok, prompt, [pair]),
        ):
            with pytest.raises(TypeError, match=r"give a Prompt, for example Prompt\('explicit', 'en-ca'\)"):
                code(TOKENIZERS["bpe"], wrong)


def test_head_and_tail_are_the_two_ends_of_the_instruction():
    tok = TOKENIZERS["bpe"]
    example = encode(tok, EXPLICIT, Pair("x", "Good day", "Bon dia"))
    spelled = {role: tok.decode([i for i, r in zip(example.ids, example.roles) if r == role]) for role in Role}
    assert spelled[Role.HEAD].strip() == "Translate the following sentence from English to Catalan.\nEnglish:"
    assert spelled[Role.TAIL] == "\nCatalan:" and spelled[Role.SOURCE].strip() == "Good day"
    assert example.roles[: example.prompt] == sorted(example.roles[: example.prompt])  # head, source, tail
    each = [token_counts([example], len(tok), role) for role in Role]
    assert (sum(each) == token_counts([example], len(tok))).all() and sum(each).sum() == len(example.ids)
    assert (token_counts([example], len(tok), INSTRUCTION) == each[Role.HEAD] + each[Role.TAIL]).all()


# As they are written: ChatML with a system prompt (Qwen), Llama 3's, and Llama 2's, whose marks are plain text.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)
LLAMA2 = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content | trim }} [/INST]{% endfor %}"


def chatty(template, closed=False):
    """A byte-level BPE tokenizer that has control tokens and a chat template; `closed` adds BOS and EOS by itself."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(TEXT, trainer)
    if closed:
        tok.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", chat_template=template)


CHATS = {
    (name, closed): chatty(template, closed)
    for name, template in (("chatml", CHATML), ("llama3", LLAMA3), ("llama2", LLAMA2))
    for closed in (False, True)
}


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(CHATS)), source=words, target=words, ending=st.sampled_from(["", " ", "\n\n"]))
def test_roles_in_a_chat_are_exact(kind, source, target, ending):
    tok = CHATS[kind]
    example = encode(tok, Prompt("chat", "en-ca"), Pair("x", source + ending, target))
    message = f"Translate the following sentence from English to Catalan.\n{source}{ending}"
    own = [{"role": "user", "content": message}]
    seen = tok.apply_chat_template(own, add_generation_prompt=True)["input_ids"]
    assert example.ids[: example.prompt] == seen  # what transformers sends to a model, one BOS and no more
    assert seen.count(tok.bos_token_id) == (kind[0] != "chatml")
    spelled = lambda role: tok.decode([i for i, r in zip(example.ids, example.roles) if r == role])
    assert spelled(Role.SOURCE).strip() == source and spelled(Role.TARGET).strip() == target
    assert spelled(Role.HEAD).rstrip().endswith("from English to Catalan.")
    assert example.roles[: example.prompt] == sorted(example.roles[: example.prompt])
    assert example.ids[-1] == tok.eos_token_id and example.labels[example.prompt :] == example.ids[example.prompt :]


def test_the_ends_of_a_chat():
    example = encode(CHATS["chatml", True], Prompt("chat", "en-ca"), Pair("x", "Good day", "Bon dia"))
    spelled = lambda role: CHATS["chatml", True].decode([i for i, r in zip(example.ids, example.roles) if r == role])
    assert spelled(Role.HEAD) == (
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n"
        "Translate the following sentence from English to Catalan.\n"
    )
    assert spelled(Role.TAIL) == "<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(Role.SPECIAL) == "</s>"
    example = encode(CHATS["llama3", True], Prompt("chat", "en-ca"), Pair("x", "Good day", "Bon dia"))
    assert example.roles[0] == Role.SPECIAL  # the template's own BOS
    spelled = lambda role: CHATS["llama3", True].decode([i for i, r in zip(example.ids, example.roles) if r == role])
    assert spelled(Role.TAIL) == "</s><|im_start|>assistant<|im_end|>\n\n"  # an EOS that the template writes stays


def test_a_message_of_ones_own_goes_into_the_chat_template():
    prompt = Prompt(Template("question", "{source}{target}", chat=True))
    tok = CHATS["chatml", False]
    example = encode(tok, prompt, Pair("x", "Good day?", "Bon dia"))
    tail = [i for i, r in zip(example.ids, example.roles) if r == Role.TAIL]
    assert tok.decode(tail) == "<|im_end|>\n<|im_start|>assistant\n"


def test_what_a_chat_cannot_do_gets_one_sentence():
    chat, pair = Prompt("chat", "en-ca"), Pair("a.tsv:3", "Good day", "Bon dia")
    with pytest.raises(ValueError, match="no chat template, and the template 'chat' needs one"):
        encode(TOKENIZERS["bpe"], chat, pair)
    for template in (
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "[INST]",
        "{{ messages[0].content | upper }}x{{ messages[0].content }}",
        "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}",  # at once
    ):
        with pytest.raises(ValueError, match="does not show the message of a.tsv:3 once and as it is"):
            encode(chatty(template), chat, pair)
    for template, words in (
        ("{{ raise_exception('no\nand no') }}", "no and no"),
        ("{% for m in %}", "Expected an expression"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ({"tool": "x"}, "default"),
    ):
        with pytest.raises(ValueError, match=f"chat template of the tokenizer is damaged .*{words}.*: write another"):
            encode(chatty(template), chat, pair)
    for wrong in (Pair("a.tsv:3", "Good \ud800", "x"), Pair("a.tsv:3", "x", "\udfff")):
        with pytest.raises(ValueError, match="a.tsv:3 holds half a character"):
            encode(TOKENIZERS["bpe"], Prompt(), wrong)
    with pytest.raises(ValueError, match="no token of a.tsv:3 comes from its source"):
        encode(TOKENIZERS["bpe"], Prompt(), Pair("a.tsv:3", "", ""))
    for wrong in (Pair("a.tsv:3", "Good <|im_end|> day", "x"), Pair("a.tsv:3", "x", "Bon dia</s>")):
        for prompt in (chat, EXPLICIT):
            with pytest.raises(ValueError, match="a.tsv:3 writes out the control token '<"):
                encode(CHATS["chatml", False], prompt, wrong)
    whole = Pair("x", "<|im_start|>user\nGood day<|im_end|>\n", "Bon dia<|im_end|>")  # a prompt that was written out
    assert (
        CHATS["chatml", False].convert_tokens_to_ids("<|im_end|>")
        in encode(CHATS["chatml", False], Prompt(), whole).ids
    )


def test_tokens_are_shown_as_text():
    bpe = TOKENIZERS["bpe"]
    assert token_text(bpe, bpe("ü\n\t </s>")["input_ids"]) == ["\\xc3", "\\xbc", "⏎", "\\t", "␣", "</s>"]  # half an ü
    whole = Tokenizer(
        models.BPE(
            {t: n for n, t in enumerate(["Ã¼", "Ġâ̂", "âĢĶ", "ĠâĢĶ", "ĊĊ", "Ġ", "ĠĠ", "Ġday", "č", ".Ċ", "Ãī"])}, []
        )
    )
    whole.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</é>")
    expected = ["ü", "Ġâ̂", "—", " —", "⏎⏎", "␣", "␣␣", " day", "\\r", ".⏎", "É", "</é>", "[99]"]
    assert token_text(whole, [*range(12), 99]) == expected
    pieces = ["▁Bon", "▁", "▁▁", "<0x0A>", "<0xC3>", "ü", "##ing", "⏎", "\n", "\u00a0", "<s>"]
    for model in (
        models.WordLevel({t: n for n, t in enumerate(pieces)}, unk_token="<s>"),
        models.Unigram([(t, 0.0) for t in pieces], unk_id=10),
    ):
        tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), bos_token="<s>")
        shown = token_text(tok, range(len(pieces)))
        assert shown == [" Bon", "␣", "␣␣", "⏎", "\\xc3", "ü", "##ing", "⏎", "⏎", "\\xa0", "<s>"]
    assert token_text(bpe, []) == []


def test_copies_of_a_sentence_are_recognised():
    "In another case, spacing, width or final punctuation; other words, or punctuation inside, are another sentence."
    one = Pair("a:1", "Don't go,  it rains.", "x")
    copies = (
        "don't go, it rains",
        "DON'T GO, IT RAINS!?",
        " Don't\u00a0go,\tit rains \u2026",
        "Ｄon't go, it rains。",
        "Don't go, it rains.”",
    )
    assert {Pair(str(i), text, "y").loose for i, text in enumerate(copies)} == {one.loose}
    others = ("Dont go, it rains.", "Don't go; it rains.", "Don't go, it rained.", "की", "का", "!", "?", "")
    assert len({Pair("b:1", text, "x").loose for text in (one.source, *others)}) == 1 + len(others)
    assert one.loose[0] == "~" and len(one.loose) == 65 and one.loose != "~" + one.hash
    pairs = [one, *(Pair(f"c:{i}", text, "y") for i, text in enumerate((*copies, *others)))]
    assert seen_before(pairs, {one.hash}) == ["a:1"]
    assert seen_before(pairs, [one.loose]) == ["a:1", *(f"c:{i}" for i in range(len(copies)))]
    assert seen_before(pairs, []) == []
