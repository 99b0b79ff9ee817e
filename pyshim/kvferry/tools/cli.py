"""The command line: ``kvferry doctor``, ``demo``, ``bench``, ``store`` and ``config``."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import anyio

from .. import __version__
from ..errors import KvferryError
from .causes import cause
from .libllama import ENVIRONMENT_VARIABLE, LlamaError
from .table import Progress

_DIFFERS, _FAILED, _INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    0: the command succeeded. 1: it found something wrong. 2: it could not be run. 130: it was
    interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except BrokenPipeError:
        # The reader of our output has closed it. Without this, Python would complain at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        # On Python 3.10 anyio handles SIGINT itself, and reports it as a cancellation.
        return _INTERRUPTED
    except Exception as failure:
        named = cause(failure)
        if not isinstance(named, (KvferryError, LlamaError, OSError)):
            raise
        print(f"kvferry {options.name}: error: {named}", file=sys.stderr)
        return _FAILED


# What add_subparsers() returns; argparse has no public name for it.
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvferry",
        description="Saves and loads the KV cache of a running llama.cpp model while it decodes.",
    )
    parser.add_argument("--version", action="version", version=f"kvferry {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")
    _add_doctor(commands)
    _add_demo(commands)
    _add_bench(commands)
    _add_store(commands)
    _add_config(commands)
    return parser


def _add_doctor(commands: _Commands) -> None:
    doctor = commands.add_parser("doctor", help="report what this machine offers to kvferry")
    _llama_lib(doctor)
    doctor.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="auto (the first usable GPU, else the host), host, cuda, or cuda:N",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.set_defaults(command=_doctor)


def _add_demo(commands: _Commands) -> None:
    demo = commands.add_parser("demo", help="save and load while decoding, and compare")
    _common(demo)
    demo.add_argument("--json", metavar="FILE", help="write all figures to this file")
    demo.add_argument(
        "--picture",
        metavar="FILE",
        default="kvferry-demo.png",
        help="draw the timeline to this file, and the restart beside it (%(default)s)",
    )
    demo.add_argument(
        "--tokens",
        type=_tokens,
        metavar="N",
        help="length of the prompt (512 on the host, 4096 on a GPU)",
    )
    demo.set_defaults(command=_demo)


def _add_bench(commands: _Commands) -> None:
    bench = commands.add_parser("bench", help="measure speed, and compare it with goals and limits")
    bench.add_argument(
        "matrix",
        choices=("states", "blocks"),
        nargs="?",
        default="states",
        help="what to measure: whole states (the default), or blocks beside them",
    )
    _common(bench)
    bench.add_argument(
        "--out",
        metavar="FOLDER",
        default="kvferry-bench",
        help="write all files to this folder (%(default)s)",
    )
    bench.add_argument("--tokens", type=_tokens, metavar="N", help="length of the saved sequence")
    bench.add_argument(
        "--only",
        metavar="TEXT",
        action="append",
        help="make only the measurements whose name contains TEXT; may be repeated",
    )
    bench.set_defaults(command=_bench)


def _add_store(commands: _Commands) -> None:
    store = commands.add_parser(
        "store",
        help="look into the folder of a store, verify it, pin, evict, warm",
        description="Looks into the folder of a kvferry.Store. Programs may use it meanwhile.",
    )
    actions = store.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, text in (
        ("list", "list the conversations"),
        ("stats", "count parts and bytes"),
        ("verify", "read every file, and quarantine what is not right"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", metavar="FOLDER", help="the folder of the store")
        action.add_argument("--json", action="store_true", help="print JSON instead of text")
    for name, text in (
        ("pin", "keep conversations from being evicted, by any process"),
        ("unpin", "end this"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", metavar="FOLDER", help="the folder of the store")
        action.add_argument("names", metavar="NAME", nargs="+", help="as list prints it")
    evict = actions.add_parser("evict", help="remove conversations, except what others share")
    evict.add_argument("folder", metavar="FOLDER", help="the folder of the store")
    which = evict.add_mutually_exclusive_group(required=True)
    which.add_argument("names", metavar="NAME", nargs="*", default=[], help="as list prints it")
    which.add_argument("--all", action="store_true", help="all conversations")
    _add_warm(actions)
    store.set_defaults(command=_store)


def _add_warm(actions: _Commands) -> None:
    warm = actions.add_parser(
        "warm",
        help="compute prompts, and keep them in a folder",
        description="Computes prompts and keeps them in a folder, so that a server that starts "
        "with it finds them. The options must be those of the server. Prints the name and the "
        "tokens of each prompt that is kept.",
    )
    warm.add_argument("folder", metavar="FOLDER", help="the folder of the store; it may be new")
    warm.add_argument(
        "prompts",
        metavar="PROMPTS",
        help='a file with a prompt a line; or a .jsonl file of objects with "prompt" or "tokens"',
    )
    warm.add_argument("--model", metavar="FILE", required=True, help="a GGUF file")
    warm.add_argument(
        "--disk-limit", metavar="SIZE", required=True, help='of the folder, such as "100 GiB"'
    )
    warm.add_argument("--ram", metavar="SIZE", default="4 GiB", help="%(default)s")
    warm.add_argument("--block-tokens", type=int, metavar="N", help="256; of a PromptCache 64")
    warm.add_argument("--salt-file", metavar="FILE", help="a file whose bytes are the salt")
    warm.add_argument("--variant", metavar="TEXT", default="", help="as for Engine.attach")
    warm.add_argument("--pin", action="store_true", help="pin what is kept")
    _llama_lib(warm)
    _cache_device(warm)
    warm.add_argument(
        "--no-flash-attention", action="store_true", help="as of servers that do not use it"
    )
    for name in ("k", "v"):
        warm.add_argument(
            f"--cache-type-{name}", metavar="TYPE", default="f16", help="%(default)s, q8_0, ..."
        )
    warm.add_argument(
        "--llama-cpp-python",
        type=_arguments,
        metavar="JSON",
        help='compute with a llama_cpp.Llama, which has these arguments, such as {"n_ctx": 8192}, '
        "for servers with a PromptCache; in place of the options of libllama and of the cache",
    )


def _add_config(commands: _Commands) -> None:
    config = commands.add_parser(
        "config",
        help="print what builds in C and Go need to use the library of this package",
        description="Prints what builds need to use the library of this package. For "
        "instance: cc program.c $(kvferry config --cflags --libs); "
        "cmake -Dkvferry_ROOT=$(kvferry config --prefix); "
        'eval "$(kvferry config --cgo)" && go build.',
    )
    config.add_argument(
        "--prefix", action="store_true", help="print the folder of include/ and lib/"
    )
    config.add_argument("--cflags", action="store_true", help="print options for the C compiler")
    config.add_argument("--libs", action="store_true", help="print options for the linker")
    config.add_argument("--static", action="store_true", help="with --libs: use the static library")
    config.add_argument(
        "--cgo", action="store_true", help="print shell commands that set Go's environment"
    )
    config.set_defaults(command=_config)


def _common(parser: argparse.ArgumentParser) -> None:
    _llama_lib(parser)
    _cache_device(parser)
    parser.add_argument(
        "--model", metavar="FILE", help="a GGUF file (default: a synthetic model is written)"
    )


def _cache_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "host", "cuda"),
        default="auto",
        help="where caches are (auto: on a GPU if libllama can use one)",
    )


def _llama_lib(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--llama-lib",
        metavar="DIR",
        help=f"folder of libllama (default: ${ENVIRONMENT_VARIABLE}, else an installed llama_cpp "
        "or xllamacpp, else the system's)",
    )


def _device(text: str) -> str:
    if re.fullmatch(r"auto|host|cuda(:[0-9]{1,2})?", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of auto, host, cuda, cuda:N")


def _arguments(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")


def _tokens(text: str) -> int:
    try:
        tokens = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens") from None
    if not 16 <= tokens <= 1_000_000:
        raise argparse.ArgumentTypeError("between 16 and 1000000 tokens")
    return tokens


# Each command imports its module when it runs, so that packages that one command needs and that are
# missing do not keep the others from working.


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
        matrix=options.matrix,
    )
    return 0 if anyio.run(bench.bench, chosen, Progress()) else _DIFFERS


def _store(options: argparse.Namespace) -> int:
    from . import store

    if options.action == "warm":
        return _warm(options)
    if options.action == "evict":
        done = store.store_evict(options.folder, options.names, options.all)
    elif options.action in ("pin", "unpin"):
        done = getattr(store, f"store_{options.action}")(options.folder, options.names)
    else:
        function = getattr(store, f"store_{options.action}")
        done = function(options.folder, options.json)
    return 0 if done else _DIFFERS


def _warm(options: argparse.Namespace) -> int:
    from . import warm
    from .decoders import Layout
    from .libllama import CACHE_TYPES

    for name in (options.cache_type_k, options.cache_type_v):
        if name not in CACHE_TYPES:
            raise LlamaError(f"{name} is no type of a cache: {', '.join(CACHE_TYPES)}")
    block_tokens = 256 if options.llama_cpp_python is None else 64
    chosen = warm.Options(
        folder=options.folder,
        prompts=options.prompts,
        model=options.model,
        disk_limit=options.disk_limit,
        ram=options.ram,
        block_tokens=block_tokens if options.block_tokens is None else options.block_tokens,
        salt=Path(options.salt_file).read_bytes() if options.salt_file else b"",
        variant=options.variant,
        pin=options.pin,
        device=options.device,
        llama_lib=options.llama_lib,
        layout=Layout(not options.no_flash_attention, options.cache_type_k, options.cache_type_v),
        llama_cpp_python=options.llama_cpp_python,
    )
    return 0 if anyio.run(warm.warm, chosen) else _DIFFERS


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
        print("kvferry config: say what to print: --help lists the options", file=sys.stderr)
        return _FAILED
    print("\n".join(lines))
    return 0
