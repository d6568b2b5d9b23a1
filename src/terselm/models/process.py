"""Which of the processes of a launch this one is.

``accelerate launch``, ``torchrun`` and most schedulers say so in the environment. The processes of a bulk run need
nothing else of each other than a folder that all of them see.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from terselm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process among its peers.

    Attributes:
        index: from 0, over all machines.
        count: of processes, over all machines.
        local_index: from 0, on this machine.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0

    def claim_device(self, asked: str) -> str:
        """The torch device of this process, made current: of several processes on a machine, each has its own GPU.

        Args:
            asked: as in `load_causal_lm`; a device with a number is left alone.
        """
        import torch

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if self.count == 1 or accelerator is None or asked not in ("auto", accelerator.type):
            return asked
        number = self.local_index % torch.accelerator.device_count()
        torch.accelerator.set_device_index(number)
        return f"{accelerator.type}:{number}"


def current_process(environment: Mapping[str, str] = os.environ) -> Process:
    """This process, from RANK, WORLD_SIZE and LOCAL_RANK; alone where they are not set.

    Raises:
        ConfigError: they contradict one another.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Process()
    values = {name: environment.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        process = Process(
            index=int(values["RANK"]), count=int(values["WORLD_SIZE"]), local_index=int(values["LOCAL_RANK"])
        )
    except ValueError:
        process = None
    if process is None or not (0 <= process.index < process.count and process.local_index >= 0):
        given = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ConfigError(f"the environment holds {given}; expected whole numbers with 0 <= RANK < WORLD_SIZE")
    return process
