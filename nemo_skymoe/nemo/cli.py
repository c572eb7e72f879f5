"""What the `nemo` command finds through the entry-point group `nemo_run.cli`: the recipe factories."""

from nemo_skymoe.recipes import skywork_moe_tiny, skywork_tiny

__all__ = ["skywork_moe_tiny", "skywork_tiny"]
