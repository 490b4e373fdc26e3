"""Trains a text encoder and a UNet in the latent space of an autoencoder: `diptych train diffusion CONFIG`.

The model learns v-prediction (Salimans and Ho 2022) on a cosine schedule rescaled to zero terminal SNR (Lin et al.
2024), with captions dropped now and then for classifier-free guidance. The text encoder is CLIP's, small, trained
together with the UNet; its tokenizer is trained first, on the captions. Latents are encoded once and cached. The result
is a folder of diffusers' `StableDiffusionPipeline`.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diptych.data.sources import DataConfig, Source
from diptych.errors import CheckpointError
from diptych.pipelines.tokenizer import write_vocabulary
from diptych.training import Run, RunConfig, ema_of, read_config
from diptych.vae.train import as_tensor, load_autoencoder

logger = logging.getLogger(__name__)


@dataclass
class ModelConfig:
    """The UNet has a level for each of `channels`, each after the first at half the size, with attention where said.

    sketch: in `text_steps` each of the last sketch x sketch tokens, which captions leave empty, learns to foresee one
    cell of the latents, where the UNet then looks it up; `tokens` counts them too.
    """

    side: int = 64
    channels: tuple[int, ...] = (64, 160, 256)
    attention: tuple[bool, ...] = (False, True, True)
    layers_per_block: int = 1
    heads: int = 4
    norm_groups: int = 16
    text_width: int = 192
    text_layers: int = 2
    tokens: int = 77
    vocabulary: int = 2048
    sketch: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.sketch**2 < self.tokens:
            raise ValueError(f"sketch must be at least 1 and its square below tokens, not {self.sketch}.")
        if len(self.attention) != len(self.channels):
            raise ValueError("attention needs one value for each of channels.")


@dataclass
class Config:
    """A whole configuration file.

    vae: folder of the finished `AutoencoderKL`; batch: pictures a step and process; caption_dropout: share of pictures
    trained without caption; cached_pictures: how many captioned pictures are encoded before the first step; noise_bias:
    above 1 trains more on high noise, where only the caption says what to draw; start_from: a pipeline folder whose
    tokenizer, text encoder and UNet are trained on; text_steps: steps in which the text encoder alone learns to foresee
    the latents of its captions, so that the UNet meets words that already mean something; optimizer: `muon` (Jordan et
    al. 2024) trains the matrices and convolutions inside the UNet and the text encoder, AdamW the rest, or all.
    """

    run: RunConfig
    data: DataConfig
    vae: str
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: int = 32
    learning_rate: float = 3e-4
    warmup: int = 300
    ema: float = 0.999
    noise_bias: float = 1.0
    caption_dropout: float = 0.1
    cached_pictures: int = 20_000
    sample_guidance: float = 3.0
    start_from: str | None = None
    text_steps: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self) -> None:
        if self.noise_bias < 1:
            raise ValueError(f"noise_bias must be at least 1, not {self.noise_bias}.")
        if self.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer = 'muon' needs PyTorch 2.9 or later; this is {torch.__version__}.")
        if self.optimizer == "muon" and self.run.mixed_precision == "fp16":
            raise ValueError("optimizer = 'muon' trains in bf16 or without mixed precision, not in fp16.")


class Denoiser(torch.nn.Module):
    """Text encoder and UNet in one forward, which is what several processes can share gradients of."""

    def __init__(self, text_encoder: Any, unet: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Noisy latents (N, C, h, w), timesteps (N,), token ids (N, L) -> predicted v (N, C, h, w)."""
        return self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample.float()


def train(config_file: str, resume: bool = False) -> Path:
    """Trains as `config_file` says and returns the folder of the finished pipeline.

    Raises ValueError, CheckpointError, ImageError or ModelNotFound before any work where something does not fit.
    """
    config = read_config(config_file, Config)
    source = config.data.open()
    if config.start_from is not None and not (Path(config.start_from) / "unet").is_dir():
        raise CheckpointError(f"start_from = {config.start_from!r} is no pipeline folder.")
    vae = load_autoencoder(config.vae, "vae").eval().requires_grad_(False)
    side = _latent_side(config, vae)
    if side % config.model.sketch:
        raise ValueError(f"sketch = {config.model.sketch} does not divide the {side} latents of a side.")
    run = Run(config, resume)
    run.keep_config(config_file)
    torch.manual_seed(config.run.seed)
    tokenizer = _tokenizer(run, source, config)
    denoiser = _build(config, vae, len(tokenizer)).to(run.device)
    run.lay_out(denoiser)
    average = ema_of(denoiser, config.ema)
    scheduler = _scheduler()
    ends = (denoiser.unet.conv_in, denoiser.unet.conv_out)
    optimizers = _optimizers(denoiser, config.optimizer, config.learning_rate, ends)
    run.attach(denoiser=denoiser, average=average, **optimizers)
    latents, tokens = _cache(run, source, vae.to(run.device), tokenizer, config)
    empty = torch.tensor(_tokenize(tokenizer, [""], config)[0])
    samples = _sample_captions(source, config)
    if not resume:
        _teach_words(run, denoiser.text_encoder, latents, tokens, config)
        average.module.load_state_dict(denoiser.state_dict())
    model, *prepared = run.accelerator.prepare(denoiser, *optimizers.values())

    for step in run.steps():
        run.set_learning_rate(step, config.learning_rate, config.warmup, *prepared)
        rng, generator = run.rng(step), run.generator(step)
        chosen = torch.from_numpy(rng.integers(len(latents), size=config.batch))
        clean, captions = latents[chosen].float(), tokens[chosen].long()
        captions[torch.from_numpy(rng.random(config.batch) < config.caption_dropout)] = empty
        noise = torch.randn(clean.shape, generator=generator)
        # One timestep from each of `batch` equal parts of the schedule: the loss varies less than with free draws.
        spread = (torch.arange(config.batch) + torch.rand(config.batch, generator=generator)) / config.batch
        last = scheduler.config.num_train_timesteps - 1
        timesteps = ((1 - spread**config.noise_bias) * (last + 1)).long().clamp_max(last)
        clean, noise, timesteps, captions = (x.to(run.device) for x in (clean, noise, timesteps, captions))
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)  # v = sqrt(a) noise - sqrt(1 - a) clean
        with run.accelerator.autocast():
            loss = (model(noisy, timesteps, captions) - target).square().mean()
        denoiser.zero_grad()
        run.accelerator.backward(loss)
        norm = run.accelerator.clip_grad_norm_(denoiser.parameters(), 1.0)
        for optimizer in prepared:
            optimizer.step()
        average.update_parameters(denoiser)
        run.log(loss=loss, gradient=norm)

        if run.due(step, config.run.sample_every) and run.is_main:
            pictures = _sample(_pipeline(vae, tokenizer, average.module, scheduler), samples, config)
            run.sheet(step, [list(row) for row in pictures.split(4)], samples)

    if run.is_main:
        _save(run.folder / "model", _pipeline(vae, tokenizer, average.module, scheduler), source)
    return run.folder / "model"


# ------------------------------------------------------------------------------------------------ parts


def _build(config: Config, vae: Any, vocabulary: int) -> Denoiser:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if config.start_from is not None:
        folder = Path(config.start_from)
        return Denoiser(
            CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True),
            UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True),
        )
    model = config.model
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=model.text_width,
            intermediate_size=4 * model.text_width,
            projection_dim=model.text_width,
            num_hidden_layers=model.text_layers,
            num_attention_heads=model.heads,
            max_position_embeddings=model.tokens,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in model.attention]
    unet = UNet2DConditionModel(
        sample_size=_latent_side(config, vae),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=model.channels,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        mid_block_type="UNetMidBlock2DCrossAttn",
        layers_per_block=model.layers_per_block,
        cross_attention_dim=model.text_width,
        attention_head_dim=model.heads,
        norm_num_groups=model.norm_groups,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",  # the caption, pooled, joins the timestep: words find their pictures sooner
        addition_embed_type_num_heads=model.heads,
    )
    return Denoiser(text_encoder, unet)


def _latent_side(config: Config, vae: Any) -> int:
    return config.model.side // 2 ** (len(vae.config.block_out_channels) - 1)


def _optimizers(
    model: torch.nn.Module, kind: str, rate: float, ends: tuple[torch.nn.Module, ...] = ()
) -> dict[str, torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices and convolutions of `model` but `ends`, and AdamW for the rest."""
    layers = torch.nn.Linear | torch.nn.Conv2d
    inner = [m.weight for m in model.modules() if isinstance(m, layers) and m not in ends] if kind == "muon" else []
    taken = {id(weight) for weight in inner}
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    adamw = torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=0.01)
    return {"adamw": adamw, "muon": _muon(inner, rate)} if inner else {"adamw": adamw}


def _muon(weights: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """PyTorch's Muon, which takes matrices only, for weights of convolutions too: each as outputs x all the rest."""

    def matrix(weight: Tensor) -> Tensor:  # without a copy, in either memory format
        by_channel = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        return (weight.permute(0, 2, 3, 1) if by_channel else weight).flatten(1)

    class Muon(torch.optim.Muon):
        def step(self, closure: Any = None) -> Any:
            for weight, view in zip(weights, self.param_groups[0]["params"], strict=True):
                view.data = matrix(weight.detach())  # anew: a weight's storage changes where several processes train
                assert weight.grad is not None and view.data_ptr() == weight.data_ptr()
                gradient = torch.empty_like(weight).copy_(weight.grad)  # in the weight's own memory format
                view.grad = matrix(gradient)
            return super().step(closure)

    views = [torch.nn.Parameter(matrix(weight.detach())) for weight in weights]
    return Muon(views, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def _tokenizer(run: Run, source: Source, config: Config) -> Any:
    """A CLIP tokenizer whose merges are learned from captions (byte pair encoding, Sennrich et al. 2016)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    folder = (run.folder if config.start_from is None else Path(config.start_from)) / "tokenizer"
    if config.start_from is None and run.is_main and not (folder / "vocab.json").exists():
        captions = source.captions(np.random.default_rng([config.run.seed, 2**31]), 20_000) or ["a picture"]
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=config.model.vocabulary,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        merges = json.loads(bpe.to_str())["model"]["merges"]
        folder.mkdir(exist_ok=True)
        write_vocabulary(folder, [m if isinstance(m, str) else " ".join(m) for m in merges])
    run.accelerator.wait_for_everyone()
    return CLIPTokenizer.from_pretrained(folder, model_max_length=config.model.tokens)


def _tokenize(tokenizer: Any, captions: list[str], config: Config) -> list[list[int]]:
    return tokenizer(captions, padding="max_length", max_length=config.model.tokens, truncation=True).input_ids


@torch.no_grad()
def _cache(run: Run, source: Source, vae: Any, tokenizer: Any, config: Config) -> tuple[Tensor, Tensor]:
    """Latents (N, C, h, w), of unit variance, float16, and token ids (N, L), int32; made once, kept in the run."""
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    path = run.folder / "latents.safetensors"
    if run.is_main and not path.exists():
        latents, tokens = [], []
        draws = range(2**32, 2**32 + math.ceil(config.cached_pictures / 64))
        drawn = run.ahead(partial(source.batch, number=64, side=config.model.side), draws)
        for pictures, captions in tqdm(drawn, total=len(draws), unit_scale=64, desc="latents", mininterval=2):
            batch = as_tensor(pictures.to(run.device)).to(memory_format=run.memory_format)
            with run.accelerator.autocast():
                mean = vae.encode(batch).latent_dist.mean
            latents.append((mean * vae.config.scaling_factor).half().cpu().contiguous())
            tokens.append(torch.tensor(_tokenize(tokenizer, captions, config), dtype=torch.int32))
        number = config.cached_pictures
        part = path.with_suffix(".part")
        save_file({"latents": torch.cat(latents)[:number].clone(), "tokens": torch.cat(tokens)[:number].clone()}, part)
        part.replace(path)
    run.accelerator.wait_for_everyone()
    cached = load_file(path)
    return cached["latents"], cached["tokens"]


def _teach_words(run: Run, text_encoder: Any, latents: Tensor, tokens: Tensor, config: Config) -> None:
    """Trains the text encoder, through a linear head that is thrown away, to foresee the latents of a caption.

    A cross-attention that starts among meaningless words takes most of a small budget to find out which word matters;
    and a step of the text encoder alone costs a tenth of one with the UNet.
    """
    parts = config.model.sketch
    channels, height, width = latents.shape[1:]
    cell = (channels, height // parts, width // parts)
    head = torch.nn.Linear(config.model.text_width, math.prod(cell)).to(run.device)
    both = torch.nn.ModuleList([text_encoder, head])
    optimizers = list(_optimizers(both, config.optimizer, 2e-3).values())
    for step in range(config.text_steps):
        run.set_learning_rate(step, 2e-3, 200, *optimizers, steps=config.text_steps)
        chosen = torch.from_numpy(run.rng(2**31 + 3 + step).integers(len(latents), size=64))
        rows = latents[chosen].float().to(run.device).unflatten(3, (parts, -1)).unflatten(2, (parts, -1))
        target = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, parts * parts, values of a cell)
        with run.accelerator.autocast():
            foreseen = head(text_encoder(tokens[chosen].long().to(run.device))[0][:, -(parts**2) :])
        loss = (foreseen.float() - target).square().mean()
        both.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 99:
            logger.info("words, step %d: %.3f of the variance is left", step + 1, loss.item() / target.var().item())


def _sample_captions(source: Source, config: Config) -> list[str]:
    """Sixteen captions for the sheets, of what is not trained on."""
    return source.held_out().batch(np.random.default_rng([config.run.seed, 2**31 + 2]), 16, config.model.side)[1]


def _pipeline(vae: Any, tokenizer: Any, denoiser: Any, scheduler: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sample(pipeline: Any, captions: list[str], config: Config) -> Tensor:
    """One picture a caption, 25 steps, seeds 0, 1, ...: (N, 3, side, side) in 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    output = pipeline(
        captions,
        num_inference_steps=25,
        guidance_scale=config.sample_guidance,
        generator=generators,
        output_type="pt",
        height=config.model.side,
        width=config.model.side,
    )
    return output.images


def _save(folder: Path, pipeline: Any, source: Source) -> None:
    pipeline.save_pretrained(folder)
    merges = json.loads(pipeline.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    write_vocabulary(folder / "tokenizer", [m if isinstance(m, str) else " ".join(m) for m in merges])
    words = source.words()
    if words:
        (folder / "words.json").write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
