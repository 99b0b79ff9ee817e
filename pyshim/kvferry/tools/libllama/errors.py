"""What goes wrong with a libllama."""


class LlamaError(Exception):
    """No libllama, one that can't be used, or a call that it refused; the text says which."""
