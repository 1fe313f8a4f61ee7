"""Frozen backbones that give tokens: timm, open_clip, Hugging Face, and the towers inside vision-language models."""

from vlattn.probing.backbones.base import Backbone as Backbone
from vlattn.probing.backbones.load import load_backbone as load_backbone

__all__ = ["Backbone", "load_backbone"]
