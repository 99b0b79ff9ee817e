"""The command ``kvferry``: demo, doctor, benchmark, and what they need; programs need none of it."""
