"""A server of the page and a browser, one of each for all tests here."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked.interrupts import interruptible

ROOT = Path(__file__).resolve().parents[3]
LONGEST = 120_000  # ms that a page may take for anything, on a machine that has much else to do
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",  # containers have little of it
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
    how = {"text": True, "stdout": subprocess.PIPE, "preexec_fn": interruptible}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, **how)
    try:
        line = server.stdout.readline()
        assert f"http://127.0.0.1:{port}/" in line
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    assert list(temporary.iterdir()) == []


@pytest.fixture(scope="session")
def context() -> Iterator[Any]:
    """Chromium of the system, without a window; its cache serves all tabs."""
    sync = pytest.importorskip("playwright.sync_api", reason="make browser installs playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("make browser installs chromium")
    sync.expect.set_options(timeout=LONGEST)
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(LONGEST)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield context
        browser.close()


@pytest.fixture
def tab(address: str, context: Any) -> Iterator[Callable[..., Any]]:
    """Opens tabs that show the page, ask nobody else for anything and say no error."""
    opened, errors, outside = [], [], []

    def asked(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            outside.append(request.url)

    def shown(query: str = "") -> Any:
        page = context.new_page()
        opened.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", asked)
        page.goto(f"{address}{query}")
        page.locator("#canvas canvas[data-ready]").wait_for()  # it listens
        return page

    yield shown
    for page in opened:
        page.close()
    assert (errors, outside) == ([], [])


@pytest.fixture
def page(tab: Callable[..., Any]) -> Any:
    """A tab that shows the page."""
    return tab()
