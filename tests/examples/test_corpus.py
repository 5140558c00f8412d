import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest

from examples.llama.corpus import load_corpus


def write_files(folder: Path, texts: dict[str, str]) -> str:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def write_rows(path: Path, rows) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


TEXTS = [f"document number {i}" for i in range(200)]


def test_default_is_the_standard_library_in_two_disjoint_splits():
    corpus = load_corpus()
    assert corpus == load_corpus("stdlib")
    assert corpus.name.startswith("the standard library of Python 3.")
    assert not corpus.streamed
    characters = [sum(map(len, split)) for split in (corpus.train, corpus.validation)]
    assert sum(characters) > 5_000_000
    assert 0.01 < characters[1] / sum(characters) < 0.1
    # The library holds its greeting, __hello__.py, twice.
    assert sum(map(len, set(corpus.train) & set(corpus.validation))) < 1000


def test_default_holds_sources_of_the_library_alone():
    corpus = load_corpus()
    texts = {*corpus.train, *corpus.validation}
    assert Path(shutil.__file__).read_text() in texts
    assert Path(pytest.__file__).read_text() not in texts


def test_folder_is_split_by_relative_path_wherever_it_lies(tmp_path):
    texts = {f"{i % 7}/{i}.txt": text for i, text in enumerate(TEXTS)}
    first = load_corpus(write_files(tmp_path / "first", texts))
    second = load_corpus(write_files(tmp_path / "second", dict(reversed(texts.items()))))
    assert (first.train, first.validation) == (second.train, second.validation)
    assert sorted([*first.train, *first.validation]) == sorted(TEXTS)
    assert 0.02 < len(first.validation) / len(TEXTS) < 0.09


def test_file_added_to_a_folder_moves_no_other_to_another_split(tmp_path):
    folder = write_files(tmp_path, {f"{i}.txt": text for i, text in enumerate(TEXTS)})
    before = load_corpus(folder)
    after = load_corpus(write_files(tmp_path, {"a/new.txt": "new"}))
    assert set(after.train) - {"new"} == set(before.train)
    assert set(after.validation) - {"new"} == set(before.validation)


def test_folder_is_read_in_the_order_of_relative_paths(tmp_path):
    texts = {name: name for name in ("b.txt", "a/z.txt", "a.txt", "c/a.txt", "d.txt", "B.txt")}
    corpus = load_corpus(write_files(tmp_path, texts))
    assert list(corpus.train) == sorted(corpus.train)


def test_hidden_files_and_folders_are_left_out(tmp_path):
    texts = {"a.txt": "a", "b.txt": "b", ".hidden": "hidden", ".git/config": "hidden"}
    corpus = load_corpus(write_files(tmp_path, texts))
    assert sorted([*corpus.train, *corpus.validation]) == ["a", "b"]


def test_files_that_are_not_utf8_are_left_out_of_a_folder_with_a_warning(tmp_path):
    folder = write_files(tmp_path, {"a.txt": "a", "b.txt": "b"})
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"left out 2 files .* such as latin\.txt"):
        corpus = load_corpus(folder)
    assert sorted([*corpus.train, *corpus.validation]) == ["a", "b"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_small_folder_still_has_both_splits(tmp_path, count):
    for start in range(5):
        folder = tmp_path / str(start)
        texts = {f"{start}-{i}.txt": TEXTS[i] for i in range(count)}
        corpus = load_corpus(write_files(folder, texts))
        assert len(corpus.train) >= 1
        assert len(corpus.validation) >= 1
        assert len(corpus.train) + len(corpus.validation) == count


def test_folder_of_one_document_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"one document, .* give at least two, or name a single"):
        load_corpus(write_files(tmp_path, {"only.txt": "text", "empty.txt": " \n"}))


def test_text_file_is_split_at_a_line_without_losing_a_character(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "input.txt"))
    (train,), (validation,) = corpus.train, corpus.validation
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.05 <= len(validation) / len(text) < 0.1


@pytest.mark.parametrize("text", ["ab", "x" * 1000, "\n" + "x" * 1000 + "\n", "x" * 980 + "\nxx"])
def test_text_file_without_a_line_end_near_the_cut_is_still_split(tmp_path, text):
    (tmp_path / "input").write_text(text)
    corpus = load_corpus(str(tmp_path / "input"))
    (train,), (validation,) = corpus.train, corpus.validation
    assert train + validation == text
    assert train
    assert validation
    assert len(validation) <= max(1, len(text) // 10)


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "books").mkdir()
    for number in range(3):
        (tmp_path / "books" / f"{number}.txt").write_text(f"book {number}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "books").symlink_to(tmp_path / "books")
    (tmp_path / "books" / "again").symlink_to(tmp_path / "mine")
    corpus = load_corpus(str(tmp_path / "mine"))
    assert sorted([*corpus.train, *corpus.validation]) == ["book 0", "book 1", "book 2"]


def test_a_json_file_is_not_learned_as_text(tmp_path):
    (tmp_path / "chats.json").write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match=r"a \.json file may have .* to a \.jsonl file"):
        load_corpus(str(tmp_path / "chats.json"))


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "ROWS.JSONL", "rows.jsonl.gz", "c4.00000-of-00512.json.gz"]
)
def test_json_lines_hold_out_the_same_texts_in_any_order_and_form(tmp_path, name):
    rows = [{"text": text, "url": "https://example.org"} for text in TEXTS]
    corpus = load_corpus(write_rows(tmp_path / name, rows))
    reversed_corpus = load_corpus(write_rows(tmp_path / "reversed.jsonl", reversed(rows)))
    assert set(corpus.validation) == set(reversed_corpus.validation)
    assert sorted([*corpus.train, *corpus.validation]) == sorted(TEXTS)
    assert 0.02 < len(corpus.validation) / len(TEXTS) < 0.09


def test_duplicate_rows_stay_in_one_split(tmp_path):
    corpus = load_corpus(write_rows(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS * 2]))
    assert not set(corpus.train) & set(corpus.validation)


def test_rows_without_text_are_left_out(tmp_path):
    rows = [{"text": "a"}, {"text": ""}, {"text": None}, {"text": " \n"}, {"text": "b"}]
    corpus = load_corpus(write_rows(tmp_path / "a.jsonl", rows))
    assert sorted([*corpus.train, *corpus.validation]) == ["a", "b"]


def test_half_a_surrogate_pair_in_json_can_be_encoded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "broken \\ud83d"}\n{"text": "whole"}\n')
    corpus = load_corpus(str(tmp_path / "a.jsonl"))
    assert sorted(text.encode() for text in [*corpus.train, *corpus.validation]) == [
        b"broken ?",
        b"whole",
    ]


def test_folder_of_rows_is_split_like_its_rows_in_one_file(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    one = load_corpus(write_rows(tmp_path / "one.jsonl", rows))
    (tmp_path / "shards").mkdir()
    write_rows(tmp_path / "shards" / "0.jsonl", rows[:90])
    write_rows(tmp_path / "shards" / "1.json.gz", rows[90:])
    shards = load_corpus(str(tmp_path / "shards"))
    assert (shards.train, shards.validation) == (one.train, one.validation)


def test_parquet_is_split_like_the_same_rows_in_json(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reads .parquet")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads .parquet")
    path = tmp_path / "rows.parquet"
    columns = {"url": ["u"] * 201, "text": [*TEXTS, None]}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=64)
    rows = load_corpus(write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS]))
    corpus = load_corpus(str(path))
    assert (corpus.train, corpus.validation) == (rows.train, rows.validation)


def test_parquet_without_a_text_column_names_its_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reads .parquet")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads .parquet")
    parquet.write_table(pyarrow.table({"url": ["u"], "body": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no .text. column; the columns are .'body', 'url'"):
        load_corpus(str(tmp_path / "a.parquet"))
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r'row 1: "text" is a int; expected a string'):
        load_corpus(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"not a Parquet file"):
        load_corpus(str(tmp_path / "a.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ImportError, match="pip install pyarrow"):
        load_corpus(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[" * 200_000, r"line 2: not JSON"),
        ("[1]", r"line 2: a list; expected an object"),
        ('{"body": "b", "a": 1}', r"line 2: no \"text\" field; the fields are \['a', 'body'\]"),
        ('{"text": 3}', r"line 2: \"text\" is a int; expected a string"),
    ],
)
def test_bad_row_is_refused_with_its_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path / "a.jsonl"))


def test_row_that_is_not_utf8_is_refused_alone_and_in_a_folder(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    for source in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match=r"line 1: not JSON"):
            load_corpus(str(source))


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_cut_gzip_file_is_refused(tmp_path, kept):
    path = tmp_path / "a.jsonl.gz"
    write_rows(path, [{"text": text} for text in TEXTS])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)] or b"not gzip at all")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: not a whole gzip file"):
        load_corpus(str(path))


def test_missing_source_is_refused_with_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"absent: no such file or folder; expected a UTF-8 text"):
        load_corpus(str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "folder/empty.txt"])
def test_source_without_text_is_refused(tmp_path, name):
    write_files(tmp_path, {name: " \n"})
    with pytest.raises(ValueError, match=r"no text in it; expected"):
        load_corpus(str(tmp_path / Path(name).parts[0]))


def test_file_in_another_form_is_refused_with_what_is_expected(tmp_path):
    (tmp_path / "corpus.zip").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ValueError, match=r"not UTF-8 text .*; expected a UTF-8 text file"):
        load_corpus(str(tmp_path / "corpus.zip"))
