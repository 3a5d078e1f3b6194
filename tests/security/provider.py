"""An identity provider on a loopback port, with a discovery document and keys."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

NOW_S = 1_800_000_000


class Provider:
    """An identity provider on a loopback port."""

    def __init__(self) -> None:
        self.keys: list[RSAKey | ECKey] = [RSAKey.generate_key(2048, {"kid": "one", "use": "sig"})]
        self.asked: list[str] = []
        self.is_down = False
        self.may_answer = threading.Event()
        """Cleared: answers wait."""
        self.may_answer.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked.append(self.path)
                provider.may_answer.wait(timeout=10)
                found = provider.documents().get(self.path)
                body = json.dumps(found).encode()
                self.send_response(503 if provider.is_down or found is None else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/realm"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def documents(self) -> dict[str, Any]:
        return {
            "/realm/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": f"{self.url}/keys"},
            "/realm/keys": {"keys": [key.as_dict(private=False) for key in self.keys]},
        }

    def token(self, header: dict[str, Any] | None = None, key: Any = None, **changes: Any) -> str:
        claims = {"iss": self.url, "aud": "modelyard", "sub": "ada", "tenant": "vision", "exp": NOW_S + 60}
        claims = {name: value for name, value in {**claims, **changes}.items() if value is not None}
        header = {"alg": "RS256", "kid": "one", **(header or {})}
        return jwt.encode(header, claims, key or self.keys[0], algorithms=["RS256", "ES256", "HS256", "PS256"])
