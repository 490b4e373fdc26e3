"""Two processes train one model: gradients are shared, and a stopped run goes on as if nothing had happened.

The test starts this file twice over, with torchrun.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

UPSCALER = """
batch = 1
patch = 32
warmup = 1
validation_pictures = 2
fitted = 4
[run]
folder = '{folder}'
steps = 6
log_every = 1
sample_every = 6
save_every = 2
[data]
folder = '{pictures}'
[model]
num_feat = 8
num_conv = 2
discriminator_feat = 4
[loss]
gan_from = 1
"""
KINDS = ("vae", "diffusion", "muon", "upscaler")


def test_two_processes_keep_one_model_and_resume_to_the_same_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((48, 48), Image.Resampling.BICUBIC).save(tmp_path / f"pictures/{index}.png")
        (tmp_path / f"pictures/{index}.txt").write_text(f"picture number {index}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*launch, __file__, str(tmp_path)], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("same")] == [f"same {kind}" for kind in KINDS]


def both_processes(folder: Path) -> None:
    """What each process does: every trainer whole, then stopped after step 5 of 6 and resumed."""
    import torch
    from safetensors.torch import load_file
    from test_training import DIFFUSION, MUON, VAE

    from diptych.pipelines.train import train as train_diffusion
    from diptych.training import Run
    from diptych.upscalers.train import train as train_upscaler
    from diptych.vae.train import train as train_vae

    torch.set_num_threads(1)
    texts = {
        "vae": VAE,
        "diffusion": DIFFUSION.replace("cached_pictures", "text_steps = 2\ncached_pictures"),
        "muon": MUON,
        "upscaler": UPSCALER,
    }
    trainers = {"vae": train_vae, "diffusion": train_diffusion, "muon": train_diffusion, "upscaler": train_upscaler}
    attach, steps = Run.attach, Run.steps
    attached: dict[str, torch.nn.Module] = {}

    def remember(self, **objects):
        attached.update({name: thing for name, thing in objects.items() if isinstance(thing, torch.nn.Module)})
        attach(self, **objects)

    def stopped(self):
        for step in steps(self):
            if step == 5:
                raise KeyboardInterrupt
            yield step

    Run.attach = remember
    for kind, train in trainers.items():
        results = []
        for name in ("whole", "parts"):
            config = folder / f"{kind}-{name}-{os.environ['RANK']}.toml"
            places = {"pictures": folder / "pictures", "vae": folder / "vae/whole/vae"}
            config.write_text(texts[kind].format(folder=folder / kind / name, precision="no", **places))
            if name == "parts":
                Run.steps = stopped
                try:
                    train(str(config))
                except KeyboardInterrupt:
                    Run.steps = steps
            result = train(str(config), resume=name == "parts")
            for part, module in attached.items():
                for key, value in module.state_dict().items():
                    other = value.clone()
                    torch.distributed.broadcast(other, 0)
                    assert torch.equal(value, other), f"{kind}: the processes disagree on {part}.{key}"
            torch.distributed.barrier()
            files = sorted(result.rglob("*.safetensors"))
            results.append({f"{file.name} {key}": v for file in files for key, v in load_file(file).items()})
            attached.clear()
        whole, parts = results
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole), kind
        if torch.distributed.get_rank() == 0:
            print("same", kind, flush=True)


if __name__ == "__main__":
    both_processes(Path(sys.argv[1]))
