"""A Slurm cluster and two hosts, for as long as the tests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clusters import namespaces
from tests.clusters import slurm as slurms
from tests.clusters.namespaces import Hosts, two_hosts
from tests.clusters.slurm import Slurm, slurm_cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of the nodes ``n1`` and ``n2``."""
    reason = slurms.missing()
    if reason is not None:
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts that reach each other by one link, and nobody else."""
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts() as pair:
        yield pair
