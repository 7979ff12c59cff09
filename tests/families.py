"""A tiny random model of every class in Transformers' causal-LM mapping, made by shrinking its default config.

Sizes are found by the names of a config's fields; lists of one entry a layer are cut so that each kind of layer stays.
What this rule doesn't reach stands in `EXCEPTIONS`, each with its reason.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # model type -> name of the class

VOCABULARY = 64
CONTEXT = 64
WINDOW = 8
LAYERS = 2
MOST_LAYERS = 4
WIDTH, HEADS, HEAD = 32, 4, 8

# The first pattern that matches a field's whole name gives its value; None leaves it as it is.
SIZES: list[tuple[str, Any]] = [
    (r"(type|task_type|segment)_vocab_size|audio_vocab_size", None),
    (r"(\w+_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(max_position_embeddings|n_positions|max_seq_len|model_max_length|n_ctx|max_target_positions)", CONTEXT),
    (r"context_length|max_inference_chunksize|max_source_positions|num_position_embeddings", CONTEXT),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention(_window_len)?", WINDOW),
    (r"attention_chunk_size|keep_window_size|mem_len", WINDOW),
    (r"(mamba_)?chunk_size|block_size", 4),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|attention_hidden_size|lru_width", WIDTH),
    (r"word_embed_proj_dim|(in|out)put_embedding_size|hidden_size_global|out_hidden_size", WIDTH),
    (r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size)|dim_ff|dff|d_inner|mlp_dim|feed_forward_size", 48),
    (r"intermediate_size_mlp", 48),
    (r"(\w+_)?(num_key_value_heads|num_kv_heads|kv_n_heads)", "kv"),
    (r"(\w+_)?(num_attention_heads|attention_heads)|num_heads|n_heads?|num_query_groups|linear_num_heads", HEADS),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", HEADS),
    (r"index_n_heads", 16),
    (r"mamba_(n|num)_heads|n_mamba_heads", 2 * WIDTH // HEAD),  # of a width twice the hidden one
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"qk_head_dim", 2 * HEAD),  # one half with rotary positions
    (r"(\w+_)?head_dim|head_dim|dim_head|d_head|attention_head_size|kv_channels|mamba_d_head|mamba_headdim", HEAD),
    (r"rotary_dim", 4),
    (r"(\w+_)?lora_rank|(\w+_)?_rank|d_rel|(\w+_)?lowrank", 8),
    (r"(mamba_d_state|state_size|ssm_state_size)", 8),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_dense_experts", 4),
    (r"num_experts_per_tok(en)?|moe_(top_)?k|moe_topk|n_expert_per_tok", 2),
    (r"n_group|topk_group|num_expert_group|o_groups|(mamba_)?n_?groups", 1),
    (r"first_k_dense_replace|num_dense_layers", "at most 1"),
    (r"index_topk(_blocks)?", 4),
    (r"rel_extent", 16),
    (r"(attn|expert)_layer_period|layer_group_size|global_attn_every_n_layers|decoder_sparse_step", 2),
    (r"(attn|expert)_layer_offset", 1),
    (r"encoder_hash_byte_group_vocab", VOCABULARY),
    (r"dim_model_base", WIDTH),
    (r"query_pre_attn_scalar", HEAD),
    (r"(\w+_)?(token_id|token_index)", "id"),
    (r"initializer_range|init_std|init_method_std|initializer_std", 0.4),
]  # fmt: skip

BERTS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip
# Not the default config of a class, but what people build: name -> (model type, fields)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {f"{x}, is_decoder": (x, {"is_decoder": True}) for x in BERTS} | {
    "bloom, eager attention": ("bloom", {"attn_implementation": "eager"}),
    "deepseek_v2, plain queries": ("deepseek_v2", {"q_lora_rank": None}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "gemma2, eager attention": ("gemma2", {"attn_implementation": "eager"}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode, several heads": ("gpt_bigcode", {"multi_query": False}),
    "llama, eager attention": ("llama", {"attn_implementation": "eager"}),
    "llama, tied weights": ("llama", {"tie_word_embeddings": True}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                                  "original_max_position_embeddings": 16}}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, sliding window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1,
                                        "layer_types": ["full_attention", "sliding_attention"]}),
}  # fmt: skip
LAYER_COUNTS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks"
)
DROPOUT = re.compile(r"\w*(dropout|_pdrop|drop_rate)\w*")

INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
SWA = {"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
       "swa_head_dim": 2 * HEAD, "swa_qk_nope_head_dim": HEAD, "swa_v_head_dim": HEAD}  # fmt: skip
PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}  # of these the class wants the config of a part only

# Not built, and why
UNBUILT = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "drafts for another model, whose hidden states and keys it takes",
    "gemma4_unified_assistant": "drafts for another model, whose hidden states and keys it takes",
}

# model type -> fields (dotted where nested), and why the rule doesn't give them
EXCEPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "bamba": ({"attn_layer_indices": [1]}, "no attention by default"),
    "cohere_compass_text": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        "None by default",
    ),
    "dbrx": ({"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}, "is in checkpoints, not in the default"),
    "deepseek_v2": ({"num_experts_per_tok": 2}, "None by default"),
    "doge": ({"keep_window_size": CONTEXT}, "beyond it equal tokens tie, and which one is kept depends on the length"),
    "dots1": ({"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}, "None by default"),
    "deepseek_v4": (
        {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
        "one is 128: no prompt would reach it",
    ),
    "dots3_note": (
        {
            "vision_config.adapter_in_dim": WIDTH,
            "vision_config.adapter_out_dim": WIDTH,
            "audio_config.adapter_input_size": WIDTH,
            "audio_config.adapter_out_dim": WIDTH,
            **{f"text_config.{k}": v for k, v in SWA.items()},
        },
        "names that don't say that it is the width",
    ),
    "dots3_note_text": (SWA, "go into per_layer_config"),
    "gemma3n_text": (
        {
            "num_kv_shared_layers": 2,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [48] * 4,
        },
        "layers that share keys come behind one of their kind",
    ),
    "granitemoehybrid": ({"layer_types": ["linear_attention", "full_attention"]}, "no attention by default"),
    "hrm_text": ({"initializer_range": 0.1}, "iterates its layers: with larger weights float32 errors grow to 1e-2"),
    "hunyuan_v1_dense": ({"head_dim": HEAD}, "None by default"),
    "hunyuan_v1_moe": ({"head_dim": HEAD}, "None by default"),
    "laguna": ({"num_attention_heads_per_layer": [HEADS, HEADS]}, "a list"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "no convolution by default"),
    "lfm2_moe": ({"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}, "None by default"),
    "mamba2": ({"num_heads": 2 * WIDTH // HEAD}, "heads times their size is twice the width"),
    "ministral": ({"head_dim": HEAD}, "None by default"),
    "mllama": ({"text_config.cross_attention_layers": [1]}, "indices"),
    "nemotron": ({"num_key_value_heads": 2}, "None by default"),
    "qwen4_exp": ({f"text_config.{k}": v for k, v in INDEXER.items()}, "None by default"),
    "qwen4_exp_text": (INDEXER, "None by default"),
    "recurrent_gemma": ({"num_hidden_layers": 3}, "two recurrent layers, then attention"),
    "reformer": (
        {"is_decoder": True, "axial_pos_embds_dim": (WIDTH // 2, WIDTH // 2), "axial_pos_shape": (8, 8)},
        "refuses to be built otherwise",
    ),
    "xlstm": ({"hidden_size": 128, "embedding_dim": 128}, "its cache rounds its keys' size up to 64, its layers don't"),
    "xmod": ({"default_language": "en_XX"}, "needs one to run"),
    "zamba": (
        {
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 4,
            "initializer_range": 0.2,
            "attention_hidden_size": 2 * WIDTH,
            "attention_head_dim": 2 * WIDTH // HEADS,
        },
        "hybrid layers share weights; with larger ones float32 errors pass 1e-4",
    ),
    "zamba2": (
        {
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 4,
            "attention_hidden_size": 2 * WIDTH,
            "attention_head_dim": 2 * WIDTH // HEADS,
        },
        "hybrid layers share weights",
    ),
    "zaya": ({"num_experts_per_tok": 1}, "takes no other number"),
}


def config(family: str, **fields: Any) -> PreTrainedConfig:
    """Tiny, with these fields."""
    model_type, variant = VARIANTS.get(family, (family, {}))
    more = EXCEPTIONS.get(model_type, ({}, ""))[0] | variant | fields
    tiny = shrunk(CONFIG_MAPPING[model_type](), more)
    return getattr(tiny, PART[model_type]) if model_type in PART else tiny


def class_name(family: str) -> str:
    return FAMILIES[VARIANTS.get(family, (family, {}))[0]]


def shrunk(default: PreTrainedConfig, more: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A config of the same kind with small sizes."""
    more = dict(more or {})
    fields = {k: v for k, v in default.to_dict().items() if k not in ("per_layer_config",)}
    wanted: dict[str, Any] = {}
    counts = [k for k in fields if LAYER_COUNTS.fullmatch(k) and isinstance(fields[k], int)]
    wanted |= _layers(fields, counts)
    for name, value in fields.items():
        own = getattr(default, name, None) if isinstance(value, dict) else None
        if isinstance(own, PreTrainedConfig):
            prefix = f"{name}."
            nested = {k.removeprefix(prefix): v for k, v in more.items() if k.startswith(prefix)}
            wanted[name] = shrunk(own, nested)
        elif name not in wanted and (new := _size(name, value, fields)) is not None:
            wanted[name] = new
    wanted |= {k: v for k, v in more.items() if "." not in k}
    return type(default)(**wanted)


def _layers(fields: dict[str, Any], counts: list[str]) -> dict[str, Any]:
    """How many layers, and of lists with an entry for each layer those entries that keep one layer of each kind."""
    depth = next((fields[k] for k in counts), 0)
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == depth > MOST_LAYERS}
    lists = {k: v for k, v in lists.items() if v != list(range(depth))}  # these are indices
    kinds = list(zip(*lists.values(), strict=True)) if lists else []
    kept = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
    for i in range(len(kinds)):
        if len(kept) < LAYERS and i not in kept:
            kept = sorted([*kept, i])
    out: dict[str, Any] = dict.fromkeys(counts, len(kept) or LAYERS)
    return out | {k: [v[i] for i in kept] for k, v in lists.items()}


def _size(name: str, value: Any, fields: dict[str, Any]) -> Any:
    if isinstance(value, float) and DROPOUT.fullmatch(name):
        return 0.0
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            if isinstance(value, bool) or not isinstance(value, (int, float, list)):
                return None
            if size == "id":
                return _token(name, value)
            if size == "at most 1":
                return min(value, 1)
            if isinstance(value, list):
                return None
            if size == "kv":
                heads = next((v for k, v in fields.items() if re.fullmatch(r"num_attention_heads|n_heads?", k)), value)
                return 1 if value == 1 else HEADS // 2 if isinstance(heads, int) and value < heads else HEADS
            return size
    return None


def _token(name: str, value: Any) -> Any:
    if name in ("eos_token_id", "pad_token_id"):
        return 0
    if name == "bos_token_id":
        return 1
    return value if isinstance(value, int) and value < VOCABULARY else VOCABULARY - 1


def build(family: str, seed: int = 0, **fields: Any) -> Any:
    """The model in float32 and evaluation mode. The same weights for the same seed."""
    tiny = config(family, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            torch.manual_seed(seed)
            if family in PART:
                model = getattr(transformers, FAMILIES[family])(tiny)
            else:
                model = AutoModelForCausalLM.from_config(
                    tiny, dtype=torch.float32, attn_implementation=tiny._attn_implementation
                )
        finally:
            logging.disable(logging.NOTSET)
    _roughen(model)
    return model.eval()


@torch.no_grad()
def _roughen(model: Any) -> None:
    """Parameters that begin constant, as biases and norms do, differ: else what they do would not be seen."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter == parameter.flatten()[:1].view(())).all():
            parameter += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        # The padding token can be drawn. From an embedding of zeros all scores of an indexer tie.
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0.4 * torch.randn(module.embedding_dim)
