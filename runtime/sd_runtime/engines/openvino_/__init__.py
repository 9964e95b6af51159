"""OpenVINO: on the CPU, in float32 or bfloat16."""
