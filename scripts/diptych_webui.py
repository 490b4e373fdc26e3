"""This repository as an extension of Automatic1111 and Forge: hands over to `extensions/sd-webui-diptych`."""

import runpy
from pathlib import Path

_root = Path(__file__).resolve().parent.parent
_script = _root / "extensions" / "sd-webui-diptych" / "scripts" / "diptych_webui.py"
_loaded = runpy.run_path(str(_script), {"_diptych_root": _root})
globals().update({name: _loaded[name] for name in ("DiptychFinish", "DiptychSection") if name in _loaded})
