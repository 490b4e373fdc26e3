"""Diptych inside Automatic1111, Forge and Forge-classic: what the hosts see of the upscaling engine.

`networks` (which there are) and `work` (run one) do the work; `upscaler`, `extras`, `generation` and `settings` are the
hosts' forms for it. The engine itself is `diptych.upscalers` and knows no host. Nothing outside the hosts' own torch,
numpy, Pillow and safetensors is needed, and nothing is installed.
"""
