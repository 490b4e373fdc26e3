"""Resizing as hires. fix and img2img do it."""

from PIL import Image

from modules import flavour, shared

LANCZOS = Image.Resampling.LANCZOS


def resize_image(resize_mode, im, width, height, upscaler_name=None):
    if flavour.name == "forge" and im.mode == "RGBA":
        im = im.convert("RGB")
    upscaler_name = upscaler_name or shared.opts.upscaler_for_img2img

    def resize(im, w, h):
        if upscaler_name in (None, "None") or im.mode == "L":
            return im.resize((w, h), LANCZOS)
        scale = max(w / im.width, h / im.height)
        if scale > 1:
            named = [x for x in shared.sd_upscalers if x.name == upscaler_name] or shared.sd_upscalers
            im = named[0].scaler.upscale(im, scale, named[0].data_path)
        return im if im.size == (w, h) else im.resize((w, h), LANCZOS)

    if resize_mode == 0:
        return resize(im, width, height)
    narrow = width / height > im.width / im.height  # mode 1: fill and crop
    size = (width, im.height * width // im.width) if narrow else (im.width * height // im.height, height)
    result = Image.new("RGB", (width, height))
    result.paste(resize(im, *size), (width // 2 - size[0] // 2, height // 2 - size[1] // 2))
    return result
