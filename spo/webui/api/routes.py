"""The routes /spo/v1/...: start, status, stop, runs, compare, settings.

They are added to the WebUI's own app, behind --api-auth as its own are. A refusal is a 4xx whose JSON has one sentence
in "detail". Everything that reads the disk or the model runs in a thread, never on the server's event loop.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from spo import config, presets
from spo.config import Setting
from spo.errors import SpoError, nearest
from spo.webui import folders, runs
from spo.webui.api.bodies import MAX_BYTES, Field, NotJSONError, parse, schema, settings_schema, shortened
from spo.webui.jobs import job
from spo.webui.jobs.training import HOST_OWNED, TrainingRequest, start_training

ROOT = "/spo/v1"
_READ_ON_BYTES = 16 * MAX_BYTES  # of a body that is too large, so that its sender gets to hear so

_START = {
    "name": Field("text", "the LoRA's name; / stands for folders in the LoRA folder"),
    "prompts": Field("text", "prompts to train on; none with resume", [], many=True),
    "preset": Field("text", "a named group of settings; `settings` wins over it", ""),
    "settings": Field("settings", "as the command line's, by the same names; start_from is a LoRA's name here", {}),
    "styles": Field("text", "the WebUI's styles, by name, put on every prompt", [], many=True),
    "resume": Field("flag", "go on with the run of that name, with its prompts and settings", False),
}
_STOP = {
    "how": Field(
        "text", "save: end after what is being done, with all saved; now: without", "save", choices=("save", "now")
    ),
}
_COMPARE = {
    "prompts": Field("text", "prompts, a row each", many=True),
    "loras": Field("text", "names of LoRAs, as of runs and saved stages", many=True),
    "weights": Field("number", "LoRA weights, a column each", [1.0], many=True),
    "seeds": Field("whole number", "seeds, a row each", [0], many=True),
    "preference": Field("text", 'a preference model for scores; "": none', ""),
    "negative_prompt": Field("text", "negative prompt", ""),
    "sampler": Field("text", "the WebUI's name of a sampler", "Euler a"),
    "steps": Field("whole number", "sampling steps", 20),
    "guidance_scale": Field("number", "CFG scale", 7.0),
    "width": Field("whole number", "in pixels; 0: the checkpoint's own", 0),
    "height": Field("whole number", "in pixels, likewise", 0),
}


class _RefusalError(Exception):
    """Answered with this status and sentence."""

    def __init__(self, status: int, detail: str) -> None:
        self.status, self.detail = status, detail


def add_routes(app: FastAPI) -> None:
    """Add the routes to the WebUI's app: at its start, and to the new app of each Reload UI."""
    _add(app, "POST", "start", _start, "Train a LoRA for the loaded checkpoint", _START)
    _add(app, "GET", "status", lambda values: status(job.current()), "What is going on, or the last work")
    _add(app, "POST", "stop", _stop, "End the current work", _STOP)
    _add(app, "GET", "runs", _runs, "Runs in the LoRA folder, newest first")
    _add(app, "POST", "compare", _compare, "Make a grid: base against LoRAs", _COMPARE)
    _add(app, "GET", "settings", _settings, "Settings of `start` with ranges, presets, preference models")


def _add(
    app: FastAPI,
    method: str,
    name: str,
    answer: Callable[[dict[str, Any]], dict[str, Any]],
    summary: str,
    fields: Mapping[str, Field] | None = None,
) -> None:
    """A route that calls `answer` in a thread with the checked fields of the body (none: no body)."""

    async def endpoint(request: Request) -> Response:
        headers = {}
        try:
            _authorise(request.headers.get("authorization", ""))
            body = b"" if fields is None else await _body(request)
            return await run_in_threadpool(_answer, answer, body, fields)
        except _RefusalError as refusal:
            code, detail = refusal.status, refusal.detail
            headers = {"WWW-Authenticate": "Basic"} if code == 401 else {}
        except (SpoError, ClientDisconnect) as error:
            code, detail = _status_of(error), str(error)
        return _json({"detail": shortened(" ".join(detail.split()))}, code, headers)

    from modules import shared

    refusals = {401: "credentials of --api-auth are missing or wrong"} if shared.cmd_opts.api_auth else {}
    extra: dict[str, Any] = {"security": [{"HTTPBasic": []}]} if shared.cmd_opts.api_auth else {}
    if fields is not None:
        refusals |= {
            400: "the body is not JSON",
            409: "other work is going on",
            413: f"the body is larger than {MAX_BYTES} bytes",
            415: "the content type is not application/json",
            422: "something in the body cannot be used",
        }
        content = {"application/json": {"schema": schema(fields, _own_settings())}}
        extra["requestBody"] = {"required": True, "content": content}
    app.add_api_route(
        f"{ROOT}/{name}",
        endpoint,
        methods=[method],
        name=f"spo_{name}",
        summary=summary,
        tags=["SPO"],
        responses={code: {"description": text} for code, text in refusals.items()},
        openapi_extra=extra,
    )


def _answer(
    answer: Callable[[dict[str, Any]], dict[str, Any]], body: bytes, fields: Mapping[str, Field] | None
) -> Response:
    return _json(answer({} if fields is None else parse(body, fields)))


def _json(content: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """ASCII, since file names need not be characters."""
    return Response(json.dumps(content, allow_nan=False), code, dict(headers or {}), "application/json")


def _status_of(error: Exception) -> int:
    if isinstance(error, job.BusyError):
        return 409
    return 400 if isinstance(error, NotJSONError | ClientDisconnect) else 422


def _authorise(header: str) -> None:
    """Check "Basic ..." against --api-auth, in a time that does not tell how much of it was right."""
    from modules import shared

    if not shared.cmd_opts.api_auth:
        return
    kind, _, code = header.strip().partition(" ")
    try:
        given = base64.b64decode(code.strip(), validate=True) if kind.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        given = b""
    pairs = [pair.strip() for pair in shared.cmd_opts.api_auth.split(",")]
    # every pair is compared, so that the time does not tell which one it was
    right = [secrets.compare_digest(given, pair.encode("utf-8", "surrogateescape")) for pair in pairs if ":" in pair]
    if not any(right):
        raise _RefusalError(401, "Give the user name and the password of --api-auth as HTTP basic credentials.")


async def _body(request: Request) -> bytes:
    """The body, however it is sent. Its type must be JSON, which a page of another site cannot send unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _RefusalError(415, f'Content type is "{shortened(kind, 80)}"; it must be application/json.')
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _READ_ON_BYTES:
            break
        if size <= MAX_BYTES:
            body += chunk
    if size > MAX_BYTES:
        raise _RefusalError(413, f"The body is larger than {MAX_BYTES} bytes; give fewer or shorter prompts.")
    return bytes(body)


def _own_settings() -> dict[str, Setting]:
    return {name: setting for name, setting in config.settings().items() if name not in HOST_OWNED}


def _start(values: dict[str, Any]) -> dict[str, Any]:
    given = {**values["settings"]}
    for name in given:
        if name in HOST_OWNED:
            raise SpoError(f"{name} is not a setting here: it comes from {HOST_OWNED[name]}; leave it out.")
    folders.lora_path(values["name"])
    if values["resume"] and (values["prompts"] or values["styles"]):
        raise SpoError("A resumed run goes on with its own prompts; leave prompts and styles out.")
    if values["preset"]:
        given = {**presets.preset(values["preset"]).values, **given}
    config.build_config(given)
    _check_styles(values["styles"])
    if "preference" in given:
        _check_preference(given["preference"])
    if given.get("start_from"):
        given["start_from"] = _lora_file(given["start_from"])
    _check_free()
    _check_architecture(values["preset"])
    request = TrainingRequest(values["name"], values["prompts"], given, values["styles"], values["resume"])
    return status(start_training(request))


def _compare(values: dict[str, Any]) -> dict[str, Any]:
    for name in values["loras"]:
        folders.lora_path(name)
    _check_preference(values["preference"])
    _check_free()
    from spo.webui.jobs.comparison import CompareRequest, start_comparison

    return status(start_comparison(CompareRequest(**values)))


def _stop(values: dict[str, Any]) -> dict[str, Any]:
    job.stop(values["how"])
    return status(job.current())


def _check_free() -> None:
    """BusyError while work goes on, before the model is looked at."""
    now = job.current()
    if now is not None and now.live:
        raise job.BusyError(f'"{now.name}" is still going on; stop it or wait for its end.')


def _check_preference(name: str) -> None:
    """Only what is offered: a name from outside must not open a file elsewhere on this machine."""
    choices = folders.preference_choices()
    if name and name not in choices:
        raise SpoError(f'preference is "{name}"{nearest(name, choices)}; accepted are {", ".join(choices)}.')


def _check_styles(names: list[str]) -> None:
    for name in names:
        if name not in (known := _style_names()):
            raise SpoError(f'style "{name}" is not known{nearest(name, known)}.')


def _style_names() -> list[str]:
    """Without the headings that the WebUI keeps among them, which have no text."""
    from modules import shared

    return [name for name, style in shared.prompt_styles.styles.items() if style.prompt is not None]


def _check_architecture(preset: str) -> None:
    from modules import sd_models

    from spo.webui.host import architecture_of

    wanted = presets.preset(preset).architecture if preset else ""
    if wanted and wanted != architecture_of(sd_models.model_data.get_sd_model()):
        raise SpoError(f'preset "{preset}" is for another kind of checkpoint ({wanted}) than the one loaded.')


def _lora_file(name: str) -> str:
    path = folders.lora_path(name)
    if not path.is_file():
        raise SpoError(f'start_from is "{name}"; there is no such file in the LoRA folder.')
    return str(path)


def status(now: job.Job | None) -> dict[str, Any]:
    """A job as JSON. phase "idle": nothing was started yet."""
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
        "message": now.message,
        "log": list(now.log)[-20:],
        "metrics": _numbers(now.rows[-1]) if now.rows else {},
        "output": str(now.output) if now.output else "",
        "picture": str(now.picture) if now.picture else "",
        "table": now.table,
    }


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in row.items()}


def _number(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _runs(values: dict[str, Any]) -> dict[str, Any]:
    return {"runs": [_run(name) for name in folders.run_names()]}


def _run(name: str) -> dict[str, Any]:
    try:
        run = runs.read(name)
    except (SpoError, OSError, ValueError) as error:
        return {"name": name, "problem": shortened(str(error))}
    return {
        "name": name,
        "step": run.step,
        "steps": run.config.get("steps", 0),
        "finished": run.lora is not None,
        "stages": [folders.lora_name(path) for path in run.stages],
        "metrics": _numbers(run.rows[-1]) if run.rows else {},
    }


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    own = _own_settings()
    described = settings_schema(own)
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
        "styles": _style_names(),
    }
