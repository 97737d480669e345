"""The server of the page: on this machine alone, with nothing from outside."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dense_attn._command import UserError

from .models import load_model
from .session import Session

# The browser itself keeps the page from fetching anything elsewhere.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'"
)
MOST_UPLOADED = "20mb"


class Policy:
    """A layer of the server that adds the policy to every answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Hand a request on."""

        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode())]
                message = message | {"headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def main(model: str | None, host: str, port: int | None, show: bool) -> int:
    """Serve the page until Ctrl-C; its folder is gone with it."""
    _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="dense_attn-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # before gradio is imported, which reads it then
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from starlette.middleware import Middleware

        from .look import CSS, THEME
        from .page import Page

        session = Session(load_model(model))
        blocks = Page(session, Path(folder) / "page").blocks()
        blocks.queue(api_open=False)
        blocks.launch(
            server_name=host,
            server_port=port,
            inbrowser=show,
            share=False,
            ssr_mode=False,
            theme=THEME,
            css=CSS,
            footer_links=[],
            max_file_size=MOST_UPLOADED,
            enable_monitoring=False,
            quiet=True,
            app_kwargs={"middleware": [Middleware(Policy)]},
            prevent_thread_lock=True,
        )
        print(f"{blocks.local_url} shows the page until Ctrl-C", flush=True)
        blocks.block_thread()
    return 0


def _check_address(host: str, port: int | None) -> None:
    """Refuse an address that cannot be listened on, before a model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port must be free, got {port}") from None
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host must be an address of this machine, got {host!r}") from None
        raise
