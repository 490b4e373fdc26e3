"""The base class of upscalers, and the three that every host has."""

import os

from PIL import Image

from modules import flavour, shared


class Upscaler:
    name = model_path = model_name = model_url = user_path = None

    def __init__(self, create_dirs=False):
        self.tile_size, self.tile_pad = shared.opts.ESRGAN_tile, shared.opts.ESRGAN_tile_overlap
        self.scale, self.half, self.model_download_path = 1, not shared.cmd_opts.no_half, None
        if self.model_path is None and self.name:
            self.model_path = os.path.join(shared.models_path, self.name)
        if self.model_path and create_dirs:
            os.makedirs(self.model_path, exist_ok=True)

    def do_upscale(self, img, selected_model):
        return img

    def upscale(self, img, scale, selected_model=None):
        self.scale = scale
        width, height = int((img.width * scale) // 8 * 8), int((img.height * scale) // 8 * 8)
        classic = flavour.name == "classic"
        for number in range(4 if classic else 3):
            if classic:
                img = self.do_upscale(img, selected_model)
                if (img.width >= width and img.height >= height) or int(scale) == 1:
                    break
                continue
            if (img.width >= width and img.height >= height and (number or scale != 1)) or shared.state.interrupted:
                break
            before = img.size
            img = self.do_upscale(img, selected_model)
            if img.size == before:
                break
        if img.size != (width, height):
            img = img.resize((width, height), Image.Resampling.LANCZOS)
        return img


class UpscalerData:
    def __init__(self, name, path, upscaler=None, scale=4, model=None):
        self.name, self.data_path, self.scaler, self.scale, self.model = name, path, upscaler, scale, model


class UpscalerNone(Upscaler):
    name = "None"

    def __init__(self, dirname=None):
        super().__init__()
        self.scalers = [UpscalerData("None", None, self)]


class UpscalerLanczos(Upscaler):
    def __init__(self, dirname=None):
        super().__init__()
        self.name = "Lanczos"
        self.scalers = [UpscalerData("Lanczos", None, self)]

    def do_upscale(self, img, selected_model=None):
        return img.resize((int(img.width * self.scale), int(img.height * self.scale)), Image.Resampling.LANCZOS)
