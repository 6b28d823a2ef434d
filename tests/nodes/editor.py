"""ComfyUI's own editor in a browser, against a small server that answers what ComfyUI's would.

The editor is the `comfyui-frontend-package` from PyPI, as it is; the server says which nodes there are (the core ones
recorded in ``object_info.json``, ours as they describe themselves) and keeps what the editor sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tornado import web, websocket
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from alkahest import nodes

OBJECT_INFO = Path(__file__).parent / "object_info.json"
WEB = Path(nodes.__file__).parent / "web"
ANSWERS: dict[str, Any] = {
    "users": {"storage": "server", "migrated": True},
    "settings": {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False},
    "system_stats": {
        "system": {"os": "posix", "comfyui_version": "0.0", "python_version": "3", "argv": [], "ram_total": 0},
        "devices": [],
    },
    "features": {},
    "extensions": ["/extensions/alkahest/" + path.name for path in sorted(WEB.glob("*.js"))],
    "workflow_templates": {},
    "global_subgraphs": {},
    "i18n": {},
    "queue": {"queue_running": [], "queue_pending": []},
    "history": {},
    "prompt": {"exec_info": {"queue_remaining": 0}},
}


def described(name: str, kind: Any) -> dict[str, Any]:
    """A node of ours as ComfyUI's ``/object_info`` describes it."""
    inputs = kind.INPUT_TYPES()
    return {
        "input": inputs,
        "input_order": {group: list(fields) for group, fields in inputs.items()},
        "output": list(kind.RETURN_TYPES),
        "output_is_list": [False] * len(kind.RETURN_TYPES),
        "output_name": list(getattr(kind, "RETURN_NAMES", kind.RETURN_TYPES)),
        "name": name,
        "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS[name],
        "description": getattr(kind, "DESCRIPTION", ""),
        "python_module": "custom_nodes.alkahest",
        "category": kind.CATEGORY,
        "output_node": getattr(kind, "OUTPUT_NODE", False),
    }


def object_info() -> dict[str, Any]:
    """Core's nodes as they were recorded, and ours."""
    core = json.loads(OBJECT_INFO.read_text())["nodes"]
    return core | {name: described(name, kind) for name, kind in nodes.NODE_CLASS_MAPPINGS.items()}


class Answer(web.RequestHandler):
    def get(self, name: str) -> None:
        first = name.split("/")[0]
        answers = self.application.settings["answers"]
        found = object_info() if first == "object_info" else answers.get(first, [])
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(found))

    def post(self, name: str) -> None:
        self.application.settings["sent"].append((name, self.request.body))
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps({"prompt_id": "1", "number": 1, "node_errors": {}} if name == "prompt" else {}))


class Socket(websocket.WebSocketHandler):
    def open(self, *_: Any) -> None:
        self.application.settings["sockets"].append(self)
        self.write_message(json.dumps({"type": "status", "data": {"status": ANSWERS["prompt"], "sid": "tests"}}))

    def on_message(self, message: str | bytes) -> None:
        del message


class Server:
    """Runs in a thread of its own until it is closed."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.address, self.sent, self.sockets = "", list[tuple[str, bytes]](), list[Socket]()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._ready.wait(20)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        static = str(importlib.resources.files("comfyui_frontend_package") / "static")
        application = web.Application(
            [
                (r"/ws", Socket),
                (r"/extensions/alkahest/(.*)", web.StaticFileHandler, {"path": str(WEB)}),
                (r"/api/(.*)", Answer),
                (r"/(.*)", web.StaticFileHandler, {"path": static, "default_filename": "index.html"}),
            ],
            answers=self.answers,
            sent=self.sent,
            sockets=self.sockets,
        )
        sockets = bind_sockets(0, "127.0.0.1")
        self.address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        server = HTTPServer(application)
        server.add_sockets(sockets)
        self._ready.set()
        self._loop.run_forever()

    def tell(self, kind: str, data: dict[str, Any]) -> None:
        """Send the editor a message, as a running graph does."""
        text = json.dumps({"type": kind, "data": data})
        for one in self.sockets:
            self._loop.call_soon_threadsafe(one.write_message, text)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)


class Editor:
    """A page with the editor in it."""

    def __init__(self, page: Any, server: Server) -> None:
        self.page, self.server = page, server

    def load(self, workflow: Any) -> None:
        """Open a workflow, in the editor's form or the API's, as dropping its file does."""
        how = "loadGraphData" if "nodes" in workflow else "loadApiJson"
        self.page.evaluate(f"async (w) => {{ await window.app.{how}(w, 'test') }}", workflow)

    def type_into(self, node: int, widget: str, text: str) -> None:
        """Double-click on a widget of a node, and type."""
        place = """([id, name]) => {
            const { canvas, graph } = window.app, node = graph.getNodeById(id);
            canvas.ds.scale = 1; canvas.ds.offset[0] = canvas.ds.offset[1] = 0;
            canvas.draw(true, true);
            const widget = node.widgets.find((one) => one.name === name);
            const box = canvas.canvas.getBoundingClientRect();
            return [box.left + node.pos[0] + node.size[0] / 2, box.top + node.pos[1] + widget.last_y + 10];
        }"""
        x, y = self.page.evaluate(place, [node, widget])
        self.page.mouse.dblclick(x, y)
        field = self.page.locator(".graphdialog input").first
        field.fill(text)
        field.press("Enter")

    def type_into_page(self, node: int, widget: str, text: str) -> None:
        """The same where nodes are parts of the page ("Nodes 2.0") and not drawn on a canvas."""
        field = self.page.locator(f"[data-node-id='{node}'] [data-widget-name='{widget}'] input")
        field.focus()
        field.fill(text)
        field.press("Enter")

    def prompt(self) -> dict[str, Any]:
        """The graph as the editor would send it to the server."""
        return dict(self.page.evaluate("async () => (await window.app.graphToPrompt()).output"))


@contextlib.contextmanager
def opened(browser: Any, in_page: bool = False, **answers: Any) -> Iterator[Editor]:
    """The editor, with its nodes on a canvas or in the page, and a server that gives other answers where told to."""
    settings = {**ANSWERS["settings"], "Comfy.VueNodes.Enabled": in_page}
    server = Server({**ANSWERS, "settings": settings, **answers})
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    try:
        page.goto(server.address)
        page.wait_for_function("!!(window.app?.graph && window.LiteGraph?.registered_node_types?.UNETLoader)")
        yield Editor(page, server)
    finally:
        page.close()
        server.close()
