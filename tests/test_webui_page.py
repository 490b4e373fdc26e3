"""The page in a real browser: what a person sees and does.

Screenshots go to test-output/.
"""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this system")
# For networks where nothing but loopback is reachable: the browser must not wait for its own services.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SHOTS = Path(__file__).resolve().parent.parent / "test-output"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"), executable_path=CHROMIUM, headless=True, args=FLAGS,
            viewport={"width": 1280, "height": 900},
        )  # fmt: skip
        context.set_default_timeout(45_000)
        expect.set_options(timeout=45_000)
        yield context
        context.close()


@pytest.fixture
def page(browser, web_server):
    """A fresh tab on the Create tab. Fails the test if the page asked another server, or logged an error."""
    page, troubles = browser.new_page(), []
    page.on("request", lambda r: r.url.startswith((web_server.url, "data:", "blob:")) or troubles.append(r.url))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("response", lambda r: r.status >= 400 and troubles.append(f"{r.status} {r.url}"))
    page.goto(web_server.url)
    expect(page.locator("#prompt textarea")).to_be_visible()
    yield page
    page.close()
    assert not troubles


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def set_number(page, element, value):
    page.locator(f"#{element} input[type=number]").first.fill(str(value))
    page.locator(f"#{element} input[type=number]").first.blur()


def create(page, prompt, seed=5, steps=4, count=1):
    page.locator("#prompt textarea").fill(prompt)
    set_number(page, "seed", seed)
    set_number(page, "steps", steps)
    set_number(page, "count", count)
    page.locator("#generate").click()


def made(page):
    expect(page.locator("#create-status")).to_contain_text("Done")
    expect(page.locator("#create-results img").first).to_be_visible()


def test_creating_shows_progress_a_preview_and_the_picture_with_its_settings(page):
    create(page, "a red cat", steps=60, count=2)
    bar = page.locator("#create-status [role=progressbar]")
    expect(bar).to_be_visible()
    expect(page.locator("#create-status .dp-preview")).to_be_visible()
    expect(page.locator("#create-status")).to_contain_text(re.compile(r"\d+ % · .*left"))
    made(page)
    expect(bar).to_have_count(0)
    expect(page.locator("#create-infotext textarea")).to_have_value(re.compile(r"a red cat\nSteps: 60, .*Seed: 5,"))
    page.screenshot(path=SHOTS / "create.png", full_page=True)


def test_an_empty_page_invites_with_examples_and_shows_nothing_that_has_no_use_yet(page):
    expect(page.locator("#create-status")).to_contain_text("Your pictures will appear here")
    for name in ("stop", "create-results", "create-infotext", "send-upscale", "init-image"):
        expect(page.locator(f"#{name}")).to_be_hidden()
    page.locator("#examples").get_by_text("apple").click()
    expect(page.locator("#prompt textarea")).to_have_value("apple")


def test_what_is_painted_over_is_drawn_anew_from_the_content_that_is_chosen(page):
    create(page, "a red cat")
    made(page)
    page.locator("#send-init").click()
    canvas = page.locator("#init-image canvas").first
    expect(canvas).to_be_visible()
    choose(page, "masked-content", "fill")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=5)
    page.mouse.up()
    set_number(page, "strength", 0.5)
    page.locator("#generate").click()
    expect(page.locator("#create-infotext textarea")).to_have_value(re.compile("Masked content: fill"))


def test_stop_ends_the_job_within_a_step(page, web_server):
    create(page, "a red cat", steps=60, count=4)
    expect(page.locator("#create-status .dp-preview")).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator("#create-status")).to_contain_text("Stopped")
    assert web_server.backend.queue.jobs() == []


def test_closing_the_page_stops_its_job(browser, web_server):
    page = browser.new_page()
    page.goto(web_server.url)
    create(page, "a red cat", steps=60, count=4)
    expect(page.locator("#create-status .dp-preview")).to_be_visible()
    (job,) = web_server.backend.queue.jobs()
    page.close()
    assert job.wait(10) and job.state == "cancelled"


def test_the_keyboard_alone_is_enough(page):
    page.keyboard.type("a red cat")  # the prompt has the focus from the start
    set_number(page, "steps", 4)
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Control+Enter")
    made(page)
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#generate")).to_be_focused()


def test_a_word_that_the_model_does_not_know_is_named_and_one_that_it_knows_can_be_picked(page, web_server):
    web_server.backend.load("test", web_server.backend.models.current.name).wait(30)
    page.locator("#prompt textarea").fill("a red zeppelin")
    expect(page.locator("#unknown-words")).to_contain_text("'zeppelin'")
    page.locator("#prompt textarea").fill("a red")
    expect(page.locator("#unknown-words")).not_to_contain_text("zeppelin")
    page.locator("#words input").click()
    page.get_by_role("option", name="apple").click()
    expect(page.locator("#prompt textarea")).to_have_value("a red apple")


@pytest.mark.parametrize("size, said", [("huge", "WIDTHxHEIGHT"), ("4096x4096", "the limit is 512")])
def test_a_mistake_is_told_in_a_sentence(page, size, said):
    page.locator("#size input").fill(size)
    page.locator("#size input").press("Tab")
    create(page, "a red cat")
    alert = page.locator("#create-status [role=alert]")
    expect(alert).to_contain_text(said)
    expect(alert).not_to_contain_text("Traceback")


def test_html_in_a_prompt_is_text(page):
    create(page, "<img src=x onerror=document.title='broken'> a <b>red</b> cat")
    made(page)
    tab(page, "Library")
    expect(page.locator("#library-pictures img").first).to_be_visible()
    assert page.title() == "Diptych"
    assert page.locator("img[src=x]").count() == 0


def test_a_picture_is_upscaled_and_compared_with_a_slider(page, tmp_path):
    Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "noise.png")
    tab(page, "Upscale")
    page.locator("#upscale-pictures input[type=file]").set_input_files(tmp_path / "noise.png")
    expect(page.locator("#upscale-pictures img").first).to_be_visible()
    choose(page, "upscale-upscaler", "Lanczos")
    set_number(page, "upscale-scale", 3)
    page.locator("#upscale-run").click()
    expect(page.locator("#upscale-status")).to_contain_text("120 x 90 pixels")
    expect(page.locator("#upscale-slider img")).to_have_count(2)
    with page.expect_download() as download:
        page.locator("#upscale-files a[download]").first.click()
    with Image.open(download.value.path()) as result:
        assert result.size == (120, 90)
    page.screenshot(path=SHOTS / "upscale.png", full_page=True)


def choose(page, element, option):
    page.locator(f"#{element} input").click()
    page.get_by_role("option", name=option).click()


def test_what_was_made_is_found_in_the_library_reused_and_deleted(page):
    create(page, "a green apple", seed=77)
    made(page)
    tab(page, "Library")
    page.locator("#library-search input, #library-search textarea").first.fill("green 77")
    expect(page.locator("#library-pictures img")).to_have_count(1)
    page.locator("#library-pictures img").click()
    expect(page.locator("#library-infotext textarea")).to_have_value(re.compile("a green apple\n.*Seed: 77"))
    expect(page.locator("#library-picture img")).to_be_visible()
    page.screenshot(path=SHOTS / "library.png", full_page=True)
    page.locator("#library-reuse").click()
    expect(page.locator("#seed input")).to_have_value("77")
    tab(page, "Library")
    page.locator("#library-search input, #library-search textarea").first.fill("green 77")
    expect(page.locator("#library-pictures img")).to_have_count(1)
    page.locator("#library-pictures img").click()
    page.locator("#library-delete").click()
    page.locator("#library-confirm").click()
    expect(page.locator("#library-status")).to_contain_text("Nothing found")


def test_settings_are_restored_from_a_picture(page, web_server):
    create(page, "a green cat", seed=4321, steps=6)
    made(page)
    (entry,) = web_server.backend.library.search("", "4321")
    page.reload()
    tab(page, "PNG info")
    page.locator("#info-picture input[type=file]").set_input_files(entry.path)
    expect(page.locator("#info-infotext textarea")).to_have_value(entry.infotext)
    expect(page.locator("#info-table")).to_contain_text("4321")
    page.screenshot(path=SHOTS / "info.png", full_page=True)
    page.locator("#info-reuse").click()
    expect(page.locator("#prompt textarea")).to_have_value("a green cat")
    expect(page.locator("#seed input")).to_have_value("4321")
    expect(page.locator("#steps input[type=number]")).to_have_value("6")


def test_a_picture_goes_on_to_other_tabs(page):
    create(page, "a red cat")
    made(page)
    page.locator("#send-upscale").click()
    expect(page.locator("#upscale-pictures img").first).to_be_visible()
    tab(page, "Create")
    page.locator("#send-info").click()
    expect(page.locator("#info-infotext textarea")).to_have_value(re.compile("a red cat"))


def test_models_are_listed_and_a_download_without_network_says_which_file_to_fetch(page, monkeypatch, tmp_path):
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing answers there
    tab(page, "Models")
    expect(page.locator("#model input")).to_have_value("tiny-model")
    page.locator("#official-download").click()
    expect(page.locator("#official-status [role=alert]")).to_contain_text("RealESRGAN_x4plus.pth")
    page.screenshot(path=SHOTS / "models.png", full_page=True)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_fits_the_screen(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)
    page.reload()
    for name in ("Create", "Upscale", "Library", "PNG info", "Models"):
        shown, more = page.get_by_role("tab", name=name), page.locator(".overflow-menu > button")
        expect(shown.or_(more).locator("visible=true").first).to_be_visible()
        if more.is_visible() and not (shown.count() and shown.first.is_visible()):
            more.click()  # a narrow screen: the rest of the tabs are behind a button
            page.locator(".overflow-dropdown button").filter(has_text=name).click()
        else:
            shown.first.click()
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        page.screenshot(path=SHOTS / f"{name.replace(' ', '-').lower()}-{width}-{scheme}.png", full_page=True)
