"""Tiny random language models of real families, and a tokenizer of a few words."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

WORDS = 60  # w0 .. w59; beside them <eos> = 0 and <unk> = 1
VOCABULARY = WORDS + 2
CONTEXT = 64

_SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
_ROPE = {
    **_SHAPE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.4,
}  # fmt: skip

FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, initializer_range=0.4)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **_SHAPE, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
            max_position_embeddings=CONTEXT, init_std=0.4,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_ROPE)),
    "llama, heads of 32": lambda: LlamaForCausalLM(LlamaConfig(**_ROPE, head_dim=32)),  # vLLM's least on a CPU
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_ROPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_ROPE, head_dim=8)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**{**_ROPE, "num_hidden_layers": 4})),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**_ROPE, sliding_window=8)),
}  # fmt: skip


def model(family: str = "llama"):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def tokenizer(words: int = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")


# Words that stand for the roles; <eos> behind each message.
TEMPLATE = """{%- for m in messages -%}
{{ {'system': 'w57', 'user': 'w58', 'assistant': 'w59'}[m['role']] + ' ' + m['content'] + '<eos> ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'w59 ' }}{%- endif -%}"""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def saved(path, family: str = "llama", chats: bool = False) -> str:
    """A folder with a model and the tokenizer."""
    model(family).save_pretrained(path)
    (chat_tokenizer() if chats else tokenizer()).save_pretrained(path)
    return str(path)


def text(length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(WORDS, (length,), generator=generator).tolist())
