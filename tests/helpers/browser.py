"""JupyterLab and a headless Chromium, for tests and pictures.

python tests/helpers/browser.py NOTEBOOK PICTURE    # run a notebook and take a picture of the explorer in it
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[2]
VIEW = ".lineas-explorer"


def chromium() -> str | None:
    """The system's Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """A JupyterLab of its own on `folder`, without anybody's settings; gives its address."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        settings = Path(home, "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings")
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers"))),
            "JUPYTER_CONFIG_DIR": f"{home}/config",
            "JUPYTER_DATA_DIR": f"{home}/data",
            "JUPYTER_RUNTIME_DIR": f"{home}/run",
            "JUPYTERLAB_SETTINGS_DIR": f"{home}/settings",
            "JUPYTERLAB_WORKSPACES_DIR": f"{home}/workspaces",
            "IPYTHONDIR": f"{home}/ipython",
        }
        command = [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"),
            *("--ip=127.0.0.1", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"),
            f"--ServerApp.root_dir={folder}",
        ]
        with Path(home, "log").open("w+") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                _wait_for(f"http://127.0.0.1:{port}/api", server, Path(home, "log"))
                yield f"http://127.0.0.1:{port}"
            finally:
                server.terminate()
                server.wait(timeout=60)


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(url).close()
            return
        except urllib.error.URLError:
            if server.poll() is not None:
                break
            time.sleep(0.25)
    raise RuntimeError(f"JupyterLab does not answer:\n{log.read_text()[-2000:]}")


@contextmanager
def browser(scale: float = 1.0) -> Iterator[Page]:
    """A page of a headless Chromium; errors in the page are errors here when it is closed."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not work for root
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        page = chrome.new_page(viewport={"width": 1200, "height": 1000}, device_scale_factor=scale)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(60_000)
        try:
            yield page
        finally:
            chrome.close()
        if errors:
            raise AssertionError(f"errors in the page: {errors}")


def open_notebook(page: Page, address: str, name: str) -> None:
    """Open a notebook of the lab's folder, its kernel ready."""
    page.goto(f"{address}/doc/tree/{name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")


def run_all(page: Page) -> None:
    """Start to run all cells."""
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")


def main(notebook: str, picture: str) -> None:
    with tempfile.TemporaryDirectory() as folder, lab(Path(folder)) as address, browser(scale=2) as page:
        shutil.copy(notebook, Path(folder, "notebook.ipynb"))
        page.set_default_timeout(600_000)
        open_notebook(page, address, "notebook.ipynb")
        run_all(page)
        view = page.locator(f"{VIEW}[data-point]").first
        view.wait_for()
        button = view.get_by_role("button", name="Generate")
        if button.count():
            button.click()
            page.locator(f"{VIEW}[data-text=done]").first.wait_for()
        view.screenshot(path=picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
