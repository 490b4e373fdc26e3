"""The adversarially trained KL autoencoder: losses, discriminator, trainer.

The network itself is diffusers' AutoencoderKL.
"""
