"""Run by Automatic1111 and Forge at every start when this repository is an extension of theirs.

There is nothing to install: the upscaler uses the host's own torch, numpy, Pillow and safetensors. For everything else
in this repository see README.md.
"""
