"""What the package needs between the C library, event loops, files and llama-cpp-python's objects.

For kvferry itself, not for programs.

Nothing here knows the classes that programs import, except for the exceptions in ``errors``.
"""
