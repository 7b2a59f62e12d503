"""Exports trained models for serving."""

from sos.export.formats import export_model
from sos.export.serving import ServingModule

__all__ = ["ServingModule", "export_model"]
