"""The page "Real language": its benchmark at a fast size, its file, and that what the page says is in the file."""

import ast
import copy
import gzip
import json

import matplotlib.pyplot as plt
import pytest

from conftest import DATA, ROOT

STORED = ROOT / "benchmarks" / "results" / "real.json"
PAGE = ROOT / "nbs" / "explanation" / "real.ipynb"


@pytest.fixture(scope="module")
def real():
    return json.loads(STORED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    "The benchmark in the built-in small world: its file, and what it holds."
    import real

    file = tmp_path_factory.mktemp("real") / "real.json"
    real.main(["--fast", "--runs", str(file.parent / "runs"), "--out", str(file)])
    return file, json.loads(file.read_text(encoding="utf-8"))


def shape(value):
    "What a file has to hold whatever was measured: the names in it."
    return {name: shape(inner) for name, inner in value.items()} if isinstance(value, dict) else None


def test_the_fast_size_makes_what_is_stored(fast, real):
    made = fast[1]
    assert [name for name in real if name not in made] == []
    assert {*made["audits"]} == {*real["audits"]} and {*made["stability"]} == {*real["stability"]}
    arms = [next(iter(found["arms"].values())) for found in (made, real)]  # of the first prompt and direction
    assert [list(found["0"]) for found in arms][0] == [list(found["0"]) for found in arms][1]
    assert shape(arms[0]["0"]) == shape(arms[1]["0"])
    one, other = (next(iter(found["scans"].values()))["0"] for found in (made, real))
    assert one.keys() == other.keys()


def test_it_goes_on_cell_by_cell(fast, capsys):
    import real

    file, whole = fast
    again = ["--fast", "--runs", str(file.parent / "runs"), "--out", str(file)]
    capsys.readouterr()
    assert real.main(again) == whole and capsys.readouterr().out == ""
    broken, (name, *_) = copy.deepcopy(whole), whole["arms"]
    del broken["arms"][name]["0"]["gradient"]
    file.write_text(json.dumps(broken))
    assert real.main(again) == whole and capsys.readouterr().out.count("\n") == 1
    file.write_text(json.dumps(whole | {"settings": whole["settings"] | {"top_k": 99}}))
    with pytest.raises(ValueError, match="holds another run"):
        real.main(again)


def numbers(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


def test_the_stored_file_is_whole(real):
    import real as benchmark

    sizes = benchmark.Sizes()
    assert real["settings"] == json.loads(json.dumps(benchmark.asdict(sizes)))
    (main, *rest), seeds = [", ".join(s) for s in sizes.settings], [str(s) for s in sizes.seeds]
    assert list(real["arms"][main]) == seeds and [*real["arms"]] == [main, *rest]
    for rate in sizes.rates:
        for seed in seeds:
            found = real["scans"][f"{rate:g}"][seed]
            passing = [len(ids) for ids in found["passing"].values()]
            assert passing == sorted(passing) and found["bonferroni"] <= found["passing"]["0.05"].__len__()
            assert (found["largest"] >= found["critical"]["0.05"]) == bool(found["passing"]["0.05"])
    for by_seed in real["arms"].values():
        for arms in by_seed.values():
            for arm in arms.values():
                for part in ("gain", "stopping", "content", "share"):
                    value, low, high = arm[part]
                    assert value is None or low <= value <= high
    for which in ("ks", "gradient"):
        assert real["audits"][which]["decomposition"]["n"] == sizes.test
    for found in real["certificates"].values():
        for by_epsilon in found.values():
            assert [*by_epsilon] == [f"{epsilon:g}" for epsilon in sizes.epsilons]
            for epsilon, pair in by_epsilon.items():
                assert [c["facts"]["extraction"] for c in pair] == ["whole", "first_line"]
                assert all(c["facts"]["epsilon"] == float(epsilon) and c["n"] <= sizes.calibration for c in pair)


def strings(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def test_no_sentence_of_the_data_is_stored(real):
    "Not in the file, but for what the model writes for sentences of ours; and these are ours."
    import real as benchmark

    assert [e["source"] for e in real["examples"]] == list(benchmark.EXAMPLES)
    folder = DATA / "short"
    if not folder.is_dir():
        pytest.skip("the sentences are not here (KSLOTTERY_DATA)")
    theirs = set()
    for file in folder.glob("*.tsv.gz"):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            theirs |= {text.strip().lower() for line in lines for text in line.split("\t")[1:]}
    assert theirs.isdisjoint(text.lower() for text in benchmark.EXAMPLES)
    kept = {text.strip().lower() for text in strings({n: v for n, v in real.items() if n != "examples"})}
    assert {text for text in kept & theirs if " " in text} == set()


def shown(outputs):
    "What outputs say, as text: printed lines, Markdown and tables."
    for output in outputs:
        data = output.get("data", {})
        for kind in ("text/markdown", "text/html"):
            if kind in data:
                yield "".join(data[kind])
        if output["output_type"] == "stream":
            yield "".join(output["text"])


def test_every_number_of_the_page_is_in_the_file(capsys, monkeypatch):
    "The page made again from the stored file says what is stored in the page, word for word."
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    names, said = {}, 0
    for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        *body, last = ast.parse("".join(cell["source"])).body
        capsys.readouterr()
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(body, []), str(PAGE), "exec"), names)
            value = eval(compile(ast.Expression(last.value), str(PAGE), "eval"), names)
        else:
            exec(compile(ast.Module([*body, last], []), str(PAGE), "exec"), names)
            value = None
        made = [getattr(value, "data", None) or value._repr_html_()] if hasattr(value, "_repr_html_") else []
        made = [value.data] if type(value).__name__ == "Markdown" else made
        printed = capsys.readouterr().out
        stored = [text for text in shown(cell["outputs"]) if text.strip()]
        assert stored == [*([printed] if printed else []), *made], "make notebooks NB=nbs/explanation/real.ipynb"
        said += len(stored)
    assert said > 20


def test_home_says_what_the_file_says(real):
    text = " ".join("".join(c["source"]) for c in json.loads((ROOT / "nbs" / "index.ipynb").read_text())["cells"])
    text = " ".join(text.split())
    arms = real["arms"]["explicit, en-de"]
    for name in ("base", "ks", "gradient"):
        found = [seed[name]["whole"]["bleu"] for seed in arms.values()]
        told = f"{found[0]:.1f}" if name == "base" else " / ".join(f"{x:.1f}" for x in found)
        assert told in text, f"{name}: {told}"
    assert "explanation/real.ipynb" in text
