"""llama-cpp-python with a cache that survives the program.

In the root of kvferry, with llama-cpp-python installed:

    pip install .
    python examples/python/prompt_cache.py MODEL.gguf

Run it twice: the second time the rules are not evaluated.
"""

import sys
import time
from pathlib import Path
from typing import Any

import kvferry
import llama_cpp

RULES = "You are a helpful assistant. You answer in one sentence, and you never guess. " * 20
QUESTIONS = ["What is a cache?", "What is a queue?", "What is a ferry?"]


def main(model: str, folder: Path) -> None:
    llm: Any = llama_cpp.Llama(model, n_ctx=4096, verbose=False)
    cache = kvferry.PromptCache(llm, ram="2 GiB", disk=folder, disk_limit="20 GiB")
    llm.set_cache(cache)
    for question in QUESTIONS:
        llm.reset()  # as if somebody else had used the object meanwhile
        begin = time.perf_counter()
        done = llm.create_completion(RULES + question, max_tokens=16, temperature=0.0)
        seconds = time.perf_counter() - begin
        kept = cache.stats()
        print(f"{question} {done['choices'][0]['text']!r}")
        print(f"{seconds:.2f} s; {kept['restored_tokens']} tokens were restored so far")


if __name__ == "__main__":
    main(sys.argv[1], Path("~/.cache/kvferry-prompts").expanduser())
