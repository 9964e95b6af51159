"""Run exported Stable Diffusion bundles with numpy, pillow and one engine library; torch is never imported."""
