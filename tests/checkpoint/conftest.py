"""Code that travels with a checkpoint is copied where a run of the tests ends."""

import pytest


@pytest.fixture(scope="session")
def remote_code(tmp_path_factory: pytest.TempPathFactory):
    """Where transformers keeps its copies of modeling files: a folder of this run, not the user's cache."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("transformers_modules"))
        )
        yield
