"""Dummy heads: heads that fill an encoder up to a number that tensor parallelism divides.

NVLM-D 72B has 7 behind its 25 (real) ones. A channel of theirs adds nothing when its value is always zero
or when the output projection multiplies it with zeros; what its query and key are does not matter, because
the norms of queries and keys take the mean over the real channels only. So they are cut away when that
holds for every channel, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.convert.encoders.layout import Layout
from nvlm_train.convert.headers import Stored
from nvlm_train.convert.keys import Place
from nvlm_train.convert.problem import Problems, error

_PROJECTION = "attn.proj.weight"


def dummy_head_problems(
    layout: Layout, vision: VisionConfig, tensors: Mapping[str, Stored], place: Place
) -> Problems:
    """Finds dummy heads that add something. Reads their values' rows, 258 MB for NVLM-D 72B in bf16.

    Args:
        layout: with the dummy heads of the files.
        vision: the recipe's sizes.
        tensors: the files', of the layout's shapes.
        place: how messages name the directory.
    """
    width, hidden = layout.files.sizes(vision)["width"], vision.hidden_size
    if layout.fused is None or width == hidden:
        return
    # Only encoders with dummy heads need torch for their check.
    from nvlm_train.convert.weight_files import WeightFiles

    head = hidden // vision.num_heads
    with WeightFiles(tensors) as files:
        for layer in range(vision.num_layers):
            values = layout.fused.replace("{n}", str(layer))
            output = f"{values.partition('attn.')[0]}{_PROJECTION}"
            alive = files.read(values, (slice(2 * width + hidden, 3 * width),)).any(dim=1)
            if not alive.any():
                continue
            columns = files.read(output, (slice(0, hidden), slice(hidden, width)))
            adding = (alive & columns.any(dim=0)).nonzero().flatten().tolist()
            if adding:
                number = vision.num_heads + adding[0] // head
                yield error(
                    f"{place.setting}: dummy head {number} of layer {layer} is not zero: neither its "
                    f"values in {values} nor its columns in {output}; "
                    f"{place.group}.num_heads={vision.num_heads} leaves {(width - hidden) // head} over",
                    "give weights whose further heads add nothing, as NVLM-D's are, or correct "
                    f"{place.group}.num_heads",
                )
                return
