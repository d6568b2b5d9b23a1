"""The utility head: one number for a unit of a prompt, from the small LM's last state at the unit's end.

It says how much a target needs the unit for its answer, relative to the other units of the same prompt. It lies as
plain safetensors beside the weights that it was trained with; a folder without it is a checkpoint without this mode.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from terselm.errors import CheckpointError
from terselm.extras import first_line

HEAD_WEIGHTS = "utility_head.safetensors"
_FACTS = "terselm"  # key of the file's metadata: a JSON object


class UtilityHead(torch.nn.Module):
    """A linear map of last hidden states, after the final norm, to one number; float32 whatever the model is.

    Args:
        hidden_size: H, of the model.
        seed: of the first weights, normal with variance 1/H; the bias begins at zero.

    Attributes:
        weight: ``(H,)`` float32.
        bias: ``()`` float32.
        facts: what `save` noted; empty for a new head.
    """

    def __init__(self, hidden_size: int, *, seed: int = 0) -> None:
        super().__init__()
        first = torch.randn(hidden_size, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(first * hidden_size**-0.5)
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.facts: dict[str, str] = {}

    def forward(self, states: Tensor) -> Tensor:
        """``(n,)`` float32, the higher the more useful, of states ``(n, H)`` in any format.

        Not a matrix product, which autocast would take in bfloat16 and whose rounding depends on n.
        """
        return (states.float() * self.weight).sum(-1) + self.bias

    def save(self, folder: Path, facts: dict[str, str]) -> None:
        """Write it into a folder.

        Args:
            folder: of an adapter or a model.
            facts: what it belongs to and what it is for. Known are ``base``, the model that was aligned, as the run
                named it, which `load` compares, and ``target``, the model whose answers the labels are of.
        """
        from safetensors.torch import save_file

        weights = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        # One entry: safetensors writes several in a random order, and equal runs are to give equal files.
        save_file(weights, folder / HEAD_WEIGHTS, metadata={_FACTS: json.dumps(facts, sort_keys=True)})

    @classmethod
    def load(cls, folder: Path, hidden_size: int, *, base: str | None = None) -> UtilityHead:
        """Read it from a folder.

        Args:
            folder: of an adapter or a model.
            hidden_size: H of the model that it is to be used with.
            base: what that model was made from, where this is known.

        Raises:
            CheckpointError: it is not there, damaged, of another hidden size, or of another base.
        """
        path = folder / HEAD_WEIGHTS
        weights, facts = _read(path)
        if (size := len(weights["weight"])) != hidden_size:
            raise CheckpointError(
                f"{path} is for states of {size} numbers, but the model's have {hidden_size}: it is the head of "
                "another small LM; put the one that was trained with this model there, or remove it"
            )
        own = facts.get("base")
        if own and base and Path(own).name != Path(base).name:  # the folder that holds a model may have moved
            raise CheckpointError(
                f"{path} was trained with the base {own!r}, but the model here is made from {base!r}; put the head "
                "that was trained with this model there, or remove it"
            )
        head = cls(hidden_size)
        head.load_state_dict(weights)
        head.facts = facts
        return head


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights and the facts."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing: this checkpoint was not aligned for use")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            facts = dict(json.loads((file.metadata() or {}).get(_FACTS, "{}")))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); it is damaged") from None
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if set(shapes) != {"weight", "bias"} or len(shapes["weight"]) != 1 or shapes["bias"] != ():
        raise CheckpointError(f"{path} holds {shapes}; expected a weight of one dimension and a bias of none")
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise CheckpointError(f"{path} holds numbers that are not finite; train the head again")
    return weights, facts
