"""A small HTTP server that plays a Kubernetes API server, for the real client to talk to.

It is a fake: it stores what is created, finds it by name and label, refuses as an API server does, and runs nothing.
The statuses that tests put into it are written after the operators' types, and are checked against their CRDs.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>log))?"
)
CORE = ("configmaps", "pods", "secrets", "persistentvolumeclaims")


@dataclass
class ApiServer:
    """What it holds, by (plural, namespace, name).

    served: kinds whose operators are installed, as `jobset.x-k8s.io/v1alpha2/jobsets`
    refusals: what it answers to a method and plural whatever is asked, as {("POST", "jobsets"): (403, "no")}
    asked: every request, as `POST jobsets dryRun=All`; accepts: Accept of each
    """

    url: str = ""
    served: set[str] = field(default_factory=set)
    objects: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    refusals: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    accepts: list[str] = field(default_factory=list)

    def put(self, plural: str, body: dict[str, Any], *, namespace: str = "team-a") -> dict[str, Any]:
        """As if it had been created before."""
        self.objects[plural, namespace, body["metadata"]["name"]] = body
        return body

    def kubeconfig(self, path: Path, *, namespace: str | None = "team-a") -> Path:
        """A file with one context, `lab`, that leads here."""
        context = {"cluster": "lab", "user": "me"} | ({"namespace": namespace} if namespace else {})
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": {"token": "not-a-secret"}}],
            "contexts": [{"name": "lab", "context": context}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        return path

    def answer(self, method: str, path: str, accept: str, body: Any) -> tuple[int, Any]:
        """Status code and object, or text for a log."""
        parts = urlsplit(path)
        found = _PATH.fullmatch(parts.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if found is None:
            return _failure(404, "the server could not find the requested resource")
        plural, namespace, name = found["plural"], found["namespace"], found["name"]
        self.asked.append(" ".join([method, plural, *(f"{k}={v}" for k, v in sorted(query.items()))]))
        self.accepts.append(accept)
        known = plural in CORE if found["core"] else f"{found['group']}/{found['version']}/{plural}" in self.served
        if (method, plural) in self.refusals:
            return _failure(*self.refusals[method, plural])
        if not known:
            return _failure(404, "the server could not find the requested resource")
        if method == "POST":
            return self._create(plural, namespace, body, keep="dryRun" not in query)
        if name is None:
            return 200, {
                "kind": "List",
                "items": list(self._labelled(plural, namespace, query.get("labelSelector", ""))),
            }
        if found["sub"] == "log":
            return (
                (200, self.logs[name])
                if name in self.logs
                else _failure(400, f"container of {name} is waiting to start")
            )
        return self._one(method, (plural, namespace, name), body, names_only="PartialObjectMetadata" in accept)

    def _create(self, plural: str, namespace: str, body: dict[str, Any], *, keep: bool) -> tuple[int, Any]:
        name = body["metadata"]["name"]
        if (plural, namespace, name) in self.objects:
            return _failure(409, f'{plural} "{name}" already exists')
        made = {**body, "metadata": {**body["metadata"], "namespace": namespace, "uid": f"uid-of-{name}"}}
        if keep:
            self.put(plural, made, namespace=namespace)
        return 201, made

    def _one(self, method: str, key: tuple[str, str, str], body: Any, *, names_only: bool) -> tuple[int, Any]:
        if key not in self.objects:
            return _failure(404, f'{key[0]} "{key[2]}" not found')
        if method == "DELETE":
            return 200, self.objects.pop(key)
        if method == "PATCH":
            self.objects[key]["metadata"] |= body["metadata"]
        found = self.objects[key]
        return 200, {"kind": "PartialObjectMetadata", "metadata": found["metadata"]} if names_only else found

    def _labelled(self, plural: str, namespace: str, selector: str) -> Iterator[dict[str, Any]]:
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
        for (kind, where, _), item in self.objects.items():
            labels = item["metadata"].get("labels", {})
            if (kind, where) == (plural, namespace) and wanted.items() <= labels.items():
                yield item


def _failure(code: int, message: str) -> tuple[int, Any]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


@contextmanager
def api_server() -> Iterator[ApiServer]:
    """One that listens on a port of this machine until the end of the block."""
    api = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            code, answer = api.answer(self.command, self.path, self.headers.get("Accept", ""), body)
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PATCH = do_DELETE = _serve

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: `asked` remembers."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
