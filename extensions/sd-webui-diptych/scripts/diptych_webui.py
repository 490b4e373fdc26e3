"""Loads Diptych into the host: two packages, found beside this file and never on `sys.path`, and their two scripts.

The hosts keep every extension's root on `sys.path`, where a common name finds the wrong package sooner or later. So
the packages are loaded by their place, under names that nobody else has.
"""

import importlib.util
import logging
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent.parent


def _load(name: str, folder: Path) -> bool:
    """Loads the package `name` from `folder`; False if another copy of it is loaded already."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        return Path(loaded.__file__ or "").resolve().parent == folder
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
        raise ImportError(f"{folder} should hold a part of Diptych, but does not: install the extension again")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise
    return True


# Installed by `diptych install-extension` the engine lies beside us; in a checkout or a wheel, some folders above.
_engines = (folder / "diptych" for folder in (_HERE, *_HERE.parents[:3]))
_engine = next((folder for folder in _engines if (folder / "errors.py").is_file()), _HERE / "diptych")
if _load("diptych", _engine) and _load("sd_webui_diptych", _HERE / "sd_webui_diptych"):
    from sd_webui_diptych.extras import DiptychFinish as DiptychFinish
    from sd_webui_diptych.generation import DiptychSection as DiptychSection
    from sd_webui_diptych.register import register

    register(Path(globals().get("_diptych_root", _HERE)))
else:
    logging.getLogger("sd_webui_diptych").warning(
        "Diptych is installed twice; this copy is not used: %s. Remove one of the two.", _HERE
    )
