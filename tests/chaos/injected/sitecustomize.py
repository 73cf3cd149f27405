"""Put on PYTHONPATH by the chaos harness, so that every Python process of a trial starts on the disk it was given."""

from tests.chaos import faulty_disk

faulty_disk.install()
