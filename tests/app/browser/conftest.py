"""A server of the page and a browser, one of each for all tests here."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's server on the small model; its temporary folder is gone at its end."""
    for package in ("gradio", "playwright", "diffusers"):
        pytest.importorskip(package, reason=f"make browser installs {package}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "dense_attn", "app", "--port", str(port), "--threads", "1"]
    environment = os.environ | {"TMPDIR": str(temporary)}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    try:
        line = server.stdout.readline()
        assert f"http://127.0.0.1:{port}/" in line
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    assert list(temporary.iterdir()) == []


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium of the system, without a window."""
    sync = pytest.importorskip("playwright.sync_api", reason="make browser installs playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("make browser installs chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(address: str, browser: Any) -> Iterator[Any]:
    """A tab that shows the page, asks nobody else for anything and says no error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(60_000)
    page, errors, outside = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def asked(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            outside.append(request.url)

    page.on("request", asked)
    page.goto(address)
    page.locator("#canvas canvas[data-ready]").wait_for()  # it listens
    yield page
    context.close()
    assert (errors, outside) == ([], [])
