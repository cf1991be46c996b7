"""One behavior suite for every engine; instantiated below for the NumPy reference and the host engine."""

from __future__ import annotations

from hbx_gpu._engine.host import HostEngine
from hbx_gpu._engine.reference import ReferenceEngine
from tests.engine.suite import EngineSuite


class TestReferenceEngine(EngineSuite):
    engine = ReferenceEngine


class TestHostEngine(EngineSuite):
    engine = HostEngine
