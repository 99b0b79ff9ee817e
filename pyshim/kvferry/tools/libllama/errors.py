"""What goes wrong with a libllama."""


class LlamaError(Exception):
    """No libllama, one that cannot be used, or a call that it refused; the text says which."""
