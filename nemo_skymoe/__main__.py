"""`python -m nemo_skymoe` is `skymoe`."""

from nemo_skymoe.cli import main

main()
