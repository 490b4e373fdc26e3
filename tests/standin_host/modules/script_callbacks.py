"""Callbacks by kind, cleared before scripts are loaded."""

from modules import errors, flavour

_KINDS = ("ui_settings", "before_ui", "app_started", "script_unloaded", "before_reload", "infotext_pasted")
_callbacks: dict[str, list] = {kind: [] for kind in _KINDS}


def clear_callbacks():
    for callbacks in _callbacks.values():
        callbacks.clear()


def _adder(kind):
    if flavour.name == "classic":
        return lambda callback: _callbacks[kind].append(callback)
    return lambda callback, *, name=None: _callbacks[kind].append(callback)


def call(kind, *args):
    for callback in list(_callbacks[kind]):
        try:
            callback(*args)
        except Exception:
            errors.report(f"Error executing callback {kind}", exc_info=True)


for _kind in _KINDS:
    globals()[f"on_{_kind}"] = _adder(_kind)
