"""The kinds of encoder: text to vectors, one protocol; and where the one lies that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vecsvc.errors import ConfigError

DEFAULT: Final = "default"  # as the name of an encoder; a folder of that name is ./default
DEFAULT_FOLDER: Final = Path(__file__).with_name(DEFAULT)


def default_encoder() -> Path:
    """The folder of the encoder that comes with the package. Raises ConfigError where this installation has none."""
    if not DEFAULT_FOLDER.is_dir():
        raise ConfigError(f"no default encoder in {DEFAULT_FOLDER}: reinstall vecsvc, or name one with --encoder DIR")
    return DEFAULT_FOLDER


def encoder_path(name: str) -> Path:
    """The folder that `--encoder` means: `default`, or the path itself."""
    return default_encoder() if name == DEFAULT else Path(name)
