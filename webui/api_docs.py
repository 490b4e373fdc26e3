"""The service's documentation as one HTML page, from its OpenAPI description.

FastAPI's own page loads its scripts from elsewhere; this one needs nothing but itself.
"""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; }
summary { cursor: pointer; padding: .3rem 0; }
code { font-size: .95em; }
table { margin: .5rem 0 1rem 1.2rem; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
.m { display: inline-block; min-width: 3.5rem; font-weight: 600; color: #0d9488; }
"""


def docs_page(description: dict[str, Any]) -> str:
    """A whole HTML document."""
    groups: dict[str, list[str]] = {}
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            group = (operation.get("tags") or ["other"])[0]
            groups.setdefault(group, []).append(_operation(path, method, operation, description))
    body = "".join(f"<h2>{escape(group.capitalize())}</h2>{''.join(items)}" for group, items in groups.items())
    title = f"{description['info']['title']} {description['info']['version']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f"<p>{escape(description['info'].get('description', ''))}</p>"
        f'<p>The same for programs: <a href="openapi.json">openapi.json</a></p>{body}</html>'
    )


def _operation(path: str, method: str, operation: dict[str, Any], description: dict[str, Any]) -> str:
    rows = [
        _row(item["name"], item.get("schema", {}), item.get("description", ""))
        for item in operation.get("parameters", [])
    ]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rsplit("/", 1)[-1]
    fields = description.get("components", {}).get("schemas", {}).get(name, {}).get("properties", {})
    rows += [_row(field, schema, schema.get("description", "")) for field, schema in fields.items()]
    table = f"<table><tr><th>Field<th>Type<th>Default<th></tr>{''.join(rows)}</table>" if rows else ""
    return (
        f'<details><summary><span class="m">{method.upper()}</span> <code>{escape(path)}</code> '
        f"{escape(operation.get('description', ''))}</summary>{table}</details>"
    )


def _row(name: str, schema: dict[str, Any], about: str) -> str:
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    kind = " or ".join(_kind(option) for option in options) or "anything"
    default = "" if "default" not in schema else repr(schema["default"])
    about = about or next((option.get("description", "") for option in options), "")
    cells = (f"<code>{escape(name)}</code>", escape(kind), f"<code>{escape(default)}</code>", escape(about))
    return f"<tr><td>{'<td>'.join(cells)}</tr>"


def _kind(schema: dict[str, Any]) -> str:
    kind = str(schema.get("type") or schema.get("$ref", "").rsplit("/", 1)[-1] or "anything")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [
        (schema.get("minimum"), "≥ {}"),
        (schema.get("exclusiveMinimum"), "> {}"),
        (schema.get("maximum"), "≤ {}"),
    ]
    said = ", ".join(text.format(value) for value, text in bounds if value is not None)
    return f"{kind} {said}".strip()
