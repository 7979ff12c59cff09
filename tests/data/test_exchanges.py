"""Prompts and responses: records, chats, and their token ids."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

from daemon_fast.data.exchanges import Exchange, as_exchange, pair, read_exchanges
from daemon_fast.data.texts import Pairs
from daemon_fast.errors import DataError, InvalidInput
from daemon_fast.proposals.base import tokenize

USER, ANSWER = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}
SYSTEM = {"role": "system", "content": "w9"}


@pytest.mark.parametrize(
    ("value", "fields", "want"),
    [
        (("w1", "w2"), (), ("w1", "w2")),
        ({"prompt": "w1", "response": "w2"}, (), ("w1", "w2")),
        ({"prompt": "w1", "completion": "w2"}, (), ("w1", "w2")),
        ({"prompt": [USER], "completion": [ANSWER]}, (), ([USER], "w2 w3")),
        ({"messages": [SYSTEM, USER, ANSWER]}, (), ([SYSTEM, USER], "w2 w3")),
        ([USER, ANSWER, USER, ANSWER], (), ([USER, ANSWER, USER], "w2 w3")),
        ({"q": {"text": "w1"}, "a": ["w2", "w3"]}, ("q.text", "a.1"), ("w1", "w3")),
        ({"messages": [USER, ANSWER], "response": "w5"}, ("messages",), ([USER], "w2 w3")),
        (["w1", "w2"], (), ("w1", "w2")),
        (np.array([USER, ANSWER]), (), ([USER], "w2 w3")),
        ({"messages": np.array([USER, ANSWER])}, (), ([USER], "w2 w3")),
        ([USER, {**ANSWER, "tool_calls": None, "weight": 1}], (), ([USER], "w2 w3")),
        ({"conversation": [USER, ANSWER]}, ("conversation",), ([USER], "w2 w3")),
        ({"prompt": "w1", "response": ""}, (), ("w1", "")),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "w4"}]}], (), ([USER], "w4")),
    ],
)
def test_forms(value, fields, want):
    assert as_exchange(value, *fields) == Exchange(*want)


@pytest.mark.parametrize(
    ("value", "fields", "message"),
    [
        ({"question": "w1"}, (), "has no prompt: no field 'prompt', but question"),
        ({"prompt": "w1"}, (), "has no response: no field 'response', but prompt"),
        ({"prompt": "w1", "response": None}, (), "has no response: null in 'response', but prompt"),
        ({"prompt": "w1", "response": 4}, (), "has a response that is a int: it must be a text"),
        ({"prompt": 4, "response": "w2"}, (), "has in 'prompt' neither a text nor a chat"),
        ({"messages": [["user", "w1"]]}, (), "has in 'messages' neither a text nor a chat"),
        (
            {"messages": [USER]},
            (),
            "has no response: no field 'response', and the last message of 'messages' is of role",
        ),
        ({"messages": None}, (), "has no prompt: null in 'messages'"),
        ({"prompt": [USER, ANSWER], "response": "w5"}, (), "has a response in 'response', and the assistant's message"),
        ({"messages": [USER, ANSWER]}, ("messages", "x"), "has a response in 'x', and the assistant's message at the"),
        ({"prompt": [USER], "completion": [USER]}, (), "has a chat whose last message is of role 'user'"),
        ([USER, {**ANSWER, "reasoning_content": "hm"}], (), "has reasoning_content in its response: only a text"),
        ([USER, {**ANSWER, "content": None, "tool_calls": [{}]}], (), "has tool_calls in its response: only a text"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, (), "has tools: prompts are made without"),
        ({"prompt": "w1", "response": "\ud800"}, (), "its response has the lone surrogate"),
        ([USER], (), "has a chat whose last message is of role 'user'"),
        ([ANSWER], (), "has a chat of a response alone"),
        ([USER, {"role": "assistant", "content": None}], (), "its chat, message 1 has a content of type NoneType"),
        ("w1 w2", (), "is a str: a chat"),
        (
            {"prompt": "w1", "answer": "w2"},
            ("prompt", "reply"),
            "has no response: no field 'reply', but prompt, answer",
        ),
    ],
)
def test_what_is_none_is_named(value, fields, message):
    with pytest.raises(InvalidInput, match=message):
        as_exchange(value, *fields)


def written(path, records):
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def test_bad_records_are_left_out_and_named(tmp_path):
    records = [{"prompt": "a", "response": "b"}, {"prompt": "a"}, '{"prompt"', {"messages": [USER]}, '"a text"', [1]]
    path = written(tmp_path / "a.jsonl", records)
    with pytest.warns(UserWarning, match=r"5 records of .*a.jsonl are left out: a.jsonl, line 2 has no response"):
        found = read_exchanges(path)
    assert found == [("a", "b")]
    assert [problem.split(" ", 3)[2] for problem in found.problems] == ["2", "3", "4", "5", "6"]
    assert "line 5 is a text: a record of fields is needed" in found.problems[3]
    with pytest.raises(DataError, match=r"b.jsonl holds no prompt with a response: b.jsonl, line 1 has no prompt"):
        read_exchanges(written(tmp_path / "b.jsonl", [{"text": "x"}]))


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"messages": [USER, ANSWER]}] * 2), tmp_path / "a.parquet")
    assert read_exchanges(tmp_path / "a.parquet") == [([USER], "w2 w3")] * 2
    assert read_exchanges(tmp_path / "a.parquet", "messages.0.content", "messages.1.content") == [("w1", "w2 w3")] * 2


# ---- token ids ------------------------------------------------------------------------------------------------------


def test_responses_end_and_are_cut():
    exchanges = [("w1", f"{' '.join(f'w{i}' for i in range(n))}") for n in range(6)]
    pairs = pair(exchanges, tiny.tokenizer(), max_new_tokens=4)
    by_length = {tuple(row) for row in pairs.continuations}
    want = [[*range(2, 2 + n), 0] for n in range(6)]
    assert by_length == {tuple(row[:4]) for row in want}  # of 4 words or more, the end is cut off
    assert pairs.prefixes == [[3]] * 6
    assert pairs.chat_template is None
    assert pairs[1:3] == Pairs(pairs.prefixes[1:3], pairs.continuations[1:3])


def test_short_responses_can_be_left_out():
    exchanges = [("w1", "w2 " * n) for n in range(6)]
    with pytest.warns(UserWarning, match=r"2 exchanges are left out: exchange \d has a response of fewer than 2 tok"):
        pairs = pair(exchanges, tiny.tokenizer(), max_new_tokens=9, min_new_tokens=2)
    assert sorted(map(len, pairs.continuations)) == [3, 4, 5, 6]
    assert pairs.left_out == pairs[:2].left_out == 2
    with pytest.raises(
        DataError, match=r"too few usable pairs: of 6 exchanges 0, and 1 are needed: exchange \d has a resp"
    ):
        pair(exchanges, tiny.tokenizer(), max_new_tokens=9, min_new_tokens=6)


def test_order_and_limits():
    exchanges = [(f"w{i}", f"w{i}") for i in range(20)]
    whole = pair(exchanges, tiny.tokenizer(), 4, seed=3)
    some = pair(exchanges, tiny.tokenizer(), 4, limit=7, seed=3)
    assert some == whole[:7]
    assert sorted(whole.prefixes) == sorted([2 + i] for i in range(20))
    assert whole.prefixes != pair(exchanges, tiny.tokenizer(), 4, seed=4).prefixes
    with pytest.raises(DataError, match=r"too few usable pairs: of 20 exchanges 20, and 21 are needed$"):
        pair(exchanges, tiny.tokenizer(), 4, limit=21)
    assert len(pair(exchanges, tiny.tokenizer(), 4, limit=21, at_least=1)) == 20


def test_texts_as_prompts():
    chats, texts = tiny.chat_tokenizer(), tiny.tokenizer()
    assert pair([("w1", "w2")], chats, 4).prefixes == [[60, 3, 0, 61]]
    assert pair([("w1", "w2")], chats, 4, chat=False).prefixes == pair([("w1", "w2")], texts, 4).prefixes == [[3]]
    with pytest.raises(InvalidInput, match="exchange 0 is a chat, and the tokenizer '' has no chat template"):
        pair([("w1", "w2")], texts, 4, chat=True)
    with pytest.raises(InvalidInput, match="exchange 0 is a chat, and the tokenizer '' has no chat template"):
        pair([[USER, ANSWER]], texts, 4)
    with pytest.raises(InvalidInput, match="chat = False, and exchange 0 is a chat"):
        pair([[USER, ANSWER]], chats, 4, chat=False)


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (("", "w2"), "exchange 0 has an empty prompt"),
        (("w1", "w2 <eos> w3"), "exchange 0 has '<eos>' in its response, which ends a text"),
        (("w3 w4 w5", "w2"), "the prompt of exchange 0 has 3 tokens; with max_new_tokens = 4 it exceeds"),
    ],
)
def test_what_cant_be_used_is_left_out_and_named(exchange, message):
    def check(rows):
        return tokenize(rows, None, 70, 6, 4)

    with pytest.raises(DataError, match=f"of 1 exchanges 0, and 1 are needed: .*{message}"):
        pair([exchange], tiny.tokenizer(), 4, check=check)
    with pytest.warns(UserWarning, match="1 exchanges are left out: .*has|1 exchanges are left out: the prompt of"):
        pairs = pair([exchange, ("w1", "w2")], tiny.tokenizer(), 4, check=check)
    assert (pairs.prefixes, pairs.left_out) == ([[3]], 1)


def test_what_is_no_exchange_is_an_error():
    with pytest.raises(
        InvalidInput, match=r"exchange 0 is a int: a chat .*, a pair of prompt and response, or a record"
    ):
        pair([5], tiny.tokenizer(), 4)


def test_records_left_out_are_named_by_where_they_stand(tmp_path):
    records = [{"prompt": "w1", "response": "w2"}, {"prompt": "w1", "response": "w2 <eos> w3"}]
    found = read_exchanges(written(tmp_path / "a.jsonl", records))
    with pytest.warns(UserWarning, match="1 exchanges are left out: a.jsonl, line 2 has '<eos>' in its response"):
        pair(found, tiny.tokenizer(), 4)


def test_a_tokenizer_without_an_end():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InvalidInput, match="has no end-of-text: responses can't end"):
        pair([("w1", "w2")], tokenizer, 4)
