"""A real ComfyUI, started as a server on a folder of its own, where COMFYUI_PATH says that there is one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alkahest.nodes.install import install


class Refused(Exception):
    """What the server said instead of running a graph."""


class Server:
    def __init__(self, address: str, base: Path) -> None:
        self.address, self.base = address, base

    def run(self, graph: dict[str, Any], seconds: float = 900) -> dict[str, Any]:
        """Run a graph to its end; what its nodes put out, by node."""
        body = json.dumps({"prompt": graph, "extra_data": {"extra_pnginfo": {"workflow": {"note": "ü"}}}}).encode()
        request = urllib.request.Request(f"{self.address}/prompt", body, {"Content-Type": "application/json"})
        try:
            number = json.load(urllib.request.urlopen(request, timeout=60))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from None
        for _ in range(int(seconds * 4)):
            history = json.load(urllib.request.urlopen(f"{self.address}/history/{number}", timeout=60))
            if number in history and history[number]["status"]["completed"] is not None:
                status = history[number]["status"]
                if status["status_str"] != "success":
                    raise Refused(json.dumps(status["messages"][-1])[:4000])
                return dict(history[number]["outputs"])
            time.sleep(0.25)
        raise TimeoutError(number)

    def saved(self, prefix: str) -> Path:
        """The newest file that a node saved under a prefix."""
        (path,) = sorted((self.base / "output").glob(f"{prefix}_*_.safetensors"))[-1:]
        return path

    @property
    def models(self) -> Path:
        return self.base / "models"


@contextlib.contextmanager
def started(base: Path, *arguments: str) -> Iterator[Server]:
    comfyui = Path(os.environ["COMFYUI_PATH"])
    places = [comfyui / "venv/bin/python", comfyui / ".venv/bin/python"]
    python = os.environ.get("COMFYUI_PYTHON") or next((str(one) for one in places if one.is_file()), sys.executable)
    for name in ("custom_nodes", "models/diffusion_models", "models/loras", "models/checkpoints", "input", "output"):
        (base / name).mkdir(parents=True, exist_ok=True)
    install(base)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        python,
        str(comfyui / "main.py"),
        "--cpu",
        "--listen",
        "127.0.0.1",
        f"--port={port}",
        f"--base-directory={base}",
        "--disable-auto-launch",
        "--disable-api-nodes",
        *arguments,
    ]
    with (base / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=comfyui, env={**os.environ, "ALKAHEST_CACHE": str(base / "cache")}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(480):
            if server.poll() is not None:
                break
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/system_stats", timeout=1).close()
                yield Server(address, base)
                return
            time.sleep(0.5)
        raise RuntimeError("ComfyUI did not start: " + (base / "server.log").read_text()[-3000:])
    finally:
        server.terminate()
        server.wait(60)
