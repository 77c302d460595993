"""One look for all who ask at the same time."""

from __future__ import annotations

import asyncio

from app.engine.together import Together


def test_a_look_has_begun_after_it_was_asked_for() -> None:
    """Who comes while one is under way shares the next one, not that one."""
    begun: list[asyncio.Future[int]] = []

    async def look() -> int:
        begun.append(asyncio.get_running_loop().create_future())
        return await begun[-1]

    async def story() -> None:
        together = Together(look)
        first = asyncio.create_task(together.get())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        later = [asyncio.create_task(together.get()) for _ in range(9)]
        await asyncio.sleep(0)
        assert len(begun) == 1
        begun[0].set_result(1)
        assert await first == 1
        # Who goes away takes nothing from the others.
        later[0].cancel()
        await asyncio.sleep(0)
        begun[1].set_result(2)
        assert await asyncio.gather(*later[1:]) == [2] * 8
        assert len(begun) == 2

    asyncio.run(story())


def test_a_look_that_fails() -> None:
    """Its error is everybody's, and the next look is another one."""
    answers = iter([OSError("no"), None])

    async def look() -> None:
        await asyncio.sleep(0)
        error = next(answers)
        if error is not None:
            raise error

    async def story() -> None:
        together = Together(look)
        both = await asyncio.gather(together.get(), together.get(), return_exceptions=True)
        assert [str(error) for error in both] == ["no", "no"]
        await together.get()

    asyncio.run(story())
