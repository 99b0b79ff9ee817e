"""What stands between the C library and Python's event loops. For kvferry itself, not for programs.

Nothing here knows the classes that programs import, except for the exceptions in ``errors``.
"""
