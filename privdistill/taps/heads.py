"""Which of several outputs of one size are heads, and which is the main one."""

from functools import partial

import torch
from torch import Tensor, nn

from privdistill.exceptions import ShapeMismatchError
from privdistill.step import Select, find_heads
from privdistill.taps.flow import FlowRecorder, ancestors, parents_of
from privdistill.taps.names import watched


def settle_heads(
    model: nn.Module,
    image: Tensor,
    *,
    training: bool = True,
    asked: bool = False,
    role: str = "network",
) -> Select:
    """Decide which of the equally fine tensors in a list are heads, and which is the main one.

    The main head is the one that eval mode returns, or the one that depends on most of the
    network where its class speaks of deep supervision. Beside it count those from which it goes
    on: heads of nested decoders, not those of alternative ones.

    Args:
        model: The network, uncompiled; call under `torch.no_grad()`. Its mode is left changed.
        image: Its input, `(B, C, *spatial)`.
        training: Whether the network is trained, so that its output in train mode counts.
        asked: Whether the user passed `head_weights`, so that all of them are heads.
        role: What messages call the network.

    Returns:
        Function from an output and the number of spatial axes to the heads, finest first.

    Raises:
        ShapeMismatchError: If nothing tells the main head.
    """
    alone = _paths(model.eval(), image)
    trained = _paths(model.train(), image) if training else []
    heads = max(alone, trained, key=len)
    if len(alone) == 1:
        main = [index for index, path in enumerate(heads) if path == alone[0]]
    else:
        deepest = max(map(len, heads))
        main = [index for index, path in enumerate(heads) if len(path) == deepest]
    supervised = asked or _speaks_of_deep_supervision(model)
    if len(main) != 1 or not (supervised or len(alone) == 1):
        if asked:
            return find_heads
        raise ShapeMismatchError(
            f"The {role} returns a list of {len(heads)} tensors of one size, and nothing tells "
            "which of them are logits. Pass `select_logits=` to the wrapper, for instance "
            "`lambda output: output[0]`, or `head_weights=`, one for each."
        )
    (chosen,) = main
    others = [index for index in range(len(heads)) if index != chosen]
    if not asked:
        others = [
            i for i in others if len(heads[chosen] - heads[i]) > len(heads[i] - heads[chosen])
        ]
    return partial(find_heads, equals=(chosen, *(others if supervised else ())))


def _paths(model: nn.Module, image: Tensor) -> list[frozenset[str]]:
    """The layers with weights on the way to each of the finest tensors in a list."""
    if model.training and image.shape[0] == 1:
        # Batch norm on maps of one voxel needs more than one value per channel.
        image = torch.cat((image, image))
    flow = FlowRecorder(image)
    with flow, watched(model, flow.watch):
        output = model(image)
        heads = find_heads(output, image.ndim - 2)
    fine = [head for head in heads if head.shape == heads[0].shape]
    reached = [ancestors(flow.nodes(head), parents_of) for head in fine]
    return [frozenset(i.name for i in flow.outputs if i.weighs and i.node in r) for r in reached]


def _speaks_of_deep_supervision(model: nn.Module) -> bool:
    texts = (
        text
        for module in model.modules()
        for text in (type(module).__doc__ or "", *vars(module), *dict(module.named_children()))
    )
    return any("supervis" in text.lower() for text in texts)
