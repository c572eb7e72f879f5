"""The errors of the package are one family, and come out of a worker process as they were raised."""

import pickle
from pathlib import Path

from nemo_skymoe.checkpoint.untrusted.inert_pickle import NotAllowedError
from nemo_skymoe.config import ConfigurationError as OfConfig
from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError, JobError


def test_they_are_one_family() -> None:
    assert OfConfig is ConfigurationError and issubclass(ConfigurationError, ValueError)
    assert all(issubclass(kind, ConfigurationError) for kind in (CheckpointError, JobError, NotAllowedError))


def test_they_come_out_of_a_worker_as_they_were_raised() -> None:
    raised = [kind("what is wrong") for kind in (ConfigurationError, CheckpointError, JobError)]
    raised.append(NotAllowedError("os.system", Path("common.pt")))
    for error in raised:
        sent = pickle.loads(pickle.dumps(error))
        assert (type(sent), str(sent)) == (type(error), str(error))
    assert str(raised[-1]).startswith("'common.pt' refers to 'os.system', which has no place")
