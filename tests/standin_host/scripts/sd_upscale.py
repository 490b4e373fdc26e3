"""SD upscale: enlarges first, then works through the result tile by tile."""

import gradio as gr
from modules import scripts, shared


class Script(scripts.Script):
    def title(self):
        return "SD upscale"

    def show(self, is_img2img):
        return is_img2img

    def ui(self, is_img2img):
        return [gr.Radio(choices=[x.name for x in shared.sd_upscalers], type="index"), gr.Slider(value=2.0)]

    def run(self, image, upscaler_index, scale):
        if isinstance(upscaler_index, str):
            upscaler_index = [x.name.lower() for x in shared.sd_upscalers].index(upscaler_index.lower())
        upscaler = shared.sd_upscalers[upscaler_index]
        return upscaler.scaler.upscale(image.convert("RGB"), scale, upscaler.data_path)
