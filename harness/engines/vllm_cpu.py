"""A vLLM plugin: NVFP4 and FP8 on vLLM's CPU backend, so that every variant loads there as it loads on a GPU.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Its CPU backend has no NVFP4
kernel, and emulates FP8 with a channel scale in minutes a batch. On any other platform the plugin does nothing.
"""


def register() -> None:
    """Called by vLLM, possibly more than once in a process."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from harness.engines.vllm_cpu_layers import CpuCompressedTensorsConfig

    register_quantization_config("compressed-tensors")(CpuCompressedTensorsConfig)
