"""The settings of an alignment: what is refused, and that the resolved file reads back."""

from __future__ import annotations

from pathlib import Path

import pytest

from terselm.config import dump_config, load_config
from terselm.errors import ConfigError
from terselm.train.settings import AlignSettings, LossOn, Template


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"optimisation\.learning_rat.*did you mean optimisation\.learning_rate\?"):
        load_config(AlignSettings, None, ["optimisation.learning_rat=1e-4"])


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="response, all"):
        load_config(AlignSettings, None, ["loss_on=prompt"])


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank is 0.*lora\.dropout is 1\.5"):
        load_config(AlignSettings, None, ["lora.rank=0", "lora.dropout=1.5"])


@pytest.mark.parametrize(
    "override",
    [
        "model=' '",
        "seed=-1",
        "log_every=0",
        "data.max_length=1",
        "optimisation.epochs=0",
        "optimisation.epochs=.nan",
        "optimisation.learning_rate=0",
        "optimisation.warmup=2",
        "optimisation.rows_per_step=0",
        "evaluation.held_out=0",
        "evaluation.held_out=1",
    ],
)
def test_values_out_of_range_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config(AlignSettings, None, [override])


def test_the_resolved_config_reads_back(tmp_path: Path) -> None:
    config = load_config(AlignSettings, None, ["template=alpaca", "loss_on=all", "optimisation.epochs=0.3"])
    assert (config.template, config.loss_on) == (Template.ALPACA, LossOn.ALL)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(AlignSettings, path) == config


def test_all_faults_of_a_section_are_named_at_once() -> None:
    faults = [f"optimisation.{fault}" for fault in ("epochs=0", "warmup=2", "rows_per_step=0")]
    with pytest.raises(ConfigError) as raised:
        load_config(AlignSettings, None, faults)
    assert all(f"{fault.split('=')[0]} is " in str(raised.value) for fault in faults)
