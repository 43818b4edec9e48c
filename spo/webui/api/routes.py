"""The routes /spo/v1/...: start, status, stop, runs, compare, settings.

They are added to the WebUI's own app, behind --api-auth as its own are. A refusal is a 4xx whose JSON has one sentence
in "detail". Endpoints are plain functions, so FastAPI runs them in a thread, never on the server's event loop.
"""

from __future__ import annotations

import base64
import json
import math
import secrets
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, get_type_hints

from fastapi import APIRouter, FastAPI, HTTPException, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.security.http import HTTPBase

from spo import config, presets
from spo.errors import SpoError, nearest
from spo.webui import folders, runs
from spo.webui.api import bodies
from spo.webui.api.bodies import MAX_BYTES, NotJSONError, shortened
from spo.webui.jobs import comparison, job
from spo.webui.jobs.training import HOST_OWNED, TrainingRequest, start_training
from spo.webui.seam import webui

ROOT = "/spo/v1"
_READ_ON_BYTES = 16 * MAX_BYTES  # of a body that is too large, so that its sender gets to hear so
# HTTP basic without reading the credentials: FastAPI's HTTPBasic reads ASCII only, and passwords have other letters
_BASIC = HTTPBase(scheme="basic", scheme_name="HTTPBasic", auto_error=False)


def add_routes(app: FastAPI) -> None:
    """Add the routes to the WebUI's app: at its start, and to the new app of each Reload UI."""
    router = APIRouter(
        prefix=ROOT,
        tags=["SPO"],
        route_class=_Route,
        default_response_class=_AsciiJSON,
        dependencies=[Security(_BASIC)] if webui.api_auth() else [],
    )
    refusals = {401: "credentials of --api-auth are missing or wrong"} if webui.api_auth() else {}
    body_refusals = refusals | {
        400: "the body is not JSON",
        409: "other work is going on",
        413: f"the body is larger than {MAX_BYTES} bytes",
        415: "the content type is not application/json",
        422: "something in the body cannot be used",
    }

    def add(method: str, name: str, endpoint: Callable[..., dict[str, Any]], summary: str) -> None:
        texts = body_refusals if method == "POST" else refusals
        router.add_api_route(
            f"/{name}",
            endpoint,
            methods=[method],
            name=f"spo_{name}",
            summary=summary,
            responses={code: {"description": text} for code, text in texts.items()},
        )

    add("POST", "start", start, "Train a LoRA for the loaded checkpoint")
    add("GET", "status", current_status, "What is going on, or the last work")
    add("POST", "stop", stop, "End the current work")
    add("GET", "runs", list_runs, "Runs in the LoRA folder, newest first")
    add("POST", "compare", compare, "Make a grid: base against LoRAs")
    add("GET", "settings", list_settings, "Settings of `start` with ranges, presets, preference models")
    app.include_router(router)


class _AsciiJSON(Response):
    """ASCII, since file names need not be characters."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


class _Route(APIRoute):
    """Credentials first, then the body; every refusal as one sentence."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = super().get_route_handler()

        async def handler(request: Request) -> Response:
            headers: Mapping[str, str] | None = None
            try:
                _authorise(await _BASIC(request))
                return await endpoint(_StrictRequest(request.scope, request.receive))
            except RequestValidationError as error:
                body = getattr(error, "body", None)
                code, detail = 422 if isinstance(body, dict) else 400, self._sentence(error, body)
            except HTTPException as error:
                code, detail, headers = error.status_code, str(error.detail), getattr(error, "headers", None)
            except SpoError as error:
                code, detail = _status_of(error), str(error)
            detail = shortened(" ".join(folders.placeless(detail).split()))
            return _AsciiJSON({"detail": detail}, code, dict(headers or {}))

        return handler

    def _sentence(self, error: RequestValidationError, body: Any) -> str:
        return bodies.sentence(error.errors()[0], body, get_type_hints(self.endpoint)["body"])


class _StrictRequest(Request):
    """A request whose JSON is read strictly, and no further than is needed to refuse it."""

    _content: bytes | None = None

    async def body(self) -> bytes:
        """The body, however it is sent. Its type must be JSON, which a page of another site cannot send unasked."""
        if self._content is not None:
            return self._content
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, f'Content type is "{shortened(kind, 80)}"; it must be application/json.')
        chunks, size = bytearray(), 0
        async for chunk in self.stream():
            size += len(chunk)
            if size > _READ_ON_BYTES:
                break
            if size <= MAX_BYTES:
                chunks += chunk
        if size > MAX_BYTES:
            raise HTTPException(413, f"The body is larger than {MAX_BYTES} bytes; give fewer or shorter prompts.")
        self._content = bytes(chunks)
        return self._content

    async def json(self) -> Any:
        """The value of the body."""
        try:
            return bodies.read_json(await self.body())
        except NotJSONError as error:  # FastAPI lets its own errors through, and hides others
            raise HTTPException(400, str(error)) from None


def _status_of(error: SpoError) -> int:
    return 409 if isinstance(error, job.BusyError) else 422


def _authorise(given: Any) -> None:
    """Check HTTP basic credentials against --api-auth, in a time that does not tell how much of them was right."""
    if not webui.api_auth():
        return
    code = given.credentials if given is not None and given.scheme.lower() == "basic" else ""
    # every pair is compared, so that the time does not tell which one it was
    right = [secrets.compare_digest(code.encode(), base64.b64encode(pair)) for pair in webui.api_credentials()]
    if not any(right):
        raise HTTPException(
            401,
            "Give the user name and the password of --api-auth as HTTP basic credentials.",
            {"WWW-Authenticate": "Basic"},
        )


def start(body: bodies.Start) -> dict[str, Any]:
    """Start training; the answer is the status."""
    given = dict(body.settings)
    for name in given:
        if name in HOST_OWNED:
            raise SpoError(f"{name} is not a setting here: it comes from {HOST_OWNED[name]}; leave it out.")
    folders.lora_path(body.name)
    if body.resume and (body.prompts or body.styles):
        raise SpoError("A resumed run goes on with its own prompts; leave prompts and styles out.")
    config.build_config({**(presets.preset(body.preset).values if body.preset else {}), **given})
    _check_styles(body.styles)
    if "preference" in given:
        folders.preference_path(given["preference"])
    if given.get("start_from"):
        folders.lora_file(given["start_from"])
    _check_free()
    request = TrainingRequest(body.name, body.prompts, given, body.styles, body.resume, body.preset)
    return status(start_training(request))


def compare(body: bodies.Compare) -> dict[str, Any]:
    """Start a comparison; the answer is the status."""
    files = folders.lora_files()
    for name in body.loras:
        if name not in files:
            folders.lora_path(name)
    folders.preference_path(body.preference)
    _check_free()
    return status(comparison.start_comparison(comparison.CompareRequest(**dict(body))))


def stop(body: bodies.Stop) -> dict[str, Any]:
    """End the current work; the answer is the status."""
    job.stop(body.how)
    return status(job.current())


def current_status() -> dict[str, Any]:
    """The current work, or the last one."""
    return status(job.current())


def _check_free() -> None:
    """BusyError while work goes on, before the model is looked at."""
    now = job.current()
    if now is not None and now.live:
        raise job.BusyError(f'"{now.name}" is still going on; stop it or wait for its end.')


def _check_styles(names: list[str]) -> None:
    for name in names:
        if name not in (known := webui.style_names()):
            raise SpoError(f'style "{name}" is not known{nearest(name, known)}.')


def status(now: job.Job | None) -> dict[str, Any]:
    """A job as JSON, without paths of this machine. phase "idle": nothing was started yet."""
    if now is None:
        return {"phase": "idle", "live": False, "message": "Nothing has been started."}
    return {
        "phase": now.shown_phase,
        "live": now.live,
        "kind": now.kind,
        "name": now.name,
        "fraction": _number(now.fraction),
        "eta_s": _number(now.eta_s),
        "step": now.step,
        "message": folders.placeless(now.message),
        "log": [folders.placeless(line) for line in list(now.log)[-20:]],
        "metrics": _numbers(now.rows[-1]) if now.rows else {},
        "check": _numbers(now.checks[-1]) if now.checks else {},
        "output": folders.lora_name(now.output) if now.output else "",
        "picture": now.picture.name if now.picture else "",
        "table": now.table,
    }


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in row.items()}


def _number(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def list_runs() -> dict[str, Any]:
    """What there is of runs."""
    return {"runs": [_run(name) for name in folders.run_names()]}


def _run(name: str) -> dict[str, Any]:
    try:
        run = runs.read(name)
    except (SpoError, OSError, ValueError) as error:
        return {"name": name, "problem": shortened(folders.placeless(str(error)))}
    return {
        "name": name,
        "step": run.step,
        "steps": run.config.get("steps", 0),
        "finished": run.lora is not None,
        "stages": [folders.lora_name(path) for path in run.stages],
        "metrics": _numbers(run.rows[-1]) if run.rows else {},
    }


def list_settings() -> dict[str, Any]:
    """What `start` accepts."""
    own, described = bodies.own_settings(), bodies.settings_schema()
    return {
        "settings": {name: {**described[name], "section": own[name].section} for name in own},
        "presets": {
            preset.name: {
                "label": preset.label,
                "text": preset.text,
                "architecture": preset.architecture,
                "settings": dict(preset.values),
            }
            for preset in presets.NAMED.values()
        },
        "preferences": folders.preference_choices(),
        "styles": webui.style_names(),
    }
