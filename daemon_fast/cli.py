"""The command line: fit, generate, decode, serve, evaluate, metrics, doctor, demo."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource
from click.shell_completion import get_completion_class

from daemon_fast.embedded import EXCHANGES, MODELS, check_model
from daemon_fast.errors import DaemonFastError, DataError, InvalidInput, ModelUnavailable, Problems, SeveralProblems

if TYPE_CHECKING:
    from daemon_fast.data.formats import Format
    from daemon_fast.data.records import Item
    from daemon_fast.decode import SIRDecoder
    from daemon_fast.proposals.load import EngineSpec


# Of `daemon_fast.experiments.studies.STUDIES`, whose import takes seconds.
STUDIES = (
    "alignment", "perplexity", "convergence", "one_metric", "temperatures", "ablation", "forward_kl", "tail",
    "transfer",
)  # fmt: skip


RESUMES = "daemon_fast.resumes"  # whether the command that runs goes on, started again, from where it stopped


class _Command(click.Command):
    """Every command has these two."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params += [
            click.Option(
                ["--quiet", "-q"], is_flag=True, expose_value=False, callback=_quiet,
                help="Results and errors only: no progress, no warnings.",
            ),
            click.Option(
                ["--verbose", "-v"], is_flag=True, expose_value=False, callback=_verbose,
                help="Also what libraries log, and where in the code an error arose.",
            ),
        ]  # fmt: skip


def _quiet(context: click.Context, _option: click.Parameter, chosen: bool) -> None:
    if chosen:
        os.environ["TQDM_DISABLE"] = "1"
        context.call_on_close(lambda: os.environ.pop("TQDM_DISABLE"))
        warnings.simplefilter("ignore")


def _verbose(context: click.Context, _option: click.Parameter, chosen: bool) -> None:
    context.find_root().obj = chosen


class _Commands(click.Group):
    """Expected errors end in a line each and exit code 2, never in a traceback; a run that was cut off says so."""

    command_class = _Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _output_errors(ctx):  # of --help and --version
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _output_errors(ctx):
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # a full disk shows here, and not when Python ends
        except DaemonFastError as error:
            _fail(ctx, *(error.problems if isinstance(error, SeveralProblems) else [error]))
        except MemoryError as error:
            _fail(ctx, f"there is not enough memory: {error or 'none is left'}")
        except RuntimeError as error:
            if not any(
                words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory")
            ):
                raise
            _fail(ctx, f"there is not enough memory: {str(error).splitlines()[0]}")
        except KeyboardInterrupt:
            goes_on = "; run the same command again to go on from here" if RESUMES in ctx.meta else ""
            click.echo(f"interrupted{goes_on}", err=True)
            sys.exit(130)


@contextmanager
def _output_errors(context: click.Context) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        _drop_stdout()
        if error.errno == errno.EPIPE:  # who read it, head, say, has enough
            sys.exit(141)
        _fail(context, "standard output can't be written: the disk is full")


def _fail(context: click.Context, *problems: object) -> NoReturn:
    if context.find_root().obj:
        traceback.print_exc()
    for problem in problems:
        click.echo(f"Error: {' '.join(str(problem).split())}", err=True)
    sys.exit(2)


def _resumes() -> None:
    click.get_current_context().meta[RESUMES] = True


def _drop_stdout() -> None:
    """What is still buffered can't be written: Python must not try again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _AllProblems(_Command):
    """Goes on where an option has a bad value, so that the command reports it together with all else that is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in self.params:
            option.__class__ = _OptionOrDefault  # those that commands share, too

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = Problems()
        return super().parse_args(ctx, args)


class _OptionOrDefault(click.Option):
    """Adds what is wrong with its value to the problems, and has its default then, to check the others with."""

    def handle_parse_result(self, ctx: click.Context, opts: Any, args: list[str]) -> tuple[Any, list[str]]:
        try:
            return super().handle_parse_result(ctx, opts, args)
        except (click.BadParameter, InvalidInput) as error:
            message = error.format_message() if isinstance(error, click.BadParameter) else str(error)
            ctx.obj.found.append(InvalidInput(message))
            return super().handle_parse_result(ctx, {}, args)


class _Text(click.types.StringParamType):
    """In UTF-8, whatever the locale is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from daemon_fast.files import as_text

        return as_text(super().convert(value, param, ctx))


TEXT = _Text()


def _shared(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


weights_options = _shared(
    click.option("--device", help="Such as cpu or cuda:0.  [default: a GPU if there is one]"),
    click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", help="Of weights."
    ),
)
model_options = _shared(
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of all random draws."),
    click.option("--batch-size", type=click.IntRange(1), default=4, help="Prefixes drawn together."),
    weights_options,
)
engine_options = _shared(
    click.option(
        "--engine", "engine_name", default="transformers", metavar="NAME",
        help="What draws: transformers, vllm, or the address of an OpenAI-compatible server, http://host:8000/v1.",
    ),
    click.option(
        "--engine-args", metavar="JSON",
        help="""For vLLM, such as '{"tensor_parallel_size": 2}', see its LLM class; for a server, '{"timeout": 60}'.""",
    ),
    click.option("--served-model", help="The server's name for the model.  [default: the only one that it serves]"),
)  # fmt: skip
format_option = click.option(
    "--format", "format_", type=click.Choice(["json", "text", "parquet"]), help="Of files whose names don't tell."
)
data_option = _shared(
    click.option(
        "--field", type=TEXT, default="text", help="Of each record: its text; meta.title for one within others."
    ),
    format_option,
)
field_options = _shared(
    click.option(
        "--prompt-field", type=TEXT, metavar="NAME",
        help="Read prompts and responses, not texts. Of each record: its prompt, a text or a chat; or a chat whose "
        "last message is the response.",
    ),
    click.option(
        "--response-field", type=TEXT, metavar="NAME",
        help="Of each record: its response.  [default: response or completion]",
    ),
)  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Overwrite an output that is there.")


@click.group(
    cls=_Commands,
    context_settings={"max_content_width": 120, "show_default": True, "help_option_names": ["-h", "--help"]},
    epilog="""\b
    Metrics: sr_<n>, tr_<w>, div, ent, coh, nats, length, ended.
    Files in: .jsonl, .ndjson, .json, .txt (these also with .gz or .zst), .parquet; a folder, a pattern, or -.
    Files out: .jsonl, .ndjson (these also with .gz or .zst), .parquet, or -.
    Completion of what you type: eval "$(daemon-fast completion bash)".""",
)
@click.version_option(package_name="daemon-fast")
def main() -> None:
    """Decode language models so that expected metrics equal those of human text (DAEMON, arXiv 2310.01041)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a text, or a file's name, that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def _engine(
    name: str, arguments: str | None, served_model: str | None, model_id: str, device: str | None, dtype: str,
    of_servers: dict[str, Any] | None = None,
) -> EngineSpec:  # fmt: skip
    """`of_servers` : what a server's --engine-args have unless they say otherwise."""
    check_model(model_id)  # before torch and Transformers are imported: at once
    from daemon_fast.proposals.load import EngineSpec

    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"--engine-args is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidInput(f"--engine-args = {arguments} must be a JSON object")
    if served_model is not None:
        parsed["served_model"] = served_model
    if of_servers is not None and name.startswith(("http://", "https://")):
        parsed = of_servers | parsed
    return EngineSpec(name, model_id, device, dtype, parsed)


def _quiet_transformers() -> None:
    if click.get_current_context().find_root().obj:  # --verbose
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@main.command(cls=_AllProblems)
@click.option("--model", default="smollm2-135m-instruct", help="Hugging Face id, folder or GGUF file.")
@click.option(
    "--data",
    default="wikipedia",
    help="Human text: files, or wikipedia, news; or encyclopedia, prompts with responses.",
)
@data_option
@field_options
@click.option(
    "--chat/--no-chat", default=None,
    help="Whether a prompt that is a text is a user's message, in the tokenizer's chat template.  [default: if it has "
    "one]",
)  # fmt: skip
@click.option(
    "--metrics", "names",
    help="Comma-separated.  [default: sr_2 to sr_4, tr_8, tr_16, tr_32, coh, nats; of responses also length, ended]",
)  # fmt: skip
@click.option("--encoder", default="all-minilm-l6-v2", help="Sentence encoder for coh.")
@click.option("--num-prefixes", default=96)
@click.option("--num-targets", type=int, help="Human texts for the targets.  [default: one per prefix]")
@click.option("--prefix-tokens", default=32, help="Where texts are cut.")
@click.option("--new-tokens", default=64, help="Of every continuation; of a response at most.")
@click.option(
    "--min-new-tokens", type=int, help="Of a response; shorter ones are left out.  [default: 0; of texts: --new-tokens]"
)
@click.option("--num-candidates", default=25, help="M, per prefix.")
@click.option("--temperature", default=0.97)
@click.option("--top-k", default=0, help="0: all.")
@click.option("--top-p", default=1.0)
@click.option("--normalization", type=click.Choice(["per_prefix", "global"]), default="per_prefix")
@click.option("--draw", type=click.Choice(["race", "sir"]), default="sir", help="What chooses among candidates.")
@click.option("--base", type=click.Choice(["proposal", "model"]), default="proposal", help="What is tilted.")
@click.option(
    "--spread", metavar="NAMES", default="", callback=lambda _context, _option, value: _listed(value),
    help="Comma-separated metrics whose squares and products are to have human means, too.",
)  # fmt: skip
@click.option(
    "--ridge", default="cv", callback=lambda _context, _option, value: _ridge(value),
    help="Penalty on mu. 0: targets are met exactly on these prefixes; cv: cross-validation chooses.",
)  # fmt: skip
@click.option("--bootstrap", default=0, help="Replicates for intervals of mu.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="For candidates.  [default: OUTPUT.candidates]")
@click.option("--output", type=click.Path(path_type=Path), default="energy.json")
@force_option
@engine_options
@model_options
@click.pass_obj
def fit(
    problems: Problems, /, names: str | None, data: str, field: str, format_: Format | None, prompt_field: str | None,
    response_field: str | None, output: Path, force: bool, work_dir: Path | None, engine_name: str,
    engine_args: str | None, served_model: str | None, model: str, device: str | None, dtype: str, new_tokens: int,
    min_new_tokens: int | None, num_candidates: int, temperature: float, top_k: int, top_p: float, encoder: str,
    **options: Any,
) -> None:  # fmt: skip
    """Fit mu: make a model's expected metrics equal those of human text. Interrupted, it resumes, unless
    --data came by a pipe.

    Texts are cut: the model goes on from their first tokens, as far as they do. With --prompt-field it answers
    prompts, and answers end by themselves:

    \b
    daemon-fast fit --data texts.jsonl --field text
    daemon-fast fit --data pairs.jsonl --prompt-field prompt --response-field response
    daemon-fast fit --data chats.jsonl --prompt-field messages

    Candidates are kept and serve again, with --force, too: those of other weights, settings or texts are refused.

    The exit code is 1 if records of --data were left out, targets were not met, or candidates leave next to no choice:
    warnings say which. All that is wrong with the arguments is told at once, before anything is drawn.
    """
    from daemon_fast.data.exchanges import Exchanges, read_exchanges
    from daemon_fast.data.texts import Texts, read_texts
    from daemon_fast.files import check_folder, check_writable

    if data != "-":
        _resumes()
    texts: Texts | Exchanges = Texts()
    tokenizer, engine, responses = None, None, prompt_field is not None or data in EXCHANGES
    with problems:
        check_writable(output, force)
    with problems:
        if work_dir is None and os.path.lexists(_candidates_of(output)):
            check_folder(_candidates_of(output))
    with problems:
        if responses:
            texts = read_exchanges(data, prompt_field, response_field, format_)
        elif response_field is not None:
            raise InvalidInput(f"--response-field = {response_field!r} needs --prompt-field")
        else:
            texts = read_texts(data, field, format_)
    model, encoder = _for_everywhere(model), _for_everywhere(encoder)  # the artefact names them
    with problems:
        check_model(model)
    no_model = any(isinstance(problem, ModelUnavailable) for problem in problems.found)
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    # A mistyped name alone is told at once: what checks the other options imports torch and Transformers.
    if no_model and given <= {"model", "data", "field", "format_", "prompt_field", "response_field", "output", "force"}:
        problems.report()
    from daemon_fast.fit.from_texts import fit_energy, is_low, prepare
    from daemon_fast.models import load_tokenizer, resolve_device
    from daemon_fast.proposals.base import ProposalSettings

    _quiet_transformers()
    listed = None if names is None else _listed(names)
    if min_new_tokens is None:
        min_new_tokens = 0 if responses else new_tokens
    sampling: dict[str, Any] = {
        "num_candidates": num_candidates, "max_new_tokens": new_tokens, "min_new_tokens": min_new_tokens,
        "temperature": temperature, "top_k": top_k, "top_p": top_p,
    }  # fmt: skip
    with problems:
        engine = _engine(engine_name, engine_args, served_model, model, device, dtype)
    with problems:
        tokenizer = load_tokenizer(model)
    with problems:
        resolve_device(device)
    with problems:
        ProposalSettings(model, "", **sampling)
    # Candidates beside OUTPUT can be written where OUTPUT can.
    plan = prepare(
        problems, texts or None, tokenizer, listed, num_candidates, new_tokens, min_new_tokens, encoder=encoder,
        directory=work_dir, **options,
    )  # fmt: skip
    assert engine is not None
    proposal = engine.proposal(**sampling)
    if responses:  # now the model says, too, which prompts it can answer
        plan = prepare(
            Problems(), texts, tokenizer, plan.metrics, num_candidates, new_tokens, min_new_tokens, encoder=encoder,
            directory=work_dir, check=proposal.tokenize, **options,
        )  # fmt: skip
    energy = fit_energy(proposal, plan.human, plan.metrics, directory=work_dir or _candidates_of(output), **options)
    energy.save(output)
    found = energy.diagnostics
    assert found is not None
    click.echo(f"{'metric':>8} {'target':>12} {'mu':>12} {'residual':>12}")
    for name, target, mu, residual in zip(energy.names, energy.targets, energy.mu, found.residual, strict=True):
        click.echo(f"{name:>8} {target:12.6g} {mu:12.6g} {residual:12.2g}")
    click.echo(
        f"ridge {found.ridge:g}; {found.iterations} steps; effective sample size {found.ess_mean:.1f} of "
        f"{num_candidates} on average, {found.ess_min:.1f} at least; KL(p_mu || p_theta) {found.kl:.3f} nats; "
        f"written to {output}"
    )
    # Warnings have named them.
    sys.exit(1 if texts.problems or plan.human.left_out or found.unmet or is_low(found.ess_mean, num_candidates) else 0)


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _ridge(text: str) -> float | str:
    try:
        if text == "cv" or 0 <= float(text) < math.inf:
            return text if text == "cv" else float(text)
    except ValueError:
        pass
    raise InvalidInput(f"--ridge = {text!r} must be a number >= 0, or cv")


def _for_everywhere(name: str) -> str:
    """A file's or folder's name that holds in other folders, too; an id or an embedded name as it is."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if name not in MODELS and path.exists() else name


def _candidates_of(artefact: Path) -> Path:
    return Path(f"{artefact}.candidates")


@main.command()
@click.option("--energy", "path", type=click.Path(path_type=Path), required=True, help="Artefact written by fit.")
@click.option(
    "--prompt",
    "prompts",
    type=TEXT,
    multiple=True,
    help="Text to continue; of an artefact that was fitted to chats, a user's message. May be repeated.",
)
@click.option("--message", "messages", type=TEXT, multiple=True, help="A user's message, to answer. May be repeated.")
@click.option("--model", help="Instead of the one in the artefact.")
@click.option("--num-samples", type=click.IntRange(1), default=1, help="Per prompt.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt, with weights and metrics.")
@engine_options
@model_options
def generate(
    path: Path, prompts: tuple[str, ...], messages: tuple[str, ...], num_samples: int, as_json: bool, seed: int,
    batch_size: int, **options: Any,
) -> None:  # fmt: skip
    """Continue prompts, or answer messages, with a fitted artefact. For files of them, see decode."""
    if not prompts and not messages:
        raise click.UsageError("Missing option '--prompt' or '--message'.")
    from daemon_fast.prompts import user
    from daemon_fast.proposals.base import Prefix

    _quiet_transformers()
    decoder = _decoder(path, batch_size, **options)
    given: list[Prefix] = [*prompts, *map(user, messages)]
    decoded = decoder(given, num_samples=num_samples, seed=seed, progress=len(given) > batch_size)
    names = decoder.energy.names
    for i, (prompt, chosen) in enumerate(zip((*prompts, *messages), decoded.texts, strict=True)):
        is_answer = i >= len(prompts) or decoder.energy.chat_template is not None
        if as_json:
            record = {
                "prompt": prompt,
                "texts": chosen,
                "ess": float(decoded.ess[i]),
                "log_z": float(decoded.log_z[i]),
                "metrics": [dict(zip(names, row, strict=True)) for row in decoded.features[i].tolist()],
            }
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            for text in chosen:
                click.echo(f"{'' if is_answer else prompt}{text}\n")


def _decoder(
    path: Path, batch_size: int, engine_name: str, engine_args: str | None, served_model: str | None,
    model: str | None, device: str | None, dtype: str, of_servers: dict[str, Any] | None = None,
) -> SIRDecoder:  # fmt: skip
    from daemon_fast.decode import SIRDecoder
    from daemon_fast.energy import Energy

    energy = Energy.load(path)
    fitted = energy.proposal_settings
    name = fitted.model_id if model is None else _for_everywhere(model)
    with _model_of(path, model):
        engine = _engine(engine_name, engine_args, served_model, name, device, dtype, of_servers)
        proposal = engine.proposal(**fitted.sampling())
    return SIRDecoder(energy, proposal, batch_size)


@contextmanager
def _model_of(artefact: Path, given: str | None) -> Iterator[None]:
    """Adds to an error where the name of the model comes from, if `--model` has not given it."""
    try:
        yield
    except ModelUnavailable as error:
        if given is not None:
            raise
        raise ModelUnavailable(f"{error}. The artefact {artefact} names it: --model says where it is now") from error


@main.command()
@click.argument("source", metavar="INPUT")
@click.argument("output", type=click.Path(allow_dash=True))
@click.option("--energy", "path", type=click.Path(path_type=Path), required=True, help="Artefact written by fit.")
@click.option(
    "--field",
    "--prompt-field",
    "field",
    type=TEXT,
    default="text",
    help="Of each record: its text; meta.title for one within others; or a chat, of which a last message of the "
    "assistant's is left out.",
)
@format_option
@click.option("--model", help="Instead of the one in the artefact.")
@click.option("--num-samples", type=click.IntRange(1), default=1, help="Per record.")
@force_option
@engine_options
@model_options
def decode(
    source: str, output: str, path: Path, field: str, format_: Format | None, num_samples: int, force: bool, seed: int,
    batch_size: int, **options: Any,
) -> None:  # fmt: skip
    """Continue the text of each record of INPUT, or answer its chat, to OUTPUT.

    Where the artefact was fitted to chats, a text is a user's message.

    INPUT is a file, a folder, a pattern in quotes, or - for standard input: .jsonl or .ndjson (an object a line), .json
    (an array, or lines), .txt (a text a line), each also with .gz or .zst; or .parquet. OUTPUT is .jsonl or .ndjson,
    also with .gz or .zst; .parquet; or - for standard output.

    Each record keeps its fields, and gets one more, "daemon": texts, metrics, ess, log_z; or error, if it can't be
    used: then the exit code is 1. Records keep their order. Files of any size; interrupted, it resumes, to the same
    bytes, where both INPUT and OUTPUT are files. INPUT must stay as it is meanwhile. From Parquet to Parquet, columns
    keep their types.
    """
    from daemon_fast.data.formats import find_sources, output_format
    from daemon_fast.files import check_folder, check_writable

    # Known before a model is loaded: `process` finds out again, with all that it takes to read them.
    sources = find_sources(source, format_, output)
    output_format(output)
    from daemon_fast.data.records import DecodeWork, parts_of, process

    if output != "-":
        check_writable(output, force)
        check_folder(parts_of(output))
        if all(one.path is not None and one.path.is_file() for one in sources):  # what came by a pipe has gone
            _resumes()
    from daemon_fast.data.collect import weights_of

    _quiet_transformers()
    decoder = _decoder(path, batch_size, **options)
    energy = json.loads(path.read_text(encoding="utf-8"))
    used = {"energy": energy, "num_samples": num_samples, "seed": seed, "batch_size": batch_size}
    used |= {name: options[name] for name in ("model", "dtype", "engine_name", "engine_args", "served_model")}
    used |= weights_of(decoder.proposal)
    summary = process(
        source, output, DecodeWork(decoder, num_samples, seed), used, field, chunk_size=batch_size,
        description="decode", format=format_, force=force,
    )  # fmt: skip
    done = f"{summary.records - len(summary.errors)} of {summary.records} records continued"
    click.echo(f"{done}; written to {'standard output' if output == '-' else output}", err=output == "-")
    for problem in summary.errors[:10]:
        click.echo(problem, err=True)
    if more := len(summary.errors[10:]):
        click.echo(f"and {more} more", err=True)
    sys.exit(1 if summary.errors else 0)


@main.command()
@click.option("--energy", "path", type=click.Path(path_type=Path), required=True, help="Artefact written by fit.")
@click.option("--model", help="Instead of the one in the artefact.")
@click.option("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for all of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8001, help="0: any that is free.")
@click.option(
    "--batch-size", type=click.IntRange(1),
    help="Prompts drawn together; of a server: requests to it at a time.  [default: 8; of a server: 64]",
)  # fmt: skip
@click.option("--max-waiting", type=click.IntRange(1), default=256, help="Prompts that wait; past it, 429.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0, help="Seconds for a reply.")
@click.option(
    "--api-key", envvar="DAEMON_FAST_API_KEY", show_envvar=True, help="That clients must send.  [default: none]"
)
@engine_options
@weights_options
def serve(
    path: Path, host: str, port: int, batch_size: int | None, max_waiting: int, timeout: float, api_key: str | None,
    engine_name: str, engine_args: str | None, **options: Any,
) -> None:  # fmt: skip
    """Serve a fitted artefact to clients of the OpenAI protocol: completions and chats, of any engine.

    Each prompt's candidates are drawn and weighed as the artefact was fitted; max_tokens and stop are cut from the text
    that was chosen. Replies tell weights, effective sample size, log Z and metrics under "daemon". What would draw from
    another distribution (temperature, logit_bias, ...) is refused by name. Embedded engines draw the prompts that wait
    together as one batch.

    SIGTERM and Ctrl-C end it when what was asked for before is answered.
    """
    from daemon_fast.errors import require

    for module in ("openai", "prometheus_client", "starlette", "uvicorn"):
        require(module, "serve needs", "'daemon-fast[serve]'")
    from daemon_fast.serving import app

    _quiet_transformers()
    behind = engine_name.startswith(("http://", "https://"))
    # A server that hangs must not hold its thread for longer than a client waits.
    waits = {"timeout": timeout, "max_retries": 2}
    size = batch_size or (64 if behind else 8)
    decoder = _decoder(path, size, engine_name, engine_args, **options, of_servers=waits)
    settings = decoder.proposal.settings
    own = Path(settings.model_id).name if os.path.exists(settings.model_id) else settings.model_id
    names = list(dict.fromkeys([getattr(decoder.proposal, "served_model", own), own]))  # clients go on as before
    if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
        warnings.warn(f"whoever reaches {host} can use this server: --api-key is not set", stacklevel=1)
    listening = app.listen(host, port)
    at = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
    click.echo(f"serving {names[0]} at {at}: {settings.num_candidates} candidates a prompt; Ctrl-C ends")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        app.serve(app.make_app(decoder, behind, names, app.Limits(max_waiting, timeout, api_key)), listening, timeout)


@main.command()
@click.argument("file")
@data_option
@click.option(
    "--id-field", type=TEXT, metavar="NAME", help="Field of a record that --json repeats as its id.  [default: id]"
)
@click.option(
    "--unit",
    type=click.Choice(["word", "character"]),
    default="word",
    help="What is counted: words between white space; or, where text has none, what a reader takes for one character.",
)
@click.option("--tokenizer", help="Count its tokens, special ones left out: Hugging Face id, folder or GGUF file.")
@click.option("--ngrams", default="2,3,4", help="n of each sr_n.")
@click.option("--windows", default="8,16,32", help="w of each tr_w.")
@click.option("--gopher", is_flag=True, help="Also the fractions of Gopher's repetition rules.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a record instead of the means.")
@click.option("--filter", "condition", metavar="CONDITION", help="Write the records that meet it instead of the means.")
@click.option("--output", type=click.Path(path_type=Path), help="For --json or --filter.  [default: -]")
@force_option
def metrics(
    file: str, field: str, format_: Format | None, id_field: str | None, unit: str, tokenizer: str | None, ngrams: str,
    windows: str, gopher: bool, as_json: bool, condition: str | None, output: Path | None, force: bool,
) -> None:  # fmt: skip
    """Repetition metrics of each text of FILE, a folder, a pattern, or - for standard input, without a model.

    \b
    sr_n   n-grams that occurred before in the text, of all its n-grams; 0 if it is shorter than n
    tr_w   tokens that occur among the w before them
    --gopher adds what the rules of Gopher limit, as datatrove has them: shares of the text's characters in
    repeated paragraphs (dup_para_char_frac), lines (dup_line_char_frac) and words (duplicated_5_n_grams to
    duplicated_10_n_grams) and in the most frequent n-gram (top_2_gram to top_4_gram); shares of paragraphs
    and lines themselves (dup_para_frac, dup_line_frac); and gopher_violations, how many exceed their limit.
    Its words are runs of letters and digits, or single other characters; with --unit character, characters.

    By default prints their means over the texts that are not empty, and distinct_n: of the n-grams of all texts taken
    together those that are distinct. That takes about 70 bytes a token; the rest any size of FILE.

    --json writes an object for each record, in order: its "source", the file, by its path in a folder or from a
    pattern on; its "line", "row" (of Parquet) or "element" (of an array), from 1; its "id"; and its metrics. Of an
    empty text they are null, and "empty" is true. A record that can't be used has an "error" in their place.

    --filter writes the records for which CONDITION holds, as they were read, one of JSON a line: such as
    "sr_4 <= 0.2 and (tr_8 < 0.5 or gopher_violations == 0)". Metrics that it names are measured. Empty texts never
    pass, nor do records that can't be used.

    The exit code is 1 if a record can't be used.
    """
    from daemon_fast.data.formats import output_format
    from daemon_fast.files import check_writable
    from daemon_fast.filters import parse_filter
    from daemon_fast.progress import progress
    from daemon_fast.text_metrics import DistinctNGrams, Summary, TextMetrics, measure_records

    problems = Problems()
    with problems:
        if as_json and condition is not None:
            raise InvalidInput("--json and --filter both say what is written: give one of them")
        if output is not None and not as_json and condition is None:
            raise InvalidInput(f"--output = {str(output)!r} needs --json or --filter: the means go to standard output")
    if output is not None and str(output) == "-":
        output = None
    with problems:
        if output is not None:
            output_format(output, lines=True)
            check_writable(output, force)
    with problems:
        if tokenizer is not None and unit == "character":
            raise InvalidInput("--tokenizer and --unit character both say what is counted: give one of them")
    sizes: list[list[int]] = []
    for text, option in ((ngrams, "--ngrams"), (windows, "--windows")):
        with problems:
            sizes.append(_sizes(text, option))
    with problems:
        if sizes == [[], []] and not gopher:
            raise InvalidInput("no metrics: --ngrams and --windows are empty, and there is no --gopher")
    wanted = None
    with problems:
        wanted = None if condition is None else parse_filter(condition)
    problems.report()
    if tokenizer is not None:
        _quiet_transformers()
    if wanted is not None:
        measure = TextMetrics.named(wanted.names, unit, tokenizer)
    else:
        measure = TextMetrics(sizes[0], sizes[1], unit, tokenizer, gopher)
    distinct = DistinctNGrams()
    if not as_json and wanted is None:
        measure.distinct = distinct
    summary, written = Summary(), 0
    rows_on_screen = (as_json or wanted is not None) and output is None and sys.stdout.isatty()
    bar = progress(desc="metrics", unit="record", delay=2.0, disable=rows_on_screen)
    with _binary(output) as sink, bar:
        for batch in measure_records(_items(file, field, format_, output), measure):
            bar.update(len(batch.items))
            summary.add(batch)
            lines = batch.rows(id_field) if as_json else () if wanted is None else batch.passing(wanted)
            for line in lines:
                sink.write(f"{line}\n".encode())
                written += 1
    if not summary.records or (not as_json and wanted is None and not summary.texts):
        raise DataError(f"{file} holds no text" + (f": {summary.problems[0]}" if summary.problems else ""))
    for problem in summary.problems:
        click.echo(problem, err=True)
    if more := summary.unusable - len(summary.problems):
        click.echo(f"and {more} more", err=True)
    if summary.dense:
        click.echo(
            f"warning: {summary.dense} of {summary.texts} texts have more than 12 characters a word, as text without "
            "spaces has, whose words say little: give --unit character, or --tokenizer",
            err=True,
        )
    found = f"{summary.texts} texts, {summary.empty} empty, {summary.unusable} unusable"
    if wanted is not None:
        click.echo(f"{written} of {summary.records} records pass ({found})", err=True)
    elif not as_json:
        click.echo(f"{found}; means x100, standard error over texts")
        for name, mean, error in zip(measure.names, summary.mean, summary.standard_error, strict=True):
            scale = 1 if name == "gopher_violations" else 100
            click.echo(f"{name:>21} {scale * mean:8.3f}" + (f" ± {scale * error:.3f}" if summary.texts > 1 else ""))
        click.echo("of all texts together, x100")
        for n, (different, total) in zip(measure.ngrams, distinct.counts(measure.ngrams), strict=True):
            share = f"{100 * different / total:8.3f}" if total else "       -"
            click.echo(f"{f'distinct_{n}':>21} {share}   {different} of {total}")
    sys.exit(1 if summary.unusable else 0)


def _items(file: str, field: str, format_: Format | None, output: Path | None) -> Iterator[Item]:
    """Records of files, or texts of an embedded collection."""
    from daemon_fast.data import records
    from daemon_fast.data.texts import read_texts
    from daemon_fast.embedded import TEXTS

    if file not in TEXTS:
        yield from records.read_records(file, field, format=format_, output=output)
        return
    for number, text in enumerate(read_texts(file), 1):
        yield records.Item({field: text}, text, None, file, number)


@contextmanager
def _binary(path: Path | None) -> Iterator[IO[bytes]]:
    """Standard output, or a file that appears when it is whole, packed as its name says."""
    from daemon_fast.data.formats import compressed
    from daemon_fast.files import replacing, writing

    if path is None:
        yield sys.stdout.buffer
        return
    with writing(f"output {path}"), replacing(path) as file, compressed(path, file) as packed:
        yield packed


def _sizes(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(re.fullmatch(r"[1-9]\d{0,8}", part) for part in parts) or len(set(parts)) < len(parts):
        raise InvalidInput(
            f"{option} = {text!r} must be whole numbers >= 1 and below 10^9, each once, separated by commas"
        )
    return [int(part) for part in parts]


def _check_new(folder: Path, name: str, force: bool) -> None:
    """That a folder of results can be written to, and holds none unless they may be overwritten."""
    from daemon_fast.files import check_writable, writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder / name, force)


@main.command()
@click.option(
    "--energy", "energies", multiple=True, required=True, type=click.Path(path_type=Path), help="Artefact of fit."
)
@click.option("--data", multiple=True, required=True, help="The human text it was fitted to; one for each --energy.")
@data_option
@field_options
@click.option("--model", help="Instead of the one in the artefact.")
@click.option(
    "--study",
    "wanted",
    multiple=True,
    type=click.Choice(STUDIES),
    help="Only this one; may be repeated.  [default: all]",
)
@click.option("--held-out", type=click.IntRange(2), default=300, help="Prefixes of each domain.")
@click.option("--pool-prefixes", type=click.IntRange(1), default=10, help="For the convergence study.")
@click.option("--pool-candidates", type=click.IntRange(20), default=1000, help="For the convergence study.")
@click.option("--sweep-prefixes", type=click.IntRange(2), default=50, help="At each temperature, to fit and held out.")
@click.option("--prefix-tokens", type=click.IntRange(1), default=32, help="As given to fit.")
@click.option("--amateur", help="Model for contrastive decoding.  [default: the model itself, of its last 8 tokens]")
@click.option("--featurizer", type=click.Choice(["encoder", "model"]), default="encoder", help="For MAUVE.")
@click.option("--output", type=click.Path(path_type=Path), default="evaluation", help="Folder.")
@force_option
@model_options
def evaluate(
    energies: tuple[Path, ...], data: tuple[str, ...], field: str, prompt_field: str | None,
    response_field: str | None, model: str | None, wanted: tuple[str, ...], held_out: int, pool_prefixes: int,
    pool_candidates: int, sweep_prefixes: int, prefix_tokens: int, amateur: str | None, featurizer: str, output: Path,
    device: str | None, seed: int, batch_size: int, dtype: str, format_: Format | None, force: bool,
) -> None:  # fmt: skip
    """The paper's experiments for fitted artefacts: tables, figures, report.html. Interrupted, it resumes.

    Candidates that fit left in ENERGY.candidates are read, not drawn again. Records of --data that can't be used are
    named and left out; the exit code is then 1.
    """
    _check_new(output, "report.json", force)
    _resumes()
    for name in (model, amateur):
        if name is not None:
            check_model(name)
    import torch

    from daemon_fast.energy import Energy
    from daemon_fast.experiments import run as evaluation
    from daemon_fast.models import load_language_model

    _quiet_transformers()
    if len(energies) != len(data):
        raise InvalidInput(f"--data is given {len(data)} times for {len(energies)} --energy: give one for each")
    loaded = [Energy.load(path) for path in energies]
    model_id = model or loaded[0].proposal_settings.model_id
    with _model_of(energies[0], model):
        language_model, tokenizer = load_language_model(model_id, device, getattr(torch, dtype))
    domains = [
        evaluation.Domain(
            path.stem,
            source,
            energy,
            field,
            kept if (kept := _candidates_of(path)).exists() else None,
            format_,
            prompt_field,
            response_field,
        )
        for path, source, energy in zip(energies, data, loaded, strict=True)
    ]
    report = evaluation.evaluate(
        domains, output, language_model, tokenizer, wanted=wanted or STUDIES,
        sizes=evaluation.Sizes(held_out, pool_prefixes, pool_candidates, sweep_prefixes),
        amateur=load_language_model(amateur, device, getattr(torch, dtype))[0] if amateur else None,
        featurizer=featurizer, prefix_tokens=prefix_tokens, batch_size=batch_size, seed=seed,
        command="daemon-fast " + " ".join(sys.argv[1:]),
    )  # fmt: skip
    for name, found in report.domains.items():
        for sentence in found.verdict:
            click.echo(f"{name}: {sentence}")
    click.echo(f"written to {output}: report.html, report.json")
    sys.exit(1 if any(found.left_out for found in report.domains.values()) else 0)  # a warning has named them


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """What makes a shell complete commands and options: eval "$(daemon-fast completion bash)"."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "daemon-fast", "_DAEMON_FAST_COMPLETE").source())


@main.command()
def doctor() -> None:
    """Versions, build, devices, and a self-check of each operator. Exit code 1 if one is wrong."""
    from daemon_fast.doctor import advice, facts, self_checks

    for name, value in facts().items():
        click.echo(f"{name:>22}: {value}")
    healthy = True
    for operator, device, verdict in self_checks():
        click.echo(f"{operator:>22}: {verdict} on {device}")
        healthy &= verdict == "ok"
    for sentence in advice():
        click.echo(sentence)
    sys.exit(0 if healthy else 1)


@main.command()
@click.option("--quick", is_flag=True, help="Fewer prefixes: a fifth of the time.")
@click.option("--output", type=click.Path(path_type=Path), default="demo", help="Folder for results.")
@force_option
@click.option("--device", help="Such as cpu or cuda:0.  [default: a GPU if there is one]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0)
def demo(quick: bool, output: Path, force: bool, device: str | None, seed: int) -> None:
    """Align SmolLM2-135M with Wikipedia: fit, decode held-out prefixes, compare. Interrupted, it resumes."""
    _check_new(output, "results.json", force)
    _resumes()
    from daemon_fast.experiments.demo import run

    _quiet_transformers()
    run(output, quick=quick, device=device, seed=seed, echo=click.echo)
