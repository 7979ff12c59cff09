"""Chats as prompts, with templates of several kinds. What one must come to is rendered here, with Jinja alone."""

from __future__ import annotations

import jinja2
import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

from daemon_fast import Energy, SIRDecoder, TransformersProposal, metrics
from daemon_fast.data.exchanges import pair
from daemon_fast.errors import InvalidInput
from daemon_fast.prompts import end_of_answer, fingerprint
from daemon_fast.proposals.base import eos_token_ids, tokenize

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "a space before the answer, and no prompt for it": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} <|end|>"
        "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
    ),
    "contents trimmed": CHATML.replace("m['content']", "m['content'] | trim"),
    "a header that the answer brings": (
        "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    ),
}
CHATS = {
    "one message": [{"role": "user", "content": "What is 2 + 2?"}],
    "a system message": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rome?"}],
    "several turns": [
        {"role": "user", "content": "Hi  "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "naïve 東京 😀"},
    ],
}


def bytes_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level, with markers of turns beside its end-of-text."""
    from test_tokenizers import byte_level

    made = byte_level()
    made.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    made.chat_template = template
    return made


def rendered(template, messages, **options):
    return jinja2.Template(template, trim_blocks=True, lstrip_blocks=True).render(messages=messages, **options)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_is_what_the_template_makes_of_it(kind, chat):
    tokenizer, messages = bytes_tokenizer(TEMPLATES[kind]), CHATS[chat]
    want = rendered(TEMPLATES[kind], messages, add_generation_prompt=True)
    rows = tokenize([messages, "plain", messages], tokenizer, len(tokenizer), None, 4)
    assert decoded(tokenizer, rows[0]) == want
    assert rows[2] == rows[0] == tokenize(messages, tokenizer, len(tokenizer), None, 4)[0]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert tokenize(parts, tokenizer, len(tokenizer), None, 4) == [rows[0]]
    for form in (tuple(messages), np.array(messages), [np.array(messages)], (tuple(messages),)):
        assert tokenize(form, tokenizer, len(tokenizer), None, 4) == [rows[0]]


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("response", ["It is 4.", "", " spaces \n", "two\nlines naïve 😀"])
def test_a_response_is_what_the_template_writes_behind_the_prompt(kind, response):
    template = TEMPLATES[kind]
    tokenizer, messages = bytes_tokenizer(template), CHATS["several turns"]
    pairs = pair([(messages, response)], tokenizer, max_new_tokens=500)
    whole = rendered(template, [*messages, {"role": "assistant", "content": response}])
    want = whole[: whole.rindex("<|end|>")] + "<|end|>"
    assert decoded(tokenizer, pairs.prefixes[0] + pairs.continuations[0]) == want
    assert pairs.continuations[0].count(tokenizer.convert_tokens_to_ids("<|end|>")) == 1
    assert pairs.chat_template == fingerprint(tokenizer) is not None


def test_a_template_that_writes_an_answered_chat_otherwise():
    """As those do that leave out earlier thoughts: the answer stands behind the prompt all the same."""
    template = CHATML.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>{% endif %}")
    tokenizer = bytes_tokenizer(template)
    with pytest.warns(UserWarning, match="writes 1 of 1 chats otherwise once they are answered"):
        pairs = pair([("Rome?", "A city.")], tokenizer, max_new_tokens=50)
    assert decoded(tokenizer, pairs.prefixes[0]).endswith("<|start|>assistant\n<think>")
    assert decoded(tokenizer, pairs.continuations[0]) == "A city.<|end|>"
    assert end_of_answer(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_token_that_ends_an_answer(kind):
    tokenizer = bytes_tokenizer(TEMPLATES[kind])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_of_answer(tokenizer) == end
    assert eos_token_ids(None, tokenizer) == eos_token_ids([tokenizer.eos_token_id], tokenizer) == [0, end]
    assert eos_token_ids([end, 5], tokenizer) == [end, 5]
    assert end_of_answer(bytes_tokenizer(None)) is None
    assert end_of_answer(bytes_tokenizer("{{ messages[0]['content'] }}")) is None
    assert end_of_answer(bytes_tokenizer("{{ raise_exception('never') }}")) is None


USER = [{"role": "user", "content": "Rome?"}]
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (None, USER, r"prefix 0 is a chat, and the tokenizer '' has no chat template: take a model .*, or give a text"),
        (REFUSING, CHATS["a system message"], "refuses messages of the roles system, user: System role not supported"),
        (CHATML, [*USER, {"role": "assistant", "content": "A city."}], "ends with a message of the assistant's"),
        (CHATML, [*USER, "Rome?"], "prefix 0, message 1 is a str: a message has a role and a content"),
        (CHATML, [{"role": "", "content": "x"}], "message 0 has role = ''"),
        (CHATML, [{"role": "user", "content": None}], "message 0 has a content of type NoneType: only text"),
        (CHATML, [{"role": "user", "content": [{"type": "image_url"}]}], "message 0 has a part of type 'image_url'"),
        (CHATML, [{"role": "user", "content": "\ud800"}], "message 0 has the lone surrogate .* at position 0"),
        ("{{ messages[0].name + 1 }}", USER, "the chat template refuses messages of the roles user: "),
    ],
)  # fmt: skip
def test_chats_that_are_none_are_named(template, chat, message):
    with pytest.raises(InvalidInput, match=message):
        tokenize([chat], bytes_tokenizer(template), 400, None, 4)


def test_a_user_may_be_answered_without_a_system_role():
    tokenizer = bytes_tokenizer(REFUSING)
    assert decoded(tokenizer, tokenize([USER], tokenizer, 400, None, 4)[0]) == rendered(
        CHATML, USER, add_generation_prompt=True
    )


# ---- answers that end -----------------------------------------------------------------------------------------------


def plain_log_p(model, prefix, row):
    """Sum of the log-probabilities of a row's tokens behind a prefix, by one pass of the model."""
    logits = model(torch.tensor([prefix + row])).logits[0].double().log_softmax(-1)
    return float(sum(logits[len(prefix) + t - 1, token] for t, token in enumerate(row)))


def proposal(**settings):
    return TransformersProposal(
        tiny.model(), tiny.chat_tokenizer(), **{"max_new_tokens": 3, "min_new_tokens": 0, **settings}
    )


@torch.inference_mode()
def test_log_p_of_an_answer_holds_that_of_its_end():
    made = proposal(num_candidates=400, temperature=1.5, max_new_tokens=4)
    c = made.propose([[{"role": "user", "content": "w3 w7"}]], seed=0)
    assert c.prefix_tokens == [[60, 5, 9, 0, 61]]
    ended = {}
    for r, (row, n) in enumerate(zip(c.tokens.tolist(), c.lengths.tolist(), strict=True)):
        drawn = row[:n] + [0] * bool(c.ended[r])
        assert 0 not in row[:n]
        assert c.ended[r] or n == 4  # else it was cut at the maximum
        ended.setdefault((bool(c.ended[r]), n), drawn)
        if r < 40:
            assert float(c.log_p[0, r]) == pytest.approx(plain_log_p(made.model, c.prefix_tokens[0], drawn), abs=1e-4)
    assert {(True, 0), (True, 1), (False, 4)} <= set(ended)
    scored = made.score([c.prefix_tokens[0]] * len(ended), list(ended.values()))
    assert scored.ended.tolist() == [key[0] for key in ended]
    assert scored.lengths.tolist() == [key[1] for key in ended]
    for k, row in enumerate(ended.values()):
        assert float(scored.log_p[k, 0]) == pytest.approx(plain_log_p(made.model, c.prefix_tokens[0], row), abs=1e-4)
    values = metrics.features(metrics.parse(["nats", "length"]), scored)[:, 0]
    empty = list(ended).index((True, 0))
    assert float(values[empty, 0]) == pytest.approx(-plain_log_p(made.model, c.prefix_tokens[0], [0]), abs=1e-4)


@torch.inference_mode()
def test_empty_answers_are_as_frequent_as_the_model_has_them():
    made = proposal(num_candidates=4000, temperature=1.5, max_new_tokens=1)
    c = made.propose([[{"role": "user", "content": "w3 w7"}]], seed=1)
    logits = made.model(torch.tensor(c.prefix_tokens)).logits[0, -1].double() / 1.5
    p = float(logits.softmax(-1)[0])
    error = (p * (1 - p) / 4000) ** 0.5
    assert p > 0.002
    assert abs(float(c.ended.double().mean()) - p) < 4 * error
    assert torch.equal(c.ended, c.lengths == 0)


# ---- the decoder ----------------------------------------------------------------------------------------------------


def energy(made, template):
    zero = torch.zeros(1, dtype=torch.float64)
    return Energy(metrics.parse(["length"]), zero, zero, made.settings, chat_template=template)


def test_the_decoder_makes_prompts_as_the_fit_did():
    made = proposal(num_candidates=3)
    chat = [{"role": "user", "content": "w3 w7"}]
    fitted = SIRDecoder(energy(made, fingerprint(made.tokenizer)), made)
    answers = fitted(["w3 w7", chat, [5, 9]])
    assert answers.candidates.prefix_tokens == [[60, 5, 9, 0, 61]] * 2 + [[5, 9]]
    on_texts = SIRDecoder(energy(made, None), made)
    assert on_texts("w3 w7").candidates.prefix_tokens == [[5, 9]]
    with pytest.warns(UserWarning, match="mu was fitted to prompts that are texts, and these are chats"):
        assert on_texts(chat).candidates.prefix_tokens == [[60, 5, 9, 0, 61]]


def test_another_template_warns(tmp_path):
    made = proposal(num_candidates=3)
    with pytest.warns(UserWarning, match=r"chats in another template \(0123\) than the tokenizer has \([0-9a-f]{16}\)"):
        SIRDecoder(energy(made, "0123"), made)
    without = TransformersProposal(tiny.model(), tiny.tokenizer(), max_new_tokens=3, min_new_tokens=0, num_candidates=3)
    with pytest.warns(UserWarning, match=r"than the tokenizer has \(none\)"):
        decoder = SIRDecoder(energy(without, "0123"), without)
    with pytest.raises(InvalidInput, match="prefix 0 is a chat, and the tokenizer '' has no chat template"):
        decoder("w3")
    kept = energy(made, fingerprint(made.tokenizer))
    kept.save(tmp_path / "e.json")
    assert Energy.load(tmp_path / "e.json").chat_template == kept.chat_template
