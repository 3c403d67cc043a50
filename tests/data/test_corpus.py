"""Reading sources and splitting them by document."""

import ast
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.data.corpus import Corpus, read_corpus, reading


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return read_corpus(["stdlib"])


def fill(folder: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def names(corpus: Corpus) -> set[str]:
    return {document.name for document in corpus.train + corpus.heldout}


def test_stdlib_is_real_code_without_tests(stdlib: Corpus) -> None:
    found = names(stdlib)
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py"} <= found
    forbidden = {"test", "tests", "idlelib", "site-packages", "__pycache__"}
    assert not [name for name in found if forbidden & set(name.split("/"))]
    (source,) = stdlib.record()["sources"]
    assert source["licence"] == "PSF-2.0" and source["bytes"] > 5e6 and source["files"] == len(found)
    assert stdlib.record()["bytes"] == source["bytes"]


def test_split_is_by_file_and_a_function_of_name_and_seed(stdlib: Corpus) -> None:
    held = {document.name for document in stdlib.heldout}
    assert held and not held & {document.name for document in stdlib.train}
    assert 0.01 < len(held) / len(names(stdlib)) < 0.12
    again, other = read_corpus(["stdlib"]), read_corpus(["stdlib"], seed=1)
    assert again == stdlib and again.record() == stdlib.record()
    assert {document.name for document in other.heldout} != held
    assert other.record()["fingerprint"] != stdlib.record()["fingerprint"]


def test_another_source_moves_no_document(tmp_path: Path) -> None:
    folder = fill(tmp_path / "more", {f"{i}.txt": f"line {i}\n" for i in range(80)})
    alone = read_corpus([folder], heldout_fraction=0.3)
    both = read_corpus(["idioms:0.05", folder], heldout_fraction=0.3)
    assert alone.heldout == [document for document in both.heldout if document.source == folder]
    assert alone.train == [document for document in both.train if document.source == folder]
    assert both.heldout != sorted(both.heldout, key=lambda document: document.name)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(2, 12), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_both_sides_hold_something(tmp_path: Path, number: int, fraction: float, seed: int) -> None:
    folder = fill(tmp_path / str(number), {f"{i}.md": f"text {i}" for i in range(number)})
    corpus = read_corpus([folder], heldout_fraction=fraction, seed=seed)
    assert corpus.train and corpus.heldout and len(names(corpus)) == number


def test_held_out_share_is_the_fraction(tmp_path: Path) -> None:
    corpus = read_corpus(["idioms:0.5"], heldout_fraction=0.25)
    share = len(corpus.heldout) / len(names(corpus))
    assert abs(share - 0.25) < 0.08  # 4 standard deviations of ~500 draws


def test_folder_takes_text_and_leaves_the_rest(tmp_path: Path) -> None:
    folder = fill(
        tmp_path / "mine",
        {
            "a.py": "x = 1\r\ny = 2\r",
            "sub/b.txt": "\ufeffhello",
            "c.md": "# title",
            "copy.md": "# title",
            "d.csv": "1,2",
            "blank.txt": " \n",
            "latin.txt": b"caf\xe9",
            ".git/e.txt": "hidden",
            "__pycache__/f.py": "cached",
        },
    )
    corpus = read_corpus([f"folder:{folder}"], heldout_fraction=0.0)
    texts = {document.name: document.text for document in corpus.train}
    kept = {"mine/a.py": "x = 1\ny = 2\n", "mine/sub/b.txt": "hello", "mine/c.md": "# title"}
    assert texts == kept and corpus.heldout == []
    (source,) = corpus.record()["sources"]
    assert (source["files"], source["duplicates"], source["undecodable"]) == (3, 1, 1)
    assert source["bytes"] == sum(len(text.encode()) for text in kept.values())


def test_package_and_its_licence() -> None:
    corpus = read_corpus(["package:numpy"])
    assert "numpy/linalg/_linalg.py" in names(corpus)
    assert not [name for name in names(corpus) if "/tests/" in name or name.endswith("conftest.py")]
    assert "BSD" in corpus.record()["licences"][0]
    assert read_corpus(["package:json"]).record()["licences"] == ["PSF-2.0"]
    assert names(read_corpus(["package:keyword"], heldout_fraction=0.0)) == {"keyword.py"}


def test_idioms_by_size() -> None:
    corpus = read_corpus(["idioms:0.2"])
    record = corpus.record()
    assert 200_000 <= record["bytes"] + 2_000 * record["sources"][0]["duplicates"] < 210_000
    for document in corpus.heldout:
        ast.parse(document.text)
    assert read_corpus(["idioms:0.2"], seed=1).record()["fingerprint"] != record["fingerprint"]


def test_max_bytes_takes_a_share_of_both_sides() -> None:
    corpus = read_corpus(["idioms:0.2"], heldout_fraction=0.2, max_bytes=100_000)
    record = corpus.record()
    assert 95_000 < record["bytes"] <= 100_000
    assert 0.05 < record["heldout_bytes"] / record["bytes"] < 0.4


def test_record_is_json_and_follows_the_text(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", {"x.py": "1", "y.py": "2"})
    record = read_corpus([folder]).record()
    assert json.loads(json.dumps(record)) == record
    fill(tmp_path / "a", {"y.py": "3"})
    assert read_corpus([folder]).record()["fingerprint"] != record["fingerprint"]


@pytest.mark.parametrize(
    ("sources", "settings_", "message"),
    [
        (["stdlibs"], {}, "'stdlibs': unknown source; allowed are stdlib, package:NAME"),
        (["folder:/no/such"], {}, "'folder:/no/such': no such folder"),
        (["/no/such"], {}, "'/no/such': no such folder"),
        (["package:no_such_package"], {}, "no package 'no_such_package'"),
        (["package:os.path"], {}, "no package 'os.path'"),
        (["package:sys"], {}, "'sys' is built in"),
        (["idioms:many"], {}, "got 'many' megabytes"),
        (["idioms:0"], {}, "got '0' megabytes"),
        (["idioms:nan"], {}, "got 'nan' megabytes"),
        (["hf:"], {}, "no dataset is named"),
        ([], {}, r"sources: got \[\]"),
        ("stdlib", {}, "sources: got 'stdlib', needed is a list"),
        (["idioms:0.01"], {"heldout_fraction": 1.0}, "heldout_fraction: got 1.0"),
        (["idioms:0.01"], {"heldout_fraction": -0.1}, "heldout_fraction: got -0.1"),
        (["idioms:0.01"], {"seed": -1}, "seed: got -1"),
        (["idioms:0.01"], {"max_bytes": 0}, "max_bytes: got 0"),
        (["idioms:0.01"], {"max_bytes": 1}, "max_bytes: got 1, the smallest document"),
    ],
)
def test_bad_input(sources: list[str], settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_corpus(sources, **settings_)
    assert "\n" not in str(caught.value)


def test_lines_are_documents_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("ab\ncd\r\n\nab\nef")
    corpus = read_corpus([f"lines:{tmp_path / 'one.txt'}"], heldout_fraction=0.0)
    assert sorted(document.text for document in corpus.train) == ["ab", "cd", "ef"] and corpus.separate
    assert corpus.record()["sources"][0]["duplicates"] == 1
    assert not read_corpus(["idioms:0.01"]).separate


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["lines:{}/none.txt"], "no such file; allowed is a text file"),
        (["lines:{}/binary"], "is not UTF-8"),
        (["lines:{}/one.txt", "idioms:0.01"], "allowed beside lines: is lines: alone"),
    ],
)
def test_lines_that_cannot_be_read(sources: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("ab\ncd\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=message):
        read_corpus([source.format(tmp_path) for source in sources])


def test_lines_are_not_streamed(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("ab\ncd\n")
    with pytest.raises(ValueError, match="lines are not streamed"):
        reading(f"lines:{tmp_path / 'one.txt'}", 0)


def test_empty_and_single_file_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="hold no text"):
        read_corpus([str(tmp_path / "empty")])
    folder = fill(tmp_path / "one", {"all.txt": "everything"})
    with pytest.raises(ValueError, match="single document"):
        read_corpus([folder])
    assert len(read_corpus([folder], heldout_fraction=0.0).train) == 1


class TestDataset:
    """A dataset in a local folder is read by the same library as one on the hub."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        rows = [{"text": f"row {i}", "body": f"body {i}", "stars": i} for i in range(40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        return fill(tmp_path / "rows", {"train.jsonl": lines})

    def test_text_column_is_found(self, folder: str) -> None:
        corpus = read_corpus([f"hf:{folder}"], heldout_fraction=0.2)
        texts = {document.text for document in corpus.train + corpus.heldout}
        assert texts == {f"row {i}" for i in range(40)}
        assert "rows/default/train/7" in names(corpus)

    def test_named_column_and_split_streamed(self, folder: str) -> None:
        corpus = read_corpus([f"hf:{folder}@train#body"], heldout_fraction=0.2, max_bytes=100)
        assert 90 < corpus.record()["bytes"] <= 100
        assert all(document.text.startswith("body ") for document in corpus.train)

    def test_problems_are_told_in_one_line(self, folder: str, tmp_path: Path) -> None:
        fill(tmp_path / "odd", {"train.jsonl": json.dumps({"prose": "x", "id": 1}) + "\n"})
        (tmp_path / "nothing").mkdir()
        for source, message in (
            (f"hf:{tmp_path / 'odd'}", "no column named text or content.*allowed are prose, id"),
            (f"hf:{folder}#title", "no column 'title'.*text, body, stars"),
            (f"hf:{folder}#stars", "holds int, needed is text"),
            (f"hf:{folder}@nosuch", "nosuch"),
            (f"hf:{tmp_path / 'nothing'}", "nothing"),
        ):
            with pytest.raises(ValueError, match=message) as caught:
                read_corpus([source])
            assert "\n" not in str(caught.value) and source in str(caught.value)

    def test_hub_out_of_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*_: object, **__: object) -> None:
            raise ConnectionError("no route\nto the hub")

        monkeypatch.setattr("datasets.load_dataset", unreachable)
        with pytest.raises(ValueError, match="'hf:some/set': the hub cannot be reached: no route to the hub"):
            read_corpus(["hf:some/set"])
