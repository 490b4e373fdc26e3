"""Finds and executes script files, keeps their classes, and calls them while pictures are made."""

import importlib.util
import inspect
import os
import sys
from collections import namedtuple

from modules import errors, flavour, script_callbacks, scripts_postprocessing, shared

AlwaysVisible = object()
ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])
scripts_data = []
postprocessing_scripts_data = []
loaded_modules = []  # the other hosts' memory of script modules; classic has none
_HOOKS = ("before_process", "process", "postprocess_image", "postprocess_image_after_composite", "postprocess")


class PostprocessImageArgs:
    def __init__(self, image, index):
        self.image = image
        if flavour.name == "forge":
            self.index = index


class Script:
    infotext_fields = paste_field_names = None
    args_from = args_to = None
    alwayson = is_img2img = False

    def show(self, is_img2img):
        return True

    def ui(self, is_img2img):
        pass

    def before_process(self, p, *args):
        pass

    def process(self, p, *args):
        pass

    def postprocess_image(self, p, pp, *args):
        pass

    def postprocess_image_after_composite(self, p, pp, *args):
        pass

    def postprocess(self, p, processed, *args):
        pass

    def elem_id(self, item_id):
        return f"script_{self.title()}_{item_id}"


class PostprocessingInMainUi(Script):
    """An Extras operation that the user wants for every generated picture."""

    def __init__(self, script):
        self.script = script

    def title(self):
        return self.script.name

    def show(self, is_img2img):
        return AlwaysVisible

    def ui(self, is_img2img):
        self.names = self.script.ui()
        return self.names.values()

    def postprocess_image(self, p, script_pp, *args):
        pp = scripts_postprocessing.PostprocessedImage(script_pp.image)
        self.script.process(pp, **dict(zip(self.names, args, strict=True)))
        p.extra_generation_params.update(pp.info)
        script_pp.image = pp.image


class ScriptRunner:
    def __init__(self, is_img2img):
        self.scripts, self.inputs, self.infotext_fields, self.paste_field_names = [], [None], [], []
        wanted = [
            ScriptClassData(lambda data=data: PostprocessingInMainUi(data.script_class()), *data[1:])
            for data in postprocessing_scripts_data
            if data.script_class.name in shared.opts.postprocessing_enable_in_main_ui
        ]
        for data in wanted + scripts_data:
            script = data.script_class()
            script.is_img2img = is_img2img
            visible = script.show(is_img2img)
            script.alwayson = visible is AlwaysVisible
            if visible:
                self.scripts.append(script)

    def setup_ui(self):
        for script in self.scripts:
            script.args_from = len(self.inputs)
            script.controls = list(_guarded(script, "ui", script.is_img2img) or [])
            self.inputs += script.controls
            script.args_to = len(self.inputs)
            self.infotext_fields += script.infotext_fields or []
            self.paste_field_names += script.paste_field_names or []

    def run(self, hook, p, *args):
        for script in self.scripts:
            if script.alwayson:
                values = p.script_args[script.args_from : script.args_to]
                _guarded(script, hook, p, *args, *values)


def _guarded(script, name, *args):
    try:
        return getattr(script, name)(*args)
    except Exception:
        errors.report(f"Error calling: {script.title()}/{name}", exc_info=True)


def load_scripts(webui, extensions):
    """`extensions`: the directories of the enabled ones, in order."""
    scripts_data.clear()
    postprocessing_scripts_data.clear()
    loaded_modules.clear()
    script_callbacks.clear_callbacks()
    files = [
        (base, os.path.join(base, "scripts", name))
        for base in [webui, *extensions]
        if os.path.isdir(os.path.join(base, "scripts"))
        for name in sorted(os.listdir(os.path.join(base, "scripts")))
        if name.endswith(".py")
    ]
    if flavour.name != "a1111":
        for base, _ in files:
            if base not in sys.path:
                sys.path = [base, *sys.path]
    path_before = sys.path
    for base, file in files:
        try:
            if base != webui:
                sys.path = [base, *sys.path]
            spec = importlib.util.spec_from_file_location(os.path.basename(file), file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if flavour.name != "classic" or base == webui:
                loaded_modules.append(module)
            for value in list(vars(module).values()):
                if inspect.isclass(value) and issubclass(value, Script):
                    scripts_data.append(ScriptClassData(value, file, base, module))
                elif inspect.isclass(value) and issubclass(value, scripts_postprocessing.ScriptPostprocessing):
                    postprocessing_scripts_data.append(ScriptClassData(value, file, base, module))
            del module
        except Exception:
            errors.report(f"Error loading script: {os.path.basename(file)}", exc_info=True)
        finally:
            sys.path = path_before


def create_ui():
    global scripts_txt2img, scripts_img2img, scripts_postproc
    scripts_txt2img, scripts_img2img = ScriptRunner(False), ScriptRunner(True)
    scripts_postproc = scripts_postprocessing.ScriptPostprocessingRunner()
    for runner in (scripts_txt2img, scripts_img2img):
        runner.setup_ui()
