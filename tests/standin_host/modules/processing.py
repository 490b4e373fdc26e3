"""Makes "decoded" pictures from a seed, runs hires. fix on them, and calls the scripts' hooks in the hosts' order."""

import numpy as np
from PIL import Image

from modules import flavour, images, infotext_utils, scripts, shared


class Processing:
    def __init__(
        self, seed=1, width=32, height=32, batch_size=1, hr_scale=None, hr_upscaler=None, mask=None, init=None
    ):
        self.seed, self.width, self.height, self.batch_size = seed, width, height, batch_size
        self.hr_scale, self.hr_upscaler, self.image_mask, self.init = hr_scale, hr_upscaler, mask, init
        self.extra_generation_params, self.comments = {}, {}
        self.script_args = []

    def comment(self, text):
        self.comments[text] = 1


class Processed:
    def __init__(self, images, infotexts, comments):
        self.images, self.infotexts, self.comments = images, infotexts, comments


def decode(seed, width, height):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def process_images(p, runner):
    if p.hr_scale and p.hr_upscaler not in [x.name for x in shared.sd_upscalers]:
        raise ValueError(f"could not find upscaler named {p.hr_upscaler}")
    runner.run("before_process", p)
    runner.run("process", p)

    def infotext():
        params = {"Steps": 1, "Seed": p.seed, "Size": f"{p.width}x{p.height}"} | p.extra_generation_params
        return "a prompt\n" + ", ".join(f"{key}: {infotext_utils.quote(value)}" for key, value in params.items())

    made, texts = [], []
    for index in range(p.batch_size):
        shared.state.nextjob()
        if shared.state.interrupted:
            break
        image = p.init or decode(p.seed + index, p.width, p.height)
        if p.init and p.init.size != (p.width, p.height):
            image = images.resize_image(0, image, p.width, p.height)
        if p.hr_scale:
            size = int(image.width * p.hr_scale), int(image.height * p.hr_scale)
            image = images.resize_image(0, image, *size, upscaler_name=p.hr_upscaler)
            if image.mode != "RGB":
                raise RuntimeError("the VAE takes three channels")
        original = image
        for hook in ("postprocess_image", "postprocess_image_after_composite"):
            pp = scripts.PostprocessImageArgs(image, index)
            runner.run(hook, p, pp)
            image = pp.image
        text = infotext()
        image.info["parameters"] = text
        made.append(image)
        texts.append(text)
        if p.image_mask and (shared.opts.return_mask_composite or shared.opts.save_mask_composite):
            made.append(Image.composite(original, Image.new("RGB", image.size), p.image_mask.resize(image.size)))
    processed = Processed(made, texts, "".join(f"{comment}\n" for comment in p.comments))
    runner.run("postprocess", p, processed)
    assert flavour.name in ("a1111", "forge", "classic")
    return processed
