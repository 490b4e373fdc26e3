"""Extras operations, one after the other on one picture."""

import types

from modules import shared


class PostprocessedImage:
    def __init__(self, image):
        self.image, self.info, self.extra_images, self.nametags = image, {}, [], []
        self.shared = types.SimpleNamespace(target_width=None, target_height=None)
        self.disable_processing, self.caption = False, None


class ScriptPostprocessing:
    name, order, args_from, args_to, controls = None, 1000, None, None, None

    def ui(self):
        pass

    def process(self, pp, **args):
        pass

    def process_firstpass(self, pp, **args):
        pass

    def image_changed(self):
        pass


class ScriptPostprocessingRunner:
    def __init__(self):
        from modules import scripts

        self.scripts = [data.script_class() for data in scripts.postprocessing_scripts_data]
        self.inputs = []
        for script in self.in_order():
            script.args_from = len(self.inputs)
            script.controls = script.ui()
            self.inputs += script.controls.values()
            script.args_to = len(self.inputs)

    def in_order(self):
        disabled = shared.opts.postprocessing_disable_in_extras
        return sorted((x for x in self.scripts if x.name not in disabled), key=lambda x: (x.order, x.name))

    def create_args_for_run(self, by_script):
        """What the API gives: the values of named arguments of named scripts, None for all others."""
        args = [None] * len(self.inputs)
        for script in self.in_order():
            for index, name in enumerate(script.controls):
                args[script.args_from + index] = by_script.get(script.name, {}).get(name)
        return args

    def run(self, pp, args):
        todo = [
            (script, dict(zip(script.controls, args[script.args_from : script.args_to], strict=True)))
            for script in self.in_order()
        ]
        for script, values in todo:
            script.process_firstpass(pp, **values)
        for script, values in todo:
            if shared.state.skipped:
                break
            shared.state.job = script.name
            script.process(pp, **values)
