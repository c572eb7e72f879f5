"""Fit the cost model's two constants to the published Skywork-13B run: python benchmarks/fit_cost_model.py"""

import argparse

from nemo_skymoe.pipeline.efficiency import Efficiency
from nemo_skymoe.pipeline.fit import SKYWORK_13B_RUN, fit_efficiency, predict


def main() -> None:
    """Print what is fitted, and beside it what the package holds."""
    fitted, packaged = fit_efficiency(), Efficiency()
    speed, memory = predict(SKYWORK_13B_RUN, fitted)
    print("Skywork-13B, 512 A800-80G, DP256 PP2, ZeRO-1, sequence 4096, micro-batch 1, global batch 4096")
    print(
        f"published  {SKYWORK_13B_RUN.tokens_per_gpu_per_second:.1f} tokens/GPU/s  {SKYWORK_13B_RUN.memory / 1e9:.2f} GB"
    )
    print(f"model      {speed:.1f} tokens/GPU/s  {memory / 1e9:.2f} GB")
    print(f"fitted     compute {fitted.compute:.4f}  memory_overhead {fitted.memory_overhead / 1e9:.3f} GB")
    print(
        f"packaged   compute {packaged.compute:.4f}  memory_overhead {packaged.memory_overhead / 1e9:.3f} GB"
    )


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
