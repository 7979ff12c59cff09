"""Where models come from: GGUF files that are converted once, and what is said of what is not there."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from transformers import LlamaForCausalLM

from daemon_fast import models
from daemon_fast.errors import DeviceUnavailable, InvalidInput, ModelUnavailable
from daemon_fast.models import dequantise, load_language_model, load_tokenizer, resolve_device, weights_digest


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A file that passes for a GGUF of the tiny model, the list of its slow loads, and the cache."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("DAEMON_FAST_CACHE", str(tmp_path / "cache"))
    loads, load, load_only_tokenizer = [], models._load, models._load_tokenizer

    def from_gguf(model_id, where, options, dtype):
        if not options:
            return load(model_id, where, options, dtype)
        loads.append(model_id)
        loaded = copy.deepcopy(tiny.model())
        loaded.config.quantization_config = {"quant_method": "gguf"}
        return loaded, tiny.tokenizer()

    def tokenizer_from_gguf(model_id, where, options):
        return tiny.tokenizer() if options else load_only_tokenizer(model_id, where, options)

    monkeypatch.setattr(models, "_load", from_gguf)
    monkeypatch.setattr(models, "_load_tokenizer", tokenizer_from_gguf)
    return str(file), loads, tmp_path / "cache"


def test_a_gguf_file_is_converted_once_for_its_content(gguf, capsys):
    file, loads, cache = gguf
    made = dequantise(file)
    told = capsys.readouterr().err
    assert made in told
    assert "MB" in told
    assert dequantise(file) == made
    assert len(loads) == 1
    again = LlamaForCausalLM.from_pretrained(made)
    assert not hasattr(again.config, "quantization_config")
    assert again.dtype == torch.float32
    torch.testing.assert_close(again.state_dict(), tiny.model().state_dict(), atol=0, rtol=0)
    assert dequantise(made) == made
    os.utime(file, (0, 0))
    moved = Path(file).rename(Path(file).with_name("tiny.GGUF").with_suffix(".gguf"))
    assert dequantise(str(moved)) == made
    with open(file, "ab") as changed:
        changed.write(b"!")
    assert dequantise(file) != made
    assert len(list(cache.iterdir())) == 2


def test_model_and_tokenizer_come_from_the_converted_file(gguf):
    file, loads, _ = gguf
    for _ in range(2):
        model, tokenizer = load_language_model(file, "cpu", torch.bfloat16)
        assert model.dtype == torch.bfloat16
        assert not model.training
        assert tokenizer.get_vocab() == load_tokenizer(file).get_vocab() == tiny.tokenizer().get_vocab()
    assert len(loads) == 1


def test_nothing_is_kept_if_so_asked(gguf, monkeypatch):
    file, loads, cache = gguf
    monkeypatch.setenv("DAEMON_FAST_CACHE", "off")
    load_language_model(file, "cpu")
    load_language_model(file, "cpu")
    assert len(loads) == 2
    assert not cache.exists()


def test_a_cache_that_can_not_be_written_only_warns(gguf, monkeypatch):
    file, loads, cache = gguf
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", Mock(side_effect=OSError("disk full")))
    with pytest.warns(UserWarning, match=r"can't be kept in converted form \(disk full\): it loads slowly"):
        load_language_model(file, "cpu")
    assert len(loads) == 2
    assert not list(cache.iterdir())


def test_what_is_half_converted_is_not_there(gguf, monkeypatch):
    file, loads, cache = gguf
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", Mock(side_effect=OSError("disk full")))
        with pytest.raises(ModelUnavailable, match="disk full"):
            dequantise(file)
    assert not list(cache.iterdir())
    load = models._load

    def slow_load(*arguments):
        if len(loads) == 1:
            loads.append(file)
            dequantise(file)  # another process, which is faster
        return load(*arguments)

    monkeypatch.setattr(models, "_load", slow_load)
    assert os.path.isfile(os.path.join(dequantise(file), "model.safetensors"))
    assert len(loads) == 4
    assert len(list(cache.iterdir())) == 1


def test_what_is_not_there_is_named():
    with pytest.raises(ModelUnavailable, match=r"model '/none.gguf': no such file"):
        load_language_model("/none.gguf")
    with pytest.raises(ModelUnavailable, match=r"model './none': no such folder"):
        load_language_model("./none")
    with pytest.raises(InvalidInput, match="device 'gpu' is none that torch knows"):
        resolve_device("gpu")
    with pytest.raises(DeviceUnavailable, match="device 'meta' was asked for, but can't be used"):
        resolve_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailable, match="sees no GPU"):
            resolve_device("cuda")


def test_a_digest_of_weights_is_that_of_the_weights(tmp_path):
    model = tiny.model()
    own = weights_digest(model)
    for folder in ("a", "b"):  # another process and another place
        tiny.saved(tmp_path / folder)
        code = (
            "import sys; from daemon_fast.models import *; print(weights_digest(load_language_model(sys.argv[1])[0]))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / folder)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == own
    assert weights_digest(torch.compile(model)) == own
    seen = {own, weights_digest(copy.deepcopy(model).bfloat16())}
    for name, weights in model.state_dict().items():
        changed = copy.deepcopy(model)
        last = changed.state_dict()[name].view(-1)[-1:]
        last.copy_(torch.nextafter(last, torch.full_like(last, torch.inf)))  # of one weight the last bit
        seen.add(weights_digest(changed))
        if weights.ndim > 1 and weights.numel() % 2048 == 0:
            halves = changed.state_dict()[name].view(2, -1)
            halves.copy_(halves.flip(0).clone())  # the same values elsewhere
            seen.add(weights_digest(changed))
    swapped = sum(w.ndim > 1 and w.numel() % 2048 == 0 for w in model.state_dict().values())
    assert len(seen) == 2 + len(model.state_dict()) + swapped


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_any_type_and_size_have_a_digest(dtype):
    for size in (0, 1, 7, 8191, 8192, 8193, 20_001):
        module = torch.nn.Module()
        values = torch.arange(size + 1).to(torch.float32).remainder(2)
        module.register_buffer("plain", values[:-1].clone().to(dtype))
        one = weights_digest(module)
        module.plain = values.to(dtype)[:-1]
        assert weights_digest(module) == one
        module.plain = torch.cat([torch.zeros(1), values[:-1]]).to(dtype)[1:]  # begins between two words of 8 bytes
        assert weights_digest(module) == one
        if size:
            module.plain = torch.cat([torch.ones(1), values[1:-1]]).to(dtype)
            assert weights_digest(module) != one
    assert weights_digest(torch.nn.Linear(3, 4, device="meta")) == weights_digest(torch.nn.Linear(3, 4, device="meta"))
