"""Saves and loads an array with an installed kvferry."""

import anyio
import kvferry
import numpy

assert "site-packages" in kvferry.__file__, kvferry.__file__


async def main() -> None:
    async with kvferry.Engine("host") as engine:
        source = numpy.arange(100_000, dtype=numpy.uint8)
        saved = await engine.copy_out(source[::2])
        target = numpy.zeros(50_000, numpy.uint8)
        await engine.copy_in(target, saved)
        assert (target == source[::2]).all()


anyio.run(main)
