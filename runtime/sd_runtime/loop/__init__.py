"""The denoising loop around the UNet, led by the host or staying on a device."""
