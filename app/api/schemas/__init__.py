"""The JSON of the API by noun, and the plain functions that make it from the values of the core.

A client of the API takes the models of the answers that it reads from here.
"""

from app.api.schemas.disks import DiskOut
from app.api.schemas.domains import DomainOut
from app.api.schemas.jobs import JobOut

__all__ = ["DiskOut", "DomainOut", "JobOut"]
