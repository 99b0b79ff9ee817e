"""The command ``kvferry``, with all that it needs. Programs that use kvferry need none of it."""
