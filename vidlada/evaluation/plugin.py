"""The entry point lmms-eval finds (group `lmms_eval.models`)."""

from typing import Any

PUBLISHED_NAME = "llava_llada_video"  # of the model in the published harness


def manifests() -> list[Any]:
    """The model `vidlada`, also under its published name. Tasks that compare likelihoods need `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="vidlada",
            chat_class_path="vidlada.evaluation.lmms.VidLaDAChat",
            simple_class_path="vidlada.evaluation.lmms.VidLaDASimple",
            aliases=(PUBLISHED_NAME,),
        )
    ]
