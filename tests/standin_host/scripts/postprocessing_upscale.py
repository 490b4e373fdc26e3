"""The hosts' own Extras upscaling, with its memory of results."""

import gradio as gr
import numpy as np
from modules import scripts_postprocessing, shared
from PIL import Image

upscale_cache = {}


class ScriptPostprocessingUpscale(scripts_postprocessing.ScriptPostprocessing):
    name = "Upscale"
    order = 1000

    def ui(self):
        names = [x.name for x in shared.sd_upscalers]
        return {
            "upscale_mode": gr.Number(value=0),
            "upscale_by": gr.Slider(value=4.0),
            "upscale_to_width": gr.Slider(value=512),
            "upscale_to_height": gr.Slider(value=512),
            "upscale_crop": gr.Checkbox(value=False),
            "upscaler_1_name": gr.Dropdown(value=names[0], choices=names),
            "upscaler_2_name": gr.Dropdown(value=names[0], choices=names),
            "upscaler_2_visibility": gr.Slider(value=0.0),
        }

    def upscale(self, image, info, upscaler, mode, by, width, height, crop):
        if mode == 1:
            by = max(width / image.width, height / image.height)
        key = (hash(np.asarray(image).tobytes()), upscaler.name, mode, by, width, height, crop)
        cached = upscale_cache.pop(key, None)
        image = cached if cached is not None else upscaler.scaler.upscale(image, by, upscaler.data_path)
        upscale_cache[key] = image
        if len(upscale_cache) > shared.opts.upscaling_max_images_in_cache:
            upscale_cache.pop(next(iter(upscale_cache)))
        if mode == 1 and crop:
            cropped = Image.new("RGB", (width, height))
            cropped.paste(image, (width // 2 - image.width // 2, height // 2 - image.height // 2))
            image = cropped
        return image

    def process(
        self, pp, upscale_mode=0, upscale_by=2.0, upscale_to_width=None, upscale_to_height=None, upscale_crop=False,
        upscaler_1_name=None, upscaler_2_name=None, upscaler_2_visibility=0.0,
    ):  # fmt: skip
        def find(name):
            found = next((x for x in shared.sd_upscalers if x.name == name and name != "None"), None)
            assert found or name in (None, "None"), f"could not find upscaler named {name}"
            return found

        first, second = find(upscaler_1_name), find(upscaler_2_name)
        if not first:
            return
        args = (upscale_mode or 0, upscale_by, upscale_to_width, upscale_to_height, upscale_crop)
        image = self.upscale(pp.image, pp.info, first, *args)
        pp.info["Postprocess upscaler"] = first.name
        if second and upscaler_2_visibility:
            other = self.upscale(pp.image, pp.info, second, *args)
            image = Image.blend(image, other.convert(image.mode), upscaler_2_visibility)
        pp.image = image

    def image_changed(self):
        upscale_cache.clear()
