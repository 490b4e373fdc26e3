"""`diptych install-extension WEBUI_DIR`: puts the extension, the engine and the embedded network into a host.

What was put there is listed in a file beside it, so that an update removes what is no longer part of Diptych and
leaves alone what the user added. Nothing outside the extension's own directory is touched.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from diptych.errors import DiptychError

NAME = "sd-webui-diptych"
LIST = "installed-files.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `diptych install-extension`."""
    parser.add_argument(
        "webui_dir", metavar="WEBUI_DIR", type=Path, help="folder of Automatic1111, Forge or Forge-classic"
    )
    parser.add_argument(
        "--link", action="store_true", help="link to this copy of Diptych instead of copying it: updates with it"
    )


def run(args: argparse.Namespace) -> int:
    """Installs or updates the extension. Raises ValueError if the folder is no host, DiptychError if it cannot be."""
    webui = args.webui_dir.expanduser().resolve()
    _check_host(webui)
    target = webui / "extensions" / NAME
    _check_free(target)
    target.parent.mkdir(exist_ok=True)
    if args.link:
        _link(target)
    else:
        _copy(target)
    print(f'{target}: installed; restart the host or press "Reload UI"')
    return 0


def _check_host(webui: Path) -> None:
    if not webui.is_dir():
        raise ValueError(f"{webui} is no folder: name the one that webui.py of Automatic1111 or Forge lies in")
    missing = [name for name in ("upscaler.py", "script_callbacks.py") if not (webui / "modules" / name).is_file()]
    if missing:
        raise ValueError(
            f"{webui} is no Automatic1111 or Forge, it has no modules/{missing[0]}: name the folder with webui.py"
        )


def _check_free(target: Path) -> None:
    """Raises DiptychError when installing would give a second copy, or overwrite what is not ours."""
    for other in sorted(target.parent.glob("*")) if target.parent.is_dir() else []:
        if other != target and any(
            (other / path / "sd_webui_diptych").is_dir() for path in (".", f"extensions/{NAME}")
        ):
            raise DiptychError(f"Diptych is installed already, as {other}: remove that one first, or update it instead")
    if target.is_symlink() or not target.exists():
        return
    if (target / ".git").exists():
        raise DiptychError(f"{target} is a Git clone: update it on the host's Extensions page, or remove it first")
    if not (target / LIST).is_file():
        raise DiptychError(f"{target} was not put there by this command: remove it first")


def _link(target: Path) -> None:
    if target.exists() and not target.is_symlink():
        raise DiptychError(f"{target} is a copy: remove it first to have a link instead")
    target.unlink(missing_ok=True)
    target.symlink_to(_extension(), target_is_directory=True)


def _copy(target: Path) -> None:
    from diptych.upscalers.files import atomic_path

    if target.is_symlink():
        target.unlink()
    target.mkdir(exist_ok=True)
    files = dict(_parts())
    before = _listed(target / LIST)
    _write_list(target / LIST, before | files.keys())  # if this ends half-way, the next time knows everything
    for name, source in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            shutil.copyfile(source, temporary)
    for name in before - files.keys():
        (target / name).unlink(missing_ok=True)
    _write_list(target / LIST, set(files))


def _parts() -> Iterator[tuple[str, Path]]:
    """Everything to copy: where it belongs in the extension's directory, and where it lies here."""
    import diptych
    import diptych.upscalers
    from diptych.errors import ModelNotFound
    from diptych.upscalers.official import embedded_model

    package, engine = Path(diptych.__file__).parent, Path(diptych.upscalers.__file__).parent
    yield from _tree(_extension(), "")
    for name in ("__init__.py", "errors.py"):
        yield f"diptych/{name}", package / name
    yield from _tree(engine, "diptych/upscalers/")
    try:
        model = embedded_model()
    except ModelNotFound:  # a copy without it still has every other network
        return
    yield "diptych/models/diptych-glyphs/model_index.json", model / "model_index.json"
    yield from _tree(model / "upscaler", "diptych/models/diptych-glyphs/upscaler/")


def _tree(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in relative.parts):
            yield prefix + relative.as_posix(), path


def _extension() -> Path:
    """The extension's directory: beside the package in a checkout, in it in a wheel."""
    import diptych

    package = Path(diptych.__file__).resolve().parent
    for folder in (package.parent, package):
        if (folder / "extensions" / NAME / "sd_webui_diptych").is_dir():
            return folder / "extensions" / NAME
    raise DiptychError(
        f"this copy of Diptych came without the extension: {package / 'extensions' / NAME} should hold it"
    )


def _listed(path: Path) -> set[str]:
    """The names in the list of an earlier installation; those that would lead out of the directory are left out."""
    if not path.is_file():
        return set()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        return {name for name in names if ".." not in Path(name).parts and not Path(name).is_absolute()}
    except (ValueError, TypeError) as error:
        raise DiptychError(f"{path} is damaged: remove {path.parent} and install again") from error


def _write_list(path: Path, names: set[str]) -> None:
    from diptych.upscalers.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(sorted(names), indent=1), encoding="utf-8")
