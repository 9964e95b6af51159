"""Serving: many requests on one pipeline, sharing evaluations of the UNet (`AsyncPipeline`)."""
