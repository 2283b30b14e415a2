"""Ranks on a Ray cluster: ``pip install 'fabric-lite[ray]'``, then ``from fabric_lite.ray import launch``.

launching.py    launch(): a function on every rank, and rank 0's value
__main__.py     python -m fabric_lite.ray: an unedited script on every rank
cluster.py      the cluster: connecting, asking for places, giving them back
job.py          the driver: numbers the ranks, waits for them, starts all again after a failure
signals.py      passing on to the ranks what asks the driver to leave
actor.py        a rank: the one actor that becomes it
"""

from fabric_lite.ray.launching import launch

__all__ = ["launch"]
