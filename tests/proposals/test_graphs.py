"""Drawing with CUDA graphs: the same tokens as on the CPU, from captured steps, whatever the settings.

On a GPU, and where there is none on a make-believe one, which refuses what CUDA refuses inside a capture.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
import weakref

import conformance
import families
import make_believe
import pytest
import tiny
import torch

from daemon_fast import Candidates, Energy, SIRDecoder, TransformersProposal, decode, metrics
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals import prompt_cache
from daemon_fast.proposals import transformers as drawing
from daemon_fast.proposals.prompt_cache import process
from daemon_fast.proposals.twin import Twin

SETTINGS = [
    {}, {"temperature": 0.7, "min_new_tokens": 9, "count_eos": True}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.01, "min_new_tokens": 16, "temperature": 1.2},
]  # fmt: skip
BATCHES = [[[5, 9, 30], [7]], [[8, 8, 6, 11], [3, 4]]]  # of one size once it is rounded up
without_cuda = pytest.mark.skipif(make_believe.HAS_CUDA, reason="this torch has CUDA itself")
PLACES = [pytest.param("make-believe", marks=without_cuda), pytest.param("cuda", marks=pytest.mark.gpu)]


class Place:
    """A GPU, or the make-believe one."""

    def __init__(self, fake: make_believe.Device | None) -> None:
        self.fake = fake

    def moved(self, model):
        return make_believe.moved(model) if self.fake else copy.deepcopy(model).to("cuda")

    def is_well(self) -> None:
        """Memory, random numbers and streams are what they are without captures."""
        if self.fake:
            assert (self.fake.tape, self.fake.allocates_in, self.fake.generates) == (None, [], True)
        else:
            assert torch.cuda.current_stream() == torch.cuda.default_stream()
            assert torch.rand(9, device="cuda").sum() > 0
            torch.empty(1 << 24, device="cuda").zero_()
            torch.cuda.synchronize()


@pytest.fixture(params=PLACES)
def place(request, monkeypatch):
    monkeypatch.setattr(prompt_cache, "SMALLEST_WINDOW", 8)  # so that 16 tokens take several captures
    if request.param == "cuda":
        request.getfixturevalue("cuda")
        yield Place(None)
    else:
        with make_believe.device() as fake:
            stream = fake.stream
            yield Place(fake)
            assert fake.stream is stream


def proposal(model, **settings):
    settings = {"num_candidates": 4, "max_new_tokens": 16, "min_new_tokens": 0, **settings}
    return TransformersProposal(model, None, eos_token_ids=[0, 1, 2], **settings)


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_same(got, want):
    assert torch.equal(got.tokens.cpu(), want.tokens)
    assert torch.equal(got.lengths.cpu(), want.lengths)
    for name in ("token_log_p", "token_log_q"):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(want, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [False, True], ids=["copied", "shared"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_tokens_as_on_the_cpu_from_captured_steps(place, settings, share, monkeypatch):
    monkeypatch.setattr(prompt_cache, "SHARE_FROM", {"cpu": 0, "cuda": 0 if share else 10**9})
    here = proposal(tiny.model(), **settings)
    there = proposal(place.moved(here.model), **settings)
    for seed, prefixes in enumerate([*BATCHES, BATCHES[0]]):
        with no_warnings():
            assert_same(there.propose(prefixes, seed), here.propose(prefixes, seed))
        if seed == 0:
            batch, graphs = there._kept[-1], dict(there._kept[-1].graphs.recorded)
            assert len(graphs) >= 2
    assert there._kept[-1] is batch  # the same buffers served all
    assert graphs.items() <= batch.graphs.recorded.items()
    if place.fake:
        assert place.fake.replayed > 20
        assert len(place.fake.pools) == 1
    place.is_well()


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "smollm3", "mistral, sliding window"])
def test_other_models(place, family):
    here = proposal(tiny.model(family), min_new_tokens=9)
    there = proposal(place.moved(here.model), min_new_tokens=9)
    with no_warnings():
        assert_same(there.propose(BATCHES[0], 1), here.propose(BATCHES[0], 1))
    assert there._kept[-1].graphs.recorded


def wait(module, inputs, out):
    """A hook that looks at what it is given."""
    assert bool(out.isfinite().all())


def test_a_step_that_waits_runs_without_a_graph_and_says_why_once(place):
    here = proposal(tiny.model())
    model = place.moved(here.model)
    hook = model.model.layers[1].mlp.register_forward_hook(wait)
    there = proposal(model)
    with pytest.warns(UserWarning, match=r"a step of LlamaForCausalLM can't be captured .*capturing") as told:
        assert_same(there.propose(BATCHES[0], 2), here.propose(BATCHES[0], 2))
    assert len([w for w in told if "captured" in str(w.message)]) == 1
    assert "failed due to a previous error" not in str(told[0].message)  # its cause, not what came of it
    place.is_well()
    began = place.fake and place.fake.began
    with no_warnings():  # of that model it is known, whatever the proposal and its shapes
        for again in (there, proposal(model, max_new_tokens=12)):
            want = proposal(here.model, max_new_tokens=again.settings.max_new_tokens)
            assert_same(again.propose(BATCHES[1], 3), want.propose(BATCHES[1], 3))
    assert place.fake is None or place.fake.began == began
    assert not there._kept[-1].graphs.recorded
    other = proposal(place.moved(here.model))  # another model is captured as ever
    with no_warnings():
        assert_same(other.propose(BATCHES[0], 2), here.propose(BATCHES[0], 2))
    assert other._kept[-1].graphs.recorded
    hook.remove()


def test_an_error_of_another_kind_inside_a_capture_is_named(place, monkeypatch):
    here = proposal(tiny.model())
    there, step = proposal(place.moved(here.model)), drawing._Batch._step

    def capturing_only(batch, *arguments):
        step(batch, *arguments)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("not here")

    want = here.propose(BATCHES[0], 2)
    monkeypatch.setattr(drawing._Batch, "_step", capturing_only)
    with pytest.warns(UserWarning, match=r"\(ValueError: not here\)"):
        assert_same(there.propose(BATCHES[0], 2), want)
    place.is_well()


def test_an_interrupt_inside_a_capture_passes(place, monkeypatch):
    there = proposal(place.moved(tiny.model()))

    def interrupted(batch, *arguments):
        if torch.cuda.is_current_stream_capturing():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drawing._Batch, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            there.propose(BATCHES[0], 2)
    place.is_well()
    with no_warnings():
        assert_same(there.propose(BATCHES[0], 2), proposal(tiny.model()).propose(BATCHES[0], 2))


LENGTHS = [(3, 5), (9, 14), (2, 6), (13, 12), (4, 1)]  # of prompts of five calls: two widths


def prompts_of(lengths):
    return [[2 + (7 * i + 3 * j) % tiny.WORDS for j in range(length)] for i, length in enumerate(lengths)]


def test_steps_serve_prompts_of_other_lengths_and_fewer_of_them(place, monkeypatch):
    """What was captured once for a width serves all calls that are padded to it, also of half as many prompts."""
    monkeypatch.setattr(prompt_cache, "SMALLEST_WIDTH", 8)
    here = proposal(tiny.model())
    there = proposal(place.moved(here.model))
    for seed, lengths in enumerate(LENGTHS):
        assert_same(there.propose(prompts_of(lengths), seed), here.propose(prompts_of(lengths), seed))
        if seed == 1:
            kept, recorded = set(there._kept), [dict(batch.graphs.recorded) for batch in there._kept]
    one = prompts_of((5,))
    assert_same(there.propose(one, 9), here.propose(one, 9))
    assert_same(there.propose(prompts_of((4, 7)), [8, 9]), here.propose(prompts_of((4, 7)), [8, 9]))
    assert set(there._kept) == kept
    assert len(kept) == 2
    now = [graph for batch in there._kept for graph in batch.graphs.recorded.values()]
    assert {graph for own in recorded for graph in own.values()} <= set(now)
    place.is_well()


def test_what_is_left_in_rows_that_are_not_used_has_no_part(place):
    """Such rows hold what another call left."""
    here = proposal(tiny.model())
    there = proposal(place.moved(here.model))
    there.propose(prompts_of((3, 5)), 0)
    for layer in there._kept[-1]._cache._layers:
        layer.keys[4:].fill_(50.0)
        layer.values[4:].fill_(50.0)
    assert_same(there.propose(prompts_of((6,)), 1), here.propose(prompts_of((6,)), 1))
    assert len(there._kept) == 1


@pytest.mark.parametrize("new", [1, 16])
def test_what_was_drawn_is_no_part_of_a_kept_batch(place, new):
    """Another thread may draw into it as soon as it is kept."""
    here = proposal(tiny.model(), max_new_tokens=new)
    there = proposal(place.moved(here.model), max_new_tokens=new)
    want = here.propose(BATCHES[0], 4)
    with torch.inference_mode():
        drawn = there._draw(BATCHES[0], [4])
    there.propose(BATCHES[1], 5)
    names = ("tokens", "lengths", "token_log_p", "token_log_q", "ended")
    assert_same(Candidates(**dict(zip(names, drawn, strict=True)), prefix_tokens=BATCHES[0], detokenize=list), want)


def test_one_bad_prompt_spoils_no_later_call(place):
    """Its NaN would stay in keys that a mask can't hide: 0 times NaN is NaN."""
    here = proposal(tiny.model())
    model = place.moved(here.model)
    there, spoils = proposal(model), []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, out: out * torch.inf if spoils else out)
    assert_same(there.propose([[3, 4]], 1), here.propose([[3, 4]], 1))
    spoils.append(True)
    with pytest.raises(InvalidInput, match="prefix 0: the logits behind its candidate 0"):
        there.propose([[5, 61, 9, 8]], 1)
    spoils.clear()
    assert_same(there.propose([[3, 4]], 1), here.propose([[3, 4]], 1))
    hook.remove()


def test_a_call_within_a_call_has_buffers_of_its_own(place):
    """As two threads of one proposal have."""
    here = proposal(tiny.model())
    model = place.moved(here.model)
    there, inner = proposal(model), []

    def draw_inside(*_):
        if not inner and not torch.cuda.is_current_stream_capturing():
            inner.append(None)
            inner[0] = there.propose(BATCHES[1], 5)

    there.propose(BATCHES[0], 2)
    hook = model.model.layers[0].register_forward_pre_hook(draw_inside)
    outer = there.propose(BATCHES[0], 4)
    hook.remove()
    assert_same(outer, here.propose(BATCHES[0], 4))
    assert_same(inner[0], here.propose(BATCHES[1], 5))


def test_few_batches_are_kept_and_none_where_memory_is_short(place, monkeypatch):
    monkeypatch.setattr(prompt_cache, "SMALLEST_WIDTH", 1)
    there = proposal(place.moved(tiny.model()), max_new_tokens=4)
    for length in (1, 2, 3, 4, 6):
        there.propose(prompts_of((length,)), 0)
    widths = [batch._cache._width for batch in there._kept]
    assert widths == [2, 3, 4, 6]
    there.propose(prompts_of((3,)), 0)
    assert [batch._cache._width for batch in there._kept] == [2, 4, 6, 3]
    # There is room when two of them have gone: the two used longest ago.
    alive = [weakref.ref(batch) for batch in there._kept]
    monkeypatch.setattr(drawing, "available", lambda _: 10**9 if sum(x() is not None for x in alive) <= 2 else 1000)
    there.propose(prompts_of((8,)), 0)
    assert [batch._cache._width for batch in there._kept] == [6, 3, 8]
    monkeypatch.setattr(drawing, "available", lambda _: 1000)
    there.propose(prompts_of((12,)), 0)
    assert [batch._cache._width for batch in there._kept] == [12]


def test_what_is_dropped_is_freed_at_once(place, monkeypatch):
    """Graphs, their memory and the key-value cache: not when the garbage collector comes by."""
    there = proposal(place.moved(tiny.model()))
    there.propose(BATCHES[0], 2)
    gc.collect()
    gc.disable()
    try:
        batch = there._kept[-1]
        parts = [batch, batch.graphs, batch._cache, *batch.graphs.recorded.values()]
        watched = [weakref.ref(part) for part in parts]
        del parts, batch
        monkeypatch.setattr(drawing, "KEPT", 1)
        there.propose([*BATCHES[0], [9]], 2)  # of another shape
        assert [x() for x in watched] == [None] * len(watched)
        watched = [weakref.ref(there), weakref.ref(there._kept[-1]), weakref.ref(there._kept[-1]._cache)]
        del there
        assert [x() for x in watched] == [None] * 3
    finally:
        gc.enable()


def decoder(p):
    mu = torch.tensor([3.0, -2.0, 0.01], dtype=torch.float64)
    energy = Energy(metrics.parse(["sr_2", "tr_8", "ent"]), mu, torch.zeros(3), p.settings)
    return SIRDecoder(energy, p)


def test_the_decoder_chooses_as_on_the_cpu(place):
    model = tiny.model()
    want = decoder(proposal(model))(BATCHES[0], num_samples=3, seed=5)
    got = decoder(proposal(place.moved(model)))(BATCHES[0], num_samples=3, seed=5)
    assert torch.equal(got.index.cpu(), want.index)
    assert got.tokens == want.tokens
    torch.testing.assert_close(got.weights.cpu(), want.weights, atol=1e-4, rtol=1e-4)


def test_stages_are_timed_when_the_device_has_done_them(place, monkeypatch):
    chooser = decoder(proposal(place.moved(tiny.model())))
    candidates = chooser.proposal.propose(BATCHES[0], 0)
    log, wait_for, features = [], torch.cuda.synchronize, Energy.features
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *given: log.append("waited") or wait_for(*given))
    monkeypatch.setattr(Energy, "features", lambda *given: log.append("features") or features(*given))
    select = decode.ops.sir_select
    monkeypatch.setattr(decode.ops, "sir_select", lambda *given: log.append("select") or select(*given))
    chooser.choose(candidates)
    assert log == ["waited", "features", "waited", "select", "waited"]


@pytest.mark.gpu
def test_logits_that_leave_nothing_to_draw_are_named_on_a_gpu(cuda):
    """On the CPU the operator raises. Here it marks what it drew, which no later step may take for a token."""
    p = proposal(tiny.model().to(cuda))
    p.propose(BATCHES[0], 0)
    with torch.no_grad():
        p.model.lm_head.weight.fill_(50.0)
    with pytest.raises(InvalidInput, match="prefix 0: the logits behind its candidate 0 are all -inf, or hold NaN"):
        p.propose(BATCHES[0], 0)
    with torch.no_grad():
        p.model.lm_head.weight.fill_(0.1)
    assert p.propose(BATCHES[0], 0).shape == (2, 4)


def test_what_an_operator_marked_is_named():
    p = proposal(tiny.model())
    with torch.inference_mode():
        model = Twin(p.model)
        batch = drawing._Batch(p._sampler, model, process(model, BATCHES[0]))
        batch._check_drawn(8)
        batch._log_p[3, 6] = torch.nan
        with pytest.raises(InvalidInput, match="prefix 1: the logits behind its candidate 2 are all -inf, or hold NaN"):
            batch._check_drawn(8)


# ---- every family ---------------------------------------------------------------------------------------------------

# What waits for the device in a step of theirs, so that it runs without a graph.
WAITS = {"dbrx": "nonzero", "phimoe": "_to_copy"}
SHARED = [row[1].strip() for line in conformance.TABLE.read_text(encoding="utf-8").splitlines()
          if len(row := line.split("|")) > 4 and "shared" in row[4]]  # fmt: skip


@without_cuda
@pytest.mark.parametrize("family", SHARED)
def test_a_step_of_every_family_is_legal_in_a_capture(family, monkeypatch):
    """In bfloat16: torch multiplies experts of other types one by one, as many rows each as the host must see."""
    settings = {**conformance.SETTINGS, "min_new_tokens": 4, "top_k": 5}
    refused = set()
    with warnings.catch_warnings(), make_believe.device() as fake, torch.inference_mode():
        warnings.simplefilter("ignore")
        model = make_believe.moved(families.build(family).to(torch.bfloat16))
        p, twin = TransformersProposal(model, None, eos_token_ids=conformance.EOS, **settings), Twin(model)
        monkeypatch.setitem(prompt_cache._tried, twin.model, (twin.structure, "shared", prompt_cache._sizes(twin)))
        prompts = process(twin, BATCHES[0])
        for share in (False, True):
            monkeypatch.setattr(prompt_cache, "SHARE_FROM", {"cuda": 0 if share else 10**9})
            batch = drawing._Batch(p._sampler, twin, prompts)
            batch._cache.load(twin, prompts)
            batch._running.fill_(True)
            batch._draw(prompts.logits.repeat_interleave(4, dim=0), True)
            batch._step(8, True)  # what a model makes when it first runs, it makes here
            fake.begin()
            try:
                batch._step(8, True)
            except RuntimeError as error:
                refused.add(str(error).split("capturing: ")[-1].split(" waits")[0])
            with contextlib.suppress(RuntimeError):
                fake.end()
    assert refused == ({WAITS[family]} if family in WAITS else set())
