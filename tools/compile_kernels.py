"""Compiles cabi/cuda/gather.cu to cabi/cuda/gather.ptx, or checks that they agree.

    python tools/compile_kernels.py            compiles
    python tools/compile_kernels.py --check    fails unless the .ptx is what the source gives

The compiler is NVRTC from PyPI: no CUDA toolkit, no GPU. Its version is pinned, so that everybody
gets the same text.

Why this compiler, this target, this ISA. The driver compiles PTX for whatever GPU it finds, but
refuses PTX of an ISA newer than itself (CUDA_ERROR_UNSUPPORTED_PTX_VERSION), and an NVRTC always
writes the ISA of its own release. 11.7 is the oldest on PyPI: ISA 7.7, driver 515. What it writes
here uses no instruction newer than ISA 6.0 (CUDA 9, driver 384), so the `.version` line is lowered
to that: the driver's own compiler, which refuses an instruction that the declared ISA does not
have, is the check. compute_52 reaches back to Maxwell; the kernels use nothing that newer targets
would add.

--check compiles again where that NVRTC is installed. Elsewhere it compares the digests that the
.ptx carries: of the source it was made from, and of its own text.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.metadata
import re
import sys
from pathlib import Path

COMPILER = "nvidia-cuda-nvrtc-cu11"
VERSION = "11.7.99"
OPTIONS = ("--gpu-architecture=compute_52", "--std=c++14")
ISA = "6.0"

CABI = Path(__file__).resolve().parent.parent / "cabi" / "cuda"
SOURCE = CABI / "gather.cu"
PTX = CABI / "gather.ptx"


class Failure(Exception):
    """Ends the program with this text."""


def compiler_path() -> Path | None:
    """NVRTC of the pinned version, or None where it is not installed."""
    try:
        package = importlib.metadata.distribution(COMPILER)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package.version != VERSION:
        return None
    for file in package.files or ():
        if re.fullmatch(r"libnvrtc\.so\.[\d.]+", file.name):
            return Path(str(package.locate_file(file)))
    return None


def compile_source(compiler: Path, source: bytes) -> str:
    """The PTX of a CUDA source; Failure with the compiler's log where it does not compile."""
    nvrtc = ctypes.CDLL(str(compiler))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    program = ctypes.c_void_p()

    def text(kind: str) -> str:
        size = ctypes.c_size_t()
        require(getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        require(getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer))
        return buffer.value.decode()

    def require(status: int) -> None:
        if status != 0:
            raise Failure(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")

    # The name becomes part of mangled symbols: the same wherever the tree lies.
    name = SOURCE.name.encode()
    require(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name, 0, None, None))
    try:
        options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = text("ProgramLog").strip()
        if status != 0 or log:  # a warning is an error
            raise Failure(f"{SOURCE.name} does not compile cleanly:\n{log}")
        return text("PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def header(source: bytes, body: str) -> str:
    return (
        f"// Made by tools/compile_kernels.py from {SOURCE.name}: do not edit.\n"
        f"// compiler: {COMPILER} {VERSION} {' '.join(OPTIONS)}, ISA lowered to {ISA}\n"
        f"// source sha256: {digest(source)}\n"
        f"// text sha256: {digest(body.encode())}\n"
    )


def generate(compiler: Path, source: bytes) -> str:
    """The whole text of the .ptx file."""
    compiled = compile_source(compiler, source)
    body, count = re.subn(r"^\.version \d+\.\d+$", f".version {ISA}", compiled, flags=re.MULTILINE)
    if count != 1:
        raise Failure("the compiler's text has no single .version line")
    body = re.sub(r"[ \t]+$", "", body, flags=re.MULTILINE).strip() + "\n"
    return header(source, body) + body


def check(compiler: Path | None, source: bytes, committed: str) -> str:
    """Says how the committed text was found good; Failure where it is not."""
    again = "\nRun tools/compile_kernels.py, and commit both files."
    lines = committed.splitlines(keepends=True)
    body = "".join(lines[4:])
    if "".join(lines[:4]) != header(source, body):
        if f"source sha256: {digest(source)}\n" not in committed:
            raise Failure(f"{PTX.name} was made from another {SOURCE.name}.{again}")
        if f"text sha256: {digest(body.encode())}\n" not in committed:
            raise Failure(f"{PTX.name} was edited after it was made.{again}")
        raise Failure(f"{PTX.name} was made by another compiler or with other options.{again}")
    if compiler is None:
        return (
            f"{PTX.name} agrees with {SOURCE.name} by its digests; "
            f"{COMPILER} {VERSION}, to compile it again, is not installed"
        )
    if generate(compiler, source) != committed:
        raise Failure(f"{SOURCE.name} compiles to something else than {PTX.name}.{again}")
    return f"{PTX.name} is what {SOURCE.name} compiles to"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="compile cabi/cuda/gather.cu to cabi/cuda/gather.ptx with NVRTC"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where they disagree"
    )
    arguments = parser.parse_args()
    compiler = compiler_path()
    source = SOURCE.read_bytes()
    try:
        if arguments.check:
            if not PTX.exists():
                raise Failure(f"there is no {PTX.name}")
            print(check(compiler, source, PTX.read_text()))
        elif compiler is None:
            raise Failure(f"needs NVRTC: python -m pip install {COMPILER}=={VERSION}")
        else:
            PTX.write_text(generate(compiler, source))
            print(f"wrote {PTX}")
    except Failure as failure:
        print(f"compile_kernels: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
