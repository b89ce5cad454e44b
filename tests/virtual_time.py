"""An event loop whose clock jumps: whoever sleeps wakes at once, in the right order, and no time passes.

What is given to a thread is done at once, by the loop itself.
"""

import asyncio
import collections.abc
import selectors
import typing

T = typing.TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """Does not wait: where the loop would, its clock goes on by as long."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits for something that can not come")
        self.now_s += max(0.0, timeout)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def run_in_executor(  # type: ignore[override]
        self, _executor: object, work: collections.abc.Callable[..., T], *arguments: typing.Any
    ) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(work(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


def run(main: collections.abc.Callable[[], collections.abc.Coroutine[typing.Any, typing.Any, T]]) -> T:
    """Run a coroutine function to its end in virtual time; `asyncio.get_running_loop().time` is its clock."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main())
