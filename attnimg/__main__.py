"""`attnimg` and `python -m attnimg`: parse the command line, run a command, print its error.

Each command has a function of its name in attnimg/cli, which is imported only when it runs. It uses
argparse, as importing typer takes 30 ms of CPU, a tenth of `check` (0.29 s, 2026-11-27).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from attnimg import __version__
from attnimg.errors import AttnimgError, memory_errors, printable
from attnimg.machine import container
from attnimg.redact import redact


class Command(NamedTuple):
    """A command.

    Attributes:
        module: the module of attnimg.cli that has its function.
        help: what it does, in one sentence.
        arguments: argparse's arguments, each a name or flag with options of add_argument.
    """

    module: str
    help: str
    arguments: tuple[tuple[str, dict[str, Any]], ...]


def _argument(name: str, help_text: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Return one argument of a command: its name or flag, and options of add_argument."""
    return name, {"help": help_text, **options}


def _number(text: str) -> int:
    """Return a whole number of the command line that is not negative."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


_ON = _argument("--on", "Check for this GPU: h100, t4, sm_90, gfx942, cpu.", metavar="GPU")
_SETTINGS = _argument(
    "settings", "Keys to set: learning_rate=1e-4.", metavar="KEY=VALUE", nargs="*"
)
_JSON = _argument(
    "--json", "Print JSON, one object per line.", dest="as_json_lines", action="store_true"
)
_RUN = _argument(
    "run", "A run's folder, a checkpoint in it, or the run's YAML file.", metavar="RUN"
)
_BASE_MODEL = _argument(
    "--base-model", "The base model, if it has been moved.", metavar="FOLDER_OR_NAME"
)
COMMANDS = {
    "check": Command(
        "check",
        "Check the values of configs: no model, no GPU, no network. Lists every error.",
        (
            _argument(
                "arguments",
                "YAML files, and keys to set in all of them: learning_rate=1e-4.",
                metavar="CONFIG_OR_KEY=VALUE",
                nargs="+",
            ),
            _ON,
            _argument(
                "--torch", "Check for this version of torch, such as 2.13.", metavar="VERSION"
            ),
            _JSON,
        ),
    ),
    "explain": Command(
        "explain",
        "Explain which backend would run, and why each other backend would not.",
        (
            _argument(
                "target",
                "A YAML file, a model's folder, or its config.json.",
                metavar="CONFIG_OR_MODEL",
            ),
            _SETTINGS,
            _ON,
            _argument("--image", "Assume this image's packages: hopper, ada.", metavar="NAME"),
            _JSON,
        ),
    ),
    "convert": Command(
        "convert",
        "Convert a config of TRL, LLaMA-Factory or axolotl; report what happened to each key.",
        (
            _argument("file", "The YAML file of the other trainer.", metavar="FILE"),
            _argument("--output", "Write the new config here, not to stdout.", metavar="FILE"),
            _argument(
                "--from",
                "The trainer of the config, if its keys fit several trainers.",
                dest="trainer",
                choices=("trl", "trl-dpo", "trl-kto", "trl-orpo", "llama-factory", "axolotl"),
            ),
            _argument(
                "--dataset-format",
                "The format of TRL's datasets, if they are not on this machine.",
                choices=("messages", "conversations", "text", "prompt-completion"),
            ),
            _JSON,
        ),
    ),
    "doctor": Command(
        "doctor",
        "Check this machine and image: GPU, driver, kernels, network, CPUs, user, folders, memory.",
        (_JSON,),
    ),
    "verify": Command(
        "verify",
        "Prove every backend that fits here: outputs, gradients, and no leak between documents.",
        (
            _argument("file", "Prove for this config's model.", metavar="CONFIG", nargs="?"),
            _SETTINGS,
            _JSON,
        ),
    ),
    "train": Command(
        "train",
        "Train a model: select and verify the attention backend, check packing, then train.",
        (
            _argument("file", "The YAML file of the run.", metavar="CONFIG"),
            _SETTINGS,
        ),
    ),
    "preprocess": Command(
        "preprocess",
        "Tokenize, pack and cache a run's data, and show which tokens are trained.",
        (
            _argument("file", "The YAML file of the run.", metavar="CONFIG"),
            _SETTINGS,
            _argument("--show", "Print N documents of each dataset.", type=_number, metavar="N"),
            _argument(
                "--html",
                "Write them to an HTML file; 10 of each dataset without --show.",
                metavar="FILE",
            ),
            _argument(
                "--seed",
                "Seed of the random choice of documents.",
                type=_number,
                default=0,
                metavar="N",
            ),
            _JSON,
        ),
    ),
    "schema": Command(
        "schema",
        "Print the JSON Schema of a config, with which editors complete and check keys.",
        (_argument("--json", "Print it on one line.", dest="as_json_lines", action="store_true"),),
    ),
    "merge": Command(
        "merge",
        "Merge a run's adapter into its base model, and compare the logits of both.",
        (
            _RUN,
            _argument("--output", "The folder to write; RUN/merged by default.", metavar="FOLDER"),
            _argument(
                "--dtype",
                "Dtype of the merged weights; by default that of the base model's files.",
                choices=("float32", "bfloat16", "float16"),
            ),
            _argument(
                "--max-shard-size",
                "The largest size of a weight file; 5GB by default.",
                metavar="SIZE",
                default="5GB",
            ),
            _BASE_MODEL,
            _JSON,
        ),
    ),
    "chat": Command(
        "chat",
        "Chat with a run's model on the terminal, or answer each line of standard input.",
        (
            _RUN,
            _argument("--system", "The system message.", metavar="TEXT"),
            _argument(
                "--raw", "Complete each line as text, without chat template.", action="store_true"
            ),
            _argument(
                "--max-new-tokens",
                "The longest answer in tokens; 512 by default.",
                metavar="N",
                type=int,
                default=512,
            ),
            _argument(
                "--temperature",
                "Sampling temperature; 0 takes the most likely token. By default the model's.",
                metavar="T",
                type=float,
            ),
            _argument(
                "--top-p",
                "Sample from the most likely tokens with this total probability.",
                metavar="P",
                type=float,
            ),
            _argument("--seed", "Seed of the sampling.", metavar="N", type=int),
            _BASE_MODEL,
            _JSON,
        ),
    ),
    "evaluate": Command(
        "evaluate",
        "Compute loss and perplexity of test_datasets with a run's model, as training does.",
        (
            _RUN,
            _argument("--base", "Evaluate the base model instead.", action="store_true"),
            _BASE_MODEL,
            _JSON,
        ),
    ),
    "selftest": Command(
        "doctor",
        "Run the image's own tests: imports, a short training run, kernels on this GPU.",
        (_argument("--only", "Run only tests whose names match (pytest -k).", metavar="WORDS"),),
    ),
}

# The commands that import torch.
_WITH_TORCH = frozenset({"chat", "evaluate", "merge", "preprocess", "selftest", "train", "verify"})


def main() -> None:
    """Run the command line; never show a traceback without --debug."""
    debug = "--debug" in sys.argv
    if not debug:
        # Hide errors that libraries raise at the end of the process, after the reported one.
        sys.unraisablehook = lambda _: None
    _set_folders_and_driver()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if arguments[:1] and arguments[0] in _WITH_TORCH:
        from attnimg.machine.threads import set_threads

        set_threads(os.environ)
    else:
        # pydantic would look for plugins in the metadata of every installed package: 5 ms of CPU.
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    code = run(arguments, debug=debug)
    if "WORLD_SIZE" in os.environ:
        from attnimg.train.distributed import end_process

        end_process(code)
    sys.exit(code)


def _set_folders_and_driver() -> None:
    """Choose the folders of caches and find the driver's libraries, before either is needed."""
    if (path := container.library_path(os.environ)) is not None:
        # The loader reads the variable only when a process starts.
        os.environ["LD_LIBRARY_PATH"] = path
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    container.apply(create=True)
    note = container.replaced_cache(os.environ)
    if note is not None and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"attnimg: {printable(note)}\n")


def run(arguments: Sequence[str], *, debug: bool = False) -> int:
    """Run one command.

    Args:
        arguments: the command line after `attnimg`.
        debug: show the traceback of an exception.

    Returns:
        The exit code.
    """
    try:
        with memory_errors():
            _run_command(arguments)
    except SystemExit as done:  # raised at the end of every command, and for a wrong argument
        code = done.code if isinstance(done.code, int) else 1
        if code in (1, 2):
            _stop_other_ranks(arguments, f"exit code {code}, see its output")
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the program that reads the output has ended, such as head
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  for Python's last flush
        return 1
    except Exception as error:
        failure = _as_attnimg_error(error)
        if debug:
            sys.excepthook(*sys.exc_info())
        sys.stderr.write(f"{failure}\n")
        if failure.code != "rank-lost":
            _stop_other_ranks(arguments, failure.what)
        return failure.exit_code
    return 0


def _run_command(arguments: Sequence[str]) -> None:
    name = arguments[0] if arguments else "--help"
    if name not in COMMANDS:
        _top_parser().parse_args([name])  # prints the help or the version, or reports the name
    command = COMMANDS[name]
    parser = _Parser(prog=f"attnimg {name}", description=command.help, allow_abbrev=False)
    for argument, options in command.arguments:
        parser.add_argument(argument, **options)
    # Options may be between the files, too.
    values = vars(parser.parse_intermixed_args(arguments[1:]))
    if name in _WITH_TORCH:
        container.require_folders(os.environ)
    getattr(import_module(f"attnimg.cli.{command.module}"), name)(**values)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors have no secrets and are safe to print on a terminal."""

    def _print_message(self, message: str, file: object = None) -> None:
        super()._print_message(printable(redact(message)), file)  # type: ignore[arg-type]  # argparse's own


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    parser = _Parser(
        prog="attnimg",
        description="Train language models with attention kernels that are chosen for your GPU and "
        "checked on it.\n\ncommands:\n"
        + "\n".join(f"  {name:{width}}{command.help}" for name, command in COMMANDS.items()),
        epilog="attnimg COMMAND --help lists its arguments. --debug, anywhere, shows the traceback "
        "of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"attnimg {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=tuple(COMMANDS))
    return parser


def _as_attnimg_error(error: Exception) -> AttnimgError:
    """Return the error to print for an exception; an unexpected one is a bug in attnimg."""
    if isinstance(error, AttnimgError):
        return error
    message = redact(" ".join(str(error).split()))
    if isinstance(error, Warning):
        return AttnimgError(
            f"Python raised a {type(error).__name__} as an error",
            why=message,
            do="follow the warning, or run without PYTHONWARNINGS=error and python -W error",
            code="bad-environment",
        )
    from attnimg.train.environment import environment_error  # imported here to keep `check` fast

    return environment_error(error, os.environ) or AttnimgError(
        f"unexpected {type(error).__name__}: this is a bug in attnimg",
        why=message[:300] or "the exception has no message",
        do="run it again with --debug and report the output",
        exit_code=1,
    )


def _stop_other_ranks(arguments: Sequence[str], reason: str) -> None:
    """Stop the other processes of a training run, which wait for this one."""
    if arguments[:1] == ["train"]:
        from attnimg.train.distributed import report_failure

        report_failure(reason)


if __name__ == "__main__":
    main()
