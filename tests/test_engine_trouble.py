"""Memory that runs out, work that is stopped, numbers that overflow, arguments that are wrong."""

import itertools
import threading

import pytest
import torch

from diptych.errors import Cancelled, ImageError, OutOfMemory
from diptych.upscalers.engine import upscale_rows, upscale_tensor
from diptych.upscalers.passes import Model
from diptych.upscalers.sources import TensorSource

FAILURES = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    MemoryError(),
]


class Failing:
    """A network that fails with `error` at the calls whose numbers are in `calls`, or for tiles above a size."""

    def __init__(self, network, error, calls=(), most=10**9):
        self.module, self.error, self.calls, self.most, self.count = network.module, error, calls, most, 0
        self.pixels = []

    def __call__(self, tile):
        self.count += 1
        self.pixels.append(tile[:, 0].numel())
        if self.count in self.calls or tile[:, 0].numel() > self.most:
            raise self.error
        with torch.no_grad():
            return self.module(tile)


def picture(height=50, width=70, batch=1):
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(0))


def run(network, compute, x, **options):
    return upscale_tensor(compute, x, scale=network.scale, halo=network.radius, **options)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__ + str(error)[:12])
def test_out_of_memory_at_any_tile_changes_nothing_in_the_result(make_srvgg, error):
    network = make_srvgg()
    expected = run(network, network.module, picture()).detach()
    for call in itertools.count(1):
        compute = Failing(network, error, calls={call})
        assert (run(network, compute, picture(), tile=32) - expected).abs().max() <= 1e-6
        if compute.count < call:
            break
    assert call > 6


def test_what_was_finished_before_memory_ran_out_is_not_computed_again(make_srvgg):
    network = make_srvgg()
    reference, compute = Failing(network, None), Failing(network, FAILURES[0], calls={4})
    run(network, reference, picture(), tile=32)
    run(network, compute, picture(), tile=32)
    assert compute.pixels[:4] == reference.pixels[:4]
    assert sum(compute.pixels[4:]) < sum(reference.pixels[3:]) * 2


def test_what_was_learned_about_memory_holds_for_the_rest_of_the_picture(make_srvgg):
    network = make_srvgg()
    compute = Failing(network, FAILURES[1], most=1500)
    expected = run(network, network.module, picture(200, 50)).detach()
    assert (run(network, compute, picture(200, 50), tile=40) - expected).abs().max() <= 1e-6
    failed = [number for number, pixels in enumerate(compute.pixels) if pixels > 1500]
    assert failed == list(range(len(failed)))


def test_a_batch_is_divided_before_a_tile(make_srvgg):
    network = make_srvgg()
    compute = Failing(network, FAILURES[0], most=3000)
    run(network, compute, picture(30, 50, batch=4))
    assert compute.pixels == [6000, 3000, 3000]


def test_tiles_that_were_to_go_together_go_alone_when_memory_does_not_suffice(make_srvgg):
    network = make_srvgg()
    compute = Failing(network, FAILURES[0], most=1500)
    expected = run(network, network.module, picture(16, 150)).detach()
    assert (run(network, compute, picture(16, 150), tile=16, batch=8) - expected).abs().max() <= 1e-6
    assert len([pixels for pixels in compute.pixels if pixels > 1500]) == 1


def test_memory_that_does_not_suffice_for_the_smallest_tile_is_an_error_of_its_own(make_srvgg):
    network = make_srvgg()
    with pytest.raises(OutOfMemory, match="cpu ran out of memory even for a tile of .* close other programs"):
        run(network, Failing(network, FAILURES[0], most=0), picture())


def test_another_failure_of_the_network_is_not_taken_for_a_lack_of_memory(make_srvgg):
    network = make_srvgg()
    with pytest.raises(RuntimeError, match="sizes of tensors"):
        run(network, Failing(network, RuntimeError("sizes of tensors must match"), calls={2}), picture(), tile=16)


def test_cancelling_stops_before_the_next_tile_wherever_it_happens(make_srvgg):
    network = make_srvgg()
    for last in range(1, 6):
        cancel, compute = threading.Event(), Failing(network, None)

        def stop(done, total, compute=compute, cancel=cancel, last=last):
            if compute.count == last:
                cancel.set()

        with pytest.raises(Cancelled):
            run(network, compute, picture(), tile=16, progress=stop, cancel=cancel, out_scale=7)
        assert compute.count == last


def rows(network, compute, x, **options):
    """All of the result, of a network that is known to run layer by layer."""
    device = torch.device("cpu")
    model = Model(compute, network.scale, network.radius, network.multiple, device, modules=network.module.modules)
    return torch.cat(list(upscale_rows(model, TensorSource(x), network.scale, **options)), 2)


@pytest.mark.parametrize("last", [1, 3])
def test_cancelling_is_heard_between_two_layers_of_a_tile(make_srvgg, last):
    network, cancel, begun = make_srvgg(), threading.Event(), []

    def layer_begins(layer, _):
        begun.append(layer)
        if len(begun) == last:
            cancel.set()

    layers = [layer for layer in network.module.modules() if not list(layer.children())]
    hooks = [layer.register_forward_pre_hook(layer_begins) for layer in layers]
    with pytest.raises(Cancelled):
        rows(network, Failing(network, None), picture(), cancel=cancel)
    for hook in hooks:
        hook.remove()
    assert len(begun) <= last + 1
    assert not any(layer._forward_pre_hooks for layer in network.module.modules())  # nothing stays behind


@pytest.mark.parametrize("call", [None, 1, 2])
def test_progress_within_a_tile_never_falls_and_ends_at_its_total(make_srvgg, call):
    network, seen = make_srvgg(), []
    compute = Failing(network, FAILURES[0], calls={call})
    out = rows(network, compute, picture(), progress=lambda *now: seen.append(now))
    assert (out - run(network, network.module, picture())).abs().max() <= 1e-6
    assert len(seen) > 2 and seen[-1] == (50 * 70, 50 * 70)
    assert all(before < after for (before, _), (after, _) in zip(seen, seen[1:], strict=False))


def test_two_threads_may_use_one_network_and_only_one_is_cancelled(make_srvgg):
    network, cancel, made = make_srvgg(), threading.Event(), []
    x = picture(120, 120)
    expected = rows(network, Failing(network, None), x)
    cancel.set()

    def other():
        for _ in range(5):
            made.append(rows(network, Failing(network, None), x, tile=16))

    thread = threading.Thread(target=other)
    thread.start()
    while thread.is_alive():
        with pytest.raises(Cancelled):
            rows(network, Failing(network, None), x, cancel=cancel)
    thread.join()
    assert len(made) == 5 and all((one - expected).abs().max() <= 1e-6 for one in made)


@pytest.mark.parametrize("options", [{}, {"out_scale": 9}, {"border": "wrap", "out_scale": 5}, {"tile": 16}])
def test_progress_rises_to_exactly_its_total(make_srvgg, options):
    network, seen = make_srvgg(), []
    run(network, network.module, picture(batch=2), progress=lambda *now: seen.append(now), **options)
    totals = {total for _, total in seen}
    assert len(totals) == 1 and seen[-1][0] == seen[-1][1]
    assert all(before < after for (before, _), (after, _) in zip(seen, seen[1:], strict=False))


def test_a_tile_that_overflows_is_computed_again_in_wider_precision(make_srvgg):
    network = make_srvgg()
    expected = run(network, network.module, picture()).detach()
    wide = []

    def compute(tile):
        with torch.no_grad():
            out = network.module(tile)
        return out if wide else out * torch.where(tile.mean() > 0.5, torch.inf, 1.0)

    def widen():
        wide.append(True)
        return len(wide) == 1

    model = Model(compute, network.scale, network.radius, on_overflow=widen)
    out = torch.cat(list(upscale_rows(model, TensorSource(picture()), 4, tile=16)), 2)
    assert (out - expected).abs().max() <= 1e-6 and len(wide) == 1


def test_a_network_that_gives_nan_in_full_precision_is_an_error_not_a_picture(make_srvgg):
    network = make_srvgg()
    with pytest.raises(ImageError, match="NaN or infinity"):
        run(network, lambda tile: network.module(tile).detach() * torch.nan, picture())


def test_a_network_that_makes_another_size_than_it_says_is_refused(make_srvgg):
    network = make_srvgg(upscale=2)
    with pytest.raises(ImageError, match="where a scale of 4 makes"):
        upscale_tensor(network.module, picture(), scale=4, halo=4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"out_scale": 0}, "scale must lie between 0.1 and 32, not 0"),
        ({"out_scale": 33}, "not 33"),
        ({"out_scale": float("nan")}, "not nan"),
        ({"tile": 0}, "tile must be auto or a positive number of pixels, not 0"),
        ({"tile": "big"}, "not 'big'"),
        ({"tile": True}, "not True"),
        ({"batch": 0}, "batch must be a positive number of tiles, not 0"),
        ({"border": "mirror"}, "border must be one of"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(make_srvgg, options, sentence):
    network = make_srvgg()
    compute = Failing(network, None)
    with pytest.raises(ValueError, match=sentence):
        run(network, compute, picture(), **options)
    assert compute.count == 0
