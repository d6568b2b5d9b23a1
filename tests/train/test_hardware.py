"""Number format and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from terselm.train.hardware import pick_precision, quieten_libraries
from terselm.train.provenance import describe_hardware, describe_versions
from terselm.train.settings import Precision

THREADS = "import torch; from terselm.train.hardware import share_out_cores as f; f(); print(torch.get_num_threads())"


@pytest.mark.parametrize(("asked", "picked"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_what_is_asked_is_picked(asked: str, picked: torch.dtype) -> None:
    assert pick_precision(Precision(asked), torch.device("cpu")) == picked


def test_auto_is_one_of_both() -> None:
    assert pick_precision(Precision.AUTO, torch.device("cpu")) in (torch.float32, torch.bfloat16)


def threads(**environment: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "OMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, env={**kept, **environment}, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="threads are left alone where there is a GPU")
def test_a_launched_process_uses_every_core() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads(OMP_NUM_THREADS="1", ACCELERATE_MIXED_PRECISION="no") == cores
    assert threads(OMP_NUM_THREADS="1", ACCELERATE_MIXED_PRECISION="no", LOCAL_WORLD_SIZE=str(cores)) == 1
    assert threads(OMP_NUM_THREADS="1") == 1


def test_versions_and_hardware_are_named() -> None:
    assert {"python", "torch", "transformers", "peft", "accelerate"} <= describe_versions().keys()
    assert describe_hardware()["cpu"]


def test_only_what_libraries_do_among_themselves_is_hidden() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quieten_libraries()
        for module in ("transformers.modeling_utils", "terselm.train.trainer"):
            warnings.warn_explicit("is deprecated", FutureWarning, "file.py", 1, module=module)
            warnings.warn_explicit(f"{module} calls something deprecated", FutureWarning, "file.py", 1, module=module)
    assert [str(one.message) for one in caught] == [
        "is deprecated",
        "terselm.train.trainer calls something deprecated",
    ]
