"""The model's side of drawing: every way of holding the key-value cache gives the same logits, and the same tokens."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import warnings

import families
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from daemon_fast import TransformersProposal
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals import prompt_cache
from daemon_fast.proposals import transformers as drawing
from daemon_fast.proposals.prompt_cache import GrowingPromptCache, SharedPromptCache, process, way_of
from daemon_fast.proposals.twin import Twin, context_of

M, STEPS = 3, 7
PROMPTS = {"padded": [[5, 9, 30], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11]], "equal lengths": [[5, 9, 30], [8, 8, 2]]}
# Longer than the window of 8 tokens, by themselves and with what is drawn.
LONG = [list(range(2, 16)), [9, 3, 8, 4, 7, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


def gemma2(**changes):
    shape = {**tiny._ROPE, "bos_token_id": 0, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 3.0}
    return Gemma2ForCausalLM(Gemma2Config(**{**shape, **changes})).eval()


def gpt_oss():
    return GptOssForCausalLM(
        GptOssConfig(
            **{**tiny._ROPE, "bos_token_id": 0}, head_dim=8, sliding_window=8, num_local_experts=2,
            num_experts_per_tok=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    ).eval()  # fmt: skip


FAMILIES = {**tiny.FAMILIES, "gemma2: window and capped scores": gemma2, "gpt-oss: window and sinks": gpt_oss}


def model_of(family):
    torch.manual_seed(0)
    return Twin(FAMILIES[family]().eval())


def logits_of(kind, model, prompts, ids, keep=None):
    """[STEPS, R, V] logits of the same tokens, appended one by one."""
    kind.load(model, prompts)
    slot, out = torch.zeros(1, dtype=torch.int64), []
    for t in range(STEPS):
        if keep is not None and t == STEPS // 2:
            kind.keep(keep)
            ids = ids[:, keep]
        out.append(kind.step(ids[t], slot, kind.window(t)))
        slot += 1
    return out


def plain(model, prompts, ids):
    """The same by one unpadded pass of the model itself over each row."""
    rows = [prompt for prompt in prompts.tokens for _ in range(M)]
    out = []
    for r, row in enumerate(rows):
        text = torch.tensor([row + ids[:, r].tolist()])
        out.append(model.model(text, use_cache=False).logits[0, len(row) :])
    return torch.stack(out, dim=1)


def some_ids(prompts):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(tiny.VOCABULARY, (STEPS, M * len(prompts.tokens)), generator=generator)


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [*PROMPTS.values(), LONG], ids=[*PROMPTS, "longer than a window"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [False, True], ids=["copied", "shared"])
@pytest.mark.parametrize("exact", [False, True], ids=["rounded up", "exact"])
def test_our_cache_gives_the_logits_of_a_plain_pass(family, tokens, share, exact):
    model = model_of(family)
    before = copy.deepcopy(model.model.config.to_dict()), model.model.config._attn_implementation
    prompts = process(model, tokens)
    ids = some_ids(prompts)
    want = plain(model, prompts, ids)
    ours = SharedPromptCache(model, prompts, M, STEPS, share, exact)
    for got, wanted in zip(logits_of(ours, model, prompts, ids), want, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (model.model.config.to_dict(), model.model.config._attn_implementation) == before
    assert way_of(model) == "shared"


@torch.inference_mode()
@pytest.mark.parametrize("share", [False, True], ids=["copied", "shared"])
@pytest.mark.parametrize("cached", [False, True], ids=["recomputed", "growing"])
def test_rows_can_be_dropped(share, cached):
    model = model_of("llama")
    ids, keep = some_ids(process(model, PROMPTS["padded"])), torch.tensor([2, 0, 3, 5, 7, 8])
    prompts = process(model, PROMPTS["padded"], cached)
    want = plain(model, prompts, ids)
    kinds = [GrowingPromptCache(model, M)]
    kinds += [SharedPromptCache(model, prompts, M, STEPS, share)] if cached else []
    for kind in kinds:
        for t, got in enumerate(logits_of(kind, model, prompts, ids, keep)):
            wanted = want[t] if t < STEPS // 2 else want[t][keep]
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_prompts_are_padded_to_few_widths():
    widths = [prompt_cache._padded_width(width, exact=False) for width in range(1, 2049)]
    assert sorted(set(widths)) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(width <= padded < max(65, 1.5 * width) for width, padded in enumerate(widths, 1))
    assert prompt_cache._padded_width(5, exact=True) == 5


@torch.inference_mode()
@pytest.mark.parametrize("share", [False, True], ids=["copied", "shared"])
@pytest.mark.parametrize("family", ["gpt2", "mistral, sliding window"])
def test_buffers_serve_other_prompts_of_the_same_rounded_size(family, share):
    model = model_of(family)
    first, second = process(model, [[5] * 20, [6] * 3]), process(model, [[9, 8], [7, 7, 1]])
    ours = SharedPromptCache(model, first, M, STEPS, share, exact=False)
    assert ours.suits(second)
    assert ours.suits(process(model, [[5]]))
    assert not ours.suits(process(model, [[5], [6], [7]]))
    logits_of(ours, model, first, some_ids(first))
    want = plain(model, second, some_ids(second))
    for got, wanted in zip(logits_of(ours, model, second, some_ids(second)), want, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def proposal(model=None, **settings):
    settings = {"num_candidates": 8, "max_new_tokens": 40, "min_new_tokens": 0, "temperature": 1.1, **settings}
    return TransformersProposal(model or tiny.model(), tiny.tokenizer(), **settings)


def assert_same(a, b):
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.lengths, b.lengths)
    torch.testing.assert_close(a.token_log_p, b.token_log_p, atol=1e-4, rtol=1e-4)


def test_dropping_what_has_ended_changes_nothing(monkeypatch):
    for prefixes in ([[5, 9]], [[5, 9, 30], [7], [8, 8]]):
        dropped = proposal(eos_token_ids=[0, 10, 20, 30]).propose(prefixes, seed=1)
        assert (dropped.lengths < 30).float().mean() > 0.5  # many end early
        monkeypatch.setattr(drawing, "DROP_ABOVE", 2.0)
        assert_same(proposal(eos_token_ids=[0, 10, 20, 30]).propose(prefixes, seed=1), dropped)
        monkeypatch.undo()


def bloom():
    shape = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 0}
    return BloomForCausalLM(BloomConfig(**shape)).eval()


def test_a_model_that_our_attention_does_not_suit_keeps_its_own_cache():
    model = bloom()
    p = proposal(model, max_new_tokens=6)
    with pytest.warns(UserWarning, match=r"BloomForCausalLM can't share .*no attention function from outside"):
        c = p.propose([[5, 9, 30], [7]], seed=0)
    assert p.path == "growing"
    assert c.shape == (2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        proposal(model, max_new_tokens=6).propose([[5, 9, 30], [7]], seed=0)


def test_a_model_with_other_logits_is_found_out(monkeypatch):
    attend = SharedPromptCache.attend
    monkeypatch.setattr(SharedPromptCache, "attend", lambda *args: 0.5 * attend(*args))
    with pytest.warns(UserWarning, match="other logits"):
        c = proposal(max_new_tokens=6).propose([[5, 9, 30]], seed=0)
    monkeypatch.undo()
    assert_same(c, proposal(max_new_tokens=6).propose([[5, 9, 30]], seed=0))


def test_a_cache_that_lies_is_found_out(monkeypatch):
    step = GrowingPromptCache.step
    monkeypatch.setattr(GrowingPromptCache, "step", lambda *args: 0.5 * step(*args))
    p = proposal(bloom(), max_new_tokens=6)
    with pytest.warns(UserWarning, match="no cache that can be kept"):
        prompt_cache.way_of(Twin(p.model))
    monkeypatch.undo()
    c = p.propose([[5, 9, 30], [7]], seed=0)
    assert p.path == "recomputed"
    other = proposal(bloom(), max_new_tokens=6)
    other.model.load_state_dict(p.model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(c, other.propose([[5, 9, 30], [7]], seed=0))
    assert other.path == "growing"


def test_a_model_that_sees_what_follows_is_refused():
    shape = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = BertLMHeadModel(BertConfig(**shape, num_attention_heads=4, initializer_range=0.4)).eval()
    with pytest.raises(InvalidInput, match="BertLMHeadModel is no causal language model as it is configured"):
        proposal(model, max_new_tokens=6).propose([[5, 9, 30]], seed=0)
    with pytest.raises(InvalidInput, match="is no causal language model"):
        proposal(model, max_new_tokens=6).score([[5, 9]], [[30]])


def largest_error(candidates, prefixes, model):
    """Of log-probabilities, against one plain pass over each text."""
    m, worst = len(candidates.tokens) // len(prefixes), 0.0
    for r, row in enumerate(candidates.tokens.tolist()):
        prefix, log_p = list(prefixes[r // m]), candidates.token_log_p[r]
        row = row[: int((log_p != 0).sum())]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prefix + row]), use_cache=False).logits[0, len(prefix) - 1 : -1]
        want = logits.double().log_softmax(-1)[range(len(row)), row]
        worst = max(worst, float((log_p[: len(row)].double() - want).abs().max()))
    return worst


FULL = {"max_new_tokens": 8, "min_new_tokens": 8, "num_candidates": 4}


# ---- texts of different lengths -------------------------------------------------------------------------------------

SWITCH = 16
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * (families.HEAD // 2), "long_factor": [2.0] * (families.HEAD // 2),
}  # fmt: skip
SIDES = [list(range(2, 32)), [5, 6], list(range(20, 40)), [7, 6, 8], [9, 3]]


def longrope(family):
    extra = {"original_max_position_embeddings": SWITCH} if family == "phi3" else {}
    return families.build(family, rope_parameters=LONGROPE, **extra)


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_prefixes_on_both_sides_of_a_change_of_rotary_embeddings(family):
    p = proposal(longrope(family), **FULL)
    for prefixes in (SIDES, SIDES[::-1], SIDES[:2]):
        c = p.propose(prefixes, seed=0)
        assert largest_error(c, prefixes, p.model) < 1e-4
        assert torch.equal(c.tokens, p.propose(prefixes, seed=0).tokens)
        assert len({tuple(row) for row in c.tokens.tolist()}) == len(c.tokens)  # no random numbers twice
    together = p.propose(SIDES, seed=[3, 4, 5, 6, 7])
    for i, prefix in enumerate(SIDES):
        assert_same(together.of_prefix(i), p.propose([prefix], seed=[3 + i]))


@pytest.mark.parametrize("rope", [LONGROPE, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}])
def test_scores_of_texts_of_many_lengths(rope):
    p = proposal(families.build("llama", rope_parameters=rope))
    texts = [([5, 9], [30, 4]), (list(range(2, 20)), list(range(3, 40))), ([7] * 20, [8]), ([7], [9] * 15)]
    prefixes, continuations = map(list, zip(*texts, strict=True))
    scored = p.score(prefixes, continuations)
    for i, row in enumerate(continuations):
        assert scored.tokens[i, : len(row)].tolist() == row
    assert largest_error(scored, prefixes, p.model) < 1e-4


def test_scores_of_texts_that_no_one_probability_is_of():
    with pytest.raises(InvalidInput, match=r"prefix 1 has 2 tokens; with its continuation of 20 it passes 16"):
        proposal(longrope("llama")).score([[5], [5, 9]], [[4], [4] * 20])
    with pytest.raises(InvalidInput, match=r"prefix 1 has 10 tokens; with its continuation of 55 it exceeds .* of 64"):
        proposal(tiny.model("gpt2")).score([[5], [5] * 10], [[4], [4] * 55])
    assert proposal(tiny.model("gpt2")).score([[5] * 10], [[4] * 54]).token_log_p.shape == (1, 54)


LENGTHS = {
    "gpt2": 64, "llama": 64, "bart": 64, "mpt": 64, "whisper": 64, "roberta, is_decoder": 63, "xmod, is_decoder": 63,
    "camembert, is_decoder": 63, "xlm-roberta, is_decoder": 63, "data2vec-text, is_decoder": 63,
}  # fmt: skip


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", LENGTHS)
def test_the_context_is_what_the_model_can_run_over(family):
    model = families.build(family)
    assert context_of(model) == LENGTHS[family]
    twin = Twin(model)
    assert twin.plain(torch.full((1, LENGTHS[family]), 5)).isfinite().all()
    if family != "llama":  # whose positions have no table
        with pytest.raises((IndexError, RuntimeError)):
            twin.plain(torch.full((1, LENGTHS[family] + 1), 5))
    c = proposal(model, **FULL).propose([[5] * (LENGTHS[family] - 8)], seed=0)
    assert c.shape == (1, 4)
    with pytest.raises(InvalidInput, match=f"context of {LENGTHS[family]}"):
        proposal(model, **FULL).propose([[5] * (LENGTHS[family] - 7)], seed=0)


# ---- what a trial sees ----------------------------------------------------------------------------------------------


def bert():
    shape = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(**shape, num_attention_heads=4, initializer_range=0.4)).eval()


def without_causal_mask():
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


@pytest.mark.parametrize("value", [-100.0, -1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_masked_logits_hide_nothing(value):
    """The vocabulary's padding is masked in many ways."""

    def masked(model):
        model.get_output_embeddings().register_forward_hook(
            lambda module, inputs, out: out.index_fill(-1, torch.tensor([1, 60, 61]), value)
        )
        return model

    prefixes = PROMPTS["padded"]
    for family in ("llama", "diffllama", "doge"):
        model = masked(families.build(family))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert largest_error(proposal(model, **FULL).propose(prefixes, seed=0), prefixes, model) < 1e-4
    for other in (bert(), without_causal_mask()):
        with pytest.raises(InvalidInput, match="no causal language model"):
            proposal(masked(other), **FULL).propose(prefixes, seed=0)


class AnyArguments(LlamaForCausalLM):
    """Which arguments it takes can't be seen; and logits that are masked."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., 60:] = torch.finfo(out.logits.dtype).min
        return out


def test_a_model_whose_arguments_can_not_be_seen():
    torch.manual_seed(0)
    model = AnyArguments(LlamaConfig(**tiny._ROPE)).eval()
    with pytest.warns(UserWarning, match="growing"):
        c = proposal(model, **FULL).propose(PROMPTS["padded"], seed=0)
    assert largest_error(c, PROMPTS["padded"], model) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [16, 30])
@pytest.mark.parametrize("family", ["moshi", "mistral", "gemma2", "gpt_oss", "recurrent_gemma"])
def test_windows_longer_than_a_short_text_are_tried(family, window):
    field = "attention_window_size" if family == "recurrent_gemma" else "sliding_window"
    model = families.build(family, **{field: window})
    prefixes = [[(7 * i * i + 3 * i) % 59 + 2 for i in range(n)] for n in (40, 45, 3)]
    assert largest_error(proposal(model, **FULL).propose(prefixes, seed=0), prefixes, model) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [0.0, 0.002, 0.02, "constant"])
@pytest.mark.parametrize("family", ["bert", "zamba2", "doge", "diffllama", "moshi"])
def test_weights_that_are_loaded_after_the_trial(family, scale):
    """At the first weights earlier tokens, or parts of the model, do next to nothing."""
    model = families.build(family)
    trained = {name: x.clone() for name, x in model.state_dict().items()}
    torch.manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            if scale == "constant":
                x.fill_(0.05)
            elif x.ndim > 1:
                x.normal_(0, scale)
    p = proposal(model, **FULL)
    with contextlib.suppress(InvalidInput):
        p.propose(PROMPTS["padded"], seed=0)
    for name, x in model.state_dict().items():
        x.copy_(trained[name])
    try:
        c = p.propose(PROMPTS["padded"], seed=0)
    except InvalidInput:
        assert family == "bert"
    else:
        assert largest_error(c, PROMPTS["padded"], model) < 2e-4
        assert family != "bert"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_needs_no_other_trial(family, monkeypatch):
    trials, again = [], prompt_cache._try
    monkeypatch.setattr(prompt_cache, "_try", lambda model: trials.append(1) or again(model))
    model = tiny.model(family)
    p, optimiser = proposal(model, **FULL), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        c = p.propose(PROMPTS["padded"], seed=0)
        assert largest_error(c, PROMPTS["padded"], model) < 1e-4
        model(torch.tensor([[5, 9, 30, 8]]), labels=torch.tensor([[5, 9, 30, 8]])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert len(trials) == 1


def test_hooks_and_switches_of_after_the_first_call_are_tried():
    p = proposal(**FULL)
    first = p.propose([[5, 9, 30]], seed=0)
    # Of the last token alone, of whatever it is called with.
    hook = p.model.model.layers[0].register_forward_hook(
        lambda module, inputs, out: torch.cat([out[:, :-1], out[:, -1:] + 1.5 * out[:, -1:].flip(-1)], dim=1)
    )
    with pytest.raises(InvalidInput, match="no causal language model"):
        p.propose([[5, 9, 30]], seed=0)
    hook.remove()
    assert_same(p.propose([[5, 9, 30]], seed=0), first)
    for layer in p.model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(InvalidInput, match="no causal language model"):
        p.propose([[5, 9, 30]], seed=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_changes_nothing(family):
    model = tiny.model(family)
    want = proposal(model, **FULL).propose(PROMPTS["padded"], seed=0)
    p = proposal(tiny.model(family), **FULL)
    for _ in range(2):  # with the trial, and without
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(p.propose(PROMPTS["padded"], seed=0), want)
            scored = p.score(PROMPTS["padded"], [[5, 6], [7], [8, 9, 4]])
            assert torch.is_autocast_enabled("cpu")
    assert largest_error(scored, PROMPTS["padded"], model) < 1e-4


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_adapters_that_act_in_their_wrapper_are_refused():
    import peft

    def adapted(config):
        torch.manual_seed(1)
        return peft.get_peft_model(tiny.model(), config).eval()

    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    plain = adapted(peft.LoraConfig(**lora))
    prefixes = PROMPTS["padded"]
    assert largest_error(proposal(plain, **FULL).propose(prefixes, seed=0), prefixes, plain) < 1e-4
    invoked = adapted(peft.LoraConfig(**lora, alora_invocation_tokens=[9]))
    with pytest.raises(InvalidInput, match="aLoRA"):
        proposal(invoked, **FULL)
    with invoked.disable_adapter():
        assert largest_error(proposal(invoked, **FULL).propose(prefixes, seed=0), prefixes, tiny.model()) < 1e-4
    plain.add_adapter("second", peft.LoraConfig(**lora, alora_invocation_tokens=[9]))
    p = proposal(plain, **FULL)  # the first is active
    plain.set_adapter("second")
    with pytest.raises(InvalidInput, match="aLoRA"):
        p.propose(prefixes, seed=0)
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    for config in (peft.PromptTuningConfig(**shape), peft.PrefixTuningConfig(**shape)):
        with pytest.raises(InvalidInput, match=f"learned prompt tokens .{type(config).__name__}"):
            proposal(adapted(config), **FULL)
    with pytest.raises(InvalidInput, match="POLY"):
        proposal(adapted(peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], n_tasks=2)), **FULL)


# ---- what a CUDA graph asks for, checked where there is no CUDA -----------------------------------------------------


class Watch(TorchDispatchMode):
    """Collects the operators that read a value on the host, or whose shape depends on one."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")

    def __init__(self):
        super().__init__()
        self.waiting, self.seen = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.overloadpacket.__name__.split(".")[-1])
        if self.seen[-1] in self.WAITING:
            self.waiting.append(str(function))
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"min_new_tokens": 40}])
@pytest.mark.parametrize("share", [False, True], ids=["copied", "shared"])
def test_a_step_waits_for_nothing_and_moves_nothing(settings, share, monkeypatch):
    monkeypatch.setattr(prompt_cache, "SHARE_FROM", {"cpu": 0 if share else 10**9})
    p = proposal(**settings)
    model = Twin(p.model)
    prompts = process(model, [[5, 9, 30], [7]])
    batch = drawing._Batch(p._sampler, model, prompts)
    batch._cache._exact = False
    batch._cache.load(model, prompts)
    batch._running.fill_(True)

    def buffers():
        owners = (batch, batch._cache)
        tensors = [x for owner in owners for x in vars(owner).values() if isinstance(x, torch.Tensor)]
        tensors += [x for layer in batch._cache._layers for x in (layer.keys, layer.values, *layer.prompt)]
        return [x.data_ptr() for x in tensors]

    batch._step(64, "min_new_tokens" in settings)
    before = buffers()
    with Watch() as watch:
        for _ in range(3):
            batch._step(64, "min_new_tokens" in settings)
    assert watch.waiting == []
    assert buffers() == before
    assert int(batch._slot) == 4
    batch._cache.load(model, process(model, [[8, 8], [3, 4, 5]]))  # a graph must find other prompts where these were
    assert buffers() == before
    with Watch() as watch:  # the watch sees such an operator
        bool(batch._running.any())
    assert watch.waiting


def rounded_batch(p, prefixes, dtype):
    """A batch as on CUDA, of a model in this dtype, ready for a step."""
    model = Twin(p.model.to(dtype))
    prompts = process(model, prefixes)
    batch = drawing._Batch(p._sampler, model, prompts)
    batch._cache._exact = False
    batch._cache.load(model, prompts)
    batch._running.fill_(True)
    return batch, prompts


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral, sliding window"])
def test_one_bias_serves_all_layers_as_it_is(family, dtype, monkeypatch):
    """In the query's dtype, and aligned: else torch would make another one in each layer."""
    monkeypatch.setattr(prompt_cache, "SHARE_FROM", {"cpu": 10**9})
    batch, _ = rounded_batch(proposal(tiny.model(family)), LONG, dtype)
    seen, attention = [], prompt_cache.F.scaled_dot_product_attention

    def watching(query, keys, values, attn_mask, scale):
        seen.append((attn_mask.data_ptr(), attn_mask.dtype, attn_mask.shape[-1] - keys.shape[2], attn_mask.stride()))
        return attention(query, keys, values, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(prompt_cache.F, "scaled_dot_product_attention", watching)
    batch._step(64, False)
    (address, used, difference, strides), *others = seen
    assert len(others) == 1
    assert set(others) == {(address, used, difference, strides)}
    assert (used, difference, strides[-1]) == (dtype, 0, 1)
    assert all(stride % 16 == 0 for stride in strides[:-1])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_draw_takes_three_operators_and_logits_as_they_are(dtype, monkeypatch):
    batch, prompts = rounded_batch(proposal(), [[5, 9, 30], [7]], dtype)
    seen, sample = [], drawing.ops.sample_tokens
    monkeypatch.setattr(drawing.ops, "sample_tokens", lambda x, *given: seen.append(x.dtype) or sample(x, *given))
    batch._draw(prompts.logits.repeat_interleave(8, dim=0), False)
    with Watch() as watch:
        logits = batch._cache.step(batch._tokens[0], batch._slot, 64)
        watch.seen.clear()
        batch._draw(logits, False)
    assert watch.seen == ["index", "sample_tokens", "append_tokens"]
    assert set(seen) == {torch.float32 if dtype == torch.float64 else dtype}
