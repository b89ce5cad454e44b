"""Whose the flows are that begin now: the agent's part in a hand-over (`handover`).

They are left to kube-proxy, or whoever else, until what that has begun is known: at the start, before another
uplink is served, and after `lbproxy migrate return`.
"""

import asyncio
import contextlib
import logging
import typing
from collections.abc import Callable

from lbproxy import controller, errors, gate
from lbproxy.config import config
from lbproxy.kernel import datapath
from lbproxy.migrate import handover

_log = logging.getLogger(__name__)

_RETRY_S: typing.Final = 5.0
_RETURN_CHECK_S: typing.Final = 1.0
_STAY: typing.Final = "new flows from outside stay with the other proxy"


def leave_if_needed(
    hand_over: handover.HandOver, settings: config.Config, path: datapath.Datapath, outcome: datapath.Outcome
) -> bool:
    """Where flows of another proxy may be about to come our way, leave them to it; whether so."""
    if hand_over.learning:
        return True
    created = outcome.how == "created"
    attached = any(held.alive for held in path.device_links.held())
    if not created and (attached or not settings.packet_path):
        return False
    hand_over.begin(sockets=created)
    return True


def look_again(hand_over: handover.HandOver, loop: asyncio.AbstractEventLoop) -> None:
    """Before another uplink is served: connections may have begun there. Not on the event loop."""
    hand_over.look()
    loop.call_soon_threadsafe(hand_over.started)


class NewFlows:
    """Begins flows once those of another proxy are known."""

    def __init__(
        self, hand_over: handover.HandOver, control: controller.Controller, writing: gate.Gate
    ) -> None:
        self._hand_over = hand_over
        self._control = control
        self._writing = writing

    async def begin(self, attached: asyncio.Event, *, left: bool) -> None:
        """As soon as all devices and services are there; then keep rows as the tracker's entries are.

        `left` says that new flows are left to the other proxy until then.
        """
        await attached.wait()
        await self._control.complete.wait()
        while left:
            left = not await self._know(self._hand_over.finish, _RETRY_S, "not ready until that is known, ")
            if left:
                await asyncio.sleep(_RETRY_S)
        self._control.devices_served()
        self._hand_over.started()
        await self._hand_over.run()

    async def watch_return(self) -> typing.NoReturn:
        """Say while new connections are kube-proxy's: somebody may have forgotten it. End it, when asked."""
        control = self._control
        while True:
            with contextlib.suppress(OSError):
                said = handover.RETURNING if self._hand_over.returning else ""
                if said and not control.return_notice:
                    _log.warning("%s", said)
                elif control.return_notice and not said:
                    _log.info("new connections are lbproxy's again")
                control.return_notice = said
                if control.ready.is_set():
                    await self._resume_if_asked()
            await asyncio.sleep(_RETURN_CHECK_S)

    async def _resume_if_asked(self) -> None:
        """Do what `lbproxy migrate take-over` asks for, which is another process. Raises OSError."""
        if not self._hand_over.unfinished:
            self._control.handover_problem = ""
        elif await self._know(lambda: self._hand_over.resume(asked=False), _RETURN_CHECK_S):
            self._hand_over.started()

    async def _know(self, learn: Callable[[], object], again_s: float, meanwhile: str = "") -> bool:
        """Learn what the other proxy has begun; says once why it can not be. False: to be tried again."""
        try:
            async with self._writing.shared():
                await asyncio.to_thread(learn)
        except (OSError, errors.AgentError) as error:
            problem = f"{_STAY}: {error}"
            if problem != self._control.handover_problem:
                _log.error("%s; %stried again every %g s", problem, meanwhile, again_s)
            self._control.handover_problem = problem
            return False
        self._control.handover_problem = ""
        return True
