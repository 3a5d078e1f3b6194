"""A cable that loses and delays packets, without the kernel's netem, which not every kernel has."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import subprocess
import threading
import time

ALL_PROTOCOLS, OUTGOING = 3, 4
SOL_PACKET, VNET_HEADER = 263, 15
"""With each frame comes a header that says what of its checksum and segments the kernel has not made yet."""
LONGEST_FRAME = 1 << 17


class Lossy:
    """Takes a cable out of its bridge, and carries each frame over by hand.

    Args:
        cable: the outside end of a host's cable.
        bridge: where it is plugged in.
        delay_s: of each frame, in each direction.
        loss: the part of the frames that is lost, in each direction.
    """

    def __init__(self, cable: str, bridge: str, delay_s: float, loss: float) -> None:
        self._cable, self._bridge, self._delay_s, self._loss = cable, bridge, delay_s, loss
        self._over = threading.Event()
        self._random = random.Random(0)
        _ip("link", "add", f"{cable}x", "type", "veth", "peer", "name", f"{cable}y")
        _ip("link", "set", f"{cable}x", "arp", "off", "up")
        _ip("link", "set", f"{cable}y", "master", bridge, "up")
        _ip("link", "set", cable, "nomaster", "arp", "off")
        self._sockets = [_opened(name) for name in (cable, f"{cable}x")]
        self._threads: list[threading.Thread] = []
        for source, sink in (self._sockets, self._sockets[::-1]):
            waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            self._threads.append(threading.Thread(target=self._take, args=(source, waiting), daemon=True))
            self._threads.append(threading.Thread(target=self._give, args=(sink, waiting), daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Plug the cable in again."""
        self._over.set()
        for thread in self._threads:
            thread.join(5 + self._delay_s)
        for each in self._sockets:
            each.close()
        _ip("link", "set", self._cable, "arp", "on", "master", self._bridge)
        _ip("link", "del", f"{self._cable}x")

    def _take(self, source: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                frame, address = source.recvfrom(LONGEST_FRAME)
                if address[2] != OUTGOING and self._random.random() >= self._loss:
                    waiting.put((time.monotonic() + self._delay_s, frame))

    def _give(self, sink: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        while not self._over.is_set():
            with contextlib.suppress(queue.Empty, OSError):  # one that cannot be sent is lost, too
                due, frame = waiting.get(timeout=0.2)
                time.sleep(max(0.0, due - time.monotonic()))
                sink.send(frame)


def _opened(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(ALL_PROTOCOLS))
    opened.setsockopt(SOL_PACKET, VNET_HEADER, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    opened.bind((interface, 0))
    opened.settimeout(0.2)
    return opened


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
