"""Options, command line, state and the list of upscalers."""

import argparse

from modules import flavour


class OptionInfo:
    def __init__(
        self, default=None, label="", component=None, component_args=None, onchange=None, section=None, refresh=None,
        comment_before="", comment_after="", infotext=None, restrict_api=False, category_id=None,
    ):  # fmt: skip
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.onchange, self.section, self.restrict_api, self.infotext = onchange, section, restrict_api, infotext
        self.comment_after = comment_after

    def info(self, text):
        self.comment_after += f" ({text})"
        return self

    def needs_reload_ui(self):
        return self.info("requires Reload UI")


class Options:
    """Saved values are there from the start; labels only once an extension has added them."""

    def __init__(self):
        object.__setattr__(self, "data", {})
        object.__setattr__(self, "data_labels", {})

    def add_option(self, key, info):
        self.data_labels[key] = info
        if key not in self.data:
            self.data[key] = info.default

    def set(self, key, value):
        info = self.data_labels[key]
        if self.data.get(key) != value:
            self.data[key] = value
            if info.onchange:
                info.onchange()

    def __getattr__(self, key):
        if key in self.data:
            return self.data[key]
        raise AttributeError(f"'Options' object has no attribute '{key}'")


class State:
    """`watcher`, if set, sees every text that is shown to the user; it may press Interrupt."""

    watcher = None

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)
        if name == "textinfo" and value and self.watcher:
            self.watcher(value)

    def __init__(self):
        self.begin("")
        self.end()

    def begin(self, job="(unknown)"):
        self.interrupted = self.skipped = self.stopping_generation = False
        self.textinfo, self.job, self.job_count, self.job_no = None, job, -1, 0

    def end(self):
        self.job, self.job_count = "", 0

    def nextjob(self):
        self.job_no += 1

    def interrupt(self):
        self.interrupted = True


def start(models_path, script_path):
    global opts, cmd_opts, state, sd_upscalers
    globals().update(models_path=str(models_path), script_path=str(script_path))
    opts, state, sd_upscalers = Options(), State(), []
    tile = {"ESRGAN_tile": 256, "ESRGAN_tile_overlap": 16} if flavour.name == "classic" else {}
    opts.data.update(
        {
            "ESRGAN_tile": 192, "ESRGAN_tile_overlap": 8, "upscaling_max_images_in_cache": 5,
            "enable_upscale_progressbar": True, "upscaler_for_img2img": None, "postprocessing_enable_in_main_ui": [],
            "postprocessing_disable_in_extras": [], "postprocessing_operation_order": [],
            "return_mask_composite": False, "save_mask_composite": False,
        } | tile
    )  # fmt: skip
    cmd_opts = argparse.Namespace(no_half=False, upcast_sampling=False)
    if flavour.name != "classic":
        cmd_opts.esrgan_models_path = f"{models_path}/ESRGAN"
        cmd_opts.realesrgan_models_path = f"{models_path}/RealESRGAN"
    else:
        cmd_opts.esrgan_models_path = f"{models_path}/ESRGAN"
