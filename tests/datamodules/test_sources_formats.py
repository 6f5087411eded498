"""Everyday formats: one question in every spelling and kind of file gives the same pair, or a sentence."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonargparse import ArgumentParser

from app.cli.options import set_up_parsing
from app.core.errors import UserError
from datamodules.preference_data import PreferenceData
from datamodules.records import BadRow, Cell, Message, PreferencePair
from datamodules.sources import files
from datamodules.sources.files import LocalFiles
from datamodules.sources.formats import FORMATS, Format
from datamodules.sources.pairs import read_pairs, read_row
from datamodules.sources.source import Source

TURN, YES, NO = (
    {"role": role, "content": said} for role, said in (("user", "hi"), ("assistant", "a"), ("assistant", "b"))
)
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}
ASKED = (Message("user", "hi"),)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}-{'-'.join(format.fields)}")
def test_an_example_is_read_by_name_and_by_itself(format: Format) -> None:
    for name in ("auto", format.name):
        pair, _ = read_row(format.example, "f:1", Source("f", format=name))
        assert (pair.chosen.strip(), (pair.rejected or "5").strip()) in (
            *(("4", "5"), ("It sleeps.", "It barks.")),
            ("2 + 2 is 4.", "5"),
        )
        assert (pair.rejected is not None) == format.is_pair
        if not format.is_pair:
            with pytest.raises(BadRow, match="missing field"):
                read_row(format.example, "f:1", Source("f", format=name), need_rejected=True)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": None, "chosen": [TURN, YES], "rejected": [TURN, NO]},
        {"prompt": "hi", "chosen": YES, "rejected": NO},
        {"prompt": [TURN], "chosen": "a", "rejected": "b"},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}},
        {"messages": [TURN], "chosen": "a", "rejected": "b", "prompt": None},
        {"messages": [HUMAN], "chosen": {"content": "a", "from": "gpt", "value": "of a tool"}, "rejected": NO},
        {
            "prompt": [{"role": "Human", "content": "hi"}],
            "chosen": [{"role": "MODEL", "content": "a"}],
            "rejected": [NO],
        },
        {"prompt": json.dumps([TURN]), "chosen": json.dumps(YES), "rejected": str([NO])},
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
            "rejected": [NO],
        },
    ],
)
def test_messages_in_every_spelling_are_one_pair(row: dict[str, Any]) -> None:
    assert read_row(row, "f:1", Source("f"), need_rejected=True)[0] == PreferencePair("f:1", ASKED, "a", "b")


def test_system_texts_of_all_kinds_come_first() -> None:
    system = Message("system", "be kind")
    for row in (
        {"system_prompt": "be kind", "question": "hi", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "developer", "content": "be kind"}, TURN], "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "system", "value": "be kind"}, HUMAN], "chosen": GPT, "rejected": NO},
    ):
        assert read_row(row, "f:1", Source("f"))[0].prompt == (system, *ASKED)


def test_alpaca_joins_its_input_and_takes_its_history() -> None:
    row = {"instruction": "do", "input": "it", "output": ["a", "b"], "history": [["x", "y"]]}
    pair, _ = read_row(row, "f:1", Source("f"), need_rejected=True)
    assert pair.prompt == (Message("user", "x"), Message("assistant", "y"), Message("user", "do\nit"))
    assert (pair.chosen, pair.rejected) == ("a", "b")
    assert read_row({"instruction": "do", "input": "", "output": "a"}, "f:1", Source("f"))[0].prompt == "do"


def test_a_function_call_is_a_tool_call() -> None:
    call = {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'}
    seen = {"from": "observation", "value": "x"}
    pair, _ = read_row({"conversations": [HUMAN, call, seen, GPT]}, "f:1", Source("f"))
    assert isinstance(pair.prompt, tuple)
    assert pair.prompt[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": 1}}
    assert pair.prompt[2] == Message("tool", "x")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "hi", "completion": "a", "label": True}, "unpaired preference .*KTO"),
        ({"prompt": "hi", "completion": "a", "label": "Undesirable"}, "unpaired preference .*KTO"),
        ({"messages": [TURN, YES], "label": False}, "unpaired preference .*KTO"),
        ({"prompt": "hi", "response": "a", "label": -1}, "unpaired preference .*KTO"),
        ({"prompt": "hi", "completion": "a", "is_desirable": False}, "unpaired preference .*is_desirable"),
        ({"instruction": "hi", "output": "a", "kto_tag": False}, "unpaired preference .*kto_tag"),
        ({"prompt": "hi", "completions": ["a"], "labels": [True]}, "stepwise"),
        ({"prompt": "hi", "answers": [{"answer": "a", "rank": 1}]}, "ranked answers"),
        ({"question": "hi", "context": "c", "answer": "a"}, "context and question"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "more than text .*images"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"}, "'image'"),
        ({"prompt": [TURN | {"images": ["x.png"]}], "chosen": "a", "rejected": "b"}, "a field images in prompt"),
        ({"prompt": '[{"role": "user", "content": "hi"}', "chosen": "a", "rejected": "b"}, "cannot be read"),
        ({"prompt": "hi", "chosen": float("nan"), "rejected": "b"}, "chosen"),
        ({"promt": "hi", "chosen": "a", "rejected": "b"}, r"prompt; .*pairs.*columns found: promt.*prompt: promt}"),
        (
            {"frage": "hi", "gut": "a"},
            r"nearest format is pairs: prompt, chosen, rejected; columns found: frage, gut",
        ),
        (
            {"prompt": "hi", "response_1": "a", "response_2": "b", "preference_strength": 1},  # HelpSteer2
            "nearest format is pairs",
        ),
        (
            {"prompt": "hi", "response_1": "a", "response_0": "b", "better_response": 1},
            "better_response_id, safer_response_id.*{better_response_id: YOURS, safer_response_id: YOURS}",
        ),
        ({"messages": [TURN], "chosen": None, "rejected": NO}, "empty chosen .no value"),
        ({"prompt": "hi", "generation": None}, "empty response .no value"),
        ({"question": "hi", "response": None}, "empty response .no value"),
    ],
)
def test_what_cannot_be_read_is_refused_by_a_sentence(row: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRow, match=said):
        read_row(row, "f:1", Source("f"))


@pytest.mark.parametrize("asked", ["prompt", "question", "instruction"])
def test_empty_columns_of_a_pair_leave_a_demonstration(asked: str) -> None:
    row = {asked: "hi", "response": "a", "chosen": None, "rejected": None}
    for one in (row, {name: row[name] for name in (asked, "response", "rejected")}):
        assert read_row(one, "f:1", Source("f"))[0] == PreferencePair("f:1", "hi", "a", None)
        with pytest.raises(BadRow, match=r"missing field .rejected; .*empty: (chosen, )?rejected"):
            read_row(one, "f:1", Source("f"), need_rejected=True)


def test_any_further_column_is_a_label() -> None:
    labels = {"": 0, "cell": Cell("1" * 5000)}
    row = {"prompt": "hi", "chosen": "a", "rejected": "b", **labels}
    assert read_row(row, "f:1", Source("f"))[0] == PreferencePair("f:1", "hi", "a", "b", labels)


def test_columns_of_other_names() -> None:
    columns = {"prompt": "Kundenfrage", "chosen": "gut", "rejected": "schlecht"}
    row = {"Kundenfrage": "hi", "gut": "a", "schlecht": "b", "prompt": "other"}
    pair, _ = read_row(row, "f:1", Source("f", columns=columns))
    assert pair == PreferencePair("f:1", "hi", "a", "b", {"prompt_in_data": "other"})
    with pytest.raises(
        BadRow, match=r"'gut', which data.columns names for chosen; columns found: .*\. Did you mean guut\?"
    ):
        read_row({"Kundenfrage": "hi", "guut": "a", "schlecht": "b"}, "f:1", Source("f", columns=columns))
    for wrong, said in (({"promt": "x"}, "Did you mean prompt"), ({"prompt": "x", "chosen": "x"}, "two fields")):
        with pytest.raises(UserError, match=said):
            Source("f", columns=wrong).check()
    with pytest.raises(UserError, match=r"no 'mesages'; known are .*\. Did you mean messages\?"):
        Source("f", format="mesages").check()


ROWS = [
    {
        "prompt": 'Say "é",\nplease; now',
        "chosen": "144",
        "rejected": "007",
        "flipped": True,
        "votes": 3,
        "note": None,
    },
    {"prompt": "two", "chosen": "nein", "rejected": "ja", "flipped": False, "votes": 4, "note": "x"},
]


def as_csv(delimiter: str, encoding: str, end: str = "\n") -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with open(path, "w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter, lineterminator=end)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


KINDS: dict[str, Callable[[Path], object]] = {
    "p.jsonl": lambda path: path.write_text("\r\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig"),
    "p.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig"),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "p.JSON.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "p.csv": as_csv(",", "utf-8"),
    "excel.csv": as_csv(";", "utf-8-sig", "\r\n"),
    "p.tsv": as_csv("\t", "utf-16"),
    "p.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "stream.arrow": lambda path: pa.ipc.new_stream(path, (t := pa.Table.from_pylist(ROWS)).schema).write_table(t),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    pairs = list(read_pairs(str(tmp_path / name)))
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in ROWS
    ]
    assert [pair.labels for pair in pairs] == [{n: row[n] for n in ("flipped", "votes", "note")} for row in ROWS]


def test_files_together_folders_and_saved_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("a.csv", "b.csv"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        KINDS["p.csv"](tmp_path / "d" / name)
    ids = ["a.csv:2", "a.csv:4", "b.csv:2", "b.csv:4"]  # the line of a file where a row begins
    assert [pair.pair_id for pair in read_pairs(str(tmp_path / "d/*.csv"))] == ids
    assert [pair.pair_id for pair in read_pairs(str(tmp_path / "d"))] == [f"d/{id}" for id in ids]
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(test=saved).save_to_disk(str(tmp_path / "many"))
    assert [pair.chosen for pair in read_pairs(str(tmp_path / "one"))] == ["144", "nein"]
    assert [pair.chosen for pair in read_pairs(str(tmp_path / "many"), split="test")] == ["144", "nein"]
    with pytest.raises(UserError, match="no split 'train', only test"):
        read_pairs(str(tmp_path / "many"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", 'prompt,chosen,rejected\na,b,c\nd,"e,f\ng,h,i\n', r"in the row that begins in line 3"),
        ("p.csv", 'prompt,chosen,rejected\na,b",c\n', "line 2: a quotation mark is not closed"),
        ("p.csv", "prompt,chosen,rejected\na,b\n", r"p\.csv:2: wrong number of cells \(2 instead of 3\)"),
        ("p.csv", "prompt,chosen,prompt\na,b,c\n", "same name"),
        ("p.csv", 'prompt, chosen, rejected\na, "b", "c"\n', r"p\.csv:2: a space before a quotation mark"),
        ("p.csv", 'prompt,chosen,rejected\na, "b, c", d\n', r"p\.csv:2: a space before a quotation mark"),
        ("p.csv", 'prompt,chosen,rejected\n "a",b,c\n', r"p\.csv:2: a space before a quotation mark"),
        ("p.csv", 'prompt,chosen,rejected\na,  "b",c\n', r"p\.csv:2: a space before a quotation mark"),
        ("p.csv", "prompt,chosen,rejected\na,,c\n", r"p\.csv:2: empty chosen \(no value\)"),
        ("p.csv", "frage,gut\na,b\n", r"p\.csv:2: missing field .*columns found: frage, gut"),
        ("p.json", '[{"prompt": "a"}', r"p.json is bad JSON \(Expecting .*: line 1 column 17"),
        ("p.json", '{"data": [{"prompt": "a"}]}', "neither an array of rows"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', r"p\.json:1: repeated field"),
        ("p.json", '[{"prompt": [{"role": "user", "role": "b"}]}]', r"p\.json:1: repeated field"),
        ("p.jsonl", '[\n{"prompt": "a"}\n]', r"p\.jsonl:1: no object in one line .*name it \.json"),
        ("p.jsonl", '{\n"prompt": "a"\n}', r"p\.jsonl:1: no object in one line .*name it \.json"),
        ("p.json", "[] x", "is bad JSON .Extra data: line 1 column 4"),
        ("p.json", '{"prompt": "a", "prompt": "b"}', r"p\.json:1: repeated field"),
        ("p.json", "a b", "neither an array of rows"),
        ("p.json", '{"prompt": {"0": "a"}, "chosen": {"0": "b"}}', r"pandas does with orient=\"records\""),
        ("p.json", '{"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}', "neither an array of rows"),
        ("p.json", '{"prompt": "a", "chosen": {"text": "b"}}', "chosen holds an object of text, and a message has"),
        ("p.json", '{"prompt": "a", "chosen": ["b"]}', "chosen holds text, and a message has role and content"),
        ("p.arrow", "no", "cannot be read as Arrow"),
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        list(read_pairs(str(tmp_path / name)))


def test_lines_before_the_names_of_the_columns(tmp_path: Path) -> None:
    for text in ("sep=|\r\nprompt|chosen|rejected\r\na,;|b|c", '\n\nprompt;chosen;rejected\n\n"a,;";b;c'):
        (tmp_path / "p.csv").write_text(text, encoding="utf-8")
        (pair,) = read_pairs(str(tmp_path / "p.csv"))
        assert (pair.prompt, pair.chosen, pair.rejected) == ("a,;", "b", "c")


def test_a_quotation_in_a_cell_may_follow_a_space(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,chosen,rejected\n"p, ""q"""," ""b, c"""," d"\n', encoding="utf-8")
    (pair,) = read_pairs(str(tmp_path / "p.csv"))
    assert (pair.prompt, pair.chosen, pair.rejected) == ('p, "q"', ' "b, c"', " d")


@pytest.mark.parametrize("path", [".", "*.jsonl"])
def test_a_link_without_its_file_is_no_smaller_data_set(tmp_path: Path, path: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "c.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"c\.jsonl is a pointer of Git LFS, not the file itself: fetch it by `git"):
        read_pairs(str(tmp_path / "c.jsonl"), on_bad_row="skip")
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(UserError, match=r"b\.jsonl is a link to gone\.jsonl, which is not there"):
        read_pairs(str(tmp_path / path))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32"])
def test_text_with_zero_bytes_is_no_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "p.txt").write_bytes("a\nb\n".encode(encoding))
    with pytest.raises(UserError, match=r"p\.txt holds zero bytes, as UTF-16 without its mark"):
        list(read_pairs(str(tmp_path / "p.txt")))


@pytest.mark.parametrize("rows", [0, 5000])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, rows: int) -> None:
    content = "prompt,chosen,rejected\n" + "a,b,c\n" * rows + "ä,b,c\n"
    (tmp_path / "p.csv").write_bytes(content.encode("cp1252"))
    with pytest.raises(UserError, match=f"line {rows + 2}, is not UTF-8"):
        list(read_pairs(str(tmp_path / "p.csv")))


def test_a_large_array_is_said_to_need_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_LARGE", 100)
    for size in (1, 100):
        row = {"prompt": "q" * size, "chosen": "a", "rejected": "b"}
        (tmp_path / f"{size}.json").write_text(json.dumps([row]))
        assert len(list(read_pairs(str(tmp_path / f"{size}.json")))) == 1
    assert [record.message.partition(" takes ")[0] for record in caplog.records] == [str(tmp_path / "100.json")]


@pytest.mark.parametrize("name", ["p.csv", "p.tsv.gz"])
def test_a_table_of_cells_is_not_kept_in_memory(tmp_path: Path, name: str) -> None:
    mark = "," if name == "p.csv" else "\t"
    content = mark.join(["prompt", "chosen", "rejected"]) + f"\nq{mark}'yes, yes'{mark}no" * 100_000
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    rows = LocalFiles([tmp_path / name]).rows()
    tracemalloc.start()
    assert sum(1 for _ in rows) == 100_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(content) / 4


def test_a_path_is_a_path_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up_parsing()
    monkeypatch.chdir(tmp_path)
    for name in ("p.csv", "p.json", "p.tsv"):  # the content of each parses as YAML
        KINDS[name](tmp_path / name)
    for given in ("p.csv", "p.json", "p.tsv", "*.csv", "nowhere.csv"):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(PreferenceData, "data", sub_configs=True)
        parser.add_argument("--config", action="config")
        Path("c.yaml").write_text(f"data: {{path: '{given}'}}")
        for words in ([f"--data.path={given}"], ["--config", "c.yaml"]):
            assert parser.parse_args(words).data.path == given
        assert parser.parse_args([f"--data.path=['{given}', b.csv]"]).data.path == [given, "b.csv"]


def test_a_second_prompt_or_answer_is_not_lost_without_a_word() -> None:
    row = {"instruction": "i", "prompt": "p", "chosen_response": "a", "rejected_response": "b"}
    pair, _ = read_row(row, "f:1", Source("f"))
    assert (pair.prompt, pair.labels) == ("i", {"prompt_in_data": "p"})
    assert read_row({"prompt": "p", "chosen": "a", "rejected": "b", "response": "c"}, "f:1", Source("f"))[1] == [
        "response"
    ]
    with pytest.raises(BadRow, match="missing field"):  # it is no plain text to learn whole
        read_row({"prompt": "p", "text": "a"}, "f:1", Source("f"))


def test_a_list_of_paths_takes_the_options_beside_it(tmp_path: Path) -> None:
    data = PreferenceData(
        [str(tmp_path / "x" / "p.csv"), str(tmp_path / "y" / "p.csv")],
        validation_path="v.csv",
        columns={"prompt": "frage"},
    )
    assert [source.columns for source in data.sources] == [{"prompt": "frage"}] * 2
    assert data.sources_of("validation") == [Source("v.csv", columns={"prompt": "frage"})]
    assert [source.label for source in data.sources] == [source.path for source in data.sources]


def test_the_lines_of_a_text_file_are_learnt_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\x0cline\n\n  ano\u2028ther  \r\n")
    pairs = list(read_pairs(str(tmp_path / "a.txt")))
    assert [(pair.prompt, pair.chosen, pair.rejected, pair.labels) for pair in pairs] == [
        ("", "one\x0cline", None, {}),
        ("", "  ano\u2028ther  ", None, {}),
    ]
    assert [pair.pair_id for pair in pairs] == ["a.txt:1", "a.txt:3"]
    asked = list(read_pairs(str(tmp_path / "a.txt"), prompts_only=True))  # for `generate` they are prompts
    assert [pair.prompt for pair in asked] == ["one\x0cline", "  ano\u2028ther  "]
    other = [{"prompt": "hi", "completion": "a", "label": True}, {"prompt": "hi", "answers": [{"rank": 1}]}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))  # of KTO, of Nectar
    assert [pair.prompt for pair in read_pairs(str(tmp_path / "b.jsonl"), prompts_only=True)] == ["hi", "hi"]
    with pytest.raises(UserError, match=r"as text it is for supervised .*data\.columns: \{rejected: YOURS\}"):
        list(read_pairs(str(tmp_path / "a.txt"), need_rejected=True))
