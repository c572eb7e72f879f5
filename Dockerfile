# nemo_skymoe in one of NVIDIA's containers: docker build --build-arg NEMO=26.08 --tag skymoe .
# Those to 26.02 have NeMo, those from 26.04 Megatron-Bridge. Which ones work: slurm/README.md. None of them was run here.
ARG NEMO=25.11
FROM nvcr.io/nvidia/nemo:${NEMO}

# Newer images keep their Python here, and pyxis would find the system's first.
ENV PATH=/opt/venv/bin:${PATH}

COPY . /opt/nemo_skymoe
# The container's torch, Megatron-Core, and NeMo or Megatron-Bridge stay as they are.
RUN python -m pip install --no-cache-dir --no-deps /opt/nemo_skymoe && skymoe doctor
