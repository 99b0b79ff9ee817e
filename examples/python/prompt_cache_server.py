"""llama-cpp-python's server with a cache that survives it.

In the root of kvferry:

    pip install . 'llama-cpp-python[server]'
    python examples/python/prompt_cache_server.py --model MODEL.gguf --n_ctx 8192

The options are those of the server. (Its option --cache is for the caches of llama-cpp-python.)
"""

import signal
import sys
from typing import Any

import kvferry
from llama_cpp.server.__main__ import main
from llama_cpp.server.model import LlamaProxy

CACHE: Any = {"ram": "2 GiB", "disk": "~/.cache/kvferry-prompts", "disk_limit": "20 GiB"}

load_without_cache = LlamaProxy.load_llama_from_model_settings
caches: list[kvferry.PromptCache] = []


def load_with_cache(settings: Any) -> Any:
    close_cache()  # The server holds one model at a time, and has closed the one before.
    llm = load_without_cache(settings)
    caches.append(kvferry.PromptCache(llm, **CACHE))
    llm.set_cache(caches[0])
    return llm


def close_cache() -> None:
    while caches:
        cache = caches.pop()
        print(f"{cache.stats()['restored_tokens']} tokens were restored", flush=True)
        cache.close()


if __name__ == "__main__":
    LlamaProxy.load_llama_from_model_settings = staticmethod(load_with_cache)  # type: ignore[method-assign]
    # The server raises the signal that has ended it once more. By itself it would end Python at
    # once, and what is not on the disk yet would be lost.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        main()  # type: ignore[no-untyped-call]
    finally:
        close_cache()
