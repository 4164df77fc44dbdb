"""Under lmms-eval: the model as a plug-in (`plugin`), and a task for a machine without network (`task`)."""

from __future__ import annotations

MODEL_ID = "twigvlm"
CLASS_PATH = f"{__name__}.plugin.LmmsTwigVLM"


def manifest():
    """What the entry point gives to lmms-eval: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=CLASS_PATH)
