"""What several test files share: small real models, built from configurations with fixed random weights."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The networks of the tests are too small for several threads, which moreover wait for each other on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the shape of the embedded model (64x64 pictures, f4 VAE, v-prediction), with an upscaler.

    It draws noise, in about a second. Its words.json knows the words "a red green apple cat".
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from diptych.pipelines import DiptychPipeline, DiptychUpscaler
    from diptych.pipelines.tokenizer import write_vocabulary

    folder = tmp_path_factory.mktemp("tiny") / "tiny-model"
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(vocabulary, ["a p", "ap p", "app l", "appl e</w>", "r e", "re d</w>", "c a", "ca t</w>"])
    torch.manual_seed(0)
    pipeline = DiptychPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=64,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=522,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=520,
                eos_token_id=521,
                pad_token_id=521,
            )
        ),
        tokenizer=CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77),
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=1,
        ),
        upscaler=DiptychUpscaler("SRVGGNetCompact", num_feat=8, num_conv=2, upscale=4),
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    words = {"subjects": ["apple", "cat"], "words": ["a", "red", "green", "apple", "cat"]}
    (folder / "words.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


@pytest.fixture
def make_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes stand-in hosts (tests/standin_host) in `tmp_path / "webui"`, with the real extension in them unless told.

    `make_host(flavour, extension=FOLDER, options={...})` returns a Host that was not started yet.
    """
    import torch

    spec = importlib.util.spec_from_file_location("standin_host", Path(__file__).parent / "standin_host" / "host.py")
    assert spec and spec.loader
    standin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(standin)
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "home"))
    extension_here = Path(__file__).parent.parent / "extensions" / "sd-webui-diptych"

    def make(flavour: str = "a1111", extension: Path | None = extension_here, options: Any = None) -> Any:
        host = standin.Host(tmp_path / "webui", flavour, options)
        link = host.webui / "extensions" / "sd-webui-diptych"
        if extension is not None and not link.exists():
            link.symlink_to(extension, target_is_directory=True)
        return host

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks of these tests are too small for more
    with standin.fresh_modules(str(standin.HERE)):
        yield make
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def web_server(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Page and service on loopback with the tiny model and small limits; one for the whole run."""
    import torch

    from diptych.webui.server import WebServer
    from diptych.webui.settings import Limits, Settings

    limits = Limits(
        body_bytes=3_000_000, picture_pixels=1_000_000, output_pixels=4_000_000, size=512, steps=60, pictures=4
    )
    outputs = tmp_path_factory.mktemp("made") / "outputs"
    server = WebServer(Settings(port=0, model=str(tiny_pipeline_folder), outputs=outputs, limits=limits, dtype="fp32"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small is not faster with more, and the browser wants some too
    server.start()
    yield server
    server.stop()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_xl_folder(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the shape of SDXL, otherwise as `tiny_pipeline_folder`."""
    import torch
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from diptych.pipelines import DiptychPipeline, DiptychXLPipeline

    folder = tmp_path_factory.mktemp("tiny-xl") / "tiny-xl-model"
    parts = DiptychPipeline.from_pretrained(tiny_pipeline_folder).components
    torch.manual_seed(1)
    text_config = CLIPTextConfig(**{**parts["text_encoder"].config.to_dict(), "hidden_size": 48, "projection_dim": 48})
    pipeline = DiptychXLPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer=parts["tokenizer"],
        tokenizer_2=parts["tokenizer"],
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1),
            cross_attention_dim=80,
            attention_head_dim=8,
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=96,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        upscaler=parts["upscaler"],
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_srvgg():
    """A function (num_conv, num_feat, upscale, gain, num_in_ch) -> a small loaded SRVGGNetCompact with random weights.

    gain 1 gives an output that depends on all of its receptive field; gain 0 exactly repeats every pixel.
    """
    import torch

    from diptych.upscalers.networks import SRVGGNetCompact, load_network

    def make(num_conv: int = 2, num_feat: int = 8, upscale: int = 4, gain: float = 1.0, num_in_ch: int = 3):
        torch.manual_seed(num_conv)
        module = SRVGGNetCompact(num_in_ch, num_in_ch, num_feat, num_conv, upscale)
        weights = module.state_dict()
        for key, weight in weights.items():
            if weight.ndim == 4:
                torch.nn.init.orthogonal_(weight, 1.3)
            elif key != "body.1.weight" and not torch.allclose(weight, torch.tensor(0.25)):
                weight.uniform_(-0.1, 0.1)
        for name in ("weight", "bias"):
            weights[f"body.{2 * num_conv + 2}.{name}"] *= 0.3 * gain
        return load_network(weights)

    return make


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without network from a copy, so that the checkout stays clean."""
    folder, root = tmp_path_factory.mktemp("wheel"), Path(__file__).parent.parent
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (root / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(folder), str(folder / "source")], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel_site(wheel: Path) -> Path:
    """The wheel installed into a folder of its own."""
    site = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site
