"""The figures: each function returns a measurement, with a name, a unit, a goal, and a function of
a prepared context.

All figures can be measured on the host and on CUDA. The limit of speed is memcpy on the host, and
the raw pinned copy on CUDA.
"""
