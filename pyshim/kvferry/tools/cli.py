"""The command line: ``kvferry doctor``, ``kvferry demo``, ``kvferry bench``, ``kvferry config``."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import sys
from collections.abc import Sequence

import anyio

from .. import __version__
from ..errors import KvferryError
from .libllama import ENVIRONMENT_VARIABLE, LlamaError
from .table import Progress

_DIFFERS, _FAILED, _INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    0: all is well. 1: a comparison found a difference. 2: it could not be run.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except BrokenPipeError:
        # Whoever reads our output has seen enough. Python would complain at the exit otherwise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        # Python 3.10: anyio takes SIGINT for its loop, and can't tell what it has cancelled there.
        return _INTERRUPTED
    except Exception as failure:
        cause = _cause(failure)
        if not isinstance(cause, (KvferryError, LlamaError, OSError)):
            raise
        print(f"kvferry {options.name}: error: {cause}", file=sys.stderr)
        return _FAILED


def _cause(failure: BaseException) -> BaseException:
    """What failed in a task, out of the groups that task groups wrap it in."""
    inner: Sequence[BaseException] = getattr(failure, "exceptions", ())
    return _cause(inner[0]) if len(inner) == 1 else failure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvferry",
        description="Saves and loads the KV cache of a running llama.cpp model beside decoding.",
    )
    parser.add_argument("--version", action="version", version=f"kvferry {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")

    doctor = commands.add_parser("doctor", help="what is here, and what it means for speed")
    _llama_lib(doctor)
    doctor.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="auto (the first GPU that can be used, if there is one), host, cuda, or cuda:N",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.set_defaults(command=_doctor)

    demo = commands.add_parser("demo", help="save, load and decode beside each other, compared")
    _common(demo)
    demo.add_argument("--model", metavar="FILE", help="a GGUF; else a synthetic one is written")
    demo.add_argument("--json", metavar="FILE", help="write all figures there")
    demo.add_argument(
        "--picture", metavar="FILE", default="kvferry-demo.png", help="timeline (%(default)s)"
    )
    demo.add_argument(
        "--tokens",
        type=_tokens,
        metavar="N",
        help="length of the prompt (512 on the host, 4096 on CUDA)",
    )
    demo.set_defaults(command=_demo)

    bench = commands.add_parser("bench", help="the figures, each beside its goal and its limit")
    _common(bench)
    bench.add_argument("--model", metavar="FILE", help="a GGUF; else a synthetic one is written")
    bench.add_argument(
        "--out", metavar="FOLDER", default="kvferry-bench", help="for all files (%(default)s)"
    )
    bench.add_argument("--tokens", type=_tokens, metavar="N", help="length of a saved sequence")
    bench.add_argument(
        "--only",
        metavar="TEXT",
        action="append",
        help="only the measurements whose name contains TEXT; more than once: any of the texts",
    )
    bench.set_defaults(command=_bench)

    config = commands.add_parser(
        "config",
        help="what builds in C and Go need to use the library of this package",
        description="Prints what builds need to use the library that this package carries, for "
        "instance: cc program.c $(kvferry config --cflags --libs); "
        "cmake -Dkvferry_ROOT=$(kvferry config --prefix); "
        'eval "$(kvferry config --cgo)" && go build.',
    )
    config.add_argument("--prefix", action="store_true", help="the folder of include/ and lib/")
    config.add_argument("--cflags", action="store_true", help="for the C compiler")
    config.add_argument("--libs", action="store_true", help="for the linker")
    config.add_argument("--static", action="store_true", help="--libs of the static library")
    config.add_argument(
        "--cgo", action="store_true", help="Go's environment, for the shell to eval"
    )
    config.set_defaults(command=_config)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    _llama_lib(parser)
    parser.add_argument("--device", choices=("auto", "host", "cuda"), default="auto")


def _llama_lib(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--llama-lib",
        metavar="DIR",
        help=f"folder of libllama; else ${ENVIRONMENT_VARIABLE}, installed llama_cpp or xllamacpp, "
        "the system",
    )


def _device(text: str) -> str:
    if re.fullmatch(r"auto|host|cuda(:[0-9]{1,2})?", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of auto, host, cuda, cuda:N")


def _tokens(text: str) -> int:
    try:
        tokens = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens") from None
    if not 16 <= tokens <= 1_000_000:
        raise argparse.ArgumentTypeError("between 16 and 1000000 tokens")
    return tokens


# The commands are imported when they are run: what one needs must not keep another from working.


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    return anyio.run(doctor.doctor, options.llama_lib, options.device, options.json)


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    chosen = demo.Options(
        llama_lib=options.llama_lib,
        model=options.model,
        json=options.json,
        picture=options.picture,
        tokens=options.tokens,
        device=options.device,
    )
    return 0 if anyio.run(demo.demo, chosen, Progress()) else _DIFFERS


def _bench(options: argparse.Namespace) -> int:
    from . import bench

    chosen = bench.Options(
        llama_lib=options.llama_lib,
        model=options.model,
        out=options.out,
        tokens=options.tokens,
        device=options.device,
        only=options.only,
    )
    return 0 if anyio.run(bench.bench, chosen, Progress()) else _DIFFERS


def _config(options: argparse.Namespace) -> int:
    from . import config

    flags = []
    if options.cflags:
        flags += config.cflags()
    if options.libs:
        flags += config.libs(static=options.static)
    lines = []
    if options.prefix:
        lines.append(str(config.PREFIX))
    if flags:
        lines.append(shlex.join(flags))
    if options.cgo:
        lines += config.cgo()
    if not lines:
        print("kvferry config: say what to print: --help names it", file=sys.stderr)
        return _FAILED
    print("\n".join(lines))
    return 0
