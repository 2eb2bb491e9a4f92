"""Signs of life: each connection is pinged by a task of its own, so no peer hides another.

A peer whose machine froze or whose cable was cut says nothing, and TCP alone would keep it for
many minutes. It is given up after two pings in a row that it does not answer.
"""

from __future__ import annotations

import logging
import os
import random
from typing import Any

import trio
from libp2p.host.ping import ID as PING
from libp2p.host.ping import PING_LENGTH
from libp2p.protocol_muxer.exceptions import ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

from lumaris_overlay.libp2p.circuit import reset
from lumaris_overlay.libp2p.connections import ConnectionWatch
from lumaris_overlay.libp2p.overrides import read_exactly, strangers

logger = logging.getLogger(__name__)

# Jitter keeps the pings of connections that were made together apart.
_PERIOD_S = (8.0, 10.0)
# A busy machine may be late by seconds. After the second wait it is no use to wait any longer: all
# in all a frozen peer is given up within 17 s.
_WAITS_S = (5.0, 2.0)


class Health:
    """Pings every connection of a host for as long as it lasts, and cuts those of dead peers."""

    def __init__(self, host: Any, nursery: trio.Nursery) -> None:
        self._host, self._nursery = host, nursery

    def start(self) -> None:
        """Look after each connection from now on."""
        self._host.get_network().register_notifee(ConnectionWatch(self._met))

    def _met(self, connection: Any) -> None:
        self._nursery.start_soon(_look_after, connection)


async def _look_after(connection: Any) -> None:
    pings = _Pings(connection)
    while not connection.is_closed:
        with trio.move_on_after(random.uniform(*_PERIOD_S)):  # noqa: S311 - not a secret
            await connection.muxed_conn.event_closed.wait()
            return
        if not (await pings.answered(_WAITS_S[0]) or await pings.answered(_WAITS_S[1])):
            strangers.note(str(connection.muxed_conn.peer_id), "silent")
            await connection.muxed_conn.cut()


class _Pings:
    """The pings of one connection, on one stream while that works: a new one costs much more."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._stream: Any = None

    async def answered(self, wait_s: float) -> bool:
        """Whether the peer answers within this time. Never raises."""
        try:
            with trio.fail_after(wait_s):
                return await self._ask()
        except Exception as error:
            logger.debug("ping peer=%s error=%r", self._connection.muxed_conn.peer_id, error)
        stream, self._stream = self._stream, None
        if stream is not None:
            await reset(stream)
        return False

    async def _ask(self) -> bool:
        if self._stream is None:
            self._stream = await self._connection.new_stream()
            try:
                await MultiselectClient().select_one_of(
                    [PING], MultiselectCommunicator(self._stream), round(_WAITS_S[0])
                )
            except ProtocolNotSupportedError:
                # It answered, if not that: we may be a stranger to it.
                stream, self._stream = self._stream, None
                await reset(stream)
                return True
        sent = os.urandom(PING_LENGTH)
        await self._stream.write(sent)
        return await read_exactly(self._stream, PING_LENGTH) == sent
