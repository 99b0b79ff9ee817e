"""`kvferry config`: what other build systems need."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.programs import run_kvferry


def test_config_is_what_a_c_program_needs(tmp_path: Path) -> None:
    """tests/install/by_pip.sh tests more, in an empty environment."""
    source = Path(__file__).parents[2] / "install" / "program.c"
    for more in ([], ["--static"]):
        flags = run_kvferry("config", "--cflags", "--libs", *more).stdout.split()
        program = tmp_path / "program"
        subprocess.run(["cc", str(source), "-o", str(program), *flags], check=True)
        assert subprocess.run([program], capture_output=True, check=True).stdout


def test_config_speaks_to_the_shell(tmp_path: Path) -> None:
    printed = run_kvferry("config", "--cgo").stdout
    script = f'{printed}\nprintf "%s\\n" "$PKG_CONFIG_PATH" "$CGO_CFLAGS" "$CGO_LDFLAGS"'
    mine = {"PKG_CONFIG_PATH": "/mine", "CGO_CFLAGS": "-O1"}

    done = subprocess.run(
        ["sh", "-euc", script], env=mine, capture_output=True, text=True, check=True
    )

    prefix = Path(run_kvferry("config", "--prefix").stdout.strip())
    assert (prefix / "include" / "kvferry.h").is_file()
    assert done.stdout.splitlines() == [
        f"{prefix}/lib/pkgconfig:/mine",
        f"-O1 -I{prefix}/include",
        f"-O2 -g -L{prefix}/lib -Wl,-rpath,{prefix}/lib -lkvferry",
    ]
