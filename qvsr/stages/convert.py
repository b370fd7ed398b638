"""The official checkpoints to the weight files of the configuration."""

from __future__ import annotations

import logging
from pathlib import Path

from qvsr.config import Config, ConfigError
from qvsr.plan import official_sources

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Convert once what `official` names, to the files that `backbone.weights` and `backbone.vae_weights` name.

    Raises:
        ConfigError: `official` names no files.
        AssetError: one of them is a listed asset that is not here, or another than listed.
    """
    from qvsr.data.assets import find, read
    from qvsr.models.convert import convert

    given = config.official
    if not given.weights or not given.vae_weights:
        raise ConfigError("official.weights and official.vae_weights are not both set: name the official checkpoints, see docs/paper.md")
    listed = read()
    files = {key: find(name) if name in listed else Path(name) for key, name in official_sources(config).items()}
    convert(config.backbone, files["weights"], files["vae_weights"], files.get("text"), given.ema, given.precision, log.info)
    log.info("%s and %s are written", config.backbone.weights, config.backbone.vae_weights)
