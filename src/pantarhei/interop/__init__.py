"""Recognise and open saved models: `pr.load(...)`."""

from pantarhei.interop.loading import find_checkpoint, load

__all__ = ["find_checkpoint", "load"]
