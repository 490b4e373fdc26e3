"""The house: three ways to import it, who may import whom, what a cheap start may load, what a wheel carries."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("diptych", "pipelines", "vae", "upscalers", "webui")
# What `import diptych.upscalers` may load beside the standard library and what these bring themselves.
UPSCALERS_MAY_LOAD = {"torch", "numpy", "PIL", "safetensors", "diptych"}


def python(code: str, *, cwd: Path, path: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Runs `code` in a fresh interpreter and returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (env or {})
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_on_disk() -> list[str]:
    names = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if package != "diptych":
                parts.insert(0, "diptych")
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


WHERE = (
    "import importlib.util, json, sys, diptych;"
    "print(json.dumps({name: bool(importlib.util.find_spec(name)) for name in json.loads(sys.argv[1])}))"
)


def found(path: Path, cwd: Path) -> dict[str, bool]:
    code = WHERE.replace("sys.argv[1]", repr(json.dumps(modules_on_disk())))
    return json.loads(python(code, cwd=cwd, path=path))


def test_a_checkout_imports_every_module_with_nothing_installed(tmp_path: Path) -> None:
    assert all(found(ROOT, tmp_path).values())


def test_a_wheel_imports_the_same_modules(wheel_site: Path, tmp_path: Path) -> None:
    missing = [name for name, there in found(wheel_site, tmp_path).items() if not there]
    assert missing == []
    assert python("import diptych; print(diptych.__file__)", cwd=tmp_path, path=wheel_site).startswith(str(wheel_site))


def test_an_editable_install_imports_the_same_modules(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    site = tmp_path / "site"
    subprocess.run([*command, "--target", str(site), "-e", str(ROOT)], check=True, capture_output=True)
    code = f"import site; site.addsitedir({str(site)!r});" + WHERE.replace(
        "sys.argv[1]", repr(json.dumps(modules_on_disk()))
    )
    there = json.loads(python(code, cwd=tmp_path))
    assert [name for name in there if not there[name]] == []


def test_a_wheel_carries_the_model_the_extension_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in ("models/diptych-glyphs/model_index.json", "models/diptych-glyphs/upscaler/config.json"):
        assert f"diptych/{path}" in names
    assert any(name.startswith("diptych/extensions/sd-webui-diptych/scripts/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_import_diptych_loads_no_third_party_package(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import diptych;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    loaded = set(python(code, cwd=tmp_path, path=ROOT).split())
    assert loaded - {"diptych"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["upscale", "--help"], ["models", "--help"]])
def test_help_loads_no_torch(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from diptych.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'diffusers', 'PIL', 'gradio'} & set(sys.modules)))"
    )
    assert python(code, cwd=tmp_path, path=ROOT).endswith("[]\n")


def test_the_upscalers_load_only_what_every_host_has(tmp_path: Path) -> None:
    code = (
        "import sys, torch, numpy, safetensors.torch, PIL.Image; before = set(sys.modules)\n"
        "from diptych.upscalers import Upscaler\n"
        "loaded = set(sys.modules) - before\n"
        "print(*(m.split('.')[0] for m in loaded), *(m for m in loaded if m.startswith('diptych')))"
    )
    loaded = set(python(code, cwd=tmp_path, path=ROOT).split())
    ours = {name for name in loaded if name.startswith("diptych")}
    assert loaded - ours <= UPSCALERS_MAY_LOAD | set(sys.stdlib_module_names)
    assert {name for name in ours if not name.startswith("diptych.upscalers")} <= {"diptych", "diptych.errors"}


# Which parts of Diptych a package may import at all, anywhere in its files: whole packages, and single light modules
# of the front door. Trainers may use the training parts as well.
LIGHT = {"diptych", "diptych.errors", "diptych.infotext"}
TRAINING = {"diptych.training", "diptych.metrics", "diptych.data"}
MAY_IMPORT = {
    "upscalers": ({"diptych.upscalers"}, {"diptych", "diptych.errors"}),
    "vae": ({"diptych.vae", "diptych.upscalers"}, LIGHT),
    "pipelines": ({"diptych.pipelines", "diptych.vae", "diptych.upscalers"}, LIGHT),
    "webui": ({"diptych.webui", "diptych.pipelines", "diptych.upscalers"}, LIGHT),
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_stands_below_them(package: str) -> None:
    packages, modules = MAY_IMPORT[package]
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        allowed = packages | (TRAINING if path.name in ("train.py", "pairs.py") else set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
                if node.module == "diptych":
                    names = [f"diptych.{alias.name}" for alias in node.names]
            for name in names:
                inside = any(name == p or name.startswith(p + ".") for p in allowed)
                if name.split(".")[0] == "diptych" and not inside and name not in modules | {"diptych.__version__"}:
                    wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


def test_directories_that_hosts_put_on_their_path_are_no_packages() -> None:
    for name in ("scripts", "tests", "models", "extensions"):
        assert not (ROOT / name / "__init__.py").exists()


def test_the_types_hold_on_the_installed_wheel(wheel_site: Path, tmp_path: Path) -> None:
    """On the wheel, because in a checkout the checker sees three files and calls that success."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "diptych"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(wheel_site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checked = int(done.stdout.rsplit("no issues found in ", 1)[1].split()[0])
    assert checked >= len(modules_on_disk())
