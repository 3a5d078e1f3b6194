"""Reading along on a bridge, as somebody on the same network would."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Self

ALL_PROTOCOLS = 3


class Capture:
    """Looks for byte strings in every frame that crosses an interface while the context lasts."""

    def __init__(self, interface: str, wanted: Sequence[bytes]) -> None:
        self.found: set[bytes] = set()
        self.bytes_seen = 0
        self._wanted = wanted
        self._ended = threading.Event()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(ALL_PROTOCOLS))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        self._socket.bind((interface, 0))
        self._socket.settimeout(0.2)
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)
        self._socket.close()

    def _read(self) -> None:
        while not self._ended.is_set():
            try:
                frame = self._socket.recv(1 << 17)
            except TimeoutError:
                continue
            self.bytes_seen += len(frame)
            self.found |= {each for each in self._wanted if each in frame}
