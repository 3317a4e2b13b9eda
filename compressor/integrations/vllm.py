"""The door for vLLM: the entry point `vllm.general_plugins` names `register`, and vLLM calls it in every process that it starts.

It imports vLLM only then. A registration that fails is a warning, because a process that serves another model must not fail for our sake.
What is registered is in vllm_layers.py; docs/vllm.md says how to use it.
"""

import warnings


def register() -> None:
    """Make vLLM serve `table` and `sparse` folders, and pack-quantized ones in widths that it does not run; calling it again changes nothing."""
    try:
        from compressor.integrations import vllm_layers

        vllm_layers.register()
    except Exception as error:  # of a version that we do not know, or of a broken installation: whatever it raises
        warnings.warn(f"vLLM cannot serve folders of compressor in this process: {error}", RuntimeWarning, stacklevel=2)
