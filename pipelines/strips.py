"""The KL autoencoder in strips: decodes and encodes a picture of any size in bounded memory, exactly.

Tiles that are decoded alone and blended, as is usual, have the colours of what they see: every GroupNorm measures the
mean and the variance of its tile, not of the picture. Here the layers are run one after the other over the whole
picture, each of them strip by strip: a strip is normalised, activated and convolved with one row more on either side,
and what it becomes is measured for the next normalisation while it is written down. So every statistic is that of the
whole picture, none is estimated, and nothing is computed twice but those rows. The low middle of the network, with its
attention over all pixels, is run as it is.

What is held is one feature map of the finest level, or two of them: 0.6 GB in bf16 for 1024 x 1024 pixels of SDXL's
decoder, of which nothing is held that was used up. Beyond a budget a map goes to a temporary file, and memory does not
grow with the picture. Every computation is a call of a layer of diffusers; only the order is from here.

GroupNorm: Wu and He 2018; at inference, with its statistics known, it is the affine map of BatchNorm. Statistics of
strips are joined as in Chan, Golub and LeVeque 1979.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import psutil
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional

from diptych.errors import Cancelled, DiptychError, OutOfMemory
from diptych.upscalers.device import is_out_of_memory
from diptych.upscalers.passes import Cancel
from diptych.upscalers.sources import Source
from diptych.upscalers.tiles import span

_STRIP_BYTES = {"cpu": 32 << 20}
_STRIP_BYTES_ELSEWHERE = 256 << 20  # of a GPU, which wants more work at a time
_WHOLE_BYTES = 64 << 20  # up to here a block of layers is run as it is
_HELD_BYTES = 1 << 30  # of feature maps in a process's own memory; a file stays in the system's while there is room


def runs_in_strips(vae: Any) -> bool:
    """Whether `vae` is built as Stable Diffusion's are, so that it can be run in strips."""
    if not isinstance(vae, AutoencoderKL):
        return False
    encoder, decoder = getattr(vae, "encoder", None), vae.decoder
    return all(isinstance(block, UpDecoderBlock2D) for block in decoder.up_blocks) and (
        encoder is None or all(isinstance(block, DownEncoderBlock2D) for block in encoder.down_blocks)
    )


@torch.no_grad()
def decode_strips(
    vae: AutoencoderKL, latents: torch.Tensor, *, cancel: Cancel | None = None, budget: int | None = None
) -> Iterator[torch.Tensor]:
    """Decodes latents (1, C, h, w), scaled as `vae.decode` takes them: strips (1, 3, some, W), about -1..1, on the
    device of the latents, from top to bottom.

    budget: bytes of feature maps to hold in memory; None is half of what is free, and of a computer's at most a
        gigabyte. The rest is in a temporary file.
    The whole picture is known to all layers before its first row comes: latents that overflow do so before.
    Raises Cancelled within one strip, OutOfMemory, DiptychError if the temporary file does not fit its disk.
    """
    decoder, work = vae.decoder, _Work(vae, cancel, budget)
    z = latents.to(vae.dtype)
    if vae.post_quant_conv is not None:
        z = vae.post_quant_conv(z)
    sample = decoder.mid_block(decoder.conv_in(z))
    blocks = list(decoder.up_blocks)
    while blocks and (larger := work.whole(sample, blocks[0], blocks[0].resnets[-1].out_channels)) is not None:
        sample = larger
        del blocks[0]
    if not blocks:
        yield decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(sample)))
        return
    features = work.map_of(sample)
    for block in blocks:
        for resnet in block.resnets:
            features = work.resnet(features, resnet)
        for upsampler in block.upsamplers or ():
            features = work.upsample(features, upsampler)
    norm = work.normalise(features, decoder.conv_norm_out, decoder.conv_act)
    yield from work.convolve(features, norm, decoder.conv_out)


@torch.no_grad()
def encode_strips(
    vae: AutoencoderKL, source: Source, *, cancel: Cancel | None = None, budget: int | None = None
) -> torch.Tensor:
    """Encodes one picture, 0..1, that is read by rows from top to bottom. Returns the moments (1, 2 * C, h, w), the
    mean and the logarithm of the variance of its latents, as `vae.encode` makes them.

    The other arguments and errors are those of `decode_strips`.
    """
    encoder, work = vae.encoder, _Work(vae, cancel, budget)
    features = work.picture(source, encoder.conv_in)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            features = work.resnet(features, resnet)
        for downsampler in block.downsamplers or ():
            features = work.downsample(features, downsampler)
    sample = encoder.mid_block(features.rows(0, features.height))
    sample = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(sample)))
    return sample if vae.quant_conv is None else vae.quant_conv(sample)


class _Budget:
    """Bytes of feature maps that may stay in memory."""

    def __init__(self, device: torch.device, limit: int | None) -> None:
        if limit is None:
            if device.type == "cuda":
                limit = torch.cuda.mem_get_info(device)[0] // 2
            else:
                limit = min(psutil.virtual_memory().available // 2, _HELD_BYTES)
        self.limit, self.held = limit, 0


class _Map:
    """A feature map (1, C, height, width), written from top to bottom and let go of in the same direction."""

    def __init__(self, budget: _Budget) -> None:
        self.height = self.width = 0
        self._budget = budget
        self._strips: list[tuple[int, int, torch.Tensor | None]] = []  # from row, to row, None: in the file
        self._file: IO[bytes] | None = None
        self._row: torch.Tensor | None = None  # an empty one, of the right type
        self._count = 0
        self._mean: torch.Tensor | None = None  # of each channel, and the sum of squared distances from it
        self._squares: torch.Tensor | None = None

    def append(self, strip: torch.Tensor) -> None:
        """Adds rows (1, C, some, width) at the bottom."""
        start, self.height, self.width = self.height, self.height + strip.shape[2], strip.shape[3]
        self._measure(strip)
        size = strip.numel() * strip.element_size()
        if self._budget.held + size <= self._budget.limit:
            self._budget.held += size
            self._strips.append((start, self.height, strip))
        else:
            self._write(start, strip)
            self._strips.append((start, self.height, None))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The rows [start, stop), which must not have been let go."""
        parts = []
        for first, last, strip in self._strips:
            low, high = max(first, start), min(last, stop)
            if low < high:
                parts.append(self._read(low, high) if strip is None else strip[:, :, low - first : high - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def drop(self, until: int) -> None:
        """Lets go of the strips that end above the row `until`."""
        while self._strips and self._strips[0][1] <= until:
            strip = self._strips.pop(0)[2]
            if strip is not None:
                self._budget.held -= strip.numel() * strip.element_size()

    def statistics(self, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean and the variance (biased) of each group of channels, repeated for its channels, (C,) float32."""
        assert self._mean is not None and self._squares is not None
        means, squares = self._mean.view(groups, -1), self._squares.view(groups, -1)
        mean = means.mean(1, keepdim=True)
        variance = squares.mean(1, keepdim=True) / self._count + (means - mean).square().mean(1, keepdim=True)
        return mean.expand_as(means).flatten().float(), variance.expand_as(means).flatten().float()

    def _measure(self, strip: torch.Tensor) -> None:
        count = strip.shape[2] * strip.shape[3]
        if strip.device.type in ("cpu", "cuda"):  # a fiftieth of the time
            unused = strip.new_zeros(strip.shape[1], dtype=torch.float32)
            mean, variance = torch.batch_norm_update_stats(strip, unused, unused.clone(), 0.0)
        else:
            variance, mean = torch.var_mean(strip[0].float(), (1, 2), correction=0)
        # Float64 is not to be had on every device, and a few numbers cost nothing on the CPU.
        mean, squares = mean.cpu().double(), variance.cpu().double() * count
        if self._mean is None or self._squares is None:
            self._count, self._mean, self._squares = count, mean, squares
            return
        together, apart = self._count + count, mean - self._mean
        self._squares += squares + apart.square() * (self._count * count / together)
        self._mean = self._mean + apart * (count / together)
        self._count = together

    def _write(self, start: int, strip: torch.Tensor) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)
        self._row = strip[:, :, :1]
        data = strip[0].permute(1, 2, 0).contiguous().cpu()
        try:
            self._file.seek(start * self._row_bytes())
            self._file.write(data.view(torch.uint8).numpy().data)
        except OSError as error:
            raise DiptychError(
                f"the temporary folder {tempfile.gettempdir()} is too small for this picture ({error.strerror}):"
                " name another one in TMPDIR, or draw a smaller picture"
            ) from error

    def _read(self, start: int, stop: int) -> torch.Tensor:
        assert self._file is not None and self._row is not None
        data = bytearray((stop - start) * self._row_bytes())
        self._file.seek(start * self._row_bytes())
        self._file.readinto(data)  # type: ignore[attr-defined]
        rows = torch.frombuffer(data, dtype=self._row.dtype).view(1, stop - start, self.width, -1)
        return rows.permute(0, 3, 1, 2).to(self._row.device)

    def _row_bytes(self) -> int:
        assert self._row is not None
        return self._row.numel() * self._row.element_size()


class _Work:
    """The layers, each as a way from one map to the next. A map that goes in is used up."""

    def __init__(self, vae: AutoencoderKL, cancel: Cancel | None, budget: int | None) -> None:
        self._cancel = cancel
        weight = next(vae.parameters())
        self._budget = _Budget(weight.device, budget)
        self._device, self._dtype = weight.device, weight.dtype
        self._bytes = _STRIP_BYTES.get(weight.device.type, _STRIP_BYTES_ELSEWHERE)

    def whole(self, sample: torch.Tensor, block: UpDecoderBlock2D, channels: int) -> torch.Tensor | None:
        """What `block` makes of all rows at once; None if that is too much."""
        size = sample[0, 0].numel() * channels * self._dtype.itemsize * (4 if block.upsamplers else 1)
        return None if size > _WHOLE_BYTES else _if_it_fits(block, sample)

    def map_of(self, tensor: torch.Tensor) -> _Map:
        """A map of all rows of `tensor`."""
        features = _Map(self._budget)
        features.append(tensor)
        return features

    def picture(self, source: Source, conv: torch.nn.Conv2d) -> _Map:
        """The convolution of a picture, 0..1, that is taken to -1..1 before."""

        def strip(start: int, stop: int) -> torch.Tensor:
            rows = span(start, stop, source.height, conv.padding[0])  # type: ignore[arg-type]
            read = source.rows(rows.read_start, rows.read_stop).to(self._device)
            made = conv((read * 2 - 1).to(self._dtype))
            return made[:, :, start - rows.read_start : stop - rows.read_start]

        features = _Map(self._budget)
        for made in self._strips(source.height, source.width * conv.out_channels, strip):
            features.append(made)
        return features

    def resnet(self, features: _Map, block: ResnetBlock2D) -> _Map:
        """Two convolutions, and the way around them."""
        hidden = _Map(self._budget)
        shortcut = features if block.conv_shortcut is None else _Map(self._budget)
        norm = self.normalise(features, block.norm1, block.nonlinearity)
        for made in self.convolve(features, norm, block.conv1, keep=True):
            hidden.append(made)
            if block.conv_shortcut is not None:
                done = hidden.height
                shortcut.append(block.conv_shortcut(features.rows(shortcut.height, done)))
                features.drop(done - 1)
        norm = self.normalise(hidden, block.norm2, block.nonlinearity)
        out = _Map(self._budget)
        for made in self.convolve(hidden, norm, block.conv2):
            around = shortcut.rows(out.height, out.height + made.shape[2])
            out.append((around + made) / block.output_scale_factor)
            shortcut.drop(out.height)
        return out

    def upsample(self, features: _Map, layer: Upsample2D) -> _Map:
        """Twice the size: the enlarged rows exist only for the strip that is convolved."""

        def strip(start: int, stop: int) -> torch.Tensor:
            rows = span(start, stop, features.height, 1)
            made = layer(features.rows(rows.read_start, rows.read_stop))
            return made[:, :, 2 * (start - rows.read_start) : 2 * (stop - rows.read_start)]

        out = _Map(self._budget)
        for made in self._strips(features.height, 4 * features.width * layer.out_channels, strip):
            out.append(made)
            features.drop(out.height // 2 - 1)
        return out

    def downsample(self, features: _Map, layer: Downsample2D) -> _Map:
        """Half the size."""

        def strip(start: int, stop: int) -> torch.Tensor:
            # The layer adds a row of zeros at the bottom, which inside of the picture nothing reads.
            return layer(features.rows(2 * start, min(2 * stop + 1, features.height)))

        out = _Map(self._budget)
        for made in self._strips(features.height // 2, 2 * features.width * layer.channels, strip):
            out.append(made)
            features.drop(2 * out.height)
        return out

    def normalise(
        self, features: _Map, norm: torch.nn.GroupNorm, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The normalisation by the statistics of the whole map, and what follows it, for rows of it."""
        mean, variance = (value.to(self._device) for value in features.statistics(norm.num_groups))
        weight, bias = norm.weight.float(), norm.bias.float()

        def run(rows: torch.Tensor) -> torch.Tensor:
            return activation(functional.batch_norm(rows, mean, variance, weight, bias, eps=norm.eps))

        return run

    def convolve(
        self,
        features: _Map,
        before: Callable[[torch.Tensor], torch.Tensor],
        conv: torch.nn.Conv2d,
        keep: bool = False,
    ) -> Iterator[torch.Tensor]:
        """The strips of conv(before(features)); the map is let go of meanwhile, but for `keep`."""

        def strip(start: int, stop: int) -> torch.Tensor:
            rows = span(start, stop, features.height, conv.padding[0])  # type: ignore[arg-type]
            made = conv(before(features.rows(rows.read_start, rows.read_stop)))
            return made[:, :, start - rows.read_start : stop - rows.read_start]

        done = 0
        for made in self._strips(features.height, features.width * conv.in_channels, strip):
            yield made
            done += made.shape[2]
            if not keep:
                features.drop(done - conv.padding[0])  # type: ignore[operator]

    def _strips(self, height: int, row: int, compute: Callable[[int, int], torch.Tensor]) -> Iterator[torch.Tensor]:
        """`compute(start, stop)` for all rows from top to bottom; in thinner strips once memory runs out.

        row: numbers in one row, by which the thickness of strips is chosen.
        """
        start = 0
        while start < height:
            if self._cancel is not None and self._cancel.is_set():
                raise Cancelled("the picture was stopped before it was complete")
            count = min(max(self._bytes // (row * self._dtype.itemsize), 1), height - start)
            made = _if_it_fits(compute, start, start + count)
            if made is None:
                if count == 1:
                    raise OutOfMemory(
                        f"{self._device} ran out of memory even for one row of the picture: close other programs, or"
                        " draw a smaller picture"
                    )
                # Thinner strips, and no more in memory than now: what is made from here on goes to the file.
                self._bytes = count // 2 * row * self._dtype.itemsize
                self._budget.limit = self._budget.held
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            start += count
            yield made


def _if_it_fits(compute: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor | None:
    """None if memory ran out. Alone, because the traceback of the error keeps its tensors alive."""
    try:
        return compute(*arguments)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
