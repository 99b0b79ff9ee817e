"""llama-cpp-python's own server with kvferry.PromptCache, as docs/prompt-cache.md sets it up."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.llama_reference import LIBRARY_FOLDER, bindings_fit
from support.programs import environment_with_support
from support.text_model import write_text_model

if "LLAMA_CPP_LIB_PATH" in os.environ and not bindings_fit():
    pytest.skip(f"llama_cpp.Llama does not fit {LIBRARY_FOLDER}", allow_module_level=True)

PROGRAM = Path(__file__).parents[3] / "examples" / "python" / "prompt_cache_server.py"

# The backends of a prebuilt libllama are loaded by its user.
LOADED = "import support.llama_reference, runpy, sys; sys.argv[1:2] = []; "
WITH_CACHE = LOADED + f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
WITHOUT_CACHE = LOADED + "runpy.run_module('llama_cpp.server', run_name='__main__')"

RULES = "You are a queue, and you answer as a queue would answer. " * 8
PATIENCE = 60.0


class Server:
    """A server in a process of its own, on a free port of this machine."""

    def __init__(self, code: str, home: Path, *models: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        common = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "seed": 1}
        config = home / "config.json"
        config.write_text(
            json.dumps(
                {
                    "host": "127.0.0.1",
                    "port": port,
                    "models": [
                        {"model": str(path), "model_alias": path.stem, **common} for path in models
                    ],
                }
            )
        )
        self._log = home / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, "server", "--config_file", str(config)],
                env=environment_with_support({"HOME": str(home)}),
                stdout=log,
                stderr=log,
            )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"{self._url}/v1/models", timeout=PATIENCE):
                    return
            except urllib.error.URLError:
                assert self._process.poll() is None, self.log()
                assert time.monotonic() < end, self.log()
                time.sleep(0.05)

    def log(self) -> str:
        return self._log.read_text()

    def post(self, path: str, **body: Any) -> str:
        """Returns the body of the answer."""
        request = urllib.request.Request(
            f"{self._url}/v1/{path}",
            json.dumps({"max_tokens": 8, "temperature": 0.0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                text: str = answer.read().decode()
                return text
        except urllib.error.HTTPError as failure:
            raise AssertionError(f"{failure.read()!r}\n{self.log()}") from failure

    def complete(self, prompt: str, **body: Any) -> str:
        text: str = json.loads(self.post("completions", prompt=prompt, **body))["choices"][0][
            "text"
        ]
        return text

    def stream(self, prompt: str) -> str:
        lines = self.post("completions", prompt=prompt, stream=True).splitlines()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data.pop() == "[DONE]"
        return "".join(json.loads(each)["choices"][0]["text"] for each in data)

    def chat(self, messages: list[dict[str, str]]) -> dict[str, str]:
        answer = json.loads(self.post("chat/completions", messages=messages))
        message = answer["choices"][0]["message"]
        return {"role": "assistant", "content": message["content"]}

    def end(self, by: signal.Signals = signal.SIGTERM) -> int:
        """Returns the exit status."""
        self._process.send_signal(by)
        return self._process.wait(PATIENCE)

    def restored(self) -> list[int]:
        """How many tokens were restored for each model, which the server tells as it ends."""
        return [int(count) for count in re.findall(r"(\d+) tokens were restored", self.log())]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def served(code: str, home: Path, *models: Path) -> Iterator[Server]:
    home.mkdir(exist_ok=True)
    server = Server(code, home, *models)
    try:
        yield server
    finally:
        server.kill()


def talk(server: Server) -> list[str]:
    """Two conversations in turn, each of which the server forgets meanwhile, and what it says."""
    said = []
    text = RULES + "Who is first?"
    messages = [{"role": "user", "content": "Tell me about ferries. " * 20}]
    for turn in range(3):
        answer = server.stream(text) if turn == 1 else server.complete(text)
        text += answer + f"And {turn}?"
        messages += [server.chat(messages), {"role": "user", "content": f"And {turn}?"}]
        said += [answer, messages[-2]["content"]]
    return said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_text_model(folder / f"{kind}.gguf", kind) for kind in ("llama", "gemma3")]


@pytest.fixture(scope="module")
def expected(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the server says without a cache."""
    with served(WITHOUT_CACHE, tmp_path_factory.mktemp("without"), models[0]) as server:
        return talk(server)


def test_conversations_in_turn_are_right_and_are_restored(
    models: list[Path], expected: list[str], tmp_path: Path
) -> None:
    with served(WITH_CACHE, tmp_path / "home", models[0]) as server:
        assert talk(server) == expected
        assert server.end() == 0, server.log()
        # All turns but the first of each have more than 400 tokens that are known.
        assert [count > 4 * 400 for count in server.restored()] == [True], server.log()
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_new_server_finds_what_another_has_kept(
    by: signal.Signals, models: list[Path], tmp_path: Path
) -> None:
    answers, restored = [], []
    for _ in range(2):
        with served(WITH_CACHE, tmp_path / "home", models[0]) as server:
            answers.append(server.complete(RULES))
            assert server.end(by) == 0, server.log()
            restored += server.restored()
    assert answers[0] == answers[1]
    assert restored[0] == 0
    assert restored[1] > 400


def test_each_model_of_a_server_has_a_cache(models: list[Path], tmp_path: Path) -> None:
    """The server closes a model when another one is asked for."""
    with served(WITH_CACHE, tmp_path / "home", *models) as server:
        answers = [server.complete(RULES, model=name) for name in ("llama", "gemma3", "llama")]
        assert answers[0] == answers[2]
        assert server.end() == 0, server.log()
        assert [count > 400 for count in server.restored()] == [False, False, True], server.log()
