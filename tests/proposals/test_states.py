"""One long-lived proposal on a model that its owner goes on using: trains, edits, adapts, moves, shares, interrupts.

After each of these, what it draws is what a new proposal on a copy of the model draws, its log-probabilities are those
of a plain pass, and the owner's model is as the owner left it.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import conformance
import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import daemon_fast
from daemon_fast import Energy, TransformersProposal, metrics
from daemon_fast.errors import DaemonFastError

DROPOUT = 0.3  # so that train mode can't go unnoticed
ROPE = {**tiny._ROPE, "attention_dropout": DROPOUT}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ROPE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**tiny._SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=tiny.CONTEXT, initializer_range=0.4,
                   attn_pdrop=DROPOUT, resid_pdrop=DROPOUT, embd_pdrop=DROPOUT)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**ROPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
                         layer_types=["sliding_attention", "full_attention"])
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**ROPE, sliding_window=8)),
}  # fmt: skip
PREFIXES = [[[5, 9, 30], [7]], [[5, 9, 30], [8, 8, 6]], [list(range(8, 20)), list(range(30, 36))]]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.5}
STEPS = 20


class World:
    """A model, its owner's doings, and the proposal that must keep up with them."""

    def __init__(self, family: str, seed: int) -> None:
        torch.manual_seed(0)
        self.model = MODELS[family]().eval()
        self.random = random.Random(seed)
        self.proposals = [self.new_proposal(self.model) for _ in range(2)]  # the second for another thread
        self.last = PREFIXES[0]
        self.hook: Any = None
        self.done: list[str] = []

    @staticmethod
    def new_proposal(model: Any) -> TransformersProposal:
        return TransformersProposal(model, None, eos_token_ids=conformance.EOS, **conformance.SETTINGS)

    # ---- what is checked

    def reference(self) -> Any:
        """A copy in evaluation mode."""
        model = copy.deepcopy(self.model).eval()
        model.gradient_checkpointing_disable()
        return model

    def may_refuse(self) -> bool:
        return self.model.training or self.model.is_gradient_checkpointing

    def check(self) -> None:
        """Candidates are right, of prompts that it may have kept and of others, and drawing them changed nothing."""
        reference = self.reference()
        before = conformance.snapshot(self.model)
        for prefixes in (self.last, self.random.choice([x for x in PREFIXES if x != self.last])):
            seed = self.random.randrange(3)
            self.last = prefixes
            fresh = self.new_proposal(copy.deepcopy(reference))
            want = fresh.propose(prefixes, seed)
            try:
                got = self.proposals[0].propose(prefixes, seed)
            except DaemonFastError:
                assert self.may_refuse()
                continue
            finally:
                changed = conformance.changes(before, conformance.snapshot(self.model))
                assert not changed, f"drawing changed {changed}"
            if self.model.dtype == torch.bfloat16 and self.proposals[0].path != fresh.path:
                continue  # where rounding is coarse, weights decide whether a trial sees two ways as one
            self.compare(got, want, "drawing again")
        error = conformance.largest_error(want, prefixes, conformance.Plain(reference))
        assert error <= TOLERANCE[self.model.dtype], f"{error:.1e} from a plain pass"

    def compare(self, got: Any, want: Any, what: str) -> None:
        worst = float((got.token_log_p - want.token_log_p).abs().max())
        same = torch.equal(got.tokens, want.tokens)
        assert same, f"{what}: other tokens than a new proposal's ({worst:.1e})"
        assert worst <= 1e-5, f"{what}: log-probabilities {worst:.1e} from a new proposal's"

    # ---- what the owner does

    def linear(self) -> tuple[nn.Module, str]:
        """One of the layers' matrices: its parent, and its name there."""
        found = [
            (parent, name)
            for path, parent in self.model.named_modules()
            for name, child in parent.named_children()
            if type(child) in (nn.Linear, Conv1D) and "lm_head" not in (path, name) and "lora" not in path
        ]
        return self.random.choice(found)

    @torch.no_grad()
    def noise(self, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        return (0.1 * torch.randn(x.shape, generator=generator)).to(x.dtype)

    def optimiser_step(self) -> None:
        ids = torch.tensor([[5, 9, 30, 7, 8, 11]])
        self.model.requires_grad_(True)  # PEFT freezes what it adapts
        optimiser = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        optimiser.step()
        optimiser.zero_grad()

    def edit_in_place(self) -> None:
        parameter = self.random.choice(list(self.model.parameters()))
        with torch.no_grad():
            if self.random.random() < 0.5:
                parameter += self.noise(parameter)
            else:  # unseen by the version counter
                parameter.data.add_(self.noise(parameter))

    def replace_data(self) -> None:
        parameter = self.random.choice(list(self.model.parameters()))
        parameter.data = parameter.data + self.noise(parameter)

    def load_state_dict(self) -> None:
        own = self.model.state_dict()
        state = {k: v + self.noise(v) if v.is_floating_point() else v for k, v in own.items()}
        self.model.load_state_dict(state, assign=self.random.random() < 0.3)

    def change_dtype(self) -> None:
        others = [d for d in TOLERANCE if d != self.model.dtype]
        self.model.to(self.random.choice(others))

    def dtype_there_and_back(self) -> None:
        before = self.model.dtype
        self.model.to(torch.bfloat16)
        self.check()
        self.model.to(before)

    def swap_submodule(self) -> None:
        parent, name = self.linear()
        new = copy.deepcopy(getattr(parent, name))
        with torch.no_grad():
            new.weight += self.noise(new.weight)
        setattr(parent, name, new)

    def toggle_hook(self) -> None:
        """An adapter as a hook."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
            return
        parent, name = self.linear()
        shift = 0.5 * random.Random(self.random.random()).choice([-1, 1])
        self.hook = getattr(parent, name).register_forward_hook(
            lambda module, inputs, out: out + shift * out.roll(1, -1)
        )

    def toggle_parametrisation(self) -> None:
        """An adapter as a parametrisation of a weight: the module's class changes."""
        for module in self.model.modules():
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                return
        parent, name = self.linear()
        module = getattr(parent, name)
        parametrize.register_parametrization(module, "weight", LowRank(self, module.weight))

    def toggle_peft(self) -> None:
        """An adapter of PEFT's, by Transformers' own methods."""
        from peft import LoraConfig

        if not getattr(self.model, "_hf_peft_config_loaded", False):
            target = ["c_attn", "c_fc"] if isinstance(self.model, GPT2LMHeadModel) else ["q_proj", "up_proj"]
            self.model.add_adapter(LoraConfig(target_modules=target, init_lora_weights=False, r=2), "a")
            self.model.eval()
            self.adapted = True
        elif self.adapted:
            self.model.disable_adapters()
            self.adapted = False
        else:
            self.model.enable_adapters()
            self.adapted = True

    def flip_training(self) -> None:
        self.model.train(not self.model.training)

    def flip_checkpointing(self) -> None:
        if self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        else:
            self.model.gradient_checkpointing_enable()

    def train_with_checkpointing(self) -> None:
        self.model.gradient_checkpointing_enable()
        self.model.train()

    def threads(self) -> None:
        """Two threads draw while a third uses the model itself."""
        prefixes, rounds = PREFIXES[:2], 3
        reference = self.reference()
        want = [self.new_proposal(copy.deepcopy(reference)).propose(p, 0) for p in prefixes]
        ids = torch.tensor([[5, 9, 30, 7, 8, 11]])
        training = self.model.training  # dropout: then only that it works
        with torch.no_grad():
            logits = copy.deepcopy(self.model)(input_ids=ids, use_cache=False).logits
        faults: list[BaseException] = []
        drawing = [True, True]

        def draw(i: int) -> None:
            try:
                for r in range(rounds):
                    which = (i + r) % len(prefixes)
                    try:
                        got = self.proposals[i].propose(prefixes[which], 0)
                    except DaemonFastError:
                        assert self.may_refuse()
                    else:
                        self.compare(got, want[which], f"thread {i}")
            except BaseException as fault:
                faults.append(fault)
            finally:
                drawing[i] = False

        def use() -> None:
            try:
                while any(drawing):
                    with torch.no_grad():
                        got = self.model(input_ids=ids, use_cache=False).logits
                    assert self.model.config._attn_implementation != "daemon_fast_candidates"
                    assert training or torch.allclose(got, logits, atol=1e-4), "a plain pass meanwhile is wrong"
            except BaseException as fault:
                faults.append(fault)

        before, interval = conformance.snapshot(self.model), sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            workers = [threading.Thread(target=draw, args=(0,)), threading.Thread(target=draw, args=(1,))]
            workers.append(threading.Thread(target=use))
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            sys.setswitchinterval(interval)
        if faults:
            raise faults[0]
        changed = conformance.changes(before, conformance.snapshot(self.model))
        assert not changed, f"left {changed} changed"

    def failure_inside(self) -> None:
        self.interrupted_by(RuntimeError("from a hook"))

    def interrupt_inside(self) -> None:
        self.interrupted_by(KeyboardInterrupt())

    def interrupted_by(self, fault: BaseException) -> None:
        """A pass of the model is cut off, at the prompt or at a later token."""
        left = self.random.randrange(3)

        def raising(module: Any, inputs: Any) -> None:
            nonlocal left
            if left == 0:
                left = -1
                raise fault
            left -= 1

        module = getattr(*self.linear())
        hook = module.register_forward_pre_hook(raising)
        before = conformance.snapshot(self.model)
        try:
            with pytest.raises(type(fault)):
                # Prompts not seen before, so that both they and the tokens behind them need passes.
                self.proposals[0].propose([[self.random.randrange(4, 60) for _ in range(5)]], self.random.randrange(99))
        except DaemonFastError:
            assert self.may_refuse()
        finally:
            changed = conformance.changes(before, conformance.snapshot(self.model))
            hook.remove()
        assert not changed, f"left {changed} changed"

    def generate(self) -> None:
        """By `generate(custom_generate=...)`, as a copy of the model does."""
        fitted = self.new_proposal(self.model).settings
        mu = torch.tensor([30.0, -40.0], dtype=torch.float64)
        energy = Energy(metrics.parse(["tr_8", "sr_1"]), mu, torch.zeros(2), fitted)
        ids = torch.tensor(self.random.choice([[[5, 9, 30]], [[5, 9, 30], [8, 8, 6]]]))
        options = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "energy": energy,
            "seed": self.random.randrange(3), "do_sample": True, "custom_generate": daemon_fast.generate,
        }  # fmt: skip
        want = self.reference().generate(**options)
        before = conformance.snapshot(self.model)
        try:
            assert torch.equal(self.model.generate(**options), want), "generate: other tokens than a copy's"
        except DaemonFastError:
            assert self.may_refuse()
        changed = conformance.changes(before, conformance.snapshot(self.model))
        assert not changed, f"generate changed {changed}"

    def nothing(self) -> None:
        """Then it only draws again."""

    def do(self, action: str) -> None:
        self.done.append(action)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                getattr(self, action)()
                self.check()
            except BaseException as fault:
                state = f"{self.model.dtype}, {'train' if self.model.training else 'eval'} mode"
                fault.add_note(f"after {', '.join(self.done)} ({state})")
                raise


class LowRank(nn.Module):
    """weight + a b"""

    def __init__(self, world: World, weight: torch.Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(3 * world.noise(weight[:, :1]))
        self.b = nn.Parameter(3 * world.noise(weight[:1]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.a @ self.b


ACTIONS: list[Callable[[World], None]] = [
    World.nothing, World.optimiser_step, World.edit_in_place, World.replace_data, World.load_state_dict,
    World.change_dtype, World.dtype_there_and_back, World.swap_submodule, World.toggle_hook,
    World.toggle_parametrisation, World.flip_training, World.flip_checkpointing,
    World.train_with_checkpointing, World.threads, World.failure_inside,
    World.interrupt_inside, World.generate,
]  # fmt: skip
if importlib.util.find_spec("peft"):
    ACTIONS.append(World.toggle_peft)
NAMES = [action.__name__ for action in ACTIONS]


@pytest.mark.parametrize("action", NAMES)
@pytest.mark.parametrize("family", MODELS)
def test_after_one_change(family, action):
    world = World(family, seed=0)
    for name in ("nothing", action):
        world.do(name)


@pytest.mark.parametrize("action", [x for x in NAMES if x.startswith(("toggle", "flip"))])
@pytest.mark.parametrize("family", MODELS)
def test_there_and_back(family, action):
    world = World(family, seed=1)
    for name in (action, "nothing", action):
        world.do(name)


@pytest.mark.parametrize("family", MODELS)
def test_after_many_changes_in_any_order(family):
    world = World(family, seed=list(MODELS).index(family))
    actions = NAMES + world.random.choices(NAMES, k=STEPS - len(NAMES))
    world.random.shuffle(actions)
    for action in actions:
        world.do(action)
