"""Writes the C source of the extension module kvferry._native (cffi, API mode).

    python build_native.py HEADER OUTPUT.c [CC]

The header is the one source of truth: its declarations are read through the C preprocessor CC
(default: cc), and the C compiler then checks every struct and every function against it. The result
uses the stable ABI of Python, so one binary serves every Python from 3.10 on. CMake calls this.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import cffi


def declarations(header: Path, compiler: str) -> str:
    """The header as cffi reads it: no includes, no macros, no attributes."""
    # Without __GNUC__ the header leaves out the visibility attributes, which cffi does not know.
    # No system header is included under KVF_CDEF, so nothing else misses it.
    command = [
        *shlex.split(compiler),
        "-E",
        "-P",
        "-x",
        "c",
        "-std=c11",
        "-DKVF_CDEF",
        "-U__GNUC__",
    ]
    preprocessed = subprocess.run(
        [*command, str(header)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    # The preprocessor has consumed the macros that are plain numbers: the compiler fills them in.
    numbers = re.findall(r"^#define (KVF_\w*VERSION\w*) \d+$", header.read_text(), re.MULTILINE)
    return preprocessed + "".join(f"#define {name} ...\n" for name in numbers)


def main(arguments: list[str]) -> None:
    header, output = Path(arguments[0]), Path(arguments[1])
    compiler = arguments[2] if len(arguments) > 2 else "cc"
    ffi = cffi.FFI()
    ffi.cdef(declarations(header, compiler))
    ffi.set_source("kvferry._native", f'#include "{header.name}"', py_limited_api=True)
    ffi.emit_c_code(str(output))
    output.touch()  # cffi leaves an unchanged file alone; the build wants it newer than the header


if __name__ == "__main__":
    main(sys.argv[1:])
