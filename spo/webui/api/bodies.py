"""Bodies of API requests: JSON of known fields, checked so strictly that nothing behind it meets a surprise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from spo.config import Setting
from spo.errors import SpoError, nearest

MAX_BYTES = 2**20
MAX_DEPTH = 8
MAX_KEY = 100

_KINDS = {"text": str, "number": float, "whole number": int, "flag": bool}
_JSON_TYPES = {str: "string", float: "number", int: "integer", bool: "boolean"}
_SAID = {
    "text": "a text",
    "number": "a number",
    "whole number": "a whole number",
    "flag": "true or false",
    "settings": 'an object of "setting: value" pairs',
}


class NotJSONError(SpoError):
    """The body is not JSON that is accepted here."""


@dataclass(frozen=True)
class Field:
    """kind: text, number, whole number, flag or settings; many: a list of it. default None: must be given."""

    kind: str
    help: str
    default: Any = None
    many: bool = False
    choices: tuple[str, ...] = ()

    def checked(self, name: str, value: Any) -> Any:
        """`value` in the field's type. Raises SpoError."""
        accepted = f"a list, each {_SAID[self.kind]}" if self.many else _SAID[self.kind]
        wrong = SpoError(f"{name} is {shown(value)}; it must be {accepted}.")
        if self.many:
            if not isinstance(value, list) or not all(self._fits(one) for one in value):
                raise wrong
        elif not self._fits(value):
            raise wrong
        if self.choices and value not in self.choices:
            raise SpoError(f"{name} is {shown(value)}; accepted are {' and '.join(self.choices)}.")
        return value

    def _fits(self, value: Any) -> bool:
        if self.kind == "settings":
            return isinstance(value, dict)
        if isinstance(value, bool) or self.kind == "flag":
            return isinstance(value, bool) and self.kind == "flag"
        if self.kind == "number":
            return isinstance(value, int | float) and abs(value) < 1e300
        return isinstance(value, _KINDS[self.kind])


def parse(body: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The fields of a body, with defaults. NotJSONError for what is no JSON object, SpoError for wrong fields."""
    values = _json(body)
    if not isinstance(values, dict):
        raise NotJSONError(f"The body is {shown(values)}; it must be a JSON object.")
    for name in values:
        if name not in fields:
            raise SpoError(f'"{name}" is not known{nearest(name, fields)}; accepted are {", ".join(fields)}.')
    checked = {}
    for name, wanted in fields.items():
        if name in values:
            checked[name] = wanted.checked(name, values[name])
        elif wanted.default is None:
            raise SpoError(f"{name} is missing; {wanted.help}.")
        else:
            checked[name] = wanted.default
    return checked


def _json(body: bytes) -> Any:
    try:
        value = json.loads(body, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError:
        raise NotJSONError(f"The body is nested deeper than {MAX_DEPTH} levels.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise NotJSONError(f"The body is not valid JSON: {shortened(str(error))}.") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise NotJSONError(f"The body is nested deeper than {MAX_DEPTH} levels.")
        for one in level:
            _check_text(one)
        level = [inner for one in level for inner in _inside(one)]
    return value


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_text(value: Any) -> None:
    for text in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise NotJSONError("The body holds half of a surrogate pair, which is not a character.") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shortened(text)} is too large a number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if len(name) > MAX_KEY:
            raise ValueError(f'the key "{shortened(name, 40)}" is longer than {MAX_KEY} characters')
        if name in found:
            raise ValueError(f'the key "{name}" is there twice')
        found[name] = value
    return found


def shown(value: Any) -> str:
    """A value for a sentence: short, whatever it is."""
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    return f'"{shortened(value, 80)}"' if isinstance(value, str) else str(value)


def shortened(text: str, length: int = 400) -> str:
    """`text`, cut with ... where it is longer."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def schema(fields: Mapping[str, Field], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The JSON schema of a body, for /docs."""
    properties = {}
    for name, wanted in fields.items():
        one: dict[str, Any] = (
            {"type": "object", "properties": settings_schema(settings), "additionalProperties": False}
            if wanted.kind == "settings"
            else {"type": _JSON_TYPES[_KINDS[wanted.kind]]}
        )
        if wanted.choices:
            one["enum"] = list(wanted.choices)
        described = {"type": "array", "items": one} if wanted.many else one
        properties[name] = described | {"description": wanted.help}
        if wanted.default is not None:
            properties[name]["default"] = wanted.default
    required = [name for name, wanted in fields.items() if wanted.default is None]
    return {"type": "object", "properties": properties, "additionalProperties": False} | (
        {"required": required} if required else {}
    )


def settings_schema(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The JSON schema of each setting by name."""
    described: dict[str, Any] = {}
    for setting in settings.values():
        one: dict[str, Any] = (
            {"type": "array", "items": {"type": "string"}}
            if setting.kind is list
            else {"type": _JSON_TYPES[setting.kind]}
        )
        one["description"] = setting.help
        one["default"] = list(setting.default) if setting.kind is list else setting.default
        for name, value in (("enum", list(setting.choices)), ("minimum", setting.low), ("maximum", setting.high)):
            if value not in ([], None):
                one[name] = value
        described[setting.name] = one
    return described
