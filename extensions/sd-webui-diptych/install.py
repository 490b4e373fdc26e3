"""Run by the host at every start. There is nothing to install: Diptych uses the host's own torch, numpy and Pillow."""
