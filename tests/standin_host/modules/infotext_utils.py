"""Generation parameters as text and back."""

import json
import re


def quote(text):
    text = str(text)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",\n:") else text


def parse_generation_parameters(text):
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.splitlines()[-1])
    return {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def paste(text, fields):
    """What pressing the paste button does to the components of `fields`."""
    params = parse_generation_parameters(text)
    for component, key in fields:
        value = key(params) if callable(key) else params.get(key)
        if value is None:
            continue
        kind = type(component.value)
        component.value = value != "False" and bool(value) if kind is bool else kind(value)
