"""The API's routes over a stand-in for the WebUI; its refusals against a real one where SPO_WEBUI_URL names it.

    SPO_WEBUI_URL=http://127.0.0.1:7860 [SPO_WEBUI_AUTH=user:password] python -m pytest -s tests/webui/api

Runs where FastAPI is installed, which it is in the WebUI's own environment.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

import pytest

pytest.importorskip("fastapi")
testclient = pytest.importorskip("fastapi.testclient", exc_type=ImportError)

from fastapi import FastAPI  # noqa: E402

from tests.webui import stand_in  # noqa: E402
from tests.webui.api.bad_requests import GOOD, BadRequest, bad_requests  # noqa: E402

URL = os.environ.get("SPO_WEBUI_URL", "")
webui = stand_in.webui


def client_of(webui):
    from spo.webui.api.routes import add_routes

    app = FastAPI()
    add_routes(app)
    return testclient.TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client(webui):
    return client_of(webui)


def training_that_waits(monkeypatch):
    """Training is a wait for the event, which ends by itself; the event."""
    from spo.webui.jobs import training

    go_on = threading.Event()

    def wait(job, prepared, resume):
        job.phase = "working"
        job.rows.append({"step": 3.0, "loss": float("nan")})
        while not go_on.wait(0.01):
            if job.asked_to_stop():
                job.phase = "stopped"
                return

    monkeypatch.setattr(training, "_train", wait)
    return go_on


def settle(client):
    for _ in range(500):
        answer = client.get("/spo/v1/status").json()
        if not answer["live"]:
            return answer
        time.sleep(0.01)
    raise AssertionError("it did not end")


def one_sentence(detail):
    return isinstance(detail, str) and detail.strip() and "\n" not in detail and len(detail) <= 400


def send(client, request: BadRequest):
    content = iter([request.body[:7], request.body[7:]]) if request.chunked else request.body
    return client.request(request.method, request.path, content=content, headers=request.headers)


def test_bad_requests_are_refused_with_a_sentence(client, webui, tmp_path):
    requests = bad_requests()
    assert len(requests) >= 200
    for request in requests:
        answer = send(client, request)
        assert 400 <= answer.status_code < 500, (request.path, request.body[:200], answer.status_code)
        assert one_sentence(answer.json()["detail"]), (request.body[:200], answer.text)
        assert str(tmp_path) not in answer.text, answer.text
    assert client.get("/spo/v1/status").json()["phase"] == "idle"
    assert not list((tmp_path / "Lora").iterdir())


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [
        ("start", {"name": "../x"}, 422, "LoRA name"),
        ("start", {"settings": {"preference": "demo", "learning_rat": 1}}, 422, "learning_rate"),
        ("start", {"settings": {"preference": "demo", "device": "cuda"}}, 422, "leave it out"),
        ("start", {"nam": "x"}, 422, '"nam" is not known, did you mean "name"?'),
        ("start", {"preset": "paper-sdxl"}, 422, "sdxl"),
        ("start", {"styles": ["--- old ---"]}, 422, "style"),
        ("stop", {"how": "kill"}, 422, "save and now"),
        ("stop", {"how": "save"}, 422, "Nothing is going on"),
        ("compare", {"weights": ["1"]}, 422, "each a number"),
    ],
)
def test_what_the_refusal_says(client, route, body, status, words):
    answer = client.post(f"/spo/v1/{route}", json=GOOD[route] | body)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"how": ', "application/json", 400),
        (b"how=now", "application/x-www-form-urlencoded", 415),
        (b'{"how": "now"}', "text/plain", 415),
        (b" " * (2**20 + 1), "application/json", 413),
        (b'{"how": "now"}', "application/json; charset=utf-8", 422),
    ],
)
def test_status_of_a_body(client, content, kind, status):
    for body in (content, iter([content])):
        answer = client.post("/spo/v1/stop", content=body, headers={"Content-Type": kind})
        assert answer.status_code == status


def test_start_status_second_start_and_stop(client, monkeypatch):
    training_that_waits(monkeypatch)
    body = GOOD["start"] | {"preset": "demo", "styles": ["soft"]}
    begun = client.post("/spo/v1/start", json=body)
    assert begun.status_code == 200
    assert begun.json()["name"] == "never"
    assert begun.json()["live"]
    second = client.post("/spo/v1/start", json=body)
    assert second.status_code == 409
    assert "never" in second.json()["detail"]
    assert client.post("/spo/v1/compare", json=GOOD["compare"]).status_code == 409
    assert client.post("/spo/v1/stop", json={}).status_code == 200
    ended = settle(client)
    assert ended["phase"] == "stopped"
    assert ended["metrics"] == {"step": 3.0, "loss": None}
    assert client.post("/spo/v1/start", json=body).status_code == 200
    client.post("/spo/v1/stop", json={"how": "now"})
    assert settle(client)["phase"] == "stopped"


def test_what_training_is_asked_for(client, monkeypatch):
    """Preset, settings, styles reach the training with the checkpoint and the file in the LoRA folder."""
    from spo.webui.jobs import training

    seen = []
    monkeypatch.setattr(training, "_train", lambda job, prepared, resume: seen.append((prepared, resume)))
    body = {"name": "mine/vivid", "prompts": ["a fish", " "], "preset": "quick", "styles": ["soft"]}
    client.post("/spo/v1/start", json=body | {"settings": {"preference": "demo", "steps": 5}})
    settle(client)
    prepared, resume = seen[0]
    assert prepared.prompts == ["a fish, soft light"]
    assert (prepared.config.optimizer.steps, prepared.config.optimizer.learning_rate) == (5, 3e-4)
    assert prepared.config.run.output.endswith("Lora/mine/vivid.safetensors")
    assert not resume


def test_compare_is_asked_for(client, monkeypatch):
    from spo.webui.jobs import comparison, job

    seen = []

    def start_comparison(request):
        seen.append(request)
        return job.Job("comparison", "never", "task")

    monkeypatch.setattr(comparison, "start_comparison", start_comparison)
    answer = client.post("/spo/v1/compare", json=GOOD["compare"] | {"weights": [0.5, 1], "seeds": [1, 2]})
    assert answer.status_code == 200
    assert answer.json()["kind"] == "comparison"
    assert (seen[0].weights, seen[0].seeds, seen[0].steps) == ([0.5, 1], [1, 2], 20)


def test_no_answer_says_where_things_are_on_this_machine(client, webui, tmp_path, monkeypatch):
    from spo.webui.jobs import job

    place, secret = tmp_path / "Lora" / "mine" / "vivid.safetensors", str(tmp_path)
    finished = job.Job("training", "vivid", "task", phase="failed", output=place, picture=tmp_path / "grid.png")
    finished.say(f'"{place}" exists already; "{tmp_path / "SPO" / "x.bin"}" is damaged.')
    monkeypatch.setattr(job, "_current", finished)
    told = client.get("/spo/v1/status").json()
    assert (told["output"], told["picture"]) == ("mine/vivid", "grid.png")
    assert "Lora/mine/vivid.safetensors" in told["message"] and secret not in str(told)
    taken = tmp_path / "Lora" / "taken.safetensors"
    taken.write_bytes(b"")
    answer = client.post("/spo/v1/start", json=GOOD["start"] | {"name": "taken"})
    assert answer.status_code == 422 and "taken" in answer.text and secret not in answer.text


def test_runs_are_listed_even_where_one_is_damaged(client, tmp_path):
    damaged = {"cells": ("step\nx\n", '{"steps": 9}'), "settings": ("step\n4\n", "{")}
    for name, (metrics, settings) in {"one": ("step,loss\n4,0.5\n", '{"steps": 9}'), **damaged}.items():
        folder = sys.modules["spo.webui.folders"].run_folder(name)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(settings, encoding="utf-8")
        (folder / "metrics.csv").write_text(metrics, encoding="utf-8")
    (tmp_path / "Lora" / "one.safetensors").write_bytes(b"")
    listed = {run["name"]: run for run in client.get("/spo/v1/runs").json()["runs"]}
    assert listed["one"] == {
        "name": "one", "step": 4, "steps": 9, "finished": True, "stages": [], "metrics": {"step": 4.0, "loss": 0.5}
    }  # fmt: skip
    assert listed["cells"]["step"] == 0
    assert "problem" in listed["settings"]


def test_settings_and_schema(client):
    from spo.webui.jobs.training import HOST_OWNED

    told = client.get("/spo/v1/settings").json()
    assert told["settings"]["rank"]["minimum"] == 1
    assert not set(HOST_OWNED) & set(told["settings"])
    assert told["presets"]["quick"]["settings"]["steps"] == 60
    assert told["preferences"] == ["demo"]
    assert told["styles"] == ["soft"]
    api = client.get("/openapi.json").json()
    paths = api["paths"]
    body = paths["/spo/v1/start"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Start"}
    body = api["components"]["schemas"]["Start"]
    assert body["additionalProperties"] is False and body["required"] == ["name"]
    assert body["properties"]["settings"]["properties"].keys() == told["settings"].keys()
    assert client.get("/docs").status_code == 200


def basic(text: bytes) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text).decode()}"}


def test_credentials(webui):
    webui.shared.cmd_opts.api_auth = "anna:straße,bob:b"
    client = client_of(webui)
    for route in ("status", "runs", "settings"):
        for right in ("anna:straße".encode(), b"bob:b"):
            assert client.get(f"/spo/v1/{route}", headers=basic(right)).status_code == 200
    wrong = [
        b"",
        b":",
        b"anna",
        b"anna:",
        b"anna:b",
        b"bob:straxe",
        "anna:straße ".encode(),
        b"\xff:\xff",
        b"anna:stra\xdfe",
    ]
    headers = [basic(one) for one in wrong]
    headers += [{}, {"Authorization": ""}, {"Authorization": "Basic"}, {"Authorization": "Basic ="}]
    headers += [{"Authorization": "Bearer x"}, {"Authorization": "Basic %%%"}, {"Authorization": b"Basic \xff\xfe"}]
    for header in headers:
        for route, body in GOOD.items():
            answer = client.post(f"/spo/v1/{route}", json=body, headers=header)
            assert answer.status_code == 401, header
            assert answer.headers["WWW-Authenticate"] == "Basic"
            assert one_sentence(answer.json()["detail"])
        assert client.get("/spo/v1/runs", headers=header).status_code == 401
    webui.shared.cmd_opts.api_auth = "no-colon"
    assert client.get("/spo/v1/runs", headers=basic(b"no-colon")).status_code == 401


def test_routes_come_back_on_the_app_of_a_reload(webui):
    for _ in range(2):
        assert client_of(webui).get("/spo/v1/status").status_code == 200


# ------------------------------------------------------------------------------------------------------ a real WebUI


def over_http(request: BadRequest, headers: dict[str, str]) -> tuple[int, bytes]:
    body = iter([request.body[:7], request.body[7:]]) if request.chunked else request.body
    asked = urllib.request.Request(URL + request.path, body, {**request.headers, **headers}, method=request.method)
    if "Content-Type" not in request.headers:
        asked.add_unredirected_header("Content-Type", "")
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.skipif(not URL, reason="SPO_WEBUI_URL does not name a WebUI")
def test_a_real_webui_refuses_the_same():
    auth = os.environ.get("SPO_WEBUI_AUTH", "")
    headers = basic(auth.encode()) if auth else {}
    counts: Counter[int] = Counter()
    for request in bad_requests():
        code, body = over_http(request, headers)
        counts[code] += 1
        assert 400 <= code < 500, (request.path, request.body[:200], code, body[:300])
        assert one_sentence(json.loads(body)["detail"]), (request.body[:200], body[:300])
    print(f"\n{counts.total()} bad requests: {dict(sorted(counts.items()))}")
    if auth:
        # a sender without credentials is answered before a large body is read, which breaks its pipe
        small = [request for request in bad_requests() if request.method == "POST" and len(request.body) < 50_000]
        without = Counter(over_http(request, {})[0] for request in small)
        print(f"without credentials: {dict(sorted(without.items()))}")
        assert set(without) <= {401, 404, 405}
    code, body = over_http(BadRequest("/spo/v1/status", "GET"), headers)
    assert code == 200
    assert not json.loads(body)["live"]
