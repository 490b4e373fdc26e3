"""The /sdapi/v1 service over real HTTP, with Automatic1111's fields, answers and errors."""

import base64
import io
import json
import threading
import time

import httpx
import pytest
from PIL import Image, ImageChops, ImageStat, PngImagePlugin

BASE = "/sdapi/v1/"


@pytest.fixture(scope="module")
def http(web_server):
    with httpx.Client(base_url=web_server.url, timeout=60) as client:
        yield client


def post(http, route, expect=200, headers=None, **body):
    answer = http.post(BASE + route, json=body, headers=headers)
    assert answer.status_code == expect, answer.text[:500]
    return answer.json()


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def encoded(picture: Image.Image, **options) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return base64.b64encode(buffer.getvalue()).decode()


def small(**more):
    return {"prompt": "a red cat", "steps": 2, "width": 64, "height": 64, "seed": 7, **more}


RED = Image.new("RGB", (48, 64), "red")


def test_txt2img_gives_a_picture_of_the_size_asked_for_with_its_parameters_inside(http):
    answer = post(http, "txt2img", **small(negative_prompt="blur"))
    (picture,) = map(opened, answer["images"])
    assert picture.size == (64, 64) and picture.format == "PNG"
    assert picture.info["parameters"].startswith("a red cat\nNegative prompt: blur\nSteps: 2, Sampler: DDIM")
    info = json.loads(answer["info"])
    assert info["seed"] == 7 and info["infotexts"] == [picture.info["parameters"]]
    assert answer["parameters"]["cfg_scale"] == 7.0 and answer["parameters"]["negative_prompt"] == "blur"


def test_without_a_prompt_something_is_drawn(http):
    answer = http.post(BASE + "txt2img", json={"steps": 2, "width": 64, "height": 64}).json()
    assert json.loads(answer["info"])["prompt"] == "" and opened(answer["images"][0]).size == (64, 64)
    assert post(http, "png-info", image=answer["images"][0])["info"].startswith("Steps: 2,")


def test_a_seed_is_a_picture_and_the_next_picture_has_the_next_seed(http):
    pair = post(http, "txt2img", **small(n_iter=2))
    alone = post(http, "txt2img", **small(seed=8))
    assert json.loads(pair["info"])["all_seeds"] == [7, 8]
    assert pair["images"][1] == alone["images"][0]


def test_no_seed_means_a_new_one_each_time(http):
    seeds = {json.loads(post(http, "txt2img", **small(seed=-1))["info"])["seed"] for _ in range(2)}
    assert len(seeds) == 2 and -1 not in seeds


def test_fields_that_existing_programs_send_without_meaning_are_taken(http):
    usual = {"eta": 1.0, "s_churn": 0, "s_tmax": 0, "subseed": -1, "subseed_strength": 0, "styles": [], "tiling": False,
             "restore_faces": False, "alwayson_scripts": {}, "script_args": [], "script_name": None,
             "hr_upscaler": "Latent", "unheard_of": 1, "override_settings": {"some_option": 1}}  # fmt: skip
    post(http, "txt2img", **small(**usual))


@pytest.mark.parametrize(
    "sampler, scheduler, written",
    [("Euler", None, "Sampler: Euler,"), ("euler", "automatic", "Sampler: Euler,"),
     ("DPM++ 2M", "Karras", "Sampler: DPM++ 2M, Schedule type: Karras"),
     ("DPM++ 2M Karras", None, "Sampler: DPM++ 2M, Schedule type: Karras"), ("DDIMScheduler", "", "Sampler: DDIM,")],
)  # fmt: skip
def test_samplers_go_by_their_names(http, sampler, scheduler, written):
    (text,) = json.loads(post(http, "txt2img", **small(sampler_name=sampler, scheduler=scheduler))["info"])["infotexts"]
    assert written in text


def test_hires_enlarges_with_the_network_and_refines(http):
    plain = post(http, "txt2img", **small(enable_hr=True, hr_scale=2, denoising_strength=0))
    refined = post(http, "txt2img", **small(enable_hr=True, hr_scale=2, denoising_strength=0.5))
    assert [opened(a["images"][0]).size for a in (plain, refined)] == [(128, 128)] * 2
    assert plain["images"] != refined["images"]


def test_hires_in_a_latent_mode_enlarges_the_latents_and_draws_them_anew(http):
    modes = [item["name"] for item in http.get(BASE + "latent-upscale-modes").json()]
    assert modes[0] == "Latent" and len(modes) == 6
    answers = {
        mode: post(http, "txt2img", **small(enable_hr=True, hr_scale=2, hr_upscaler=mode, denoising_strength=0.6))
        for mode in ("Latent", "latent (nearest)", "None")
    }
    assert len({answer["images"][0] for answer in answers.values()}) == 3
    info = json.loads(answers["Latent"]["info"])
    assert opened(answers["Latent"]["images"][0]).size == (128, 128) and info["denoising_strength"] == 0.6
    assert "Hires upscale: 2, Hires steps: 2, Hires upscaler: Latent" in info["infotexts"][0]


@pytest.mark.parametrize("strength, steps", [(0.001, 1), (0.05, 3), (1, 3)])
def test_hires_takes_as_many_steps_as_are_asked_for_at_any_strength(http, strength, steps):
    body = small(enable_hr=True, hr_scale=2, hr_second_pass_steps=3, denoising_strength=strength)
    assert f"Hires steps: {steps}," in json.loads(post(http, "txt2img", **body)["info"])["infotexts"][0]


def test_a_seed_is_a_picture_with_hires_too(http):
    hires = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5}
    pair, alone = post(http, "txt2img", **small(n_iter=2, **hires)), post(http, "txt2img", **small(seed=8, **hires))
    assert pair["images"][1] == alone["images"][0]


def test_hires_to_a_size_enlarges_as_far_as_that(http):
    answer = post(http, "txt2img", **small(enable_hr=True, hr_resize_x=192, hr_resize_y=0, denoising_strength=0))
    assert opened(answer["images"][0]).size == (192, 192)


def test_img2img_draws_more_of_the_picture_anew_the_more_is_denoised(http):
    def drawn(strength):
        body = small(init_images=[encoded(RED)], denoising_strength=strength, steps=10)
        return opened(post(http, "img2img", **body)["images"][0]).convert("RGB")

    def difference(one, other):
        return ImageStat.Stat(ImageChops.difference(one, other)).sum2

    barely, little, much = map(drawn, (0.1, 0.3, 0.9))
    assert barely.size == (64, 64)
    assert sum(difference(barely, little)) < sum(difference(barely, much))


def test_img2img_takes_the_data_prefix_and_says_which_pictures_it_got_only_if_asked(http):
    body = small(init_images=["data:image/png;base64," + encoded(RED)])
    assert post(http, "img2img", **body)["parameters"]["init_images"] is None
    assert post(http, "img2img", **body, include_init_images=True)["parameters"]["init_images"] == body["init_images"]


def test_each_init_image_is_drawn_from(http):
    blue = Image.new("RGB", (64, 64), "blue")
    answer = post(http, "img2img", **small(init_images=[encoded(RED), encoded(blue)]))
    assert len(answer["images"]) == 2 and json.loads(answer["info"])["all_seeds"] == [7, 8]


@pytest.mark.parametrize("full_res, size", [(False, (64, 64)), (True, (96, 96))])
def test_inpainting_leaves_what_is_black_in_the_mask_as_it_was(http, full_res, size):
    picture, mask = Image.new("RGB", (96, 96), (200, 30, 60)), Image.new("L", (96, 96), 0)
    mask.paste(255, (60, 60, 84, 84))
    answer = post(http, "img2img", **small(
        init_images=[encoded(picture)], mask=encoded(mask), inpaint_full_res=full_res, mask_blur=0,
        inpaint_full_res_padding=4, denoising_strength=1,
    ))  # fmt: skip
    drawn = opened(answer["images"][0]).convert("RGB")
    assert drawn.size == size
    assert max(abs(a - b) for a, b in zip(drawn.getpixel((5, 5)), (200, 30, 60), strict=True)) <= 1
    inside = drawn.getpixel((size[0] * 72 // 96, size[1] * 72 // 96))
    assert max(abs(a - b) for a, b in zip(inside, (200, 30, 60), strict=True)) > 3


def test_inverting_the_mask_draws_the_rest(http):
    picture, mask = Image.new("RGB", (64, 64), (200, 30, 60)), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    answer = post(http, "img2img", **small(
        init_images=[encoded(picture)], mask=encoded(mask), inpaint_full_res=False, mask_blur=0,
        inpainting_mask_invert=1, denoising_strength=1,
    ))  # fmt: skip
    drawn = opened(answer["images"][0]).convert("RGB")
    assert max(abs(a - b) for a, b in zip(drawn.getpixel((5, 32)), (200, 30, 60), strict=True)) <= 1


def inpainted(http, **more):
    picture, mask = Image.effect_noise((96, 96), 90).convert("RGB"), Image.new("L", (96, 96), 0)
    mask.paste(255, (40, 40, 72, 72))
    body = {"init_images": [encoded(picture)], "mask": encoded(mask), "mask_blur": 0, "width": 96, "height": 96,
            "denoising_strength": 0.5, "inpaint_full_res": False}  # fmt: skip
    answer = post(http, "img2img", **small(**body | more))
    drawn = opened(answer["images"][0]).convert("RGB")
    return ImageChops.difference(picture, drawn).convert("L").point(lambda v: 255 if v > 2 else 0), answer


def test_what_the_mask_lays_bare_begins_as_inpainting_fill_says(http):
    answers = [inpainted(http, inpainting_fill=fill)[1] for fill in range(4)]
    assert len({answer["images"][0] for answer in answers}) == 4
    said = [json.loads(answer["info"])["infotexts"][0] for answer in answers]
    assert ["Masked content: fill" in said[0], "Masked content" in said[1]] == [True, False]


@pytest.mark.parametrize("full_res", [False, True])
def test_blurring_the_mask_lets_the_drawing_reach_over_its_border_and_not_far(http, full_res):
    sharp, soft = (inpainted(http, mask_blur=blur, inpaint_full_res=full_res)[0].getbbox() for blur in (0, 4))
    assert sharp == (40, 40, 72, 72)
    assert 24 < soft[0] < 40 and 24 < soft[1] < 40 and 72 < soft[2] < 88 and 72 < soft[3] < 88


def test_padding_shows_the_model_more_of_what_is_around_the_mask(http):
    near, far = (inpainted(http, inpaint_full_res=True, inpaint_full_res_padding=n)[1]["images"] for n in (0, 20))
    assert near != far


@pytest.mark.parametrize("resize_mode", [0, 1, 2, 3])
def test_every_resize_mode_gives_the_size_asked_for(http, resize_mode):
    answer = post(http, "img2img", **small(init_images=[encoded(RED)], resize_mode=resize_mode, width=128, height=64))
    assert opened(answer["images"][0]).size == (128, 64)


def test_extras_enlarge_by_a_factor(http):
    answer = post(http, "extra-single-image", image=encoded(RED), upscaler_1="Lanczos", upscaling_resize=1.5)
    assert opened(answer["image"]).size == (72, 96) and "Lanczos" in answer["html_info"]


@pytest.mark.parametrize("crop, size", [(True, (100, 100)), (False, (75, 100))])
def test_extras_enlarge_to_a_size(http, crop, size):
    answer = post(http, "extra-single-image", image=encoded(RED), upscaler_1="Lanczos", resize_mode=1,
                  upscaling_resize_w=100, upscaling_resize_h=100, upscaling_crop=crop)  # fmt: skip
    assert opened(answer["image"]).size == size


def test_extras_blend_two_upscalers(http):
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    both = [post(http, "extra-single-image", image=encoded(picture), upscaler_1="Lanczos", upscaler_2="Nearest",
                 extras_upscaler_2_visibility=v)["image"] for v in (0, 0.5, 1)]  # fmt: skip
    nearest = opened(post(http, "extra-single-image", image=encoded(picture), upscaler_1="Nearest")["image"])
    assert len(set(both)) == 3 and opened(both[2]).tobytes() == nearest.tobytes()


def test_extras_work_on_several_pictures_and_keep_their_order(http):
    pictures = [{"data": encoded(Image.new("RGB", (8, 8 + i))), "name": f"{i}.png"} for i in range(3)]
    answer = post(http, "extra-batch-images", imageList=pictures, upscaler_1="Nearest", upscaling_resize=2)
    assert [opened(text).size for text in answer["images"]] == [(16, 16), (16, 18), (16, 20)]


def test_extras_with_no_upscaler_named_say_that_nothing_was_done(http):
    answer = post(http, "extra-single-image", image=encoded(RED))
    assert opened(answer["image"]).tobytes() == RED.tobytes() and "no upscaler" in answer["html_info"]


def test_png_info_reads_what_txt2img_wrote(http):
    made = post(http, "txt2img", **small())
    answer = post(http, "png-info", image=made["images"][0])
    assert answer["info"] == json.loads(made["info"])["infotexts"][0]
    assert answer["parameters"]["Prompt"] == "a red cat" and answer["parameters"]["Seed"] == "7"
    assert answer["parameters"]["Size-1"] == "64"


def test_png_info_of_a_picture_that_says_nothing_is_empty(http):
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "holiday")
    answer = post(http, "png-info", image=encoded(RED, pnginfo=text))
    assert answer == {"info": "", "items": {"Comment": "holiday"}, "parameters": {}}


@pytest.mark.parametrize("file_format, name", [("jpg", "JPEG"), ("webp", "WEBP")])
def test_answers_come_in_the_format_that_the_options_say_and_keep_their_infotext(http, file_format, name):
    post(http, "options", samples_format=file_format)
    try:
        made = post(http, "txt2img", **small())
        assert opened(made["images"][0]).format == name
        assert post(http, "png-info", image=made["images"][0])["info"] == json.loads(made["info"])["infotexts"][0]
    finally:
        post(http, "options", samples_format="png")


def test_options_can_be_read_and_written(http):
    before = http.get(BASE + "options").json()
    post(http, "options", CLIP_stop_at_last_layers=2, an_unknown_one=5)
    after = http.get(BASE + "options").json()
    post(http, "options", **before)
    assert after == before | {"CLIP_stop_at_last_layers": 2}


def test_progress_shows_the_own_job_with_a_preview_and_interrupt_stops_it(http, web_server):
    mine, others = {"X-Client-Id": "mine"}, {"X-Client-Id": "others"}
    answers = {}

    def draw(headers):
        answers[headers["X-Client-Id"]] = httpx.post(
            web_server.url + BASE + "txt2img", json=small(steps=60, n_iter=4), headers=headers, timeout=60
        ).json()

    thread = threading.Thread(target=draw, args=(mine,))
    thread.start()
    seen = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        seen.append(http.get(BASE + "progress", headers=mine).json())
        assert http.get(BASE + "progress", headers=others).json()["state"]["job_count"] == 0
        if seen[-1]["current_image"]:
            break
    assert 0 < seen[-1]["progress"] < 1 and seen[-1]["state"]["job_count"] == 1
    assert opened(seen[-1]["current_image"]).size == (64, 64)
    post(http, "interrupt", headers=others)
    assert thread.is_alive()
    post(http, "interrupt", headers=mine)
    thread.join(10)
    assert not thread.is_alive() and len(answers["mine"]["images"]) < 4
    assert http.get(BASE + "progress", headers=mine).json()["progress"] == 0


def test_skip_leaves_out_the_picture_at_hand_only(http, web_server):
    headers, answer = {"X-Client-Id": "skipper"}, {}
    body, url = small(steps=40, n_iter=3), web_server.url + BASE + "txt2img"
    thread = threading.Thread(
        target=lambda: answer.update(httpx.post(url, json=body, headers=headers, timeout=60).json())
    )
    thread.start()
    while thread.is_alive() and not http.get(BASE + "progress", headers=headers).json()["progress"]:
        pass
    post(http, "skip", headers=headers)
    thread.join(30)
    assert len(answer["images"]) == 2


def test_a_job_goes_by_the_id_that_its_client_chose(http, web_server):
    thread = threading.Thread(
        target=httpx.post, args=(web_server.url + BASE + "txt2img",),
        kwargs={"json": small(steps=60, n_iter=4, force_task_id="my task"), "timeout": 60},
    )  # fmt: skip
    thread.start()
    mine = {"id_task": "my task"}
    while thread.is_alive() and not http.get(BASE + "progress", params=mine).json()["state"]["job_count"]:
        pass
    assert thread.is_alive()
    assert http.get(BASE + "progress", params={"id_task": "another"}).json()["state"]["job_count"] == 0
    http.post(BASE + "interrupt", params=mine)
    thread.join(10)
    assert not thread.is_alive()


def test_a_client_that_hangs_up_frees_its_place(http, web_server):
    headers = {"X-Client-Id": "hanging up"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(web_server.url + BASE + "txt2img", json=small(steps=60, n_iter=4), headers=headers, timeout=0.3)
    deadline = time.monotonic() + 10
    while http.get(BASE + "progress", headers=headers).json()["state"]["job_count"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert http.get(BASE + "progress", headers=headers).json()["state"]["job_count"] == 0
    post(http, "txt2img", **small())


LISTS = {
    "sd-models": [{"title", "model_name", "hash", "sha256", "filename", "config"}],
    "samplers": [{"name", "aliases", "options"}],
    "schedulers": [{"name", "label", "aliases", "default_rho", "need_inner_model"}],
    "upscalers": [{"name", "model_name", "model_path", "model_url", "scale"}],
    "latent-upscale-modes": [{"name"}], "sd-vae": [], "hypernetworks": [], "face-restorers": [], "prompt-styles": [],
    "realesrgan-models": [], "loras": [],
}  # fmt: skip


@pytest.mark.parametrize("route", LISTS)
def test_lists_have_the_keys_that_programs_read_and_are_empty_where_there_is_nothing(http, route):
    items = http.get(BASE + route).json()
    assert bool(items) == bool(LISTS[route])
    assert all(set(item) == LISTS[route][0] for item in items)


def test_the_other_questions_have_their_keys_too(http):
    assert http.get(BASE + "embeddings").json() == {"loaded": {}, "skipped": {}}
    assert http.get(BASE + "scripts").json() == {"txt2img": [], "img2img": []}
    assert set(http.get(BASE + "memory").json()) == {"ram", "cuda"}
    assert http.get(BASE + "cmd-flags").json()["api"] is True
    assert http.post(BASE + "refresh-checkpoints").json() is None
    assert http.get("/healthz").json() == {"status": "ok"}


def test_the_documentation_needs_nothing_from_elsewhere(http):
    page = http.get("/docs").text
    assert "/sdapi/v1/txt2img" in page and "src=" not in page and "://" not in page
    assert http.get("/openapi.json").json()["paths"].keys() >= {BASE + "txt2img", BASE + "img2img"}
