"""Requests that the API must refuse, made from the settings, from lists of known tricks, and by a seeded generator."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from spo.config import settings
from spo.webui.api.bodies import MAX_BYTES
from spo.webui.jobs.training import HOST_OWNED

ROUTES = {"start": "POST", "stop": "POST", "compare": "POST", "status": "GET", "runs": "GET", "settings": "GET"}
# each would be accepted but for the one thing that is made wrong
GOOD: dict[str, dict[str, Any]] = {
    "start": {"name": "never", "prompts": ["a red fish"], "settings": {"preference": "demo", "steps": 1}},
    "stop": {"how": "save"},
    "compare": {"prompts": ["a red fish"], "loras": ["never"]},
}
BAD_NAMES = [
    "", " ", "/", ".", "..", "../up", "a/../../up", "a/./b", "/etc/passwd", "//host/share", "\\\\host\\share", "..\\up",
    "C:", "C:\\x", "c:/x", "x:y", "CON", "con.safetensors", "a/NUL", "aux.txt", "com1", "LPT9.x", ".hidden", "a/.b",
    "a.", "a/", "a//b", "a /b", "a\0b", "a\nb", "a\x7f", "a<b", "a|b", "a?b", "a*b", 'a"b', "a,b", "a" * 151, "ü" * 140,
    "😀" * 60, ".safetensors", "file:///etc/passwd", "a/..",
]  # fmt: skip
BAD_JSON = [
    b"", b" ", b"{", b"}", b"{]", b"null", b"[]", b"1", b"true", b'"name"', b'{"name"}', b"{'name': 'x'}", b"name=x",
    b"{}{}",
    b'{"how": NaN}', b'{"how": Infinity}', b'{"how": -Infinity}', b'{"how": 1e999}', b'{"how": -1e999}',
    b'{"how": ' + b"9" * 5000 + b"}", b'{"how": 1e}', b'{"how": 01}', b'{"how": "\xff"}', b"\xff\xfe\x00", b"\x00" * 64,
    b'{"how": "\\ud800"}', b'{"\\udfff": 1}', b'{"how": "\xed\xa0\x80"}', b'{"how": "save", "how": "now"}',
    b'{"how": "a\nb"}',
    b"[" * 100_000, b'{"a":' * 50_000, b"[" * 20 + b"]" * 20, b'{"how": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"' + b"k" * 5000 + b'": 1}', b'{"how": "save"} x', "{\"how\": \"save\"".encode("utf-16"), b"<how>save</how>",
]  # fmt: skip
BAD_TYPES = [
    "",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/jsonx",
]
KINDS = {
    "start": dict(name="text", prompts="texts", preset="text", settings="object", styles="texts", resume="flag"),
    "stop": dict(how="text"),
    "compare": dict(prompts="texts", loras="texts", weights="numbers", seeds="integers", preference="text")
    | dict(negative_prompt="text", sampler="text", guidance_scale="number", steps="integer", width="integer"),
}
WRONG: dict[str, list[Any]] = {
    "text": [None, True, 0, 1.5, [], ["x"], {}, {"a": 1}],
    "texts": [None, True, 0, "x", {}, [1], [None], [[]], ["x", {}]],
    "flag": [None, 0, 1, "true", [], {}],
    "object": [None, True, 0, "x", [], [1], [{}]],
    "number": [None, True, "1", [], {}, 10**400],
    "numbers": [None, 1, "1", {}, ["1"], [None], [True], [[1]], [10**400]],
    "integer": [None, True, "1", 1.5, [], {}],
    "integers": [None, 1, "1", {}, ["1"], [1.5], [False], [[]]],
}
ODD: list[Any] = [None, True, False, 0, -1, 1.5, 10**30, "", "x", [], [1], [None], [[]], {}, {"a": 1}, [{"a": "b"}]]


@dataclass(frozen=True)
class BadRequest:
    """chunked: sent without its length."""

    path: str
    method: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    chunked: bool = False


def bad_requests(seed: int = 0) -> list[BadRequest]:
    """All of them, in an order that mixes the kinds."""
    draws = random.Random(seed)
    found = [*_bodies(), *_methods(), *_names(draws), *_fields(), *_settings(), *_unknown(draws), *_noise(draws)]
    draws.shuffle(found)
    return found


def _request(route: str, body: Any) -> BadRequest:
    return BadRequest(f"/spo/v1/{route}", "POST", json.dumps(body).encode())


def _bodies() -> Iterator[BadRequest]:
    for route in GOOD:
        path, good = f"/spo/v1/{route}", json.dumps(GOOD[route]).encode()
        yield from (BadRequest(path, "POST", body) for body in BAD_JSON)
        for kind in BAD_TYPES:
            yield BadRequest(path, "POST", good, {"Content-Type": kind} if kind else {})
        padded = good + b" " * MAX_BYTES
        yield BadRequest(path, "POST", padded)
        yield BadRequest(path, "POST", padded, chunked=True)
        yield BadRequest(path, "POST", good[:-1], chunked=True)


def _methods() -> Iterator[BadRequest]:
    for route, method in ROUTES.items():
        for other in {"GET", "POST", "PUT", "DELETE", "PATCH"} - {method}:
            yield BadRequest(f"/spo/v1/{route}", other, b"{}")
    for path in ("/spo/v1/", "/spo/v1/nothing", "/spo/v2/status", "/spo/v1/start/..", "/spo/v1/runs/..%2f..%2fetc"):
        yield BadRequest(path, "POST", b"{}")


def _names(draws: random.Random) -> Iterator[BadRequest]:
    climbing = ["/".join(draws.choices(["..", "a", ".", "x y"], k=draws.randint(1, 5))) + "/../x" for _ in range(30)]
    for name in BAD_NAMES + climbing:
        yield _request("start", GOOD["start"] | {"name": name})
        yield _request("start", GOOD["start"] | {"name": name, "resume": True, "prompts": []})
        yield _request("compare", GOOD["compare"] | {"loras": [name]})
        if name:
            yield _with_settings(start_from=name)
            yield _with_settings(preference=name)


def _with_settings(**given: Any) -> BadRequest:
    return _request("start", GOOD["start"] | {"settings": GOOD["start"]["settings"] | given})


def _fields() -> Iterator[BadRequest]:
    for route, kinds in KINDS.items():
        for name, kind in kinds.items():
            for wrong in WRONG[kind]:
                yield _request(route, GOOD[route] | {name: wrong})
    for missing in ("name",):
        yield _request("start", {name: value for name, value in GOOD["start"].items() if name != missing})
    for missing in GOOD["compare"]:
        yield _request("compare", {name: value for name, value in GOOD["compare"].items() if name != missing})
    for change in ({"preset": "nothing"}, {"preset": "paper-sdxl"}, {"styles": ["no such style"]}, {"prompts": []}):
        yield _request("start", GOOD["start"] | change)
    for change in ({"prompts": [" "]}, {"resume": True}, {"resume": True, "prompts": []}, {"settings": {}}):
        yield _request("start", GOOD["start"] | change)
    for how in ("", "Save", "kill", "save now", "\0"):
        yield _request("stop", {"how": how})
    yield _request("stop", {"how": "save"})  # nothing is going on
    yield _request("compare", GOOD["compare"] | {"preference": "../../etc/passwd"})


def _settings() -> Iterator[BadRequest]:
    for setting in settings().values():
        if setting.name in HOST_OWNED:
            yield _with_settings(**{setting.name: setting.default})
            continue
        yield _with_settings(**{setting.name: None})
        yield _with_settings(**{setting.name: {"a": 1}})
        yield _with_settings(**{setting.name: [[1]] if setting.name != "sigmas" else 1})
        if setting.kind in (int, float):
            yield _with_settings(**{setting.name: True})
            yield _with_settings(**{setting.name: "nan"})
            yield _with_settings(**{setting.name: -(10**400)})
            yield _with_settings(**{setting.name: setting.low - 1 if setting.low is not None else "x"})
            if setting.high is not None:
                yield _with_settings(**{setting.name: int(setting.high) * 2 + 2})
        if setting.choices:
            yield _with_settings(**{setting.name: "no such choice"})
        misspelled = setting.name[:-1] + "_"
        yield _with_settings(**{misspelled: setting.default})
    for side in (7, 63, 65, 100, 4097):
        yield _with_settings(width=side)
    yield _with_settings(timestep_min=700, timestep_max=300)
    yield _with_settings(start_from="no-such-lora")
    yield _with_settings(preference="no-such-model.safetensors")


def _unknown(draws: random.Random) -> Iterator[BadRequest]:
    for route in GOOD:
        for _ in range(15):
            key = "".join(draws.choices(string.ascii_letters + "_- 漢é", k=draws.randint(1, 60)))
            yield _request(route, GOOD[route] | {f"{key}~": draws.choice(ODD)})


def _noise(draws: random.Random) -> Iterator[BadRequest]:
    """Random JSON, whose keys are never all known, and random bytes."""
    for number in range(90):
        route = draws.choice(list(GOOD))
        if number % 3 == 0:
            yield BadRequest(f"/spo/v1/{route}", "POST", b"\xfe" + draws.randbytes(draws.randint(0, 300)))
        else:
            yield _request(route, {"~": _random_json(draws, 4), **draws.choice([{}, GOOD[route]])})


def _random_json(draws: random.Random, depth: int) -> Any:
    kind = draws.randint(0, 6 if depth else 4)
    if kind == 5:
        return [_random_json(draws, depth - 1) for _ in range(draws.randint(0, 4))]
    if kind == 6:
        return {str(n): _random_json(draws, depth - 1) for n in range(draws.randint(0, 4))}
    return [None, draws.random() * 10 ** draws.randint(-300, 300), draws.getrandbits(200), "é\0" * 5, True][kind]
